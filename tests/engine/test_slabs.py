"""Rows are handed out in runs that never overlap, and come back whole."""

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.slabs import NUM_SCRATCH_ROWS, ROW_STEP, SlabAllocator

STEPS = ("take", "take", "free", "shrink")


@given(
    num_rows=st.integers(32, 2000),
    steps=st.lists(st.tuples(st.sampled_from(STEPS), st.integers(1, 400)), max_size=80),
)
def test_slabs_never_overlap_and_all_rows_come_back(
    num_rows: int, steps: list[tuple[str, int]]
) -> None:
    slabs = SlabAllocator(num_rows)
    held: dict[int, int] = {}
    for step, number in steps:
        if step == "take":
            start = slabs.find(number)
            fits = any(gap >= number for gap in gaps(held, slabs.num_rows))
            assert fits == (start is not None)
            if start is not None:
                held[start] = number
        elif held:
            start = sorted(held)[number % len(held)]
            if step == "free":
                slabs.free(start)
                del held[start]
            else:
                held[start] = min(number, held[start])
                slabs.shrink(start, held[start])
        rows = [row for start, size in held.items() for row in range(start, start + size)]

        assert len(rows) == len(set(rows))
        assert all(NUM_SCRATCH_ROWS <= row < slabs.num_rows for row in rows)
        assert all(start % ROW_STEP == 0 for start in held)
        taken = sum(-(-size // ROW_STEP) * ROW_STEP for size in held.values())
        assert slabs.largest_slab - taken == slabs.num_free_rows
    for start in held:
        slabs.free(start)

    assert slabs.largest_slab == slabs.num_free_rows
    assert NUM_SCRATCH_ROWS == slabs.find(slabs.largest_slab)


def gaps(held: dict[int, int], num_rows: int) -> list[int]:
    """The sizes of the runs between slabs, in whole steps."""
    found, at = [], NUM_SCRATCH_ROWS
    for start in sorted(held):
        found.append(start - at)
        at = start + -(-held[start] // ROW_STEP) * ROW_STEP
    return [*found, num_rows - at]


def test_smallest_hole_that_fits_is_taken() -> None:
    slabs = SlabAllocator(16 + 10 * 16)
    starts = [slabs.find(rows) for rows in (48, 16, 32, 16, 32)]
    for index in (0, 2):
        assert starts[index] is not None
        slabs.free(starts[index] or 0)

    assert starts[2] == slabs.find(20)  # not the hole of 48 rows, nor the rest of 16 at the end
    assert starts[0] == slabs.find(40)
    assert None is slabs.find(17)


def test_row_zero_to_fifteen_are_never_handed_out() -> None:
    slabs = SlabAllocator(1000)

    assert 992 == slabs.num_rows
    assert 16 == slabs.find(1)
    assert 32 == slabs.find(16)


def test_unknown_slab_is_a_bug_of_the_caller() -> None:
    slabs = SlabAllocator(100)
    start = slabs.find(10)
    assert start is not None
    slabs.free(start)

    with pytest.raises(KeyError):
        slabs.free(start)
    with pytest.raises(KeyError):
        slabs.shrink(start, 1)
    with pytest.raises(ValueError, match="31 rows hold no slab"):
        SlabAllocator(31)


@pytest.mark.parametrize(
    "module",
    ["engine.slabs", "engine.prefixes", "engine.scheduler", "engine.inputs", "engine"],
)
def test_logic_of_rows_and_turns_loads_no_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"

    assert 0 == subprocess.run([sys.executable, "-c", code], check=False).returncode
