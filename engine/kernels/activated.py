"""
A matrix product and the activation of what it gives.

Apart, the second of them reads and writes all that the first has written. For GPUs of the Hopper
generation there is a kernel that does both; whether it is faster than the vendor's product and a
kernel behind it depends on the shape, so both are timed. With few rows the vendor's is. Sums are
activated as they are, in float32, so that a result is rounded once; apart, it is rounded twice.
"""

import logging
import math
import sys
from functools import cache, partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.kernels import activations, has_kernels, is_hopper
from engine.kernels.timing import ask_once, chooses_by_time, time_ms
from engine.kernels.trials import left_out_if_broken, unless_memory_is_short

logger = logging.getLogger(__name__)

Activation = Literal["quick_gelu", "gelu_tanh", "silu_mul"]

NEVER = sys.maxsize  # no call has so many rows
ROWS = (8192, 2048, 512)  # of calls on which the two ways are compared, most first
BETTER = 0.97  # of the other's time: less is no reason to leave what is known
APART = 0.03  # of two results in 16 bits, to one more than their size
ALIGNMENT = 8  # numbers of 16 bits at whose multiples rows begin, for the copy engine


def multiply(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: Activation,
    least_rows: int = NEVER,
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
    from engine.kernels.gpu import activated

    kind = {
        "quick_gelu": activated.QUICK_GELU,
        "gelu_tanh": activated.GELU_TANH,
        "silu_mul": activated.SILU_MUL,
    }[activation]
    rows = activated.multiply(x.reshape(-1, x.shape[-1]).contiguous(), weight, bias, kind)
    return rows.view(*x.shape[:-1], rows.shape[1])


def choose(weight: Tensor, bias: Tensor | None, activation: Activation) -> int:
    """
    Compare the two ways, once for each device and shape, and say in the log what came of it.

    It takes a tenth of a second, and two where Triton has not compiled the kernel before. Where
    kernels are not chosen by time, ours is not used.

    NOTE: not while a CUDA graph is captured.

    Returns:
        How many rows a call must have for our kernel to be the faster one; NEVER where it is not.
    """
    device, dtype = weight.device, weight.dtype
    width, depth = weight.shape
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return NEVER
    if not chooses_by_time():
        return NEVER
    width_out = width // 2 if activation == "silu_mul" else width
    if not is_hopper(device) or width_out % ALIGNMENT or depth % ALIGNMENT:
        return NEVER
    if not has_kernels(torch.empty(1, device=device)):
        return NEVER
    return ask_once(_choose, device, dtype, activation, width, depth, bias is not None)


def _choose(
    device: torch.device,
    dtype: torch.dtype,
    activation: Activation,
    width: int,
    depth: int,
    has_bias: bool,
) -> int:
    """`choose`, of what there is memory to compare."""
    least_rows = NEVER
    for rows in ROWS:
        share = unless_memory_is_short(
            partial(_compare, device, dtype, activation, width, depth, has_bias, rows), None
        )
        if share is None:
            continue
        if share >= BETTER:
            if share == math.inf:  # right with more rows or not, it is not to be trusted
                least_rows = NEVER
            break
        least_rows = rows
    logger.info(
        "activated_product activation=%s width=%s depth=%s least_rows=%s",
        activation,
        width,
        depth,
        None if least_rows == NEVER else least_rows,
    )
    return least_rows


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
    """
    How long our kernel takes, as a share of the other way's time; infinity where it does not work.

    Raises:
        OutOfMemoryError: so that they are compared again.
    """
    trial = left_out_if_broken("activated_product", device)
    with trial, torch.cuda.device(device), torch.inference_mode():
        weight = torch.randn((width, depth), dtype=dtype, device=device).mul_(depth**-0.5)
        bias = torch.randn(width, dtype=dtype, device=device) if has_bias else None
        x = torch.randn((rows, depth), dtype=dtype, device=device)
        return _time(x, weight, bias, activation)
    return math.inf


def _time(x: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation) -> float:
    """
    Raises:
        RuntimeError: the kernel computes nonsense.
    """

    def run(least_rows: int) -> Tensor:
        return multiply(x, weight, bias, activation, least_rows)

    if not torch.allclose(run(0), run(NEVER), rtol=APART, atol=APART):
        raise RuntimeError(f"{activation} of {len(x)} rows comes out as nonsense")
    return time_ms(lambda: run(0)) / time_ms(lambda: run(NEVER))
