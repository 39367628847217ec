"""
The product that a layer's stream is added to, with that addition; see engine/kernels/in_one.py.

Otherwise the norm behind it adds, which reads what the product wrote and writes the sum.
"""

from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from engine.kernels import in_one, norms, quantised
from engine.kernels.quantised import FP8, Fp8Linear, Fp8Rows, quantise
from engine.kernels.timing import ask_once

NAME = "added_product"
EPS = 1e-6


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
        rows = inner if isinstance(inner, Fp8Rows) else quantise(inner)
        flat = Fp8Rows(rows.values.flatten(0, -2), rows.scales)
        return gpu.multiply_and_add(flat, linear.rows, bias, stream).view(x.shape)
    assert isinstance(inner, Tensor)
    return gpu.multiply_and_add(flatten(inner), linear.weight, bias, stream).view(x.shape)


def flatten(inner: Tensor) -> Tensor:
    """(..., depth) -> (rows, depth), dense."""
    return inner.reshape(-1, inner.shape[-1]).contiguous()


def choose(linear: nn.Module, *, is_rms: bool, gives_fp8: bool) -> int:
    """
    Compare the two ways, once for each device and shape.

    It takes a tenth of a second, and two where Triton has not compiled the kernel before.

    NOTE: not while a CUDA graph is captured.

    Args:
        is_rms, gives_fp8: of the norm behind it, which is part of what is timed.

    Returns:
        How many rows a call must have for our kernel to be the faster one; in_one.NEVER where it is not.
    """
    if not isinstance(linear, nn.Linear | Fp8Linear):
        return in_one.NEVER
    weight, shape = linear.weight, linear.weight.shape
    if not in_one.is_possible(weight.device, weight.dtype, *shape):
        return in_one.NEVER
    has_bias = linear.bias is not None
    return ask_once(_choose, weight.device, weight.dtype, *shape, has_bias, is_rms, gives_fp8)


def _choose(
    device: torch.device,
    dtype: torch.dtype,
    width: int,
    depth: int,
    has_bias: bool,
    is_rms: bool,
    gives_fp8: bool,
) -> int:
    name = f"{NAME} dtype={dtype} width={width} depth={depth} fp8_behind={gives_fp8}"
    return in_one.choose_rows(
        name, partial(_compare, device, dtype, width, depth, has_bias, is_rms, gives_fp8)
    )


@cache
def _compare(
    device: torch.device,
    dtype: torch.dtype,
    width: int,
    depth: int,
    has_bias: bool,
    is_rms: bool,
    gives_fp8: bool,
    rows: int,
) -> float:
    """`in_one.time_share` of so many rows."""

    def build() -> partial[Tensor | Fp8Rows]:
        drawn, _ = draw(device, dtype, rows, depth, width, has_bias, is_rms, gives_fp8)
        return drawn

    apart = in_one.APART_IN_FP8 if gives_fp8 else in_one.APART
    return in_one.time_share(NAME, device, build, read, apart)


def draw(
    device: torch.device,
    dtype: torch.dtype,
    rows: int,
    depth: int,
    width: int,
    has_bias: bool,
    is_rms: bool,
    gives_fp8: bool,
) -> tuple[partial[Tensor | Fp8Rows], nn.Linear | Fp8Linear]:
    """What runs the product and the norm behind it, in one from so many rows on; and the product."""
    inner: Tensor | Fp8Rows
    linear: nn.Linear | Fp8Linear
    plain = torch.bfloat16 if dtype == FP8 else dtype
    if dtype == FP8:
        inner, linear = in_one.draw_in_fp8(device, rows, depth, width, has_bias=has_bias)
    else:
        inner, linear = in_one.draw(device, rows, depth, width, dtype=dtype, has_bias=has_bias)
    x = torch.randn((rows, width), dtype=plain, device=device)
    # Of other norms the results are so large that their last places are further apart.
    weight, bias = x.new_ones(width), None if is_rms else x.new_zeros(width)
    return partial(run, inner, linear, x, weight, bias, gives_fp8), linear


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


def read(rows: Tensor | Fp8Rows) -> Tensor:
    """The numbers of what a norm gives."""
    return rows.read() if isinstance(rows, Fp8Rows) else rows
