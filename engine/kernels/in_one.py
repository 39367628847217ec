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

import torch
from torch import Tensor

from engine.kernels import has_kernels, is_hopper
from engine.kernels.timing import chooses_by_time, time_ms
from engine.kernels.trials import left_out_if_broken, unless_memory_is_short

logger = logging.getLogger(__name__)

NEVER = sys.maxsize  # no call has so many rows
ROWS = (8192, 2048, 512)  # of calls on which the two ways are compared, most first
BETTER = 0.97  # of the other's time: less is no reason to leave what is known
APART = 0.03  # of two results in 16 bits, to one more than their size
ALIGNMENT = 8  # numbers of 16 bits at whose multiples rows begin, for the copy engine


def is_possible(device: torch.device, dtype: torch.dtype, width: int, depth: int) -> bool:
    """
    Whether to compare at all. Where kernels are not chosen by time, ours is not used.

    Args:
        width: of the result.
    """
    return (
        device.type == "cuda"
        and dtype in (torch.bfloat16, torch.float16)
        and chooses_by_time()
        and is_hopper(device)
        and width % ALIGNMENT == depth % ALIGNMENT == 0
        and has_kernels(torch.empty(1, device=device))
    )


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
    name: str, device: torch.device, build: Callable[[], Callable[[int], Tensor]]
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
        if not torch.allclose(run(0), run(NEVER), rtol=APART, atol=APART):
            raise RuntimeError("it computes nonsense")
        return time_ms(lambda: run(0)) / time_ms(lambda: run(NEVER))
    return math.inf
