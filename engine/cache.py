"""
What can be made again and is kept meanwhile: bounded in bytes, for keys that anybody may think of.

Who was not asked for longest goes first. It knows no threads: whoever shares one holds a lock.
"""

from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class Cache(Generic[Key, Value]):
    """
    Args:
        max_bytes: of all that is kept together, by the sizes that `put` is told; 0 keeps nothing.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._kept: OrderedDict[Key, tuple[Value, int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def find(self, key: Key) -> Value | None:
        """What was put under the key, or None where it is not kept."""
        found = self._kept.get(key)
        if found is None:
            return None
        self._kept.move_to_end(key)
        return found[0]

    def takes(self, key: Key, num_bytes: int) -> bool:
        """Whether `put` would change anything."""
        return num_bytes <= self.max_bytes and key not in self._kept

    def put(self, key: Key, value: Value, num_bytes: int) -> None:
        """Keep a value, unless it is too large, or one of its key is there."""
        if not self.takes(key, num_bytes):
            return
        while self.num_bytes + num_bytes > self.max_bytes:
            _, (_, num_freed) = self._kept.popitem(last=False)
            self.num_bytes -= num_freed
        self._kept[key] = value, num_bytes
        self.num_bytes += num_bytes

    def clear(self) -> None:
        self._kept.clear()
        self.num_bytes = 0
