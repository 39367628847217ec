"""
Attention among the patches of each picture.

Heads of Qwen2-VL's encoder are 80 wide, which other kernels pad to 96 or 128. Here a head is two
pieces, each a power of two: 64 and 16.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.gpu import LOG2_E, count_blocks
from engine.kernels.quantised import FP8

TILE = 64  # keys of one turn of the loop; 32 and 128 were slower in every cut


@triton.jit
def _turn(
    query,
    query_rest,
    key_ptr,
    value_ptr,
    at,
    is_used,
    largest,
    total,
    out,
    out_rest,
    scale_log2,
    WIDE: tl.constexpr,
    REST: tl.constexpr,
    REST_BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """
    One tile of keys and values: `at` is where its rows begin.

    Rows that are not used weigh nothing; they are read all the same, from one that is.
    """
    wide = at[:, None] + tl.arange(0, WIDE)[None, :]
    rest = at[:, None] + WIDE + tl.arange(0, REST_BLOCK)[None, :]
    key = tl.load(key_ptr + wide)
    score = tl.dot(query, tl.trans(key), input_precision=PRECISION)
    if REST > 0:
        key_rest = tl.load(key_ptr + rest)
        score = tl.dot(query_rest, tl.trans(key_rest), score, input_precision=PRECISION)
    score = tl.where(is_used[None, :], score, float("-inf"))
    # The scale, which is over 0, rides in the one instruction that subtracts the largest.
    new_largest = tl.maximum(largest, tl.max(score, axis=1) * scale_log2)
    weight = tl.exp2(score * scale_log2 - new_largest[:, None])
    shrink = tl.exp2(largest - new_largest)
    total = total * shrink + tl.sum(weight, axis=1)
    weight = weight.to(query.dtype)
    value = tl.load(value_ptr + wide)
    out = out * shrink[:, None]
    out = tl.dot(weight, value, out, input_precision=PRECISION)
    if REST > 0:
        value_rest = tl.load(value_ptr + rest)
        out_rest = out_rest * shrink[:, None]
        out_rest = tl.dot(weight, value_rest, out_rest, input_precision=PRECISION)
    return new_largest, total, out, out_rest


@triton.jit
def _attend(
    query_ptr,
    key_ptr,
    value_ptr,
    starts_ptr,
    out_ptr,
    factors_ptr,
    scale_log2,
    query_stride,
    key_stride,
    value_stride,
    head_stride,
    heads,
    WIDE: tl.constexpr,
    REST: tl.constexpr,
    REST_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    head = tl.program_id(1)
    picture = tl.program_id(2)
    start = tl.load(starts_ptr + picture).to(tl.int64)
    length = (tl.load(starts_ptr + picture + 1) - start).to(tl.int32)
    first = tl.program_id(0) * ROWS
    if first < length:
        row = first + tl.arange(0, ROWS)
        is_row = row < length
        wide = tl.arange(0, WIDE)
        rest = WIDE + tl.arange(0, REST_BLOCK)
        at = (start + row) * query_stride + head * head_stride
        query = tl.load(query_ptr + at[:, None] + wide[None, :], mask=is_row[:, None], other=0.0)
        query_rest = query
        if REST > 0:
            query_rest = tl.load(
                query_ptr + at[:, None] + rest[None, :], mask=is_row[:, None], other=0.0
            )
        largest = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        out = tl.zeros([ROWS, WIDE], tl.float32)
        out_rest = tl.zeros([ROWS, REST_BLOCK], tl.float32)
        key_from = key_ptr + start * key_stride + head * head_stride
        value_from = value_ptr + start * value_stride + head * head_stride
        in_tile = tl.arange(0, TILE)
        # One loop, the last tile in it. A turn of its own behind the loop, without which the others
        # would need no mask, is what Triton 3.6 makes wrong code of: nonsense, or reads where
        # nothing is (heads of 80, 16 bits, H100; 2026).
        for tile_start in range(0, length, TILE):
            row_of_key = tile_start + in_tile
            # keys and values lie in one projection: the same offsets lead to both
            largest, total, out, out_rest = _turn(
                query, query_rest, key_from, value_from,
                tl.minimum(row_of_key, length - 1) * key_stride, row_of_key < length,
                largest, total, out, out_rest, scale_log2,
                WIDE, REST, REST_BLOCK, PRECISION,
            )  # fmt: skip
        to = out_ptr + ((start + row) * heads + head) * (WIDE + REST)
        out = out / total[:, None]
        out_rest = out_rest / total[:, None]
        kind = out_ptr.dtype.element_ty
        if kind.primitive_bitwidth == 8:
            factors = factors_ptr + head * (WIDE + REST)
            out *= tl.load(factors + wide)[None, :]
            if REST > 0:
                out_rest *= tl.load(factors + rest)[None, :]
        tl.store(to[:, None] + wide[None, :], out.to(kind), mask=is_row[:, None])
        if REST > 0:
            tl.store(to[:, None] + rest[None, :], out_rest.to(kind), mask=is_row[:, None])


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts: Tensor,
    max_len: int,
    scale: float,
    *,
    rows: int = 128,
    num_warps: int = 8,
    num_stages: int = 3,
    factors: Tensor | None = None,
) -> Tensor:
    """As engine/kernels/pictures.py says; the rest is for measuring."""
    num_tokens, heads, dim = query.shape
    for x in (query, key, value):
        assert x.stride(2) == 1
        assert x.stride(1) == query.stride(1)
    assert key.stride(0) == value.stride(0)
    dtype = query.dtype if factors is None else FP8
    out = torch.empty((num_tokens, heads, dim), dtype=dtype, device=query.device)
    if num_tokens == 0:
        return out
    wide = 128 if dim == 128 else 64
    rest = dim - wide
    _attend[(count_blocks(max_len, rows), heads, len(starts) - 1)](
        query,
        key,
        value,
        starts,
        out,
        starts if factors is None else factors,
        scale * LOG2_E,
        query.stride(0),
        key.stride(0),
        value.stride(0),
        query.stride(1),
        heads,
        WIDE=wide,
        REST=rest,
        REST_BLOCK=max(rest, 16),
        ROWS=rows,
        TILE=TILE,
        PRECISION="ieee",  # of float32 only
        num_warps=num_warps,
        num_stages=num_stages,
    )
    return out
