"""
How many bytes of media a worker holds at a time, over all its chunks.

An item is begun when there is room for all that it may bring, first come first served, so that items
never wait for each other with half of their pictures in hand; what it turns out to need less is free
at once, and the rest when the engine has answered.
"""

import threading
from collections import deque
from typing import Final

from storage.ids import ItemId

LOOK_S: Final = 0.5
"""How often one that waits looks whether its chunk is over."""


class Budget:
    """
    Args:
        max_bytes: held together; one item that alone may bring more waits until it is alone.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._waiting: deque[object] = deque()
        self._changed = threading.Condition()

    @property
    def max_bytes(self) -> int:
        return self._max_bytes

    @property
    def num_bytes(self) -> int:
        """Taken now."""
        return self._num_bytes

    def try_take(self, num_bytes: int) -> bool:
        """Take so much if there is room, and nobody waits for it already."""
        with self._changed:
            if self._waiting or not self._has_room(num_bytes):
                return False
            self._num_bytes += num_bytes
            return True

    def take(self, num_bytes: int, hold: "Hold") -> bool:
        """Wait for one's turn and for room; False where `hold` was closed meanwhile."""
        turn = object()
        with self._changed:
            self._waiting.append(turn)
            try:
                while not (self._waiting[0] is turn and self._has_room(num_bytes)):
                    if hold.is_closed:
                        return False
                    self._changed.wait(LOOK_S)
                self._num_bytes += num_bytes
                return True
            finally:
                self._waiting.remove(turn)
                self._changed.notify_all()

    def give_back(self, num_bytes: int) -> None:
        with self._changed:
            self._num_bytes -= num_bytes
            self._changed.notify_all()

    def _has_room(self, num_bytes: int) -> bool:
        return self._num_bytes == 0 or self._num_bytes + num_bytes <= self._max_bytes


class Hold:
    """What one chunk has taken, by item. When the chunk is over, all of it is given back."""

    def __init__(self, budget: Budget) -> None:
        self.is_closed = False
        self._budget = budget
        self._taken: dict[ItemId, int] = {}
        self._lock = threading.Lock()

    @property
    def most_bytes(self) -> int:
        """That all chunks may hold together."""
        return self._budget.max_bytes

    def take(self, item: ItemId, num_bytes: int, *, wait: bool) -> bool:
        """Whether the item may be begun; without `wait`, whether it may be now."""
        is_taken = self._budget.take(num_bytes, self) if wait else self._budget.try_take(num_bytes)
        if is_taken:
            with self._lock:
                if not self.is_closed:
                    self._taken[item] = num_bytes
                    return True
            self._budget.give_back(num_bytes)
        return False

    def shrink(self, item: ItemId, num_bytes: int) -> None:
        """It has come, and is so large."""
        with self._lock:
            taken = self._taken.get(item)
            if taken is None:
                return
            self._taken[item] = num_bytes
        self._budget.give_back(taken - num_bytes)

    def release(self, item: ItemId) -> None:
        with self._lock:
            taken = self._taken.pop(item, 0)
        self._budget.give_back(taken)

    def close(self) -> None:
        with self._lock:
            self.is_closed = True
            taken = sum(self._taken.values())
            self._taken.clear()
        self._budget.give_back(taken)
