"""What stands between the two matrix products of an MLP. Axes: leading ones, then width."""

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.kernels import has_kernels

QUICK_GELU = 1.702


def silu_mul(gate_up: Tensor) -> Tensor:
    """(..., 2 * width), gates before what they gate -> (..., width): silu(gate) * up."""
    if has_kernels(gate_up):
        from engine.kernels.gpu import activations

        return activations.silu_mul(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def quick_gelu_(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 * x), written over `x`, which is returned."""
    if has_kernels(x):
        from engine.kernels.gpu import activations

        return activations.quick_gelu_(x)
    return x.mul_(torch.sigmoid(QUICK_GELU * x))
