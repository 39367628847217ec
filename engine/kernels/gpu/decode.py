"""
Decode attention over slabs: split-KV, all query heads of a group in one tile of 16 rows or more.

The tile exists because tensor cores want 16 rows; with fewer heads in a group the rest is masked,
which costs nothing where reading K and V is what takes the time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.gpu import LOG2_E, count_blocks

TILE = 64  # KV rows of one turn of the loop
JOINED = 16  # splits that the second kernel reads at once


@triton.jit
def _attend_split(
    query_ptr,
    keys_ptr,
    values_ptr,
    starts_ptr,
    lens_ptr,
    out_ptr,
    sums_ptr,
    maxima_ptr,
    max_len,
    scale_log2,
    query_seq_stride,
    query_head_stride,
    row_stride,
    kv_head_stride,
    num_splits,
    heads,
    GROUP: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
    DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    SPLIT_ROWS: tl.constexpr,
    TILE: tl.constexpr,
    IS_WHOLE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    seq = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    length = tl.minimum(tl.load(lens_ptr + seq).to(tl.int32), max_len)
    start = tl.load(starts_ptr + seq).to(tl.int64)
    first = split * SPLIT_ROWS
    end = tl.minimum(first + SPLIT_ROWS, length)
    member = tl.arange(0, GROUP_BLOCK)
    column = tl.arange(0, DIM_BLOCK)
    head = kv_head * GROUP + member
    is_member = member < GROUP
    is_column = column < DIM
    inside = is_member[:, None] & is_column[None, :]
    query = tl.load(
        query_ptr + seq * query_seq_stride + head[:, None] * query_head_stride + column[None, :],
        mask=inside,
        other=0.0,
    )
    largest = tl.full([GROUP_BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([GROUP_BLOCK], tl.float32)
    out = tl.zeros([GROUP_BLOCK, DIM_BLOCK], tl.float32)
    kv_offset = start * row_stride + kv_head * kv_head_stride
    for tile_start in range(first, end, TILE):
        row = tile_start + tl.arange(0, TILE)
        is_used = row < end  # rows behind it belong to nobody, or to another
        at = kv_offset + row.to(tl.int64)[:, None] * row_stride + column[None, :]
        is_read = is_used[:, None] & is_column[None, :]
        key = tl.load(keys_ptr + at, mask=is_read, other=0.0).to(query.dtype)
        value = tl.load(values_ptr + at, mask=is_read, other=0.0).to(query.dtype)
        score = tl.dot(query, tl.trans(key), input_precision=PRECISION) * scale_log2
        score = tl.where(is_used[None, :], score, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(score, axis=1))
        weight = tl.exp2(score - new_largest[:, None])
        shrink = tl.exp2(largest - new_largest)
        total = total * shrink + tl.sum(weight, axis=1)
        out = out * shrink[:, None]
        out += tl.dot(weight.to(query.dtype), value, input_precision=PRECISION)
        largest = new_largest
    if IS_WHOLE:
        out = out / tl.where(total == 0.0, 1.0, total)[:, None]
        to = (seq * heads + head[:, None]) * DIM + column[None, :]
        tl.store(out_ptr + to, out.to(out_ptr.dtype.element_ty), mask=inside)
    else:
        # Splits behind the last row are not read by the second kernel: nothing to write.
        place = (seq * heads + head) * num_splits + split
        is_written = is_member & (first < length)
        tl.store(sums_ptr + place, total, mask=is_written)
        tl.store(maxima_ptr + place, largest, mask=is_written)
        tl.store(
            out_ptr + place[:, None] * DIM + column[None, :],
            out,
            mask=is_written[:, None] & is_column[None, :],
        )


@triton.jit
def _join(
    parts_ptr,
    sums_ptr,
    maxima_ptr,
    lens_ptr,
    out_ptr,
    max_len,
    num_splits,
    heads,
    DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    SPLIT_ROWS: tl.constexpr,
    JOINED: tl.constexpr,
):
    seq = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    length = tl.minimum(tl.load(lens_ptr + seq).to(tl.int32), max_len)
    num_used = (length + SPLIT_ROWS - 1) // SPLIT_ROWS
    column = tl.arange(0, DIM_BLOCK)
    is_column = column < DIM
    first_place = (seq * heads + head) * num_splits
    largest = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    out = tl.zeros([DIM_BLOCK], tl.float32)
    for first in range(0, num_used, JOINED):
        split = first + tl.arange(0, JOINED)
        is_used = split < num_used
        place = first_place + split
        maxima = tl.load(maxima_ptr + place, mask=is_used, other=float("-inf"))
        sums = tl.load(sums_ptr + place, mask=is_used, other=0.0)
        part = tl.load(
            parts_ptr + place[:, None] * DIM + column[None, :],
            mask=is_used[:, None] & is_column[None, :],
            other=0.0,
        )
        new_largest = tl.maximum(largest, tl.max(maxima, axis=0))
        weight = tl.exp2(maxima - new_largest)
        shrink = tl.exp2(largest - new_largest)
        total = total * shrink + tl.sum(weight * sums, axis=0)
        out = out * shrink + tl.sum(weight[:, None] * part, axis=0)
        largest = new_largest
    out = out / tl.where(total == 0.0, 1.0, total)
    to = (seq * heads + head) * DIM + column
    tl.store(out_ptr + to, out.to(out_ptr.dtype.element_ty), mask=is_column)


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    starts: Tensor,
    lens: Tensor,
    max_len: int,
    scale: float,
    split_rows: int,
    *,
    tile: int = TILE,
    num_warps: int = 4,
    num_stages: int = 3,
) -> Tensor:
    """As engine/kernels/decode.py says; the rest is for measuring."""
    num_seqs, heads, dim = query.shape
    kv_heads = keys.shape[1]
    assert query.stride(2) == 1
    assert keys.is_contiguous()
    assert values.is_contiguous()
    assert keys.shape == values.shape
    out = torch.empty((num_seqs, heads, dim), dtype=query.dtype, device=query.device)
    if num_seqs == 0:
        return out
    num_splits = max(1, count_blocks(max_len, split_rows))
    parts, sums, maxima = out, out, out
    if num_splits > 1:
        shape = (num_seqs, heads, num_splits)
        parts = torch.empty((*shape, dim), dtype=torch.float32, device=query.device)
        sums = torch.empty(shape, dtype=torch.float32, device=query.device)
        maxima = torch.empty(shape, dtype=torch.float32, device=query.device)
    dim_block = max(16, triton.next_power_of_2(dim))
    _attend_split[(num_seqs, kv_heads, num_splits)](
        query,
        keys,
        values,
        starts,
        lens,
        parts,
        sums,
        maxima,
        max_len,
        scale * LOG2_E,
        query.stride(0),
        query.stride(1),
        keys.stride(0),
        keys.stride(1),
        num_splits,
        heads,
        GROUP=heads // kv_heads,
        GROUP_BLOCK=max(16, triton.next_power_of_2(heads // kv_heads)),
        DIM=dim,
        DIM_BLOCK=dim_block,
        SPLIT_ROWS=split_rows,
        TILE=tile,
        IS_WHOLE=num_splits == 1,
        PRECISION="ieee",  # of float32 only
        num_warps=num_warps,
        num_stages=num_stages,
    )
    if num_splits > 1:
        _join[(num_seqs, heads)](
            parts,
            sums,
            maxima,
            lens,
            out,
            max_len,
            num_splits,
            heads,
            DIM=dim,
            DIM_BLOCK=dim_block,
            SPLIT_ROWS=split_rows,
            JOINED=JOINED,
            num_warps=4,
        )
    return out
