"""Rows to fp8, with the activation before: one program a row, which stays in registers."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.activations import QUICK_GELU
from engine.kernels.gpu import LOG2_E
from engine.kernels.quantised import FP8, LEAST_SCALE, MOST

COPY, SILU_MUL, GELU = range(3)
_COPY, _SILU_MUL = tl.constexpr(COPY), tl.constexpr(SILU_MUL)


@triton.jit
def _read(x_ptr, columns, width, KIND: tl.constexpr, SLOPE_LOG2: tl.constexpr):
    """Some columns of a row, activated, in float32; zero behind its end."""
    inside = columns < width
    x = tl.load(x_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    if KIND != _COPY:
        # x * sigmoid(slope * x), as one quick division: behind it numbers have 8 bits or fewer.
        x = x / (1.0 + tl.exp2(x * -SLOPE_LOG2))
    if KIND == _SILU_MUL:
        x *= tl.load(x_ptr + width + columns, mask=inside, other=0.0).to(tl.float32)
    return x


@triton.jit
def _quantise(
    x_ptr,
    out_ptr,
    scales_ptr,
    row_stride,
    width,
    KIND: tl.constexpr,
    SLOPE_LOG2: tl.constexpr,
    MOST: tl.constexpr,
    LEAST_SCALE: tl.constexpr,
    BLOCK: tl.constexpr,
    REST_BLOCK: tl.constexpr,
):
    """
    BLOCK columns and REST_BLOCK more, or none: powers of two, of which one alone could be almost
    twice as many as there are, and it is arithmetic that takes the time.
    """
    row = tl.program_id(0).to(tl.int64)
    from_ptr, to_ptr = x_ptr + row * row_stride, out_ptr + row * width
    columns = tl.arange(0, BLOCK)
    x = _read(from_ptr, columns, width, KIND, SLOPE_LOG2)
    largest = tl.max(tl.abs(x), axis=0)
    if REST_BLOCK > 0:
        others = BLOCK + tl.arange(0, REST_BLOCK)
        rest = _read(from_ptr, others, width, KIND, SLOPE_LOG2)
        largest = tl.maximum(largest, tl.max(tl.abs(rest), axis=0))
    scale = tl.maximum(largest / MOST, LEAST_SCALE)
    factor = tl.div_rn(1.0, scale)
    kind = out_ptr.dtype.element_ty
    # NOTE: what rounding takes a little beyond MOST is rounded back to it.
    tl.store(to_ptr + columns, (x * factor).to(kind), mask=columns < width)
    if REST_BLOCK > 0:
        tl.store(to_ptr + others, (rest * factor).to(kind), mask=others < width)
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
        block, rest = _cut(width)
        slope = QUICK_GELU if kind == GELU else 1.0
        _quantise[(num_rows,)](
            x,
            out,
            scales,
            x.shape[-1],
            width,
            KIND=kind,
            SLOPE_LOG2=slope * LOG2_E,
            MOST=MOST,
            LEAST_SCALE=LEAST_SCALE,
            BLOCK=block,
            REST_BLOCK=rest,
            num_warps=4 if block + rest <= 2048 else 8,
        )
    return out, scales


def _cut(width: int) -> tuple[int, int]:
    """A power of two, and 0 or one more, that hold so many columns with few to spare."""
    block = triton.next_power_of_2(width)
    if block == width or block <= 256:
        return block, 0
    half = block // 2
    rest = triton.next_power_of_2(width - half)
    return (half, rest) if rest < half else (block, 0)
