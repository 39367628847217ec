"""
A matrix product and the activation of what it gives; see engine/kernels/in_one.py.
"""

from functools import cache, partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.kernels import activations, in_one
from engine.kernels.timing import ask_once

Activation = Literal["quick_gelu", "gelu_tanh", "silu_mul"]


def multiply(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: Activation,
    least_rows: int = in_one.NEVER,
) -> Tensor:
    """
    Args:
        x: (..., depth), dense.
        weight: (width, depth), dense. For silu_mul its first half makes gates, the second what they
            gate.
        bias: (width,).
        least_rows: of all of x, from which our kernel does it, as `choose` says for this weight.

    Returns:
        (..., width), or (..., width / 2) for silu_mul.
    """
    if x.numel() >= least_rows * x.shape[-1]:
        return _multiply_in_one(x, weight, bias, activation)
    product = F.linear(x, weight, bias)
    if activation == "silu_mul":
        return activations.silu_mul(product)
    if activation == "quick_gelu":
        return activations.quick_gelu_(product)
    return F.gelu(product, approximate="tanh")


def _multiply_in_one(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation
) -> Tensor:
    from engine.kernels.gpu import in_one as gpu

    kind = {
        "quick_gelu": gpu.QUICK_GELU,
        "gelu_tanh": gpu.GELU_TANH,
        "silu_mul": gpu.SILU_MUL,
    }[activation]
    rows = gpu.multiply_and_activate(x.reshape(-1, x.shape[-1]).contiguous(), weight, bias, kind)
    return rows.view(*x.shape[:-1], rows.shape[1])


def choose(weight: Tensor, bias: Tensor | None, activation: Activation) -> int:
    """
    Compare the two ways, once for each device and shape.

    It takes a tenth of a second, and two where Triton has not compiled the kernel before.

    NOTE: not while a CUDA graph is captured.

    Returns:
        How many rows a call must have for our kernel to be the faster one; in_one.NEVER where it is not.
    """
    width, depth = weight.shape
    width_out = width // 2 if activation == "silu_mul" else width
    if not in_one.is_possible(weight.device, weight.dtype, width_out, depth):
        return in_one.NEVER
    return ask_once(
        _choose, weight.device, weight.dtype, activation, width, depth, bias is not None
    )


def _choose(
    device: torch.device,
    dtype: torch.dtype,
    activation: Activation,
    width: int,
    depth: int,
    has_bias: bool,
) -> int:
    name = f"activated_product activation={activation} width={width} depth={depth}"
    compare = partial(_compare, device, dtype, activation, width, depth, has_bias)
    return in_one.choose_rows(name, compare)


@cache
def _compare(
    device: torch.device,
    dtype: torch.dtype,
    activation: Activation,
    width: int,
    depth: int,
    has_bias: bool,
    rows: int,
) -> float:
    """`in_one.time_share` of so many rows."""

    def build() -> partial[Tensor]:
        weight = torch.randn((width, depth), dtype=dtype, device=device).mul_(depth**-0.5)
        bias = torch.randn(width, dtype=dtype, device=device) if has_bias else None
        x = torch.randn((rows, depth), dtype=dtype, device=device)
        return partial(multiply, x, weight, bias, activation)

    return in_one.time_share("activated_product", device, build)
