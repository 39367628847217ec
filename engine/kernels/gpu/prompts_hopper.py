"""
Attention of prompts over their slabs, on GPUs of the Hopper generation, in 16 bits: as in
pictures_hopper.py, with tokens that look back only and heads that share keys and values.

A program takes 128 tokens of a prompt, 64 to each of its two groups, and one head after the other. A
tile is masked at the edge of what is seen only: one or two of them, the rest are whole.
"""

import torch
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
    send,
)

LEAST = gl.constexpr(-1e30)  # the largest score of a row that has seen none yet
# Groups of 64 tokens, and rows of a tile: of six variants the fastest all round (H100, 2026-11-28).
GROUPS = gl.constexpr(2)
TILE = gl.constexpr(128)


@gluon.jit
def _fetch(desc, start, length, row, head, full, to):
    """As many rows of one head as there is room for; zeros where the prompt has none."""
    mbarrier.expect(full, to.shape[0] * to.shape[1] * 2)
    fetch(desc, start, length, row, head, 0, full, to)


@gluon.jit
def _fetch_all(descs, rings, work, heads_a_kv):
    """The one warp that fetches."""
    query_desc, key_desc, value_desc = descs
    query, key, value = rings
    barriers, prompt, first, first_head, num_turns = work
    query_full, query_empty, key_full, key_empty, value_full, value_empty = barriers
    start, num_queries, slab, length = prompt
    STAGES: gl.constexpr = key.shape[0]
    num_tiles = gl.cdiv(gl.minimum(length - num_queries + first + 64 * GROUPS, length), TILE)
    stage = 0
    phase = 1
    for turn in range(num_turns):
        head = first_head + turn
        kv_head = head // heads_a_kv
        for group in gl.static_range(GROUPS):
            place = turn % QUERIES * GROUPS + group
            mbarrier.wait(query_empty.index(place), (turn // QUERIES & 1) ^ 1)
            _fetch(
                query_desc, start, num_queries, first + group * 64, head,
                query_full.index(place), query.index(place),
            )  # fmt: skip
        for index in range(num_tiles):
            row = (num_tiles - 1 - index) * TILE
            mbarrier.wait(key_empty.index(stage), phase)
            _fetch(key_desc, slab, length, row, kv_head, key_full.index(stage), key.index(stage))
            mbarrier.wait(value_empty.index(stage), phase)
            _fetch(
                value_desc, slab, length, row, kv_head, value_full.index(stage), value.index(stage)
            )
            stage, phase = next_stage(stage, phase, STAGES)


@gluon.jit
def _next_tile(
    query, key, value, key_full, key_empty, value_full, value_empty, stage, phase, largest, total,
    out, operand, tile, edge, columns, scale_log2, IS_MASKED: gl.constexpr,
):  # fmt: skip
    """The next tile's scores, while the last tile's weights are put to use."""
    STAGES: gl.constexpr = key.shape[0]
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 16])
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, key.shape[2], 16])
    weight_layout: gl.constexpr = gl.DotOperandLayout(0, out_layout, 2)
    nothing = gl.zeros([64, TILE], gl.float32, score_layout)
    last_stage = stage
    stage, phase = next_stage(stage, phase, STAGES)
    mbarrier.wait(key_full.index(stage), phase)
    score = warpgroup_mma(
        query, key.index(stage).permute((1, 0)), nothing, use_acc=False, is_async=True
    )
    out = warpgroup_mma(operand, value.index(last_stage), out, is_async=True)
    score = warpgroup_mma_wait(1, deps=[score])
    mbarrier.arrive(key_empty.index(stage), count=1)
    if IS_MASKED:
        is_seen = (tile * TILE + columns)[None, :] <= edge[:, None]
        score = gl.where(is_seen, score, float("-inf"))
    new_largest = gl.maximum(largest, gl.max(score, axis=1) * scale_log2)
    weight = gl.exp2(score * scale_log2 - new_largest[:, None])
    shrink = gl.exp2(largest - new_largest)
    total = total * shrink + gl.sum(weight, axis=1)
    # NOTE: the wait for the next product's values stands here because the assembler moves no
    # arithmetic over it: otherwise it waits for this product first, and weighs then.
    mbarrier.wait(value_full.index(stage), phase)
    out, operand = warpgroup_mma_wait(0, deps=[out, operand])
    mbarrier.arrive(value_empty.index(last_stage), count=1)
    operand = gl.convert_layout(weight.to(query.dtype), weight_layout)
    out *= gl.convert_layout(shrink, gl.SliceLayout(1, out_layout))[:, None]
    return stage, phase, new_largest, total, out, operand


@gluon.jit
def _attend_rows(group, out_desc, rings, work, scale_log2):
    """One group of four warps: 64 query rows, of one head after the other."""
    query, key, value = rings
    barriers, prompt, first, first_head, num_turns = work
    query_full, query_empty, key_full, key_empty, value_full, value_empty = barriers
    start, num_queries, _slab, length = prompt
    STAGES: gl.constexpr = key.shape[0]
    DIM: gl.constexpr = key.shape[2]
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 16])
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM, 16])
    weight_layout: gl.constexpr = gl.DotOperandLayout(0, out_layout, 2)
    kind: gl.constexpr = query.dtype

    before = length - num_queries  # rows that earlier calls have written
    num_tiles = gl.cdiv(gl.minimum(before + first + 64 * GROUPS, length), TILE)
    row = first + group * 64
    # Of this group: tiles that any of its rows sees, those of them that all of its rows see, and those
    # at the edge besides the last.
    my_tiles = gl.cdiv(gl.minimum(before + row + 64, length), TILE)
    whole = gl.minimum((before + row + 1) // TILE, my_tiles - 1)
    edges = my_tiles - 1 - whole
    edge = before + row + gl.arange(0, 64, gl.SliceLayout(1, score_layout))
    columns = gl.arange(0, TILE, gl.SliceLayout(0, score_layout))
    nothing = gl.zeros([64, TILE], gl.float32, score_layout)
    stage = 0
    phase = 0
    for turn in range(num_turns):
        head = first_head + turn
        is_idle = row >= num_queries
        place = turn % QUERIES * GROUPS + group
        place_before = (turn + QUERIES - 1) % QUERIES * GROUPS + group
        mbarrier.wait(query_full.index(place), turn // QUERIES & 1)
        skipped = num_tiles - my_tiles
        if is_idle:
            skipped = num_tiles
        for _ in range(skipped):
            mbarrier.wait(key_full.index(stage), phase)
            mbarrier.arrive(key_empty.index(stage), count=1)
            mbarrier.wait(value_full.index(stage), phase)
            mbarrier.arrive(value_empty.index(stage), count=1)
            stage, phase = next_stage(stage, phase, STAGES)
        if is_idle:
            tma.store_wait(0)
            mbarrier.arrive(query_empty.index(place_before), count=1, pred=turn > 0)
        else:
            my_query = query.index(place)
            # 1. the last tile that is seen, at the edge
            mbarrier.wait(key_full.index(stage), phase)
            score = warpgroup_mma(
                my_query, key.index(stage).permute((1, 0)), nothing, use_acc=False, is_async=True
            )
            score = warpgroup_mma_wait(0, deps=[score])
            mbarrier.arrive(key_empty.index(stage), count=1)
            is_seen = ((my_tiles - 1) * TILE + columns)[None, :] <= edge[:, None]
            score = gl.where(is_seen, score, float("-inf"))
            largest = gl.maximum(gl.max(score, axis=1) * scale_log2, LEAST)
            weight = gl.exp2(score * scale_log2 - largest[:, None])
            total = gl.sum(weight, axis=1)
            operand = gl.convert_layout(weight.to(kind), weight_layout)
            out = gl.zeros([64, DIM], gl.float32, out_layout)
            # What the head before wrote has gone out by now.
            tma.store_wait(0)
            mbarrier.arrive(query_empty.index(place_before), count=1, pred=turn > 0)
            mbarrier.wait(value_full.index(stage), phase)
            # 2. another at the edge where rows and tiles begin at different places, and the whole ones
            for index in range(edges):
                stage, phase, largest, total, out, operand = _next_tile(
                    my_query, key, value, key_full, key_empty, value_full, value_empty, stage,
                    phase, largest, total, out, operand, my_tiles - 2 - index, edge, columns,
                    scale_log2, True,
                )  # fmt: skip
            for _ in range(whole):
                stage, phase, largest, total, out, operand = _next_tile(
                    my_query, key, value, key_full, key_empty, value_full, value_empty, stage,
                    phase, largest, total, out, operand, 0, edge, columns, scale_log2, False,
                )  # fmt: skip
            # 3. the first tile's values, and out
            out = warpgroup_mma(operand, value.index(stage), out, is_async=True)
            out = warpgroup_mma_wait(0, deps=[out])
            mbarrier.arrive(value_empty.index(stage), count=1)
            stage, phase = next_stage(stage, phase, STAGES)
            out *= gl.convert_layout(1.0 / total, gl.SliceLayout(1, out_layout))[:, None]
            # The queries have been read, so what they lie in takes what goes out.
            my_query.store(out.to(kind))
            fence_async_shared()
            gl.thread_barrier()
            send(out_desc, start, num_queries, row, head, 0, my_query)
    tma.store_wait(0)


# NOTE: the three begin anywhere in a table: as many kernels would be compiled as there are alignments.
@gluon.jit(
    do_not_specialize=["num_turns", "heads_a_kv"],
    do_not_specialize_on_alignment=["query_starts_ptr", "slab_starts_ptr", "lens_ptr"],
)
def _attend(
    query_desc, key_desc, value_desc, out_desc, query_starts_ptr, slab_starts_ptr, lens_ptr,
    scale_log2, num_turns, heads_a_kv, DIM: gl.constexpr, STAGES: gl.constexpr,
    GROUP_REGISTERS: gl.constexpr, FETCH_REGISTERS: gl.constexpr,
):  # fmt: skip
    kind: gl.constexpr = query_desc.dtype
    PLACES: gl.constexpr = QUERIES * GROUPS
    layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    query = gl.allocate_shared_memory(kind, [PLACES, 64, DIM], layout)
    key = gl.allocate_shared_memory(kind, [STAGES, TILE, DIM], layout)
    value = gl.allocate_shared_memory(kind, [STAGES, TILE, DIM], layout)
    barriers = make_barriers(PLACES, STAGES, GROUPS)

    sequence = gl.program_id(1)
    start = gl.load(query_starts_ptr + sequence)
    num_queries = gl.load(query_starts_ptr + sequence + 1) - start
    prompt = (start, num_queries, gl.load(slab_starts_ptr + sequence), gl.load(lens_ptr + sequence))
    # The last rows of a prompt see most: they begin first, in all prompts.
    first = (gl.cdiv(num_queries, 64 * GROUPS) - 1 - gl.program_id(2)) * (64 * GROUPS)
    num_mine = gl.where(first >= 0, num_turns, 0)
    first_head = gl.program_id(0) * num_turns
    descs = (query_desc, key_desc, value_desc)
    rings = (query, key, value)
    work = (barriers, prompt, first, first_head, num_mine)
    gl.warp_specialize(
        [
            (_attend_rows, (gl.to_tensor(0), out_desc, rings, work, scale_log2)),
            (_attend_rows, (gl.to_tensor(1), out_desc, rings, work, scale_log2)),
            (_fetch_all, (descs, rings, work, heads_a_kv)),
        ],
        [4, 1],
        [GROUP_REGISTERS, FETCH_REGISTERS],
    )


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    query_starts: Tensor,
    slab_starts: Tensor,
    lens: Tensor,
    max_queries: int,
    scale: float,
) -> Tensor:
    """As engine/kernels/prompts.py says, in 16 bits and with heads of 64 or 128."""
    num_tokens, heads, dim = query.shape
    out = torch.empty((num_tokens, heads, dim), dtype=query.dtype, device=query.device)
    if num_tokens == 0:
        return out
    groups, tile = GROUPS.value, TILE.value
    num_rows = 64 * groups
    together = count_heads(heads, count_blocks(num_tokens, num_rows), query.device)
    registers, group_registers, fetch_registers = REGISTERS[groups]
    tables = query_starts, slab_starts, lens
    constants = dim, count_stages(groups, tile, dim), group_registers, fetch_registers
    args = (
        describe(query, 64, dim),
        describe(keys, tile, dim),
        describe(values, tile, dim),
        describe(out, 64, dim),
        *tables,
        scale * LOG2_E,
        together,
        heads // keys.shape[1],
        *constants,
    )
    types = query.dtype, keys.dtype, values.dtype, *(table.dtype for table in tables)
    grid = heads // together, len(query_starts) - 1, count_blocks(max_queries, num_rows)
    built_for = (query.device, *types, *constants)
    launch(_attend, grid, args, built_for, num_warps=4, maxnreg=registers)
    return out
