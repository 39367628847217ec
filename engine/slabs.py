"""
Which KV rows belong to which sequence: one contiguous run of rows, a slab, for each.

Loads no torch. A slab holds a sequence's prompt and all that it may still generate, so a sequence
that was admitted never has to give way.
"""

from bisect import insort

ROW_STEP = 16  # slabs start and end at multiples of this, as attention kernels like it
NUM_SCRATCH_ROWS = ROW_STEP  # rows 0 to 15 take what nobody will read


def round_rows(num_rows: int) -> int:
    """What so many rows take: whole steps."""
    return -(-num_rows // ROW_STEP) * ROW_STEP


class SlabAllocator:
    """
    A best-fit free list over rows.

    Args:
        num_rows: rows in all, scratch included; rounded down to a multiple of ROW_STEP.
    """

    def __init__(self, num_rows: int) -> None:
        self.num_rows = num_rows // ROW_STEP * ROW_STEP
        if self.num_rows <= NUM_SCRATCH_ROWS:
            raise ValueError(f"{num_rows} rows hold no slab")
        self._free = [(NUM_SCRATCH_ROWS, self.num_rows)]  # (start, end), sorted, never adjacent
        self._end_of: dict[int, int] = {}

    @property
    def num_free_rows(self) -> int:
        return sum(end - start for start, end in self._free)

    @property
    def largest_slab(self) -> int:
        """Rows of the largest slab that could ever be given, when nothing else is held."""
        return self.num_rows - NUM_SCRATCH_ROWS

    def find(self, num_rows: int) -> int | None:
        """Take a slab of at least `num_rows` rows; its first row, or None where none fits now."""
        needed = round_rows(num_rows)
        fitting = [hole for hole in self._free if hole[1] - hole[0] >= needed]
        if not fitting:
            return None
        start, end = min(fitting, key=lambda hole: (hole[1] - hole[0], hole[0]))
        self._free.remove((start, end))
        if start + needed < end:
            insort(self._free, (start + needed, end))
        self._end_of[start] = start + needed
        return start

    def free(self, start: int) -> None:
        """
        Give a slab back.

        Raises:
            KeyError: no slab starts there, which is a bug of the caller.
        """
        self._give_back(start, self._end_of.pop(start))

    def shrink(self, start: int, num_rows: int) -> None:
        """
        Give back what a slab has behind its first `num_rows` rows.

        Raises:
            KeyError: no slab starts there, which is a bug of the caller.
        """
        end, kept = self._end_of[start], start + round_rows(num_rows)
        if kept < end:
            self._end_of[start] = kept
            self._give_back(kept, end)

    def _give_back(self, start: int, end: int) -> None:
        for hole in list(self._free):
            if hole[1] == start:
                start = hole[0]
                self._free.remove(hole)
            elif hole[0] == end:
                end = hole[1]
                self._free.remove(hole)
        insort(self._free, (start, end))
