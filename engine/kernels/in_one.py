"""
From how many rows on a matrix product of ours, which goes on with its sums before it writes them, is
faster than the vendor's product and a kernel behind it.

Apart, the second of them reads and writes all that the first has written. In one is only for GPUs of the
Hopper generation, and which is faster depends on the shape, so both are timed: with few rows the
vendor's is. Sums are gone on with as they are, in float32, so that a result is rounded once; apart, it
is rounded twice.
"""

import logging
import math
import sys
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn

from engine.kernels import has_kernels, is_hopper
from engine.kernels.quantised import FP8, Fp8Linear, Fp8Rows, quantise
from engine.kernels.timing import chooses_by_time, time_ms
from engine.kernels.trials import left_out_if_broken, unless_memory_is_short

logger = logging.getLogger(__name__)

T = TypeVar("T")

NEVER = sys.maxsize  # no call has so many rows
ROWS = (8192, 2048, 512)  # of calls on which the two ways are compared, most first
BETTER = 0.97  # of the other's time: less is no reason to leave what is known
APART = 0.03  # of two results in 16 bits, to one more than their size
APART_IN_FP8 = 0.15  # of two in fp8, with scales of their own: one of its steps may be an eighth
ALIGNMENT = 16  # bytes at whose multiples rows begin, for the copy engine


def is_possible(device: torch.device, dtype: torch.dtype, *widths: int) -> bool:
    """
    Whether to compare at all. Where kernels are not chosen by time, ours is not used.

    Args:
        dtype: of what is multiplied.
        widths: of its rows and of those of the result.
    """
    return (
        device.type == "cuda"
        and dtype in (torch.bfloat16, torch.float16, FP8)
        and chooses_by_time()
        and is_hopper(device)
        and not any(width * dtype.itemsize % ALIGNMENT for width in widths)
        and has_kernels(torch.empty(1, device=device))
    )


def draw(
    device: torch.device, rows: int, depth: int, width: int, *, dtype: torch.dtype, has_bias: bool
) -> tuple[Tensor, nn.Linear]:
    """Rows and a product to compare the two ways on, whose bias is large enough to be missed."""
    linear = nn.Linear(depth, width, bias=has_bias, dtype=dtype, device=device)
    if has_bias:
        nn.init.normal_(linear.bias)
    return torch.randn((rows, depth), dtype=dtype, device=device), linear


def draw_in_fp8(
    device: torch.device, rows: int, depth: int, width: int, *, has_bias: bool
) -> tuple[Fp8Rows, Fp8Linear]:
    """As `draw`, of rows and of outputs whose scales are not alike."""
    x, linear = draw(device, rows, depth, width, dtype=torch.bfloat16, has_bias=has_bias)
    for part in (x, linear.weight.data):
        part.mul_(torch.rand((len(part), 1), device=device))
    return quantise(x), Fp8Linear(linear)


def choose_rows(name: str, compare: Callable[[int], float]) -> int:
    """
    Compare the two ways on fewer and fewer rows, and say in the log what came of it.

    NOTE: not while a CUDA graph is captured.

    Args:
        name: of the product, with its shape.
        compare: `time_share` of so many rows, or an OutOfMemoryError.

    Returns:
        How many rows a call must have for ours to be the faster one; NEVER where it is not.
    """
    least_rows = NEVER
    for rows in ROWS:
        share = unless_memory_is_short(partial(compare, rows), None)
        if share is None:
            continue
        if share >= BETTER:
            if share == math.inf:  # right with more rows or not, it is not to be trusted
                least_rows = NEVER
            break
        least_rows = rows
    logger.info("%s least_rows=%s", name, None if least_rows == NEVER else least_rows)
    return least_rows


def time_share(
    name: str,
    device: torch.device,
    build: Callable[[], Callable[[int], T]],
    read: Callable[[T], Tensor],
    apart: float = APART,
) -> float:
    """
    How long our kernel takes, as a share of the other way's time; infinity where it does not work.

    Args:
        build: makes random inputs on the current device; what it gives computes them, in one if
            they have as many rows as it is told.
        read: the numbers of a result.
        apart: how far two of them may be, to one more than their size.

    Raises:
        OutOfMemoryError: so that they are compared again.
    """
    with left_out_if_broken(name, device), torch.cuda.device(device), torch.inference_mode():
        run = build()
        if not torch.allclose(read(run(0)), read(run(NEVER)), rtol=apart, atol=apart):
            raise RuntimeError("it computes nonsense")
        return time_ms(lambda: run(0)) / time_ms(lambda: run(NEVER))
    return math.inf
