"""Rows to fp8, with the activation before: one program a row, which stays in registers."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.activations import QUICK_GELU
from engine.kernels.quantised import FP8, LEAST_SCALE, MOST

COPY, SILU_MUL, GELU = range(3)


@triton.jit
def _quantise(
    x_ptr,
    out_ptr,
    scales_ptr,
    row_stride,
    width,
    KIND: tl.constexpr,
    SLOPE: tl.constexpr,
    MOST: tl.constexpr,
    LEAST_SCALE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    kind = x_ptr.dtype.element_ty
    at = x_ptr + row * row_stride + columns
    x = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    if KIND == 1:
        up = tl.load(at + width, mask=inside, other=0.0).to(tl.float32)
        x = (x * tl.sigmoid(x)).to(kind).to(tl.float32) * up
    if KIND == 2:
        x = x * tl.sigmoid(SLOPE * x)
    x = x.to(kind).to(tl.float32)  # as if it had been written
    scale = tl.maximum(tl.max(tl.abs(x), axis=0) / MOST, LEAST_SCALE)
    x = tl.minimum(tl.maximum(x / scale, -MOST), MOST)
    tl.store(out_ptr + row * width + columns, x.to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(scales_ptr + row, scale)


def quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    """Values and scales of a tensor as it is."""
    return _launch(x, x.shape[-1], COPY)


def silu_mul(gate_up: Tensor) -> tuple[Tensor, Tensor]:
    """Of silu(first half of the columns) * second half."""
    return _launch(gate_up, gate_up.shape[-1] // 2, SILU_MUL)


def quick_gelu(x: Tensor) -> tuple[Tensor, Tensor]:
    """Of x * sigmoid(1.702 * x)."""
    return _launch(x, x.shape[-1], GELU)


def _launch(x: Tensor, width: int, kind: int) -> tuple[Tensor, Tensor]:
    x = x.contiguous()
    out = torch.empty((*x.shape[:-1], width), dtype=FP8, device=x.device)
    num_rows = out.numel() // width
    scales = torch.empty((num_rows, 1), dtype=torch.float32, device=x.device)
    if num_rows:
        block = triton.next_power_of_2(width)
        _quantise[(num_rows,)](
            x,
            out,
            scales,
            x.shape[-1],
            width,
            KIND=kind,
            SLOPE=QUICK_GELU,
            MOST=MOST,
            LEAST_SCALE=LEAST_SCALE,
            BLOCK=block,
            num_warps=4 if block <= 2048 else 8 if block <= 8192 else 16,
        )
    return out, scales
