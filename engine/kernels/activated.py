"""
A matrix product and the activation of what it gives; see engine/kernels/in_one.py.
"""

from functools import cache, partial
from typing import Literal, NamedTuple, get_args

import torch.nn.functional as F
from torch import Tensor, nn

from engine.kernels import activations, in_one, quantised
from engine.kernels.in_one import Product, flatten
from engine.kernels.quantised import MOST, Fp8Linear, Fp8Rows
from engine.kernels.timing import ask_once

Activation = Literal["quick_gelu", "gelu_tanh", "silu_mul"]

NAME = "activated_product"
SURE = 1.01  # bounds are raised by so much, as sums are rounded
MOST_SPREAD = 8.0  # of the sum of an output's weights, as a share of what evenly large ones have


def multiply(
    x: Tensor, linear: nn.Linear, activation: Activation, least_rows: int = in_one.NEVER
) -> Tensor:
    """
    Args:
        x: (..., depth), dense.
        linear: depth -> width. For silu_mul its first half makes gates, the second what they gate.
        least_rows: of all of x, from which our kernel does it, as `choose` says for this product.

    Returns:
        (..., width), or (..., width / 2) for silu_mul.
    """
    if x.numel() >= least_rows * x.shape[-1]:
        return _multiply_in_one(x, linear, activation)
    return activate(linear(x), activation)


def activate(product: Tensor, activation: Activation) -> Tensor:
    """Whether `product` is written over is left open."""
    if activation == "silu_mul":
        return activations.silu_mul(product)
    if activation == "quick_gelu":
        return activations.quick_gelu_(product)
    return F.gelu(product, approximate="tanh")


def activate_in_fp8(product: Tensor, activation: Activation) -> Fp8Rows:
    """`activate`, with scales by the largest number of each row."""
    if activation == "silu_mul":
        return quantised.silu_mul(product)
    if activation == "quick_gelu":
        return quantised.quick_gelu(product)
    return quantised.quantise(activate(product, activation))


def _multiply_in_one(x: Tensor, linear: nn.Linear, activation: Activation) -> Tensor:
    from engine.kernels.gpu import in_one as gpu

    kind = find_kind(activation)
    out = gpu.multiply_and_activate(flatten(x), linear.weight, linear.bias, kind)
    return out.view(*x.shape[:-1], out.shape[1])


def find_kind(activation: Activation) -> int:
    """As engine/kernels/gpu/in_one.py numbers them."""
    return get_args(Activation).index(activation)


class Bound(NamedTuple):
    """
    The scale of a row of a GELU in fp8 before there is any result: that of the row that is multiplied
    times `share`, plus `rest`.
    """

    share: float
    rest: float

    @classmethod
    def find(cls, linear: Fp8Linear) -> "Bound | None":
        """
        No number of a row is more than MOST of its scale, so no sum is more than as many times what the
        weights of its output add up to; and no GELU is further from zero than what it is of.

        Most are a hundred times smaller, which costs them nothing: numbers in fp8 are as exact over
        seven powers of two more.

        Returns:
            None where one output's weights are so much larger than others' that it would cost these,
            and where all are zero.
        """
        weight = linear.rows.read()
        share = weight.abs().sum(1).max().item()
        even = weight.shape[1] ** 0.5 * weight.norm(dim=1).median().item()
        if not 0 < share <= MOST_SPREAD * even:
            return None
        rest = 0.0 if linear.bias is None else linear.bias.abs().max().item() / MOST
        return cls(share * SURE, rest * SURE)


def find_bound(linear: Fp8Linear, activation: Activation) -> Bound | None:
    """None for what is gated, too: of a product of two, bounds would be too far off."""
    return None if activation == "silu_mul" else Bound.find(linear)


def multiply_in_fp8(
    rows: Fp8Rows,
    linear: Fp8Linear,
    activation: Activation,
    bound: Bound | None,
    least_rows: int = in_one.NEVER,
) -> Fp8Rows:
    """
    `multiply` from fp8 to fp8: of a GELU that our kernel does with scales by the bound, elsewhere by the
    largest number of each row.

    Args:
        bound: of the linear, for a GELU.
    """
    if len(rows.scales) >= least_rows:
        return _multiply_in_one_in_fp8(rows, linear, activation, bound)
    return activate_in_fp8(linear(rows), activation)


def _multiply_in_one_in_fp8(
    rows: Fp8Rows, linear: Fp8Linear, activation: Activation, bound: Bound | None
) -> Fp8Rows:
    from engine.kernels.gpu import in_one as gpu

    shape = rows.values.shape[:-1]
    kind = find_kind(activation)
    out = gpu.multiply_and_activate_in_fp8(rows.flatten(), linear.rows, linear.bias, kind, bound)
    if bound is None:
        return quantised.quantise(out.view(*shape, -1))
    return Fp8Rows(out.view(*shape, -1), rows.scales * bound.share + bound.rest)


def choose(linear: nn.Module, activation: Activation) -> int:
    """
    Compare the two ways, once for each device and shape.

    It takes some two tenths of a second, and more where Triton has not compiled the kernel before.

    NOTE: not while a CUDA graph is captured.

    Returns:
        How many rows a call must have for our kernel to be the faster one; in_one.NEVER where it is not.
    """
    if not isinstance(linear, nn.Linear | Fp8Linear):
        return in_one.NEVER
    product = Product.of(linear)
    width = product.width // 2 if activation == "silu_mul" else product.width
    if not in_one.is_possible(product.device, product.dtype, width, product.depth):
        return in_one.NEVER
    if isinstance(linear, Fp8Linear) and activation != "silu_mul" and not Bound.find(linear):
        return in_one.NEVER
    return ask_once(_choose, product, activation)


def _choose(product: Product, activation: Activation) -> int:
    _, dtype, depth, width, _ = product
    name = f"{NAME} dtype={dtype} activation={activation} width={width} depth={depth}"
    return in_one.choose_rows(name, partial(_compare, product, activation))


@cache
def _compare(product: Product, activation: Activation, rows: int) -> float:
    """`in_one.time_share` of so many rows."""

    def build() -> partial[Tensor] | partial[Fp8Rows]:
        x, linear = in_one.draw(product, rows)
        if isinstance(linear, Fp8Linear):
            assert isinstance(x, Fp8Rows)
            bound = find_bound(linear, activation)
            return partial(multiply_in_fp8, x, linear, activation, bound)
        assert isinstance(x, Tensor)
        return partial(multiply, x, linear, activation)

    return in_one.time_share(NAME, product.device, build)
