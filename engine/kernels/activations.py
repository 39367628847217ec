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


def gelu(x: Tensor) -> Tensor:
    """
    GELU by erf. x: (..., rows, width).

    On a CPU torch gives what is contiguous to oneDNN, which compiles a kernel for each shape and keeps
    the last 1,024 of them, 28 kB each (torch 2.13, 2026-11): pictures and prompts bring as many shapes,
    and the heap that lies between them grew for ten thousands of requests. Seen with its axes
    swapped, torch's own kernel takes it, which is as fast and is one for all shapes.
    """
    return F.gelu(x.mT).mT if x.device.type == "cpu" else F.gelu(x)
