"""Rotary positions: one program a token, all its heads in a tile."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.gpu import count_blocks
from engine.kernels.quantised import FP8, MOST


@triton.jit
def _rotate(
    heads_ptr,
    cos_ptr,
    sin_ptr,
    keys_ptr,
    values_ptr,
    rows_ptr,
    token_stride,
    head_stride,
    angle_stride,
    num_rotated,
    kv_heads,
    HALF: tl.constexpr,
    IN_PAIRS: tl.constexpr,
    STORES: tl.constexpr,
    CLAMP: tl.constexpr,
    HEADS_BLOCK: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS_BLOCK + tl.arange(0, HEADS_BLOCK)
    column = tl.arange(0, HALF_BLOCK)
    angle_inside = column < HALF
    cos = tl.load(cos_ptr + token * angle_stride + column, mask=angle_inside, other=0.0)
    sin = tl.load(sin_ptr + token * angle_stride + column, mask=angle_inside, other=0.0)
    cos, sin = cos.to(tl.float32)[None, :], sin.to(tl.float32)[None, :]
    inside = (head < num_rotated)[:, None] & angle_inside[None, :]
    # Numbers that turn each other are neighbours, or half a head apart.
    STEP: tl.constexpr = 2 if IN_PAIRS else 1
    APART: tl.constexpr = 1 if IN_PAIRS else HALF
    at = heads_ptr + token * token_stride + head[:, None] * head_stride + STEP * column[None, :]
    first = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(at + APART, mask=inside, other=0.0).to(tl.float32)
    kind = heads_ptr.dtype.element_ty
    new_first = (first * cos - second * sin).to(kind)
    new_second = (second * cos + first * sin).to(kind)
    tl.store(at, new_first, mask=inside)
    tl.store(at + APART, new_second, mask=inside)
    if STORES:
        row = tl.load(rows_ptr + token).to(tl.int64)
        kv_kind = keys_ptr.dtype.element_ty
        # keys: the last of the rotated heads
        kv_head = head - (num_rotated - kv_heads)
        is_key = inside & (kv_head >= 0)[:, None]
        to = row * kv_heads * (2 * HALF) + kv_head[:, None] * (2 * HALF) + column[None, :]
        key_first, key_second = new_first.to(tl.float32), new_second.to(tl.float32)
        if CLAMP > 0:
            key_first = tl.minimum(tl.maximum(key_first, -CLAMP), CLAMP)
            key_second = tl.minimum(tl.maximum(key_second, -CLAMP), CLAMP)
        tl.store(keys_ptr + to, key_first.to(kv_kind), mask=is_key)
        tl.store(keys_ptr + to + HALF, key_second.to(kv_kind), mask=is_key)
        # values: as many heads behind them, copied by the same programs
        is_value = (head < kv_heads)[:, None] & angle_inside[None, :]
        value_at = at + num_rotated * head_stride
        value_to = row * kv_heads * (2 * HALF) + head[:, None] * (2 * HALF) + column[None, :]
        value_first = tl.load(value_at, mask=is_value, other=0.0).to(tl.float32)
        value_second = tl.load(value_at + HALF, mask=is_value, other=0.0).to(tl.float32)
        if CLAMP > 0:
            value_first = tl.minimum(tl.maximum(value_first, -CLAMP), CLAMP)
            value_second = tl.minimum(tl.maximum(value_second, -CLAMP), CLAMP)
        tl.store(values_ptr + value_to, value_first.to(kv_kind), mask=is_value)
        tl.store(values_ptr + value_to + HALF, value_second.to(kv_kind), mask=is_value)


@triton.jit
def _look_up(
    positions_ptr,
    axis_of_ptr,
    cos_table_ptr,
    sin_table_ptr,
    cos_ptr,
    sin_ptr,
    axis_stride,
    token_stride,
    num_positions,
    half,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < half
    axis = tl.load(axis_of_ptr + column, mask=inside, other=0)
    position = tl.load(
        positions_ptr + axis * axis_stride + token * token_stride, mask=inside, other=0
    )
    # Never outside the table, whatever a place without a sequence holds.
    position = tl.minimum(tl.maximum(position, 0), num_positions - 1).to(tl.int64)
    cos = tl.load(cos_table_ptr + position * half + column, mask=inside, other=0.0)
    sin = tl.load(sin_table_ptr + position * half + column, mask=inside, other=0.0)
    tl.store(cos_ptr + token * half + column, cos, mask=inside)
    tl.store(sin_ptr + token * half + column, sin, mask=inside)


def rotate_(heads: Tensor, cos: Tensor, sin: Tensor, *, in_pairs: bool = False) -> None:
    """heads: (T, heads, dim), rotated in place."""
    _launch(heads, heads.shape[1], cos, sin, heads, heads, heads, in_pairs=in_pairs, stores=False)


def rotate_and_store_(
    heads: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, write_rows: Tensor
) -> None:
    """heads: (T, heads + 2 * kv_heads, dim): queries and keys rotated in place, K and V stored."""
    assert keys.is_contiguous()
    assert values.is_contiguous()
    assert keys.dtype == values.dtype
    num_rotated = heads.shape[1] - keys.shape[1]
    _launch(heads, num_rotated, cos, sin, keys, values, write_rows, in_pairs=False, stores=True)


def _launch(
    heads: Tensor,
    num_rotated: int,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    write_rows: Tensor,
    *,
    in_pairs: bool,
    stores: bool,
) -> None:
    num_tokens, _, dim = heads.shape
    if num_tokens == 0:
        return
    assert heads.stride(2) == 1
    assert cos.stride(-1) == sin.stride(-1) == 1
    assert cos.stride(0) == sin.stride(0)
    heads_block = min(16, triton.next_power_of_2(num_rotated))
    _rotate[(num_tokens, count_blocks(num_rotated, heads_block))](
        heads,
        cos,
        sin,
        keys,
        values,
        write_rows,
        heads.stride(0),
        heads.stride(1),
        cos.stride(0),
        num_rotated,
        keys.shape[1] if stores else 0,
        HALF=dim // 2,
        IN_PAIRS=in_pairs,
        STORES=stores,
        CLAMP=MOST if keys.dtype == FP8 else 0.0,
        HEADS_BLOCK=heads_block,
        HALF_BLOCK=triton.next_power_of_2(dim // 2),
        num_warps=4,
    )


def look_up(positions: Tensor, axis_of: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """(axes, T) and the table -> two of (T, half)."""
    num_tokens, half = positions.shape[1], cos.shape[1]
    found = torch.empty((2, num_tokens, half), dtype=cos.dtype, device=cos.device)
    if num_tokens:
        _look_up[(num_tokens,)](
            positions,
            axis_of,
            cos,
            sin,
            found[0],
            found[1],
            positions.stride(0),
            positions.stride(1),
            cos.shape[0],
            half,
            BLOCK=triton.next_power_of_2(half),
            num_warps=1,
        )
    return found[0], found[1]
