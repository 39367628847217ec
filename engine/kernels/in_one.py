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
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn

from engine.kernels import has_kernels, is_hopper
from engine.kernels.quantised import FP8, Fp8Linear, Fp8Rows, quantise
from engine.kernels.timing import chooses_by_time, time_ms
from engine.kernels.trials import left_out_if_broken, unless_memory_is_short

logger = logging.getLogger(__name__)

NEVER = sys.maxsize  # no call has so many rows
ROWS = (16_384, 8192, 2048, 512)  # of calls on which the two ways are compared, most first
BETTER = 0.985  # of the other's time: less is no reason to leave what is known
APART = 0.03  # of two results in 16 bits, to one more than their size
APART_IN_FP8 = 0.15  # of two in fp8, with scales of their own: one of its steps may be an eighth
RUN = 16  # columns side by side that a thread of our kernel has; all widths are multiples of it
EPS = 1e-6  # of norms that are part of what is timed


class Product(NamedTuple):
    """
    What decides how long a matrix product takes, but for the rows of a call.

    Attributes:
        dtype: of its weight, which is that of the rows that it multiplies.
        depth, width: columns of these rows and of what they become.
    """

    device: torch.device
    dtype: torch.dtype
    depth: int
    width: int
    has_bias: bool

    @classmethod
    def of(cls, linear: nn.Linear | Fp8Linear) -> Self:
        weight, (width, depth) = linear.weight, linear.weight.shape
        return cls(weight.device, weight.dtype, depth, width, linear.bias is not None)

    @property
    def layer_dtype(self) -> torch.dtype:
        """Of the layers around it: products in fp8 stand between those in bfloat16."""
        return torch.bfloat16 if self.dtype == FP8 else self.dtype


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
        and not any(width % RUN for width in widths)
        and has_kernels(torch.empty(1, device=device))
    )


def flatten(x: Tensor) -> Tensor:
    """(..., depth) -> (rows, depth), dense, as kernels read rows."""
    return x.reshape(-1, x.shape[-1]).contiguous()


def draw(product: Product, rows: int) -> tuple[Tensor | Fp8Rows, nn.Linear | Fp8Linear]:
    """As `draw_in_16_bits`; in fp8 with scales that are not alike, of rows and of outputs."""
    x, linear = draw_in_16_bits(product, rows)
    if product.dtype != FP8:
        return x, linear
    for part in (x, linear.weight.data):
        part.mul_(torch.rand((len(part), 1), device=product.device))
    return quantise(x), Fp8Linear(linear)


def draw_in_16_bits(product: Product, rows: int) -> tuple[Tensor, nn.Linear]:
    """(rows, depth) and a product to compare the two ways on, whose bias is large enough to be missed."""
    device, _, depth, width, has_bias = product
    dtype = product.layer_dtype
    linear = nn.Linear(depth, width, bias=has_bias, dtype=dtype, device=device)
    if has_bias:
        nn.init.normal_(linear.bias)
    return torch.randn((rows, depth), dtype=dtype, device=device), linear


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
    least_rows, shares = NEVER, []
    for rows in ROWS:
        share = unless_memory_is_short(partial(compare, rows), None)
        if share is None:
            continue
        shares.append(f"{rows}:{share:.3f}")
        if share >= BETTER:
            if share == math.inf:  # right with more rows or not, it is not to be trusted
                least_rows = NEVER
            break
        least_rows = rows
    least = None if least_rows == NEVER else least_rows
    logger.info("%s least_rows=%s time_shares=%s", name, least, ",".join(shares))
    return least_rows


def time_share(
    name: str, device: torch.device, build: Callable[[], Callable[[int], Tensor | Fp8Rows]]
) -> float:
    """
    How long our kernel takes, as a share of the other way's time; infinity where it does not work.

    Args:
        build: makes random inputs on the current device; what it gives computes them, in one if
            they have as many rows as it is told.

    Raises:
        OutOfMemoryError: so that they are compared again.
    """
    with left_out_if_broken(name, device), torch.cuda.device(device), torch.inference_mode():
        run = build()
        if not _are_near(run(0), run(NEVER)):
            raise RuntimeError("it computes nonsense")
        return time_ms(lambda: run(0)) / time_ms(lambda: run(NEVER))
    return math.inf


def _are_near(one: Tensor | Fp8Rows, other: Tensor | Fp8Rows) -> bool:
    if isinstance(one, Fp8Rows):
        assert isinstance(other, Fp8Rows)
        return torch.allclose(one.read(), other.read(), rtol=APART_IN_FP8, atol=APART_IN_FP8)
    assert isinstance(other, Tensor)
    return torch.allclose(one, other, rtol=APART, atol=APART)
