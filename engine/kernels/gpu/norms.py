"""RMSNorm and LayerNorm: one program a row, which stays in registers."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit(do_not_specialize=["eps"])
def _norm(
    x_ptr,
    delta_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    width,
    eps,
    ADDS: tl.constexpr,
    CENTRES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    at = tl.program_id(0).to(tl.int64) * width + columns
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if ADDS:
        x += tl.load(delta_ptr + at, mask=inside, other=0.0).to(tl.float32)
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
        x = x.to(out_ptr.dtype.element_ty).to(tl.float32) * weight
    tl.store(out_ptr + at, x.to(out_ptr.dtype.element_ty), mask=inside)


def norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """LayerNorm, or RMSNorm without a bias."""
    x = x.contiguous()
    out = torch.empty_like(x)
    _launch(x, out, weight, bias, out, eps, adds=False)
    return out


def add_norm_(delta: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """The norm of delta + x; delta keeps the sum."""
    assert delta.is_contiguous()
    out = torch.empty_like(delta)
    _launch(x.contiguous(), delta, weight, bias, out, eps, adds=True)
    return out


def _launch(
    x: Tensor,
    delta: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    eps: float,
    *,
    adds: bool,
) -> None:
    width = x.shape[-1]
    num_rows = x.numel() // width
    if num_rows == 0:
        return
    block = triton.next_power_of_2(width)
    _norm[(num_rows,)](
        x,
        delta,
        weight,
        weight if bias is None else bias,
        out,
        width,
        eps,
        ADDS=adds,
        CENTRES=bias is not None,
        BLOCK=block,
        num_warps=4 if block <= 2048 else 8,
    )
