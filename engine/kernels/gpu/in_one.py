"""
A matrix product whose result is activated, rotated, added or normed on its way out, for Hopper: rows
(M, K) by weights (N, K), in 16 bits or in fp8.

A block of threads stays on each multiprocessor and takes tiles of the result in turn, ordered so that
those in work at a time share rows and weights in the L2 cache. One warp of it loads, by TMA, into a
ring of stages; each of two groups of four warps multiplies 64 rows of the tile by all 256 columns,
goes on with the sums in float32 and stores them by TMA. The groups go on by themselves, one some steps
ahead: while one is at its sums, the other has the tensor cores. It is so for no more than these steps,
and what is done to sums has to be short. So weights are loaded in such an order that a thread has sums
of sixteen columns side by side: it reads what belongs to them, and writes them, in few instructions, and
sums that rotate each other are in one thread.
"""

import math
from typing import TYPE_CHECKING

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
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from engine.kernels import activations
from engine.kernels.gpu import count_blocks
from engine.kernels.gpu.hopper import launch, lay_out, of_pointer
from engine.kernels.gpu.processors import count_processors
from engine.kernels.in_one import RUN
from engine.kernels.quantised import Fp8Rows

if TYPE_CHECKING:
    from engine.kernels.folded import Norm

QUICK_GELU, GELU_TANH, SILU_MUL, ROTATE, ADD, NOTHING = range(6)  # what happens to the sums
RMS_NORM, LAYER_NORM = 1, 2  # of the rows that were multiplied, done afterwards
LINE = 128  # bytes of the depth in a stage

_QUICK_GELU = gl.constexpr(QUICK_GELU)
_GELU_TANH = gl.constexpr(GELU_TANH)
_SILU_MUL = gl.constexpr(SILU_MUL)
_ROTATE = gl.constexpr(ROTATE)
_ADD = gl.constexpr(ADD)
_NOTHING = gl.constexpr(NOTHING)
_LAYER_NORM = gl.constexpr(LAYER_NORM)
_SLOPE = gl.constexpr(activations.QUICK_GELU)
_SQRT_2_PI = gl.constexpr(math.sqrt(2 / math.pi))
_GROUPS = gl.constexpr(2)  # of four warps that multiply
_ROWS = gl.constexpr(64)  # of a tile, for each of them
_HALF = gl.constexpr(128)  # columns of a tile, in two halves
_PART = gl.constexpr(64)  # columns that are activated and stored at a time
_RUN = gl.constexpr(RUN)
_LINE_BITS = gl.constexpr(8 * LINE)
_STAGES = gl.constexpr(4)  # of the ring
_LEAD = 3  # steps by which the first group starts ahead
_TILE_GROUP = gl.constexpr(8)  # rows of tiles that are in work at a time


@gluon.jit
def _find_tile(tile, num_down, num_across):
    """Row and column of a tile: some rows of tiles at a time, each column by column."""
    in_group = _TILE_GROUP * num_across
    first = tile // in_group * _TILE_GROUP
    rows = gl.minimum(num_down - first, _TILE_GROUP)
    rest = tile % in_group
    return first + rest % rows, rest // rows


@gluon.jit
def _next(stage, phase):
    stage += 1
    phase = gl.where(stage == _STAGES, phase ^ 1, phase)
    stage = gl.where(stage == _STAGES, 0, stage)
    return stage, phase


@gluon.jit
def _before(stage):
    # NOTE: a variable carried for this, set to `stage` before a loop and again in it, would not be
    # carried at all: Triton takes it for the same value, and each arrival would free one stage.
    return gl.where(stage == 0, _STAGES, stage) - 1


@gluon.jit
def _load(rings, bars, counts, GATED: gl.constexpr):
    x_desc, weight_desc, x_ring, weight_ring = rings
    full, empty, _lead = bars
    num_steps, num_down, num_across, width = counts
    STEP: gl.constexpr = x_ring.shape[2]
    BYTES: gl.constexpr = (_GROUPS * _ROWS + 2 * _HALF) * _LINE_BITS // 8
    stage = gl.to_tensor(0)
    phase = gl.to_tensor(1)
    for tile in range(gl.program_id(0), num_down * num_across, gl.num_programs(0)):
        down, across = _find_tile(tile, num_down, num_across)
        row = down * (_GROUPS * _ROWS)
        if GATED:
            first = across * _HALF
            other = width + first
        else:
            first = across * (2 * _HALF)
            other = first + _HALF
        for step in range(num_steps):
            at = step * STEP
            mbarrier.wait(empty.index(stage), phase)
            bar = full.index(stage)
            mbarrier.expect(bar, BYTES)
            for group in gl.static_range(_GROUPS):
                tma.async_copy_global_to_shared(
                    x_desc, [row + group * _ROWS, at], bar, x_ring.index(stage * _GROUPS + group)
                )
            tma.async_copy_global_to_shared(
                weight_desc, [0, first // _RUN, 0, at], bar, weight_ring.index(2 * stage)
            )
            tma.async_copy_global_to_shared(
                weight_desc, [0, other // _RUN, 0, at], bar, weight_ring.index(2 * stage + 1)
            )
            stage, phase = _next(stage, phase)


@gluon.jit
def _sort(x):
    """
    Sums with their columns in order, where `_describe_weight` loads weights in another; registers only
    get other names.
    """
    ROWS: gl.constexpr = x.shape[0]
    # Halves, pairs of a run, parts of a half, runs of a part (each in another thread), columns of a pair.
    x = x.reshape([ROWS, 2, _RUN // 2, _HALF // _PART, _PART // _RUN, 2])
    return x.permute([0, 1, 3, 4, 2, 5]).reshape([ROWS, 2 * _HALF])


@gluon.jit
def _halve(x):
    """(rows, columns) -> its left and its right columns; registers only get other names."""
    ROWS: gl.constexpr = x.shape[0]
    COLUMNS: gl.constexpr = x.shape[1]
    return x.reshape([ROWS, 2, COLUMNS // 2]).permute([0, 2, 1]).split()


@gluon.jit
def _in_runs(part):
    """Registers in the order of columns, too: sixteen of a row, and of the row eight further down."""
    layout: gl.constexpr = gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [0, 4], [0, 8], [8, 0]],
        lane_bases=[[0, 16], [0, 32], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[_ROWS, _PART],
    )
    return gl.convert_layout(part, layout)


@gluon.jit
def _split(sums):
    """The parts of a tile, from left to right."""
    left, right = _halve(_sort(sums))
    a, b = _halve(left)
    c, d = _halve(right)
    return _in_runs(a), _in_runs(b), _in_runs(c), _in_runs(d)


@gluon.jit
def _tanh(x):
    """
    On the fast units, to 11 bits: what is activated may be off by |x| / 2**12. Rounding x to bfloat16 may
    change it by sixteen times as much, to float16 by twice. What a negative x becomes is near zero and may
    be off by as much, too.
    """
    return gl.inline_asm_elementwise(
        "tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def _activate(x, KIND: gl.constexpr):
    """x / 2 * (1 + tanh(y)), which for y = slope * x / 2 is x / (1 + exp(-slope * x))."""
    half = x * 0.5
    if KIND == _QUICK_GELU:
        y = x * (_SLOPE * 0.5)
    elif KIND == _GELU_TANH:
        y = x * (x * x * (_SQRT_2_PI * 0.044715) + _SQRT_2_PI)
    else:
        y = half
    return half * _tanh(y) + half


@gluon.jit
def _load_angles(row, column, angles, DIM: gl.constexpr, layout: gl.constexpr):
    """Of a part, as `multiply_and_rotate` has them; columns that are not rotated turn by nothing."""
    angles_ptr, stride, num_rows, num_rotated = angles
    rows = row + gl.arange(0, _ROWS, layout=gl.SliceLayout(1, layout))
    columns = column + gl.arange(0, _PART, layout=gl.SliceLayout(0, layout))
    at = gl.expand_dims(rows * stride, 1) + gl.expand_dims(columns % DIM, 0)
    inside = gl.expand_dims(rows < num_rows, 1) & gl.expand_dims(columns < num_rotated, 0)
    nothing = gl.expand_dims(gl.where(columns % 2 == 0, 1.0, 0.0), 0)
    return gl.load(angles_ptr + at, mask=inside, other=nothing.to(gl.float16))


@gluon.jit
def _rotate(x, angles):
    """Columns 2 j and 2 j + 1 by angle j of their row."""
    PAIRS: gl.constexpr = x.shape[1] // 2
    first, second = x.reshape([x.shape[0], PAIRS, 2]).split()
    cos, sin = angles.to(gl.float32).reshape([x.shape[0], PAIRS, 2]).split()
    return gl.join(first * cos - second * sin, second * cos + first * sin).reshape(x.shape)


@gluon.jit
def _load_stream(row, column, stream, layout: gl.constexpr):
    """What stands in the places of a part."""
    stream_ptr, num_rows, width = stream
    rows = row + gl.arange(0, _ROWS, layout=gl.SliceLayout(1, layout))
    columns = column + gl.arange(0, _PART, layout=gl.SliceLayout(0, layout))
    at = gl.expand_dims(rows.to(gl.int64) * width, 1) + gl.expand_dims(columns, 0)
    inside = gl.expand_dims(rows < num_rows, 1) & gl.expand_dims(columns < width, 0)
    return gl.load(stream_ptr + at, mask=inside, other=0.0)


@gluon.jit
def _load_columns(
    column,
    offset,
    columns_of,
    SCALED: gl.constexpr,
    NORM: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    layout: gl.constexpr,
):
    """
    Of each column of a part: the factor of its weights, in fp8 their scale, for a LayerNorm their sum;
    and its bias.

    offset: of the weight that makes a column, behind the one of this number.
    """
    factors_ptr, bias_ptr, width = columns_of
    columns = column + gl.arange(0, _PART, layout=gl.SliceLayout(0, layout))
    factor = 0.0
    bias = 0.0
    if SCALED or NORM == _LAYER_NORM:
        factor = gl.load(factors_ptr + offset + columns, mask=columns < width, other=0.0)
    if HAS_BIAS:
        bias = gl.load(bias_ptr + offset + columns, mask=columns < width, other=0.0)
    return factor, bias


@gluon.jit
def _load_scales(row, scales, layout: gl.constexpr):
    """Of each row in fp8; and by what its result, no larger than a share of that and a rest, fits."""
    scales_ptr, num_rows, share, rest = scales
    rows = row + gl.arange(0, _ROWS, layout=gl.SliceLayout(1, layout))
    scale = gl.load(scales_ptr + rows, mask=rows < num_rows, other=1.0)
    return scale, 1.0 / (scale * share + rest)


@gluon.jit
def _load_norms(row, norms, NORM: gl.constexpr, layout: gl.constexpr):
    """Of each row that was multiplied: its mean, zero where it is not taken off, and 1 / its size."""
    totals_ptr, num_parts, num_rows, depth, eps = norms
    rows = row + gl.arange(0, _ROWS, layout=gl.SliceLayout(1, layout))
    at = totals_ptr + rows * num_parts
    mean = gl.zeros([_ROWS], gl.float32, gl.SliceLayout(1, layout))
    squares = gl.zeros([_ROWS], gl.float32, gl.SliceLayout(1, layout))
    for part in range(num_parts):
        squares += gl.load(at + num_rows * num_parts + part, mask=rows < num_rows, other=0.0)
        if NORM == _LAYER_NORM:
            mean += gl.load(at + part, mask=rows < num_rows, other=0.0)
    mean = mean / depth
    # Of a row of equal numbers the difference may be rounded below zero.
    return mean, gl.rsqrt(gl.maximum(squares / depth - mean * mean, 0.0) + eps)


@gluon.jit
def _finish(
    x, of_rows, of_columns, SCALED: gl.constexpr, NORM: gl.constexpr, HAS_BIAS: gl.constexpr
):
    """Sums as they would be of numbers in 16 bits, of normed rows, and with a bias."""
    factor, bias = of_columns
    if SCALED:
        x = x * gl.expand_dims(of_rows[0], 1) * gl.expand_dims(factor, 0)
    if NORM == _LAYER_NORM:
        x = x - gl.expand_dims(of_rows[0], 1) * gl.expand_dims(factor, 0)
    if NORM:
        x = x * gl.expand_dims(of_rows[1], 1)
    if HAS_BIAS:
        x = x + gl.expand_dims(bias.to(gl.float32), 0)
    return x


@gluon.jit
def _load_part(
    row,
    column,
    behind,
    KIND: gl.constexpr,
    NORM: gl.constexpr,
    SCALED: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    DIM: gl.constexpr,
    layout: gl.constexpr,
):
    """All that is read to finish a part: of its columns, and by what it is gated, rotated or added to."""
    _scales, _norms, columns_of, angles, stream = behind
    of_columns = _load_columns(column, 0, columns_of, SCALED, NORM, HAS_BIAS, layout)
    other = 0.0
    if KIND == _SILU_MUL:
        other = _load_columns(column, columns_of[2], columns_of, SCALED, NORM, HAS_BIAS, layout)
    elif KIND == _ROTATE:
        other = _load_angles(row, column, angles, DIM, layout)
    elif KIND == _ADD:
        other = _load_stream(row, column, stream, layout)
    return of_columns, other


@gluon.jit
def _keep_totals(total, squares, row, across, num_across, norms):
    """Of the columns of a tile: what they add up to, and their squares; (2, rows, tiles across)."""
    totals_ptr, _num_parts, num_rows, _depth, _eps = norms
    rows = row + gl.arange(0, total.shape[0], layout=total.type.layout)
    at = totals_ptr + rows * num_across + across
    gl.store(at, total, mask=rows < num_rows)
    gl.store(at + num_rows * num_across, squares, mask=rows < num_rows)


@gluon.jit
def _put(
    out_desc,
    x,
    out_buffers,
    row,
    column,
    GROUP: gl.constexpr,
    PART: gl.constexpr,
    LAST: gl.constexpr,
):
    """
    Lay a part into the next buffer of the group, the first only when what was stored before has left; once
    all are full, or it is the last part, store them by TMA.
    """
    BUFFERS: gl.constexpr = out_buffers.shape[0] // _GROUPS
    AT: gl.constexpr = PART % BUFFERS
    if AT == 0:
        tma.store_wait(pendings=0)
    out_buffers.index(GROUP * BUFFERS + AT).store(x)
    if AT == BUFFERS - 1 or PART == LAST:
        fence_async_shared()
        for at in gl.static_range(AT + 1):
            tma.async_copy_shared_to_global(
                out_desc, [row, column + (at - AT) * _PART], out_buffers.index(GROUP * BUFFERS + at)
            )


@gluon.jit
def _multiply_group(
    tensors,
    behind,
    KIND: gl.constexpr,
    NORM: gl.constexpr,
    KEEPS_TOTALS: gl.constexpr,
    DIM: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    GROUP: gl.constexpr,
    LEAD: gl.constexpr,
):
    out_desc, x_ring, weight_ring, out_buffers, bars, counts = tensors
    scales, norms, _columns_of, _angles, _stream = behind
    full, empty, lead = bars
    num_steps, num_down, num_across, _width = counts
    GATED: gl.constexpr = KIND == _SILU_MUL
    PARTS: gl.constexpr = (1 if GATED else 2) * _HALF // _PART  # of the result in a tile
    BITS: gl.constexpr = x_ring.dtype.primitive_bitwidth
    SCALED: gl.constexpr = BITS == 8
    layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 2 * _HALF, 256 // BITS]
    )
    stage = gl.to_tensor(0)
    phase = gl.to_tensor(0)
    if GROUP == 1:
        mbarrier.wait(lead, 0)
    acc = gl.zeros((_ROWS, 2 * _HALF), gl.float32, layout)
    part_layout: gl.constexpr = _split(acc)[0].type.layout
    done = 0
    for tile in range(gl.program_id(0), num_down * num_across, gl.num_programs(0)):
        down, across = _find_tile(tile, num_down, num_across)
        for step in range(num_steps):
            mbarrier.wait(full.index(stage), phase)
            acc = warpgroup_mma(
                x_ring.index(stage * _GROUPS + GROUP),
                weight_ring.index(stage).permute((1, 0)),
                acc,
                use_acc=step > 0,
                is_async=True,
            )
            acc = warpgroup_mma_wait(1, (acc,))
            mbarrier.arrive(empty.index(_before(stage)), pred=step > 0)
            if GROUP == 0:  # noqa: SIM102 - known before it is compiled
                if done == LEAD - 1:
                    mbarrier.arrive(lead)
            stage, phase = _next(stage, phase)
            done += 1
        row = down * (_GROUPS * _ROWS) + GROUP * _ROWS
        column = across * (PARTS * _PART)
        # Read while the last products are under way, and of each part while the one before it is stored.
        of_rows = (0.0, 0.0)
        if SCALED:
            of_rows = _load_scales(row, scales, part_layout)
        elif NORM:
            of_rows = _load_norms(row, norms, NORM, part_layout)
        of_part = _load_part(row, column, behind, KIND, NORM, SCALED, HAS_BIAS, DIM, part_layout)
        acc = warpgroup_mma_wait(0, (acc,))
        mbarrier.arrive(empty.index(_before(stage)))

        sums = _split(acc)
        if KEEPS_TOTALS:
            total = gl.zeros([_ROWS], gl.float32, gl.SliceLayout(1, part_layout))
            squares = gl.zeros([_ROWS], gl.float32, gl.SliceLayout(1, part_layout))
        for part in gl.static_range(PARTS):
            of_columns, other = of_part
            x = _finish(sums[part], of_rows, of_columns, SCALED, NORM, HAS_BIAS)
            if GATED:
                gated = _finish(sums[PARTS + part], of_rows, other, SCALED, NORM, HAS_BIAS)
                x = _activate(x, KIND) * gated
            elif KIND == _ROTATE:
                x = _rotate(x, other)
            elif KIND == _ADD:
                x = x + other.to(gl.float32)
            elif KIND != _NOTHING:
                x = _activate(x, KIND)
            if out_desc.dtype.primitive_bitwidth == 8:
                x = x * gl.expand_dims(of_rows[1], 1)
            x = x.to(out_desc.dtype)
            if KEEPS_TOTALS:
                exact = x.to(gl.float32)
                total += gl.sum(exact, axis=1)
                squares += gl.sum(exact * exact, axis=1)
            if part < PARTS - 1:
                of_part = _load_part(
                    row, column + _PART, behind, KIND, NORM, SCALED, HAS_BIAS, DIM, part_layout
                )
            _put(out_desc, x, out_buffers, row, column, GROUP, part, PARTS - 1)
            column += _PART
        if KEEPS_TOTALS:
            _keep_totals(total, squares, row, across, num_across, norms)
    tma.store_wait(pendings=0)


@gluon.jit(do_not_specialize=["num_rows", "num_steps"])
def _multiply(
    x_desc,
    weight_desc,
    out_desc,
    bias_ptr,
    stream_ptr,
    angles_ptr,
    row_scales_ptr,
    factors_ptr,
    totals_ptr,
    num_rows,
    num_steps,
    width,
    angle_stride,
    num_rotated,
    share,
    rest,
    num_parts,
    depth,
    eps,
    KIND: gl.constexpr,
    NORM: gl.constexpr,
    KEEPS_TOTALS: gl.constexpr,
    DIM: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    LEAD: gl.constexpr,
):
    """width: of the result; a gated product's weights are twice as many."""
    GATED: gl.constexpr = KIND == _SILU_MUL
    dtype: gl.constexpr = x_desc.dtype
    STEP: gl.constexpr = _LINE_BITS // dtype.primitive_bitwidth
    x_ring = gl.allocate_shared_memory(dtype, [_STAGES * _GROUPS, _ROWS, STEP], x_desc.layout)
    weight_ring = gl.allocate_shared_memory(dtype, [_STAGES, 2 * _HALF, STEP], x_desc.layout)
    weight_halves = weight_ring._reinterpret(
        dtype, [2 * _STAGES, _RUN // 2, _HALF // _RUN, 2, STEP], weight_desc.layout
    )
    BUFFERS: gl.constexpr = 32 // out_desc.dtype.primitive_bitwidth  # of a group
    out_buffers = gl.allocate_shared_memory(
        out_desc.dtype, [BUFFERS * _GROUPS, _ROWS, _PART], out_desc.layout
    )
    full = gl.allocate_shared_memory(gl.int64, [_STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [_STAGES, 1], mbarrier.MBarrierLayout())
    lead = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(_STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=_GROUPS)
    mbarrier.init(lead, count=1)
    fence_async_shared()

    num_down = gl.cdiv(num_rows, _GROUPS * _ROWS)
    num_across = gl.cdiv(width, _HALF if GATED else 2 * _HALF)
    bars = (full, empty, lead)
    counts = (num_steps, num_down, num_across, width)
    rings = (x_desc, weight_desc, x_ring, weight_halves)
    tensors = (out_desc, x_ring, weight_ring, out_buffers, bars, counts)
    behind = (
        (row_scales_ptr, num_rows, share, rest),
        (totals_ptr, num_parts, num_rows, depth, eps),
        (factors_ptr, bias_ptr, width),
        (angles_ptr, angle_stride, num_rows, num_rotated),
        (stream_ptr, num_rows, width),
    )
    gl.warp_specialize(
        [
            (_multiply_group, (tensors, behind, KIND, NORM, KEEPS_TOTALS, DIM, HAS_BIAS, 0, LEAD)),
            (_multiply_group, (tensors, behind, KIND, NORM, KEEPS_TOTALS, DIM, HAS_BIAS, 1, LEAD)),
            (_load, (rings, bars, counts, GATED)),
        ],
        [4, 1],  # warps, of all but the first
        [232, 40],  # and registers of their threads
    )


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None, norm: "Norm | None" = None) -> Tensor:
    """`multiply_and_activate` without an activation."""
    out = x.new_empty((len(x), len(weight)))
    _launch(x, weight, bias, out, NOTHING, norm=norm)
    return out


def multiply_and_activate(
    x: Tensor, weight: Tensor, bias: Tensor | None, kind: int, norm: "Norm | None" = None
) -> Tensor:
    """
    Args:
        x: (M, K), dense, bfloat16 or float16; K a multiple of 8, as TMA wants rows aligned.
        weight: (N, K), dense, as x. For SILU_MUL the first half of it makes gates. N, or half of it,
            is a multiple of 16.
        bias: (N,) or None.
        kind: QUICK_GELU, GELU_TANH or SILU_MUL.
        norm: of x, with which the sums are normed instead.

    Returns:
        (M, N), or (M, N / 2) for SILU_MUL.
    """
    width = len(weight) // 2 if kind == SILU_MUL else len(weight)
    out = x.new_empty((len(x), width))
    _launch(x, weight, bias, out, kind, norm=norm)
    return out


def multiply_and_activate_in_fp8(
    rows: Fp8Rows,
    weight: Fp8Rows,
    bias: Tensor | None,
    kind: int,
    bound: tuple[float, float] | None = None,
) -> Tensor:
    """
    Args:
        rows: (M, K), dense, with a scale for each row; K and N multiples of 16.
        weight: (N, K), likewise, for SILU_MUL as of `multiply_and_activate`.
        bias: (N,) or None.
        kind: QUICK_GELU, GELU_TANH or SILU_MUL.
        bound: what the scale of a row is times the first, plus the second, is the scale of its
            result. Not for SILU_MUL.

    Returns:
        (M, N) in fp8, without those scales. Without a bound in bfloat16; (M, N / 2) for SILU_MUL.
    """
    assert bound is None or kind != SILU_MUL
    width = len(weight.values) // 2 if kind == SILU_MUL else len(weight.values)
    dtype = torch.bfloat16 if bound is None else rows.values.dtype
    out = rows.values.new_empty((len(rows.values), width), dtype=dtype)
    bound = bound or (1.0, 0.0)
    scales = rows.scales, weight.scales
    _launch(rows.values, weight.values, bias, out, kind, scales=scales, bound=bound)
    return out


def multiply_and_rotate(
    x: Tensor | Fp8Rows,
    weight: Tensor | Fp8Rows,
    bias: Tensor | None,
    angles: Tensor,
    dim: int,
    num_rotated: int,
    norm: "Norm | None" = None,
) -> Tensor:
    """
    Args:
        x, weight, bias, norm: as of `multiply_and_activate`, or both of the first in fp8.
        angles: (M, at least dim), float16, rows some multiple of 16 apart: of angle j in columns 2 j and
            2 j + 1 its cosine and its sine.
        dim: of a head, whose numbers 2 j and 2 j + 1 turn by angle j.
        num_rotated: columns of the result that are such heads; those behind them stay.

    Returns:
        (M, N), of fp8 in bfloat16.
    """
    x, weight, scales = _take_apart(x, weight)
    out = x.new_empty((len(x), len(weight)), dtype=x.dtype if scales is None else torch.bfloat16)
    _launch(
        x,
        weight,
        bias,
        out,
        ROTATE,
        angles=angles,
        dim=dim,
        num_rotated=num_rotated,
        scales=scales,
        norm=norm,
    )
    return out


def multiply_and_add(
    x: Tensor | Fp8Rows,
    weight: Tensor | Fp8Rows,
    bias: Tensor | None,
    stream: Tensor,
    totals: Tensor | None = None,
) -> Tensor:
    """
    Args:
        x, weight, bias: as of `multiply_and_activate`, or both of the first in fp8.
        stream: (M, N), dense, in 16 bits; what is added.
        totals: (2, M, `count_tiles` of N), float32, written over: what the result's rows add up to
            in each tile, and their squares.

    Returns:
        (M, N), as the stream.
    """
    assert stream.is_contiguous()
    x, weight, scales = _take_apart(x, weight)
    out = torch.empty_like(stream)
    _launch(x, weight, bias, out, ADD, stream=stream, scales=scales, totals=totals)
    return out


def count_tiles(width: int) -> int:
    """Across a result that is not gated."""
    return count_blocks(width, 2 * _HALF.value)


def _take_apart(
    x: Tensor | Fp8Rows, weight: Tensor | Fp8Rows
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
    """What is multiplied, and the scales of both where they are in fp8."""
    if isinstance(x, Fp8Rows):
        assert isinstance(weight, Fp8Rows)
        return x.values, weight.values, (x.scales, weight.scales)
    assert isinstance(weight, Tensor)
    return x, weight, None


def _launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    kind: int,
    *,
    stream: Tensor | None = None,
    angles: Tensor | None = None,
    dim: int = 2,
    num_rotated: int = 0,
    scales: tuple[Tensor, Tensor] | None = None,
    bound: tuple[float, float] = (1.0, 0.0),
    totals: Tensor | None = None,
    norm: "Norm | None" = None,
) -> None:
    """
    Args:
        out: (M, width of the result), dense, written over.
        kind: what happens to the sums, of which ADD alone reads `stream` and writes `totals`, and
            ROTATE alone reads `angles`, `dim` and `num_rotated`.
        scales: of rows and of weights, in fp8.
        bound: of the scales of a result in fp8.
        norm: brings totals of its own, which are read; not together with `totals`.
    """
    num_rows, depth = x.shape
    if not num_rows:
        return
    width = out.shape[1]
    step = LINE // x.itemsize
    num_steps = count_blocks(depth, step)
    tiles = count_blocks(num_rows, _GROUPS.value * _ROWS.value) * count_tiles(len(weight))
    norm_kind, factors = 0, None
    if norm is not None:
        totals, factors = norm.totals, norm.weight_sums
        norm_kind = RMS_NORM if factors is None else LAYER_NORM
    row_scales, factors = scales or (out, factors)
    pointers = (
        out if bias is None else bias,
        out if stream is None else stream,
        out if angles is None else angles,
        row_scales,
        out if factors is None else factors,
        out if totals is None else totals,
    )
    angle_stride = 0 if angles is None else angles.stride(0)
    num_parts = 1 if totals is None else totals.shape[2]
    constants = (
        kind,
        norm_kind,
        totals is not None and norm is None,
        dim,
        bias is not None,
        min(_LEAD, num_steps),
    )
    args = (
        _describe(x, _ROWS.value, step),
        _describe_weight(weight, step),
        _describe(out, _ROWS.value, _PART.value),
        *pointers,
        num_rows,
        num_steps,
        width,
        angle_stride,
        num_rotated,
        *bound,
        num_parts,
        depth,
        0.0 if norm is None else norm.eps,
        *constants,
    )
    types = x.dtype, weight.dtype, out.dtype, *map(of_pointer, pointers)
    numbers = width, angle_stride, num_rotated, num_parts, depth
    built_for = (x.device, *types, *numbers, *constants)
    grid = min(tiles, count_processors(x.device)), 1, 1
    launch(_multiply, grid, args, built_for, num_warps=4, maxnreg=168)


def _describe(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    layout = lay_out(columns, x.itemsize, 2)
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [rows, columns], layout)


def _describe_weight(weight: Tensor, step: int) -> TensorDescriptor:
    """
    Of half a tile: the first pair of each run of columns, then the second pairs, and so on, as a thread has
    every fourth pair of what is multiplied.
    """
    width, depth = weight.shape
    run = _RUN.value
    shape = [run // 2, width // run, 2, depth]
    strides = [2 * depth, run * depth, depth, 1]
    block = [run // 2, _HALF.value // run, 2, step]
    return TensorDescriptor(weight, shape, strides, block, lay_out(step, weight.itemsize, 4))
