"""
KV rows as they lie in memory: in the model's own type, or in fp8, which is half as large.

Of fp8 only its e4m3 form is kept, without a scale: three bits behind the first one, whatever a
number's size, and 448 at most. Torch copies and indexes few tensors of that type, so that their
bytes are moved here.

Axes of rows: (num_rows, kv_heads, dim).
"""

import torch
from torch import Tensor

from engine.kernels.quantised import FP8, MOST


def can_hold_fp8(device: torch.device) -> bool:
    """Whether kernels read and write such rows: on Ada, Hopper or later, and on any CPU."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 9)


def store_(rows: Tensor, at: Tensor, new: Tensor) -> None:
    """
    Write rows: (T, kv_heads, dim), of any float type, to the places `at`, (T,), int64.

    What fp8 cannot hold becomes the largest that it can.
    """
    if rows.dtype == FP8:
        new = new.clamp(-MOST, MOST)  # beyond it there is only NaN
    _bytes(rows).index_copy_(0, at, _bytes(new.to(rows.dtype)))


def read(rows: Tensor, at: Tensor, dtype: torch.dtype) -> Tensor:
    """The rows of the places `at`, one behind the other, as `dtype`."""
    return _bytes(rows)[at].view(rows.dtype).to(dtype)


def copy_(rows: Tensor, sources: Tensor, targets: Tensor) -> None:
    """Copy rows; all are read before any is written."""
    moved = _bytes(rows)
    moved.index_copy_(0, targets, moved[sources])


def _bytes(rows: Tensor) -> Tensor:
    return rows.view(torch.uint8) if rows.dtype == FP8 else rows
