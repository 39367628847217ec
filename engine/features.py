"""
Encoded pictures that are kept: a picture that many prompts ask about is encoded once.

Known by what they are and how they were cut, never by a name that a caller gave. Bounded in bytes;
who was not asked for longest goes first.
"""

from collections import OrderedDict

from torch import Tensor


class FeatureCache:
    """
    Args:
        max_bytes: of all features together; 0 keeps nothing.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._kept: OrderedDict[bytes, Tensor] = OrderedDict()

    def find(self, key: bytes) -> Tensor | None:
        """The features of a picture, or None where they are not kept."""
        found = self._kept.get(key)
        if found is not None:
            self._kept.move_to_end(key)
        return found

    def put(self, key: bytes, features: Tensor) -> None:
        """Keep a copy: what is given is often a part of something larger."""
        num_bytes = features.numel() * features.element_size()
        if num_bytes > self.max_bytes or key in self._kept:
            return
        while self.num_bytes + num_bytes > self.max_bytes:
            _, oldest = self._kept.popitem(last=False)
            self.num_bytes -= oldest.numel() * oldest.element_size()
        self._kept[key] = features.clone()
        self.num_bytes += num_bytes

    def clear(self) -> None:
        self._kept.clear()
        self.num_bytes = 0
