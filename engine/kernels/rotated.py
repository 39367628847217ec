"""
The product that makes queries, keys and values, and the rotation of the first two; see
engine/kernels/in_one.py.

A kernel that rotates sums wants those that turn each other to be neighbours. So `interleave` puts the
two halves of each head of queries and of keys into one another, once, in the weights; no score between
them changes.
"""

from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.kernels import in_one, rope
from engine.kernels.timing import ask_once


def multiply(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    dim: int,
    num_heads: int,
    least_rows: int = in_one.NEVER,
) -> Tensor:
    """
    Args:
        x: (T, depth), dense.
        weight: (width, depth), dense and interleaved.
        bias: (width,), likewise.
        cos, sin: (T, dim / 2) or wider: columns from there on are not read. Of equal strides.
        dim: of a head.
        num_heads: how many of them are rotated, the first ones.
        least_rows: from which on our kernel does it, as `choose` says for this weight.

    Returns:
        (T, width).
    """
    if len(x) >= least_rows:
        return _multiply_in_one(x, weight, bias, cos, sin, dim, num_heads)
    product = F.linear(x, weight, bias)
    heads = product.view(len(product), -1, dim)[:, :num_heads]
    rope.rotate_(heads, cos, sin, in_pairs=True)
    return product


def _multiply_in_one(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    dim: int,
    num_heads: int,
) -> Tensor:
    from engine.kernels.gpu import in_one as gpu

    return gpu.multiply_and_rotate(x.contiguous(), weight, bias, cos, sin, dim, num_heads * dim)


def interleave(rows: Tensor, dim: int, num_heads: int) -> Tensor:
    """
    A weight or bias, (width, ...), whose first heads' rows go 0, dim / 2, 1, dim / 2 + 1, … now.
    """
    heads, rest = rows.tensor_split([num_heads * dim])
    pairs = heads.view(num_heads, 2, dim // 2, *rows.shape[1:]).transpose(1, 2)
    return torch.cat([pairs.flatten(0, 2), rest])


def choose(weight: Tensor, bias: Tensor | None, dim: int, num_heads: int) -> int:
    """
    Compare the two ways, once for each device and shape.

    It takes a tenth of a second, and two where Triton has not compiled the kernel before.

    NOTE: not while a CUDA graph is captured.

    Returns:
        How many rows a call must have for our kernel to be the faster one; in_one.NEVER where it is not.
    """
    width, depth = weight.shape
    if dim % 2 or not in_one.is_possible(weight.device, weight.dtype, width, depth):
        return in_one.NEVER
    return ask_once(
        _choose, weight.device, weight.dtype, dim, num_heads, width, depth, bias is not None
    )


def _choose(
    device: torch.device,
    dtype: torch.dtype,
    dim: int,
    num_heads: int,
    width: int,
    depth: int,
    has_bias: bool,
) -> int:
    name = f"rotated_product heads={num_heads} dim={dim} width={width} depth={depth}"
    return in_one.choose_rows(
        name, partial(_compare, device, dtype, dim, num_heads, width, depth, has_bias)
    )


@cache
def _compare(
    device: torch.device,
    dtype: torch.dtype,
    dim: int,
    num_heads: int,
    width: int,
    depth: int,
    has_bias: bool,
    rows: int,
) -> float:
    """`in_one.time_share` of so many rows."""

    def build() -> partial[Tensor]:
        weight = torch.randn((width, depth), dtype=dtype, device=device).mul_(depth**-0.5)
        bias = torch.randn(width, dtype=dtype, device=device) if has_bias else None
        x = torch.randn((rows, depth), dtype=dtype, device=device)
        angles = torch.rand((rows, dim // 2), device=device).mul_(7.0)
        return partial(multiply, x, weight, bias, angles.cos(), angles.sin(), dim, num_heads)

    return in_one.time_share("rotated_product", device, build)
