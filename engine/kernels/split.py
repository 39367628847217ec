"""
A product of few rows, whose depth is split among the processors of a GPU.

A step of decode multiplies some hundred rows: cut into tiles of the result alone they keep a third of
the processors at work where a result is narrow and its weights are deep, as those of the product that
ends an MLP. So each tile is made in parts, of a share of the depth each; whoever reads the result adds
them up. Whether that is faster than the vendor's product depends on the shape, so both are timed.
"""

import logging
import math
from functools import cache, partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from engine.kernels import has_kernels, in_one, norms
from engine.kernels.timing import ask_once, chooses_by_time
from engine.kernels.trials import unless_memory_is_short

logger = logging.getLogger(__name__)

NAME = "split_product"
ROWS = (512, 256, 128, 64, 16)  # of calls on which the two ways are compared
STEP = 64  # numbers of the depth; a weight that it does not divide is not split
EPS = 1e-6


class Span(NamedTuple):
    """Numbers of rows, both included, with which splitting is faster."""

    least: int
    most: int

    def has(self, num_rows: int) -> bool:
        return self.least <= num_rows <= self.most


NEVER = Span(1, 0)


def multiply(x: Tensor, weight: Tensor) -> Tensor:
    """
    Args:
        x: (..., depth), 16 bits.
        weight: (width, depth), dense, as x; depth a multiple of STEP.

    Returns:
        (parts, rows, width), float32: what adds up to the product.
    """
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    if has_kernels(x):
        from engine.kernels.gpu import split

        return split.multiply(rows, weight)
    half = rows.shape[1] // 2
    return torch.stack(
        [
            rows[:, :half].float() @ weight[:, :half].float().T,
            rows[:, half:].float() @ weight[:, half:].float().T,
        ]
    )


def choose(linear: nn.Module) -> Span:
    """
    Compare the two ways, each with the addition and RMSNorm behind it, once for each device and shape.

    NOTE: not while a CUDA graph is captured.
    """
    if not isinstance(linear, nn.Linear) or linear.bias is not None:
        return NEVER
    device, dtype = linear.weight.device, linear.weight.dtype
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return NEVER
    if not chooses_by_time() or linear.in_features % STEP or linear.out_features % 8:
        return NEVER
    if not has_kernels(torch.empty(1, device=device)):
        return NEVER
    return ask_once(_choose, device, dtype, linear.in_features, linear.out_features)


def _choose(device: torch.device, dtype: torch.dtype, depth: int, width: int) -> Span:
    span = NEVER
    for index, rows in enumerate(ROWS):
        compare = partial(_compare, device, dtype, depth, width, rows)
        share = unless_memory_is_short(compare, math.inf)
        if share < in_one.BETTER:
            smaller = ROWS[index + 1] if index + 1 < len(ROWS) else 0
            span = Span(smaller + 1, max(span.most, rows))
        elif span != NEVER or share == math.inf:
            break
    logger.info("%s dtype=%s depth=%s width=%s rows=%s-%s", NAME, dtype, depth, width, *span)
    return span


@cache
def _compare(device: torch.device, dtype: torch.dtype, depth: int, width: int, rows: int) -> float:
    """`in_one.time_share` of so many rows."""

    def build() -> partial[Tensor]:
        run, _ = draw(device, dtype, depth, width, rows)
        return run

    return in_one.time_share(NAME, device, build, lambda normed: normed)


def draw(
    device: torch.device, dtype: torch.dtype, depth: int, width: int, rows: int
) -> tuple[partial[Tensor], nn.Linear]:
    """What runs the product, the addition and the norm, in parts from so many rows on; the product."""
    inner, linear = in_one.draw(device, rows, depth, width, dtype=dtype, has_bias=False)
    x = torch.randn((rows, width), dtype=dtype, device=device)
    return partial(_run, inner, linear, x, x.new_ones(width)), linear


def _run(inner: Tensor, linear: nn.Linear, x: Tensor, norm: Tensor, least_rows: int) -> Tensor:
    if len(x) >= least_rows:
        _, normed = norms.add_parts_rms_norm(multiply(inner, linear.weight), x, norm, EPS)
        return normed
    return norms.add_rms_norm_(linear(inner), x, norm, EPS)
