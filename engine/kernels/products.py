"""
Matrix products on a CPU by oneDNN, with weights laid out once in the order in which it reads them.

A tenth faster than torch's own where many rows are multiplied, up to three times where few are, as in
a decode step.

oneDNN compiles a kernel for each number of rows and keeps the last 1,024 of them, some 1.2 MB each, so
rows are multiplied in blocks of a few sizes. Up to 64 rows take little longer than one, as weights have
to come from memory: what does not fill a block is filled up with zeros, so that weights come once.
"""

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Below, a call costs more than it saves (256 x 384 is even; EPYC, 2026-11-28).
MIN_WEIGHTS = 1 << 17
# Rows; what lies between two products of 256 stays in the cache.
BLOCK_SIZES = (256, 64, 48, 32, 24, 16, 8, 4, 1)
FILLED_SIZE = 64  # the largest that is filled up


class PackedLinear(nn.Module):
    """
    A Linear by oneDNN, which alone can read its weight.

    Args:
        linear: on a CPU.
        activation: what is done with the result on its way out: "none", "swish" or "gelu" (by tanh).
        is_shared: whether somebody else reads the weight, which then stays as it is: laid out anew
            in every call, which takes some of the gain, and no memory.
    """

    def __init__(
        self, linear: nn.Linear, activation: str = "none", *, is_shared: bool = False
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight
        if not is_shared:
            packed = torch.ops.mkldnn._reorder_linear_weight(weight.data)
            weight = nn.Parameter(packed, requires_grad=False)
        self.weight = weight
        self.bias = linear.bias
        self.activation = activation
        self.algorithm = "tanh" if activation == "gelu" else ""

    @classmethod
    def find(
        cls, linear: nn.Linear, activation: str = "none", *, is_shared: bool = False
    ) -> "PackedLinear | None":
        """The same product, packed; None where that does not run or would not pay."""
        weight = linear.weight
        if weight.numel() < MIN_WEIGHTS or weight.device.type != "cpu":
            return None
        if not _can_pack(weight.dtype):
            return None
        return cls(linear, activation, is_shared=is_shared)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        return by_blocks(self._multiply, x, self.out_features)

    def _multiply(self, rows: Tensor) -> Tensor:
        product: Any = torch.ops.mkldnn._linear_pointwise
        return product(rows, self.weight, self.bias, self.activation, [], self.algorithm)  # type: ignore[no-any-return]


def by_blocks(call: Callable[[Tensor], Tensor], x: Tensor, width: int) -> Tensor:
    """
    Call with some rows at a time, in numbers that come back.

    Args:
        call: (rows, any) -> (rows, width), of each row by itself; also of rows of zeros.
        x: (..., any).

    Returns:
        (..., width).
    """
    rows = x.reshape(-1, x.shape[-1])
    if len(rows) in BLOCK_SIZES:
        return call(rows).view(*x.shape[:-1], width)
    out = rows.new_empty(len(rows), width)
    for block, size in _cut(len(rows)):
        given = rows[block]
        num = len(given)
        if num < size:
            given = F.pad(given, (0, 0, 0, size - num))
        out[block] = call(given)[:num]
    return out.view(*x.shape[:-1], width)


def _cut(num_rows: int) -> Iterator[tuple[slice, int]]:
    """As many of the largest blocks as fit, then of the next, and one that is filled up: its rows, its size."""
    at = 0
    for size in BLOCK_SIZES[: BLOCK_SIZES.index(FILLED_SIZE) + 1]:
        while num_rows - at >= size:
            yield slice(at, at + size), size
            at += size
    if at < num_rows:
        yield slice(at, num_rows), min(size for size in BLOCK_SIZES if size >= num_rows - at)


@cache
def _can_pack(dtype: torch.dtype) -> bool:
    """The operators are private to torch: they are tried, and without them all stays as it is."""
    if dtype not in (torch.float32, torch.bfloat16) or not torch._C._has_mkldnn:
        return False
    try:
        if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return False
        linear = nn.Linear(16, 32, dtype=dtype)
        with torch.no_grad():
            x = torch.ones(3, 16, dtype=dtype)
            return torch.allclose(PackedLinear(linear)(x), linear(x), rtol=0.02, atol=1e-3)
    except (AttributeError, RuntimeError):
        return False
