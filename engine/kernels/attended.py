"""
What attention gives, in fp8, for the product behind it.

Heads are computed apart, so the largest number of a row is known only when all of it has been written:
too late for a scale. But what a head gives is a mean of values, and a value is no larger than its weights
can make of a row that is normed. So each column has a factor of its own, found once, that the weights of
the product behind take back.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from engine.kernels import has_kernels, is_hopper
from engine.kernels.pictures import HOPPER_DIMS
from engine.kernels.quantised import FP8, MOST, STEP, Fp8Linear, Fp8Rows

# Bounds are raised by so much: rows and weights in fp8 are some 6 % off at worst, each.
SURE = 1.15
LEAST = 1e-12  # of a bound: a value may always be zero


def is_possible(out: nn.Linear, dim: int) -> bool:
    """
    Whether the product behind may read what attention among patches gives in fp8. On a GPU only where
    the kernel for the Hopper generation writes it, as it would cost a pass elsewhere.

    Args:
        out: that product. dim: of a head.
    """
    if not Fp8Linear.takes(out):
        return False
    device = out.weight.device
    if device.type == "cpu":
        return True
    takes = dim in HOPPER_DIMS and dim % STEP == 0
    return takes and is_hopper(device) and has_kernels(torch.empty(1, device=device))


def find_factors(weight: Tensor, bias: Tensor | None, norm: Any) -> Tensor:
    """
    What columns are multiplied by, so that no result is beyond the largest number of fp8.

    Args:
        weight, bias: (width, depth) and (width,) of what makes values.
        norm: LayerNorm or RMSNorm of the rows that these multiply. Before it weighs a row, the squares
            of that add up to its depth at most.

    Returns:
        (width,), float32.
    """
    exact = weight.float()
    size = (exact * norm.weight.float()).norm(dim=1) * weight.shape[1] ** 0.5
    moved = torch.zeros_like(size) if bias is None else bias.float()
    norm_bias = getattr(norm, "bias", None)
    unsure = torch.zeros_like(size)
    if norm_bias is not None:
        moved = moved + exact @ norm_bias.float()
        # Where its products cancel each other out, what fp8 takes off each of them does not.
        unsure = exact.abs() @ norm_bias.float().abs() * (SURE - 1)
    largest: Tensor = (size + moved.abs()) * SURE + unsure
    return MOST / largest.clamp(min=LEAST)


def read_by(linear: nn.Linear, factors: Tensor) -> Fp8Linear:
    """The same product of rows that are multiplied by these factors, (depth,)."""
    scaled = copy.deepcopy(linear)
    scaled.weight.data.div_(factors)
    return Fp8Linear(scaled)


def quantise(attended: Tensor, factors: Tensor) -> Fp8Rows:
    """
    Args:
        attended: (T, width), in 16 bits, or in fp8 and multiplied already.
        factors: (width,).
    """
    if attended.dtype != FP8:
        attended = (attended.float() * factors).clamp(-MOST, MOST).to(FP8)
    scales = torch.ones((len(attended), 1), dtype=torch.float32, device=attended.device)
    return Fp8Rows(attended, scales)
