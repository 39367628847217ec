"""
The product that a layer's stream is added to, with that addition; see engine/kernels/in_one.py.

Otherwise the norm behind it adds, which reads what the product wrote and writes the sum.
"""

from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from engine.kernels import in_one, norms, quantised
from engine.kernels.in_one import EPS, Product, flatten
from engine.kernels.quantised import Fp8Linear, Fp8Rows
from engine.kernels.timing import ask_once

NAME = "added_product"


def multiply(inner: Tensor | Fp8Rows, linear: nn.Linear | Fp8Linear, x: Tensor) -> Tensor:
    """
    x + linear(inner), in our kernel.

    Args:
        inner: (..., depth).
        x: (..., width).
    """
    from engine.kernels.gpu import in_one as gpu

    bias, stream = linear.bias, flatten(x)
    if isinstance(linear, Fp8Linear):
        flat = quantised.as_rows(inner).flatten()
        return gpu.multiply_and_add(flat, linear.rows, bias, stream).view(x.shape)
    assert isinstance(inner, Tensor)
    return gpu.multiply_and_add(flatten(inner), linear.weight, bias, stream).view(x.shape)


def choose(linear: nn.Module, *, is_rms: bool, gives_fp8: bool) -> int:
    """
    Compare the two ways, once for each device and shape.

    It takes some two tenths of a second, and more where Triton has not compiled the kernel before.

    NOTE: not while a CUDA graph is captured.

    Args:
        is_rms, gives_fp8: of the norm behind it, which is part of what is timed.

    Returns:
        How many rows a call must have for our kernel to be the faster one; in_one.NEVER where it is not.
    """
    if not isinstance(linear, nn.Linear | Fp8Linear):
        return in_one.NEVER
    product = Product.of(linear)
    if not in_one.is_possible(product.device, product.dtype, product.width, product.depth):
        return in_one.NEVER
    return ask_once(_choose, product, is_rms, gives_fp8)


def _choose(product: Product, is_rms: bool, gives_fp8: bool) -> int:
    _, dtype, depth, width, _ = product
    name = f"{NAME} dtype={dtype} width={width} depth={depth} fp8_behind={gives_fp8}"
    return in_one.choose_rows(name, partial(_compare, product, is_rms, gives_fp8))


@cache
def _compare(product: Product, is_rms: bool, gives_fp8: bool, rows: int) -> float:
    """`in_one.time_share` of so many rows."""
    build = partial(draw, product, is_rms, gives_fp8, rows)
    return in_one.time_share(NAME, product.device, build)


def draw(product: Product, is_rms: bool, gives_fp8: bool, rows: int) -> partial[Tensor | Fp8Rows]:
    """What runs such a product and the norm behind it, in one from so many rows on."""
    inner, linear = in_one.draw(product, rows)
    x = torch.randn((rows, product.width), dtype=product.layer_dtype, device=product.device)
    # Of other norms the results are so large that their last places are further apart.
    weight, bias = x.new_ones(product.width), None if is_rms else x.new_zeros(product.width)
    return partial(run, inner, linear, x, weight, bias, gives_fp8)


def run(
    inner: Tensor | Fp8Rows,
    linear: nn.Linear | Fp8Linear,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gives_fp8: bool,
    least_rows: int,
) -> Tensor | Fp8Rows:
    """The norm of the sum, by `multiply` where there are as many rows."""
    pieces: Any = quantised if gives_fp8 else norms
    args = (weight, EPS) if bias is None else (weight, bias, EPS)
    normed: Tensor | Fp8Rows
    if len(x) >= least_rows:
        norm = pieces.rms_norm if bias is None else pieces.layer_norm
        normed = norm(multiply(inner, linear, x), *args)
    else:
        add_norm_ = pieces.add_rms_norm_ if bias is None else pieces.add_layer_norm_
        normed = add_norm_(linear(inner), x, *args)
    return normed
