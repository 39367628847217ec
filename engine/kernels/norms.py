"""
RMSNorm and LayerNorm, alone or with the addition that stands before them.

Axes: any number of leading ones, then width. Sums are float32 whatever the inputs are.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.kernels import has_kernels


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """(..., width) -> (..., width), as transformers' text models have it: rounded, then weighted."""
    if has_kernels(x):
        from engine.kernels.gpu import norms

        return norms.norm(x, weight, None, eps)
    exact = x.float()
    exact = exact * torch.rsqrt(exact.pow(2).mean(-1, keepdim=True) + eps)
    return exact.to(x.dtype).mul_(weight)


def add_rms_norm_(delta: Tensor, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Add `x` to `delta`, which keeps the sum, and return the sum's RMSNorm."""
    if has_kernels(x):
        from engine.kernels.gpu import norms

        return norms.add_norm_(delta, x, weight, None, eps)
    return rms_norm(delta.add_(x), weight, eps)


def add_parts(parts: Tensor, x: Tensor) -> Tensor:
    """The sum of `x`, (..., width), and of all parts, (parts, rows, width) in float32; as x."""
    return (x.float() + parts.sum(0).view(x.shape)).to(x.dtype)


def add_parts_rms_norm(
    parts: Tensor, x: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """
    `add_parts`, and the sum's RMSNorm.

    Returns:
        Two of (..., width), as x.
    """
    if has_kernels(x):
        from engine.kernels.gpu import norms

        return norms.add_parts_norm(parts, x, weight, None, eps)
    total = add_parts(parts, x)
    return total, rms_norm(total, weight, eps)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """(..., width) -> (..., width)."""
    if has_kernels(x):
        from engine.kernels.gpu import norms

        return norms.norm(x, weight, bias, eps)
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def add_layer_norm_(delta: Tensor, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Add `x` to `delta`, which keeps the sum, and return the sum's LayerNorm."""
    if has_kernels(x):
        from engine.kernels.gpu import norms

        return norms.add_norm_(delta, x, weight, bias, eps)
    return layer_norm(delta.add_(x), weight, bias, eps)
