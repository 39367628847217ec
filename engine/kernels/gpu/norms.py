"""RMSNorm and LayerNorm: one program a row, which stays in registers."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.quantised import FP8, LEAST_SCALE, MOST


@triton.jit(do_not_specialize=["eps", "num_rows"])
def _norm(
    x_ptr,
    delta_ptr,
    parts_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    scales_ptr,
    num_rows,
    width,
    eps,
    ADDS: tl.constexpr,
    NUM_PARTS: tl.constexpr,
    CENTRES: tl.constexpr,
    QUANTISES: tl.constexpr,
    MOST: tl.constexpr,
    LEAST_SCALE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    at = row * width + columns
    kind = x_ptr.dtype.element_ty
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if ADDS:
        if NUM_PARTS == 0:
            x += tl.load(delta_ptr + at, mask=inside, other=0.0).to(tl.float32)
        for part in tl.static_range(NUM_PARTS):
            parts_at = (row + part * num_rows) * width + columns
            x += tl.load(parts_ptr + parts_at, mask=inside, other=0.0)
        total = x.to(delta_ptr.dtype.element_ty)
        tl.store(delta_ptr + at, total, mask=inside)
        x = total.to(tl.float32)  # what the next layer will add to
    if CENTRES:
        x = tl.where(inside, x - tl.sum(x, axis=0) / width, 0.0)
    x = x * tl.rsqrt(tl.sum(x * x, axis=0) / width + eps)
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    if CENTRES:
        bias = tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)
        x = x * weight + bias
    else:
        x = x.to(kind).to(tl.float32) * weight
    if QUANTISES:
        scale = tl.maximum(tl.max(tl.abs(x), axis=0) / MOST, LEAST_SCALE)
        x *= tl.div_rn(1.0, scale)
        tl.store(scales_ptr + row, scale)
    tl.store(out_ptr + at, x.to(out_ptr.dtype.element_ty), mask=inside)


def norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """LayerNorm, or RMSNorm without a bias."""
    x = x.contiguous()
    out = torch.empty_like(x)
    _launch(x, x, weight, bias, out, None, eps, adds=False)
    return out


def add_norm_(delta: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """The norm of delta + x; delta keeps the sum."""
    out = torch.empty_like(delta)
    _launch(x.contiguous(), delta, weight, bias, out, None, eps, adds=True)
    return out


def add_parts_norm(
    parts: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """The sum of x and of what stands in parts, (parts, rows, width), float32; and its norm."""
    x = x.contiguous()
    total, out = torch.empty_like(x), torch.empty_like(x)
    _launch(x, total, weight, bias, out, None, eps, adds=True, parts=parts)
    return total, out


def add_parts_norm_in_fp8(
    parts: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """`add_parts_norm`, the norm as values and the scales of rows."""
    x = x.contiguous()
    total, (out, scales) = torch.empty_like(x), _fp8_like(x)
    _launch(x, total, weight, bias, out, scales, eps, adds=True, parts=parts)
    return total, (out, scales)


def norm_in_fp8(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """`norm`, as values and the scales of rows."""
    x = x.contiguous()
    out, scales = _fp8_like(x)
    _launch(x, x, weight, bias, out, scales, eps, adds=False)
    return out, scales


def add_norm_in_fp8_(
    delta: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """`add_norm_`, as values and the scales of rows."""
    out, scales = _fp8_like(delta)
    _launch(x.contiguous(), delta, weight, bias, out, scales, eps, adds=True)
    return out, scales


def _fp8_like(x: Tensor) -> tuple[Tensor, Tensor]:
    num_rows = x.numel() // x.shape[-1]
    scales = torch.empty((num_rows, 1), dtype=torch.float32, device=x.device)
    return torch.empty_like(x, dtype=FP8), scales


def _launch(
    x: Tensor,
    delta: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    scales: Tensor | None,
    eps: float,
    *,
    adds: bool,
    parts: Tensor | None = None,
) -> None:
    assert delta.is_contiguous()
    assert x.shape == delta.shape
    width = x.shape[-1]
    num_rows = x.numel() // width
    if num_rows == 0:
        return
    block = triton.next_power_of_2(width)
    _norm[(num_rows,)](
        x,
        delta,
        x if parts is None else parts,
        weight,
        weight if bias is None else bias,
        out,
        weight if scales is None else scales,
        num_rows,
        width,
        eps,
        ADDS=adds,
        NUM_PARTS=0 if parts is None else len(parts),
        CENTRES=bias is not None,
        QUANTISES=scales is not None,
        MOST=MOST,
        LEAST_SCALE=LEAST_SCALE,
        BLOCK=block,
        num_warps=4 if block <= 2048 else 8,
    )
