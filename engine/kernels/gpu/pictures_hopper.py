"""
Attention among the patches of each picture, on GPUs of the Hopper generation, in 16 bits;
results may be in fp8.

One warp fetches tiles of keys and values with the copy engine into a ring in shared memory; two or
three groups of four warps, each with 64 query rows, multiply. A group has the next tile's scores
computed while it weighs this one's, so that the tensor cores need not wait for exponentials. Heads
of a picture follow each other in one program: the next head's queries come while this one ends.

A head is one or two pieces, each a power of two wide.
"""

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from engine.kernels.gpu import LOG2_E, count_blocks
from engine.kernels.gpu.hopper import (
    QUERIES,
    REGISTERS,
    count_heads,
    count_stages,
    describe,
    fetch,
    launch,
    make_barriers,
    next_stage,
    of_pointer,
    send,
)
from engine.kernels.quantised import FP8


@gluon.jit
def _fetch(desc, rest_desc, picture, row, head, full, to, rest_to, REST: gl.constexpr):
    """As many rows of one head as there is room for; zeros where the picture has none."""
    WIDE: gl.constexpr = to.shape[1]
    start, length = picture
    mbarrier.expect(full, to.shape[0] * (WIDE + REST) * 2)
    fetch(desc, start, length, row, head, 0, full, to)
    if REST > 0:
        fetch(rest_desc, start, length, row, head, WIDE, full, rest_to)


@gluon.jit
def _fetch_all(descs, rings, work, REST: gl.constexpr):
    """The one warp that fetches."""
    query_desc, query_rest_desc, key_desc, key_rest_desc, value_desc, value_rest_desc = descs
    query, query_rest, key, key_rest, value, value_rest = rings
    barriers, picture, first, head, num_heads = work
    query_full, query_empty, key_full, key_empty, value_full, value_empty = barriers
    STAGES: gl.constexpr = key.shape[0]
    TILE: gl.constexpr = key.shape[1]
    GROUPS: gl.constexpr = query.shape[0] // QUERIES
    _, length = picture
    num_tiles = gl.cdiv(length, TILE)
    stage = 0
    phase = 1
    for turn in range(num_heads):
        for group in gl.static_range(GROUPS):
            place = turn % QUERIES * GROUPS + group
            mbarrier.wait(query_empty.index(place), (turn // QUERIES & 1) ^ 1)
            _fetch(
                query_desc, query_rest_desc, picture, first + group * 64, head + turn,
                query_full.index(place), query.index(place), query_rest.index(place), REST,
            )  # fmt: skip
        for index in range(num_tiles):
            row = (num_tiles - 1 - index) * TILE
            mbarrier.wait(key_empty.index(stage), phase)
            _fetch(
                key_desc, key_rest_desc, picture, row, head + turn,
                key_full.index(stage), key.index(stage), key_rest.index(stage), REST,
            )  # fmt: skip
            mbarrier.wait(value_empty.index(stage), phase)
            _fetch(
                value_desc, value_rest_desc, picture, row, head + turn,
                value_full.index(stage), value.index(stage), value_rest.index(stage), REST,
            )  # fmt: skip
            stage, phase = next_stage(stage, phase, STAGES)


@gluon.jit
def _score(query, query_rest, key, key_rest, nothing, REST: gl.constexpr):
    score = warpgroup_mma(query, key.permute((1, 0)), nothing, use_acc=False, is_async=True)
    if REST > 0:
        score = warpgroup_mma(query_rest, key_rest.permute((1, 0)), score, is_async=True)
    return score


@gluon.jit
def _as_fp8(places):
    """Twice as many places, each of half as many bytes."""
    WIDTH: gl.constexpr = places.shape[2]
    SWIZZLE: gl.constexpr = WIDTH if WIDTH >= 32 else 0
    layout: gl.constexpr = gl.NVMMASharedLayout(SWIZZLE, 8, rank=2)
    return places._reinterpret(gl.float8e4nv, [2 * places.shape[0], places.shape[1], WIDTH], layout)


@gluon.jit
def _attend_rows(group, outs, rings, work, scale_log2, REST: gl.constexpr):
    """One group of four warps: its 64 query rows, of one head after the other."""
    out_desc, out_rest_desc, factors_ptr = outs
    GIVES_FP8: gl.constexpr = out_desc.dtype.primitive_bitwidth == 8
    query, query_rest, key, key_rest, value, value_rest = rings
    barriers, picture, first, head, num_heads = work
    query_full, query_empty, key_full, key_empty, value_full, value_empty = barriers
    start, length = picture
    WIDE: gl.constexpr = key.shape[2]
    TILE: gl.constexpr = key.shape[1]
    STAGES: gl.constexpr = key.shape[0]
    GROUPS: gl.constexpr = query.shape[0] // QUERIES
    REST_BLOCK: gl.constexpr = 16 if REST == 0 else REST
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 16])
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDE, 16])
    rest_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, REST_BLOCK, 16])
    weight_layout: gl.constexpr = gl.DotOperandLayout(0, out_layout, 2)
    weight_rest_layout: gl.constexpr = gl.DotOperandLayout(0, rest_layout, 2)
    kind: gl.constexpr = query.dtype

    num_tiles = gl.cdiv(length, TILE)
    row = first + group * 64
    nothing = gl.zeros([64, TILE], gl.float32, score_layout)
    columns = gl.arange(0, TILE, gl.SliceLayout(0, score_layout))
    is_key = (num_tiles - 1) * TILE + columns < length
    stage = 0
    phase = 0
    if row >= length:
        # No row of this group is in the picture: it only lets the others' tiles go by.
        for turn in range(num_heads):
            place = turn % QUERIES * GROUPS + group
            mbarrier.wait(query_full.index(place), turn // QUERIES & 1)
            mbarrier.arrive(query_empty.index(place), count=1)
            for _ in range(num_tiles):
                mbarrier.wait(key_full.index(stage), phase)
                mbarrier.arrive(key_empty.index(stage), count=1)
                mbarrier.wait(value_full.index(stage), phase)
                mbarrier.arrive(value_empty.index(stage), count=1)
                stage, phase = next_stage(stage, phase, STAGES)
    else:
        for turn in range(num_heads):
            place = turn % QUERIES * GROUPS + group
            my_query = query.index(place)
            my_query_rest = query_rest.index(place)
            mbarrier.wait(query_full.index(place), turn // QUERIES & 1)
            # 1. the last tile, of which some rows may be missing
            mbarrier.wait(key_full.index(stage), phase)
            score = _score(
                my_query, my_query_rest, key.index(stage), key_rest.index(stage), nothing, REST,
            )  # fmt: skip
            score = warpgroup_mma_wait(0, deps=[score])
            mbarrier.arrive(key_empty.index(stage), count=1)
            score = gl.where(is_key[None, :], score, float("-inf"))
            largest = gl.max(score, axis=1) * scale_log2
            weight = gl.exp2(score * scale_log2 - largest[:, None])
            total = gl.sum(weight, axis=1)
            half = weight.to(kind)
            operand = gl.convert_layout(half, weight_layout)
            operand_rest = gl.convert_layout(half, weight_rest_layout)
            out = gl.zeros([64, WIDE], gl.float32, out_layout)
            out_rest = gl.zeros([64, REST_BLOCK], gl.float32, rest_layout)
            # What the head before wrote has gone out by now.
            tma.store_wait(0)
            before = (turn + QUERIES - 1) % QUERIES * GROUPS + group
            mbarrier.arrive(query_empty.index(before), count=1, pred=turn > 0)
            # 2. the others: the next scores while the last weights are put to use
            mbarrier.wait(value_full.index(stage), phase)
            for _ in range(num_tiles - 1):
                last_stage = stage
                stage, phase = next_stage(stage, phase, STAGES)
                mbarrier.wait(key_full.index(stage), phase)
                score = _score(
                    my_query, my_query_rest, key.index(stage), key_rest.index(stage), nothing, REST,
                )  # fmt: skip
                out = warpgroup_mma(operand, value.index(last_stage), out, is_async=True)
                if REST > 0:
                    out_rest = warpgroup_mma(
                        operand_rest, value_rest.index(last_stage), out_rest, is_async=True
                    )
                score = warpgroup_mma_wait(2 if REST > 0 else 1, deps=[score])
                mbarrier.arrive(key_empty.index(stage), count=1)
                new_largest = gl.maximum(largest, gl.max(score, axis=1) * scale_log2)
                weight = gl.exp2(score * scale_log2 - new_largest[:, None])
                shrink = gl.exp2(largest - new_largest)
                total = total * shrink + gl.sum(weight, axis=1)
                largest = new_largest
                # NOTE: the wait for the next product's values stands here because the assembler moves
                # no arithmetic over it: otherwise it waits for this product first, and weighs then.
                mbarrier.wait(value_full.index(stage), phase)
                if REST > 0:
                    out, out_rest, operand, operand_rest = warpgroup_mma_wait(
                        0, deps=[out, out_rest, operand, operand_rest]
                    )
                else:
                    out, operand = warpgroup_mma_wait(0, deps=[out, operand])
                mbarrier.arrive(value_empty.index(last_stage), count=1)
                half = weight.to(kind)
                operand = gl.convert_layout(half, weight_layout)
                operand_rest = gl.convert_layout(half, weight_rest_layout)
                out *= gl.convert_layout(shrink, gl.SliceLayout(1, out_layout))[:, None]
                if REST > 0:
                    out_rest *= gl.convert_layout(shrink, gl.SliceLayout(1, rest_layout))[:, None]
            # 3. the first tile's values, and out
            out = warpgroup_mma(operand, value.index(stage), out, is_async=True)
            if REST > 0:
                out_rest = warpgroup_mma(
                    operand_rest, value_rest.index(stage), out_rest, is_async=True
                )
                out_rest = warpgroup_mma_wait(0, deps=[out_rest])
            out = warpgroup_mma_wait(0, deps=[out])
            mbarrier.arrive(value_empty.index(stage), count=1)
            stage, phase = next_stage(stage, phase, STAGES)
            share = 1.0 / total
            out *= gl.convert_layout(share, gl.SliceLayout(1, out_layout))[:, None]
            if REST > 0:
                out_rest *= gl.convert_layout(share, gl.SliceLayout(1, rest_layout))[:, None]
            # The queries have been read, so what they lie in takes what goes out.
            my_out = my_query
            my_out_rest = my_query_rest
            if GIVES_FP8:
                at = factors_ptr + (head + turn) * (WIDE + REST)
                out *= gl.load(at + gl.arange(0, WIDE, gl.SliceLayout(0, out_layout)))[None, :]
                my_out = _as_fp8(query).index(2 * place)
                if REST > 0:
                    places = gl.arange(0, REST_BLOCK, gl.SliceLayout(0, rest_layout))
                    out_rest *= gl.load(at + WIDE + places)[None, :]
                    my_out_rest = _as_fp8(query_rest).index(2 * place)
            my_out.store(out.to(out_desc.dtype))
            if REST > 0:
                my_out_rest.store(out_rest.to(out_desc.dtype))
            fence_async_shared()
            gl.thread_barrier()
            send(out_desc, start, length, row, head + turn, 0, my_out)
            if REST > 0:
                send(out_rest_desc, start, length, row, head + turn, WIDE, my_out_rest)
        tma.store_wait(0)


@gluon.jit(do_not_specialize=["heads_a_program"])
def _attend(
    query_desc, query_rest_desc, key_desc, key_rest_desc, value_desc, value_rest_desc,
    out_desc, out_rest_desc, starts_ptr, factors_ptr, scale_log2, heads_a_program,
    WIDE: gl.constexpr, REST: gl.constexpr, GROUPS: gl.constexpr, TILE: gl.constexpr,
    STAGES: gl.constexpr, GROUP_REGISTERS: gl.constexpr, FETCH_REGISTERS: gl.constexpr,
):  # fmt: skip
    kind: gl.constexpr = query_desc.dtype
    REST_BLOCK: gl.constexpr = 16 if REST == 0 else REST
    REST_TILE: gl.constexpr = 8 if REST == 0 else TILE  # a place that nothing is written to
    PLACES: gl.constexpr = QUERIES * GROUPS
    wide: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    rest: gl.constexpr = gl.NVMMASharedLayout(REST_BLOCK * 2, 16, rank=2)
    query = gl.allocate_shared_memory(kind, [PLACES, 64, WIDE], wide)
    query_rest = gl.allocate_shared_memory(kind, [PLACES, 64, REST_BLOCK], rest)
    key = gl.allocate_shared_memory(kind, [STAGES, TILE, WIDE], wide)
    key_rest = gl.allocate_shared_memory(kind, [STAGES, REST_TILE, REST_BLOCK], rest)
    value = gl.allocate_shared_memory(kind, [STAGES, TILE, WIDE], wide)
    value_rest = gl.allocate_shared_memory(kind, [STAGES, REST_TILE, REST_BLOCK], rest)
    barriers = make_barriers(PLACES, STAGES, GROUPS)

    start = gl.load(starts_ptr + gl.program_id(2))
    length = gl.load(starts_ptr + gl.program_id(2) + 1) - start
    picture = (start, length)
    first = gl.program_id(0) * (GROUPS * 64)
    head = gl.program_id(1) * heads_a_program
    num_heads = gl.where(first < length, heads_a_program, 0)
    descs = (query_desc, query_rest_desc, key_desc, key_rest_desc, value_desc, value_rest_desc)
    outs = (out_desc, out_rest_desc, factors_ptr)
    rings = (query, query_rest, key, key_rest, value, value_rest)
    work = (barriers, picture, first, head, num_heads)
    if GROUPS == 2:
        gl.warp_specialize(
            [
                (_attend_rows, (gl.to_tensor(0), outs, rings, work, scale_log2, REST)),
                (_attend_rows, (gl.to_tensor(1), outs, rings, work, scale_log2, REST)),
                (_fetch_all, (descs, rings, work, REST)),
            ],
            [4, 1],
            [GROUP_REGISTERS, FETCH_REGISTERS],
        )
    else:
        gl.warp_specialize(
            [
                (_attend_rows, (gl.to_tensor(0), outs, rings, work, scale_log2, REST)),
                (_attend_rows, (gl.to_tensor(1), outs, rings, work, scale_log2, REST)),
                (_attend_rows, (gl.to_tensor(2), outs, rings, work, scale_log2, REST)),
                (_fetch_all, (descs, rings, work, REST)),
            ],
            [4, 4, 1],
            [GROUP_REGISTERS, GROUP_REGISTERS, FETCH_REGISTERS],
        )


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts: Tensor,
    max_len: int,
    scale: float,
    *,
    groups: int = 2,
    tile: int = 128,
    factors: Tensor | None = None,
) -> Tensor:
    """
    As engine/kernels/pictures.py says; the three may lie apart.

    Args:
        factors: (heads * dim,), float32: the result is in fp8 and so many times as large. Heads are a
            multiple of 16 numbers wide then.
        groups: of four warps, 2 or 3.
        tile: keys of one turn of the loop: 64 or 128, with 3 groups 64.
    """
    num_tokens, heads, dim = query.shape
    dtype = query.dtype if factors is None else FP8
    out = torch.empty((num_tokens, heads, dim), dtype=dtype, device=query.device)
    if num_tokens == 0:
        return out
    wide = 128 if dim == 128 else 64
    rest = max(16, triton.next_power_of_2(dim - wide)) if dim > wide else 0
    descs = []
    for x, rows in ((query, 64), (key, tile), (value, tile), (out, 64)):
        first = describe(x, rows, wide)
        descs += [first, describe(x, rows, rest) if rest else first]
    num_rows = groups * 64
    together = count_heads(heads, count_blocks(num_tokens, num_rows), query.device)
    registers, group_registers, fetch_registers = REGISTERS[groups]
    stages = count_stages(groups, tile, wide + rest)
    constants = wide, rest, groups, tile, stages, group_registers, fetch_registers
    pointers = starts, starts if factors is None else factors
    args = (*descs, *pointers, scale * LOG2_E, together, *constants)
    types = query.dtype, key.dtype, value.dtype, dtype, *map(of_pointer, pointers)
    grid = count_blocks(max_len, num_rows), heads // together, len(starts) - 1
    built_for = (query.device, *types, *constants)
    launch(_attend, grid, args, built_for, num_warps=4, maxnreg=registers)
    return out
