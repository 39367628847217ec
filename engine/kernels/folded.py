"""
A norm that is no pass of its own: the product before it keeps what each row adds up to, and the product
behind it multiplies rows as they are and norms its sums; see engine/kernels/in_one.py.

A row's norm takes off its mean (LayerNorm alone), divides it by its size and multiplies each column by
a weight. The last of these goes into the weights of the product behind, once, with what the norm adds to
columns in its bias; the first two are a number each for a row, and sums are as easily corrected by them:
W (x - mean) / size = (W x - mean * sums of W) / size.
"""

import copy
from dataclasses import dataclass
from functools import cache, partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.kernels import activated, added, has_kernels, in_one, rotated
from engine.kernels.activated import Activation, find_kind
from engine.kernels.in_one import EPS, Product, flatten
from engine.kernels.timing import ask_once

NAME = "folded_norm"


class Summed(NamedTuple):
    """
    Rows that are to be normed, with what they add up to.

    Attributes:
        x: (..., width).
        totals: (2, rows, parts), float32: sums and sums of squares of the columns of each part.
    """

    x: Tensor
    totals: Tensor


class Folded(nn.Module):
    """
    A product with the norm before it.

    Args:
        linear: with the norm's weight and bias in its own, see `fold_`.
        eps: of the norm.
        is_rms: whether means stay.
    """

    def __init__(self, linear: nn.Linear, eps: float, *, is_rms: bool) -> None:
        super().__init__()
        self.linear, self.eps = linear, eps
        sums = None if is_rms else linear.weight.float().sum(1)
        self.weight_sums = None if sums is None else nn.Buffer(sums, persistent=False)

    def forward(self, summed: Summed) -> Tensor:
        """(..., depth) -> (..., width): what the linear makes of normed rows."""
        if not has_kernels(summed.x):
            return self._multiply(summed)
        from engine.kernels.gpu import in_one as gpu

        return _shape(summed, gpu.multiply(*self._take(summed)))

    def activate(self, summed: Summed, activation: Activation) -> Tensor:
        """And activated; (..., width / 2) for silu_mul."""
        if not has_kernels(summed.x):
            return activated.activate(self._multiply(summed), activation)
        from engine.kernels.gpu import in_one as gpu

        x, weight, bias, norm = self._take(summed)
        kind = find_kind(activation)
        return _shape(summed, gpu.multiply_and_activate(x, weight, bias, kind, norm))

    def rotate(self, summed: Summed, cos: Tensor, sin: Tensor, dim: int, num_heads: int) -> Tensor:
        """And rotated, of a linear that is interleaved; see `rotated.multiply`."""
        if not has_kernels(summed.x):
            product = self._multiply(summed)
            rotated.rotate_(product, cos, sin, dim, num_heads)
            return product
        from engine.kernels.gpu import in_one as gpu

        x, weight, bias, norm = self._take(summed)
        angles = rotated.pack(cos, sin, dim)
        return gpu.multiply_and_rotate(x, weight, bias, angles, dim, num_heads * dim, norm)

    def _take(self, summed: Summed) -> tuple[Tensor, Tensor, Tensor | None, "Norm"]:
        x = summed.x.view(-1, summed.x.shape[-1])
        norm = Norm(summed.totals, self.weight_sums, self.eps)
        return x, self.linear.weight, self.linear.bias, norm

    def _multiply(self, summed: Summed) -> Tensor:
        """The plain form of what kernels do with their sums."""
        x, weight, bias, norm = self._take(summed)
        mean, squares = norm.totals.sum(-1)[..., None] / x.shape[1]
        exact = F.linear(x.float(), weight.float())
        if norm.weight_sums is None:
            mean = torch.zeros_like(mean)
        else:
            exact = exact - mean * norm.weight_sums
        exact = exact * torch.rsqrt((squares - mean.square()).clamp(min=0.0) + norm.eps)
        if bias is not None:
            exact = exact + bias.float()
        return _shape(summed, exact.to(x.dtype))


def _shape(summed: Summed, rows: Tensor) -> Tensor:
    return rows.view(*summed.x.shape[:-1], -1)


class Norm(NamedTuple):
    """
    What a kernel norms its sums with.

    Attributes:
        totals: of `Summed`.
        weight_sums: (width,), float32, of each output's weights; None where means stay.
    """

    totals: Tensor
    weight_sums: Tensor | None
    eps: float


def multiply_and_sum_up(inner: Tensor, linear: nn.Linear, x: Tensor) -> Summed:
    """`added.multiply` in 16 bits, and what the rows of the result add up to."""
    if not has_kernels(x):
        total = x + linear(inner)
        rows = total.view(-1, x.shape[-1]).float()
        return Summed(total, torch.stack([rows.sum(1), rows.square().sum(1)])[..., None])
    from engine.kernels.gpu import in_one as gpu

    stream = flatten(x)
    shape = 2, len(stream), gpu.count_tiles(stream.shape[1])
    totals = torch.empty(shape, dtype=torch.float32, device=x.device)
    out = gpu.multiply_and_add(flatten(inner), linear.weight, linear.bias, stream, totals)
    return Summed(out.view(x.shape), totals)


def fold_(linear: nn.Linear, weight: Tensor, bias: Tensor | None) -> None:
    """Put a norm's weight and bias, (depth,), into the product behind it."""
    exact = linear.weight.data.float()
    if bias is not None:
        moved = exact @ bias.float()
        if linear.bias is not None:
            moved = moved + linear.bias.float()
        linear.bias = nn.Parameter(moved.to(linear.weight.dtype), requires_grad=False)
    linear.weight.data = (exact * weight.float()).to(linear.weight.dtype)


@dataclass(frozen=True, slots=True)
class Behind:
    """
    What the product behind the norm does with what it makes.

    Attributes:
        activation: None for nothing.
        dim, num_heads: as of `rotated.multiply`; 0 where nothing is rotated.
        least_rows: from which on our kernel does it without folding, too.
    """

    activation: Activation | None = None
    dim: int = 0
    num_heads: int = 0
    least_rows: int = in_one.NEVER


def choose(
    end: nn.Linear, reader: nn.Linear, behind: Behind, *, is_rms: bool, least_added: int
) -> int:
    """
    Compare two products and the norm between them, both ways, once for each device and shape.

    NOTE: not while a CUDA graph is captured.

    Args:
        end: the product before the norm. reader: that behind it.
        least_added: from how many rows on the first adds, without folding too.

    Returns:
        How many rows a call must have for two kernels to be faster than three; in_one.NEVER where they
        are not.
    """
    first, second = Product.of(end), Product.of(reader)
    width_out = second.width // (1 + (behind.activation == "silu_mul"))
    if first.dtype != second.dtype:
        return in_one.NEVER
    widths = first.width, first.depth, width_out
    if not in_one.is_possible(first.device, first.dtype, *widths):
        return in_one.NEVER
    return ask_once(_choose, first, second, behind, is_rms, least_added)


def _choose(end: Product, reader: Product, behind: Behind, is_rms: bool, least_added: int) -> int:
    widths = f"{end.depth},{end.width},{reader.width}"
    name = f"{NAME} dtype={end.dtype} widths={widths} behind={behind}"
    compare = partial(_compare, end, reader, behind, is_rms, least_added)
    return in_one.choose_rows(name, compare)


@cache
def _compare(
    end: Product, reader: Product, behind: Behind, is_rms: bool, least_added: int, rows: int
) -> float:
    """`in_one.time_share` of so many rows."""
    build = partial(draw, end, reader, behind, is_rms, least_added, rows)
    return in_one.time_share(NAME, end.device, build)


def draw(
    end: Product, reader: Product, behind: Behind, is_rms: bool, least_added: int, rows: int
) -> partial[Tensor]:
    """What runs both products and the norm between them, folded from so many rows on."""
    device, dtype, _, width, _ = end
    inner, first = in_one.draw_in_16_bits(end, rows)
    x, second = in_one.draw_in_16_bits(reader, rows)
    x += torch.randn((rows, 1), dtype=dtype, device=device)  # means that are missed if they stay
    weight, bias = torch.rand((2, width), dtype=dtype, device=device)
    norm = weight, None if is_rms else bias
    twin = copy.deepcopy(second)
    fold_(twin, *norm)
    product = Folded(twin, EPS, is_rms=is_rms)
    # As wide as transformers' own: the kernel that rotates apart is built for that, too.
    turns = torch.rand((rows, behind.dim // 2), device=device).repeat(1, 2)
    angles = turns.cos(), turns.sin()
    return partial(_run, inner, first, x, norm, second, product, angles, behind, least_added)


def _run(
    inner: Tensor,
    end: nn.Linear,
    x: Tensor,
    norm: tuple[Tensor, Tensor | None],
    reader: nn.Linear,
    folded: Folded,
    angles: tuple[Tensor, Tensor],
    behind: Behind,
    least_added: int,
    least_rows: int,
) -> Tensor:
    """Two products and the norm between them, folded where there are as many rows."""
    if len(x) >= least_rows:
        summed = multiply_and_sum_up(inner, end, x)
        if behind.num_heads:
            return folded.rotate(summed, *angles, behind.dim, behind.num_heads)
        if behind.activation is not None:
            return folded.activate(summed, behind.activation)
        return folded(summed)  # type: ignore[no-any-return]
    normed = added.run(inner, end, x, *norm, False, least_added)
    assert isinstance(normed, Tensor)
    if behind.num_heads:
        of_heads = behind.dim, behind.num_heads
        return rotated.multiply(normed, reader, *angles, *of_heads, behind.least_rows)
    if behind.activation is not None:
        return activated.multiply(normed, reader, behind.activation, behind.least_rows)
    return reader(normed)  # type: ignore[no-any-return]
