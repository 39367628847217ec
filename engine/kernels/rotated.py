"""
The product that makes queries, keys and values, and the rotation of the first two; see
engine/kernels/in_one.py.

A kernel that rotates sums wants those that turn each other to be neighbours. So `interleave_` puts the
two halves of each head of queries and of keys into one another, once, in the weights; no score between
them changes.
"""

from collections.abc import MutableMapping
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from engine.kernels import in_one, rope
from engine.kernels.in_one import Product
from engine.kernels.quantised import FP8, Fp8Linear, Fp8Rows
from engine.kernels.timing import ask_once

NAME = "rotated_product"


def multiply(
    x: Tensor | Fp8Rows,
    linear: nn.Linear | Fp8Linear,
    cos: Tensor,
    sin: Tensor,
    dim: int,
    num_heads: int,
    least_rows: int = in_one.NEVER,
) -> Tensor:
    """
    Args:
        x: (T, depth), dense; of an Fp8Linear in fp8.
        linear: interleaved.
        cos, sin: (T, dim / 2) or wider: columns from there on are not read. Of equal strides.
        dim: of a head.
        num_heads: how many of them are rotated, the first ones.
        least_rows: from which on our kernel does it, as `choose` says for this product.

    Returns:
        (T, width).
    """
    if len(cos) >= least_rows:
        return _multiply_in_one(x, linear, cos, sin, dim, num_heads)
    product: Tensor = linear(x)
    rotate_(product, cos, sin, dim, num_heads)
    return product


def rotate_(product: Tensor, cos: Tensor, sin: Tensor, dim: int, num_heads: int) -> None:
    """The first heads of what such a product gave, (T, width)."""
    heads = product.view(len(product), -1, dim)[:, :num_heads]
    rope.rotate_(heads, cos, sin, in_pairs=True)


def _multiply_in_one(
    x: Tensor | Fp8Rows,
    linear: nn.Linear | Fp8Linear,
    cos: Tensor,
    sin: Tensor,
    dim: int,
    num_heads: int,
) -> Tensor:
    from engine.kernels.gpu import in_one as gpu

    of_heads = pack(cos, sin, dim), dim, num_heads * dim
    if isinstance(linear, Fp8Linear):
        assert isinstance(x, Fp8Rows)
        return gpu.multiply_and_rotate(x, linear.rows, linear.bias, *of_heads)
    assert isinstance(x, Tensor)
    return gpu.multiply_and_rotate(x.contiguous(), linear.weight, linear.bias, *of_heads)


# By cosines: the dim, and what `pack` made of them.
_packed: MutableMapping[Tensor, tuple[int, Tensor]] = WeakTensorKeyDictionary()


def pack(cos: Tensor, sin: Tensor, dim: int) -> Tensor:
    """
    Angles as the kernel reads them: cosine and sine of each in float16, side by side, and rows some
    multiple of 16 apart. That rounds them by an eighth of what results are rounded by to bfloat16.

    All layers of a model rotate by the same ones, so they are kept for as long as the cosines are.

    Args:
        cos, sin: of `multiply`; made for one call of a model, and not written to after that.

    Returns:
        (T, at least dim), float16.
    """
    known = _packed.get(cos)
    if known is not None and known[0] == dim:
        return known[1]
    pairs = torch.stack([cos[:, : dim // 2], sin[:, : dim // 2]], dim=2).flatten(1)
    packed = F.pad(pairs.half(), (0, -dim % 16))
    _packed[cos] = dim, packed
    return packed


def interleave_(linear: nn.Linear | Fp8Linear, dim: int, num_heads: int) -> None:
    """Of the first heads, let the results go 0, dim / 2, 1, dim / 2 + 1, … from now on."""
    for part in (*linear.parameters(), *linear.buffers()):
        by_byte = part.data.view(torch.uint8) if part.dtype == FP8 else part.data
        heads, rest = by_byte.tensor_split([num_heads * dim])
        pairs = heads.view(num_heads, 2, dim // 2, *part.shape[1:]).transpose(1, 2)
        part.data = torch.cat([pairs.flatten(0, 2), rest]).view(part.dtype)


def choose(linear: nn.Linear | Fp8Linear, dim: int, num_heads: int) -> int:
    """
    Compare the two ways, once for each device and shape.

    It takes some two tenths of a second, and more where Triton has not compiled the kernel before.

    NOTE: not while a CUDA graph is captured.

    Returns:
        How many rows a call must have for our kernel to be the faster one; in_one.NEVER where it is not.
    """
    product = Product.of(linear)
    widths = product.width, product.depth
    if dim % 2 or not in_one.is_possible(product.device, product.dtype, *widths):
        return in_one.NEVER
    return ask_once(_choose, product, dim, num_heads)


def _choose(product: Product, dim: int, num_heads: int) -> int:
    _, dtype, depth, width, _ = product
    name = f"{NAME} dtype={dtype} heads={num_heads} dim={dim} width={width} depth={depth}"
    return in_one.choose_rows(name, partial(_compare, product, dim, num_heads))


@cache
def _compare(product: Product, dim: int, num_heads: int, rows: int) -> float:
    """`in_one.time_share` of so many rows."""

    def build() -> partial[Tensor]:
        x, linear = in_one.draw(product, rows)
        # As wide as transformers' own: the kernel that rotates apart is built for that, too.
        angles = torch.rand((rows, dim // 2), device=product.device).mul_(7.0).repeat(1, 2)
        cos, sin = angles.cos(), angles.sin()
        return partial(multiply, x, linear, cos, sin, dim, num_heads)

    return in_one.time_share(NAME, product.device, build)
