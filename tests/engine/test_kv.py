"""Rows that nobody has written take no memory."""

import sys
from pathlib import Path

import pytest
import torch

from engine.kv import KVLayer, KVRows, KVShape

PAGE_BYTES = 4096


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_BYTES


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_a_long_context_cost_what_is_written(dtype: torch.dtype) -> None:
    shape = KVShape((KVLayer(2, 64),) * 4, dtype)
    num_rows = (1 << 30) // shape.row_bytes
    before = resident_bytes()
    rows = KVRows(shape, num_rows, torch.device("cpu"))
    rows.keys[3][-5:] = 1

    assert resident_bytes() - before < 64 << 20
    assert (num_rows, 2, 64) == rows.keys[0].shape == rows.values[3].shape
    assert dtype == rows.values[0].dtype
    assert 5 * 2 * 64 == rows.keys[3][-9:].sum()
