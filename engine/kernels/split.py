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
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from engine.kernels import has_kernels, in_one, norms, quantised
from engine.kernels.in_one import EPS, Product, flatten
from engine.kernels.quantised import FP8, Fp8Linear, Fp8Rows
from engine.kernels.timing import ask_once, chooses_by_time
from engine.kernels.trials import unless_memory_is_short

logger = logging.getLogger(__name__)

NAME = "split_product"
ROWS = (512, 256, 128, 64, 16)  # of calls on which the two ways are compared
STEP_BYTES = 128  # of the depth; a weight whose rows it does not divide is not split


class Span(NamedTuple):
    """Numbers of rows, both included, with which splitting is faster."""

    least: int
    most: int

    def has(self, num_rows: int) -> bool:
        return self.least <= num_rows <= self.most


NEVER = Span(1, 0)


def multiply(x: Tensor | Fp8Rows, linear: nn.Linear | Fp8Linear) -> Tensor:
    """
    Args:
        x: (..., depth), 16 bits; of an Fp8Linear perhaps in fp8.
        linear: without a bias; depth a multiple of STEP_BYTES in numbers.

    Returns:
        (parts, rows, width), float32: what adds up to the product.
    """
    scales: tuple[Tensor, Tensor] | None = None
    if isinstance(linear, Fp8Linear):
        small = quantised.as_rows(x)
        scales, x = (small.scales, linear.scales), small.values
    assert isinstance(x, Tensor)
    rows = flatten(x)
    if has_kernels(x):
        from engine.kernels.gpu import split

        return split.multiply(rows, linear.weight, *(scales or ()))
    halves = zip(rows.tensor_split(2, 1), linear.weight.tensor_split(2, 1), strict=True)
    parts = torch.stack([half.float() @ of_half.float().T for half, of_half in halves])
    return parts if scales is None else parts * scales[0] * scales[1].T


def choose(linear: nn.Module, *, gives_fp8: bool) -> Span:
    """
    Compare the two ways, each with the addition and RMSNorm behind it, once for each device and shape.

    NOTE: not while a CUDA graph is captured.

    Args:
        gives_fp8: of that norm.

    Returns:
        How many rows a call must have for the parts to be faster; NEVER where they are not.
    """
    if not isinstance(linear, nn.Linear | Fp8Linear) or linear.bias is not None:
        return NEVER
    product = Product.of(linear)
    device, dtype, depth, width, _ = product
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16, FP8):
        return NEVER
    if not chooses_by_time() or depth * dtype.itemsize % STEP_BYTES or width % 8:
        return NEVER
    if not has_kernels(torch.empty(1, device=device)):
        return NEVER
    return ask_once(_choose, product, gives_fp8)


def _choose(product: Product, gives_fp8: bool) -> Span:
    _, dtype, depth, width, _ = product
    span, shares = NEVER, []
    for index, rows in enumerate(ROWS):
        compare = partial(_compare, product, gives_fp8, rows)
        share = unless_memory_is_short(compare, math.inf)
        shares.append(f"{rows}:{share:.3f}")
        if share < in_one.BETTER:
            smaller = ROWS[index + 1] if index + 1 < len(ROWS) else 0
            span = Span(smaller + 1, max(span.most, rows))
        elif span != NEVER or share == math.inf:
            break
    logger.info(
        "%s dtype=%s depth=%s width=%s rows=%s-%s time_shares=%s",
        *(NAME, dtype, depth, width, *span, ",".join(shares)),
    )
    return span


@cache
def _compare(product: Product, gives_fp8: bool, rows: int) -> float:
    """`in_one.time_share` of so many rows."""
    build = partial(draw, product, gives_fp8, rows)
    return in_one.time_share(NAME, product.device, build)


def draw(product: Product, gives_fp8: bool, rows: int) -> partial[Tensor | Fp8Rows]:
    """What runs such a product, the addition and the norm; in parts from so many rows on."""
    inner, linear = in_one.draw(product, rows)
    x = torch.randn((rows, product.width), dtype=product.layer_dtype, device=product.device)
    return partial(_run, inner, linear, x, x.new_ones(product.width), gives_fp8)


def _run(
    inner: Tensor | Fp8Rows,
    linear: nn.Linear | Fp8Linear,
    x: Tensor,
    weight: Tensor,
    gives_fp8: bool,
    least_rows: int,
) -> Tensor | Fp8Rows:
    pieces: Any = quantised if gives_fp8 else norms
    normed: Tensor | Fp8Rows
    if len(x) >= least_rows:
        _, normed = pieces.add_parts_rms_norm(multiply(inner, linear), x, weight, EPS)
    else:
        normed = pieces.add_rms_norm_(linear(inner), x, weight, EPS)
    return normed
