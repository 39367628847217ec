"""Activations, elementwise."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.activations import QUICK_GELU
from engine.kernels.gpu import count_blocks

BLOCK = 2048


@triton.jit
def _silu_mul(x_ptr, out_ptr, width, BLOCK: tl.constexpr):
    row = tl.program_id(1).to(tl.int64)
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    gate = tl.load(x_ptr + row * 2 * width + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * 2 * width + width + columns, mask=inside, other=0.0)
    opened = (gate * tl.sigmoid(gate)).to(x_ptr.dtype.element_ty).to(tl.float32)
    out = (opened * up.to(tl.float32)).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * width + columns, out, mask=inside)


@triton.jit  # NOTE: `num` is specialised: only with a known divisor of it are loads vectors
def _quick_gelu(x_ptr, num, SLOPE: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < num
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    x = x * tl.sigmoid(SLOPE * x)
    tl.store(x_ptr + at, x.to(x_ptr.dtype.element_ty), mask=inside)


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(first half of the columns) * second half."""
    gate_up = gate_up.contiguous()
    width = gate_up.shape[-1] // 2
    out = torch.empty((*gate_up.shape[:-1], width), dtype=gate_up.dtype, device=gate_up.device)
    num_rows = out.numel() // width
    # A grid's second axis ends at 65535, so rows beyond go in another launch.
    flat_in, flat_out = gate_up.view(num_rows, -1), out.view(num_rows, -1)
    block = min(BLOCK, triton.next_power_of_2(width))
    for first in range(0, num_rows, 65_535):
        rows = slice(first, first + 65_535)
        grid = (count_blocks(width, block), len(flat_in[rows]))
        _silu_mul[grid](flat_in[rows], flat_out[rows], width, BLOCK=block, num_warps=4)
    return out


def quick_gelu_(x: Tensor) -> Tensor:
    """In place."""
    assert x.is_contiguous()
    num = x.numel()
    if num:
        _quick_gelu[(count_blocks(num, BLOCK),)](x, num, SLOPE=QUICK_GELU, BLOCK=BLOCK, num_warps=4)
    return x
