"""
Which prompts begin alike, and whose slab holds the KV rows of that beginning.

Loads no torch. A prefix is known by all that its rows follow from: token ids, positions, and what its
pictures are and how they were cut; never by a name that a caller gave. Rows that nobody needs any more
are kept in the slabs in which they were written, until those are wanted for something else: who was
not asked for longest goes first. Why so: docs/decisions/0015.
"""

import hashlib
from collections import OrderedDict, deque
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from engine.slabs import round_rows

BLOCK_TOKENS = 16

Media = Sequence[tuple[npt.NDArray[np.int64], bytes | None]]
Key = tuple[int, bytes]
"""A prefix: how many tokens it has, and what they are."""


def build_keys(
    token_ids: Sequence[int],
    positions: npt.NDArray[np.int64],
    media: Media = (),
    both_ways: Sequence[tuple[int, int]] = (),
) -> tuple[Key, ...]:
    """
    The prefixes of a prompt that others may have too: of whole blocks, and to the ends of pictures.

    Args:
        positions: (num_axes, num_tokens).
        media: for each picture or clip, in order: the places of its features, and what it is. Where
            that is not known, the prefixes end before it.
        both_ways: see `Prepared.both_ways`: no prefix ends inside.
    """
    table = np.ascontiguousarray(np.concatenate([np.array([token_ids], np.int64), positions]).T)
    pictures = deque((int(rows[0]), int(rows[-1]) + 1, key) for rows, key in media)
    ends = {*range(BLOCK_TOKENS, len(table) + 1, BLOCK_TOKENS), *(end for _, end, _ in pictures)}
    keys: list[Key] = []
    begin, before = 0, b""
    for end in sorted(ends):
        digest = hashlib.sha256(before)
        digest.update(table[begin:end].data)
        while pictures and pictures[0][1] <= begin:
            pictures.popleft()
        for first, last, key in pictures:
            if first >= end:
                break
            if key is None:
                return tuple(keys)
            digest.update(f" {first} {last} ".encode())
            digest.update(key)
        begin, before = end, digest.digest()
        if not any(first < end < last for first, last in both_ways):
            keys.append((end, before))
    return tuple(keys)


class Prefixes:
    """
    Slabs, by the keys of the prefixes that their first rows hold.

    Attributes:
        num_kept_rows: of slabs that are nobody's: those that `evict` gives.
    """

    def __init__(self) -> None:
        self._slab_of: dict[bytes, int] = {}
        # Of a slab, the keys that lead to it, each with the number of rows that it stands for. A key
        # leads to one slab, so prompts that begin as another's keep only what goes on differently.
        self._rows_of: dict[int, dict[bytes, int]] = {}
        self._kept: OrderedDict[int, int] = OrderedDict()  # slabs of nobody's, and their rows
        self.num_kept_rows = 0

    def find(self, keys: Sequence[Key]) -> tuple[int, int]:
        """The slab that holds most of a prompt's beginning, and how many rows; no row where none does."""
        for num_rows, key in reversed(keys):
            start = self._slab_of.get(key)
            if start is not None:
                if start in self._kept:
                    self._kept.move_to_end(start)
                return start, num_rows
        return 0, 0

    def add(self, start: int, keys: Sequence[Key]) -> None:
        """A slab's rows were written."""
        own = {key: num_rows for num_rows, key in keys if key not in self._slab_of}
        if own:
            self._rows_of[start] = own
            self._slab_of |= dict.fromkeys(own, start)

    def keep(self, start: int) -> int:
        """Whose slab it was needs it no more: so many of its rows are kept. 0: it is free."""
        own = self._rows_of.get(start)
        if own is None:
            return 0
        num_rows = self._kept[start] = round_rows(max(own.values()))
        self.num_kept_rows += num_rows
        return num_rows

    def evict(self) -> int | None:
        """Forget the slab that was not asked for longest, of those that are nobody's; None: there is none."""
        if not self._kept:
            return None
        start, num_rows = self._kept.popitem(last=False)
        self.num_kept_rows -= num_rows
        for key in self._rows_of.pop(start):
            del self._slab_of[key]
        return start

    def clear(self) -> list[int]:
        """Forget all, also what those that run would leave; the slabs that are free now."""
        freed = list(self._kept)
        self._kept.clear()
        self.num_kept_rows = 0
        self._slab_of.clear()
        self._rows_of.clear()
        return freed
