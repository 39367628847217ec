"""
A matrix product whose result is activated, or rotated, on its way out, for Hopper: rows (M, K) by
weights (N, K).

A block of threads stays on each multiprocessor and takes tiles of the result in turn, ordered so that
those in work at a time share rows and weights in the L2 cache. One warp of it loads, by TMA, into a
ring of stages; each of two groups of four warps multiplies 64 rows of the tile by all 256 columns,
activates the sums in float32 and stores them by TMA. The groups go on by themselves, one some steps
ahead: while it activates, the other has the tensor cores. Sums that rotate each other are neighbours,
and so in one thread.
"""

import math

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
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from engine.kernels import activations
from engine.kernels.gpu import LOG2_E
from engine.kernels.gpu.hopper import count_processors

QUICK_GELU, GELU_TANH, SILU_MUL, ROTATE = range(4)  # what happens to the sums

_QUICK_GELU = gl.constexpr(QUICK_GELU)
_GELU_TANH = gl.constexpr(GELU_TANH)
_SILU_MUL = gl.constexpr(SILU_MUL)
_ROTATE = gl.constexpr(ROTATE)
_LOG2_E = gl.constexpr(LOG2_E)
_SLOPE = gl.constexpr(activations.QUICK_GELU)
_SQRT_2_PI = gl.constexpr(math.sqrt(2 / math.pi))
_GROUPS = gl.constexpr(2)  # of four warps that multiply
_ROWS = gl.constexpr(64)  # of a tile, for each of them
_HALF = gl.constexpr(128)  # columns of a tile, in two halves
_PART = gl.constexpr(64)  # columns that are activated and stored at a time
_STEP = gl.constexpr(64)  # of the depth, in a stage
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
    BYTES: gl.constexpr = (
        (_GROUPS * _ROWS + 2 * _HALF) * _STEP * x_desc.dtype.primitive_bitwidth // 8
    )
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
            at = step * _STEP
            mbarrier.wait(empty.index(stage), phase)
            bar = full.index(stage)
            mbarrier.expect(bar, BYTES)
            for group in gl.static_range(_GROUPS):
                tma.async_copy_global_to_shared(
                    x_desc, [row + group * _ROWS, at], bar, x_ring.index(stage * _GROUPS + group)
                )
            tma.async_copy_global_to_shared(
                weight_desc, [first, at], bar, weight_ring.index(2 * stage)
            )
            tma.async_copy_global_to_shared(
                weight_desc, [other, at], bar, weight_ring.index(2 * stage + 1)
            )
            stage, phase = _next(stage, phase)


@gluon.jit
def _halve(x):
    """(rows, columns) -> its left and its right columns; registers only get other names."""
    ROWS: gl.constexpr = x.shape[0]
    COLUMNS: gl.constexpr = x.shape[1]
    return x.reshape([ROWS, 2, COLUMNS // 2]).permute([0, 2, 1]).split()


@gluon.jit
def _sigmoid(exponent):
    """
    1 / (1 + 2**exponent) on the fast units, of which there are few: one number's reciprocal takes as
    long as a dozen products. So four numbers share one: 1 / a is b / (a * b). Exponents are at most
    31 for that, such that no product overflows.
    """
    return gl.inline_asm_elementwise(
        """
        {
        .reg .f32 a, b, c, d, ab, cd, r, s;
        min.f32 a, $4, 0f41F80000;
        min.f32 b, $5, 0f41F80000;
        min.f32 c, $6, 0f41F80000;
        min.f32 d, $7, 0f41F80000;
        ex2.approx.ftz.f32 a, a;
        ex2.approx.ftz.f32 b, b;
        ex2.approx.ftz.f32 c, c;
        ex2.approx.ftz.f32 d, d;
        add.f32 a, a, 0f3F800000;
        add.f32 b, b, 0f3F800000;
        add.f32 c, c, 0f3F800000;
        add.f32 d, d, 0f3F800000;
        mul.f32 ab, a, b;
        mul.f32 cd, c, d;
        mul.f32 r, ab, cd;
        rcp.approx.ftz.f32 r, r;
        mul.f32 s, r, ab;
        mul.f32 r, r, cd;
        mul.f32 $0, r, b;
        mul.f32 $1, r, a;
        mul.f32 $2, s, d;
        mul.f32 $3, s, c;
        }
        """,
        "=&f,=&f,=&f,=&f,f,f,f,f",
        [exponent],
        dtype=gl.float32,
        is_pure=True,
        pack=4,
    )


@gluon.jit
def _activate(x, KIND: gl.constexpr):
    if KIND == _QUICK_GELU:
        x = x * _sigmoid(x * (-_SLOPE * _LOG2_E))
    elif KIND == _GELU_TANH:
        # (1 + tanh(y)) / 2 is sigmoid(2 * y)
        scale: gl.constexpr = -2 * _LOG2_E * _SQRT_2_PI
        slope = x * x * (scale * 0.044715) + scale
        x = x * _sigmoid(x * slope)
    else:
        x = x * _sigmoid(x * -_LOG2_E)
    return x


@gluon.jit
def _rotate(x, row, column, angles, DIM: gl.constexpr):
    """Columns 2 j and 2 j + 1 of each head by angle j of their row, up to the last of such heads."""
    cos_ptr, sin_ptr, stride, num_rows, num_rotated = angles
    ROWS: gl.constexpr = x.shape[0]
    PAIRS: gl.constexpr = x.shape[1] // 2
    first, second = x.reshape([ROWS, PAIRS, 2]).split()
    layout: gl.constexpr = first.type.layout
    rows = row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    columns = column + 2 * gl.arange(0, PAIRS, layout=gl.SliceLayout(0, layout))
    at = gl.expand_dims(rows * stride, 1) + gl.expand_dims(columns % DIM // 2, 0)
    inside = gl.expand_dims(rows < num_rows, 1) & gl.expand_dims(columns < num_rotated, 0)
    cos = gl.load(cos_ptr + at, mask=inside, other=1.0).to(gl.float32)
    sin = gl.load(sin_ptr + at, mask=inside, other=0.0).to(gl.float32)
    return gl.join(first * cos - second * sin, second * cos + first * sin).reshape(x.shape)


@gluon.jit
def _load_bias(ptr, first, width, GATED: gl.constexpr, layout: gl.constexpr):
    """Of a tile's 256 columns; a gated tile's are 128 of gates and 128 of the rest."""
    columns = gl.arange(0, 2 * _HALF, layout=gl.SliceLayout(0, layout))
    if GATED:
        place = first + columns % _HALF
        return gl.load(ptr + place + columns // _HALF * width, mask=place < width, other=0.0)
    else:
        return gl.load(ptr + first + columns, mask=first + columns < width, other=0.0)


@gluon.jit
def _put(out_desc, x, buffers, index: gl.constexpr, row, column):
    """Store by TMA from one of two buffers, once what was stored from it before has left."""
    tma.store_wait(pendings=1)
    buffer = buffers.index(index)
    buffer.store(x.to(out_desc.dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(out_desc, [row, column], buffer)


@gluon.jit
def _multiply_group(
    tensors,
    angles,
    KIND: gl.constexpr,
    DIM: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    GROUP: gl.constexpr,
    LEAD: gl.constexpr,
):
    out_desc, bias_ptr, x_ring, weight_ring, out_buffers, bars, counts = tensors
    full, empty, lead = bars
    num_steps, num_down, num_across, width = counts
    GATED: gl.constexpr = KIND == _SILU_MUL
    WIDTH: gl.constexpr = _HALF if GATED else 2 * _HALF  # columns of the result in a tile
    layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 2 * _HALF, 16]
    )
    stage = gl.to_tensor(0)
    phase = gl.to_tensor(0)
    if GROUP == 1:
        mbarrier.wait(lead, 0)
    acc = gl.zeros((_ROWS, 2 * _HALF), gl.float32, layout)
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
        # The bias is fetched while the last products are under way.
        row = down * (_GROUPS * _ROWS) + GROUP * _ROWS
        column = across * WIDTH
        if HAS_BIAS:
            bias = _load_bias(bias_ptr, column, width, GATED, layout)
        acc = warpgroup_mma_wait(0, (acc,))
        mbarrier.arrive(empty.index(_before(stage)))

        sums = acc
        if HAS_BIAS:
            sums = sums + gl.expand_dims(bias.to(gl.float32), 0)
        left, right = _halve(sums)
        a, b = _halve(left)
        c, d = _halve(right)
        if GATED:
            _put(out_desc, _activate(a, KIND) * c, out_buffers, 2 * GROUP, row, column)
            column += _PART
            _put(out_desc, _activate(b, KIND) * d, out_buffers, 2 * GROUP + 1, row, column)
        else:
            parts = (a, b, c, d)
            for part in gl.static_range(4):
                if KIND == _ROTATE:
                    x = _rotate(parts[part], row, column, angles, DIM)
                else:
                    x = _activate(parts[part], KIND)
                _put(out_desc, x, out_buffers, 2 * GROUP + part % 2, row, column)
                column += _PART
    tma.store_wait(pendings=0)


@gluon.jit(do_not_specialize=["num_rows", "num_steps"])
def _multiply(
    x_desc,
    weight_desc,
    out_desc,
    bias_ptr,
    cos_ptr,
    sin_ptr,
    num_rows,
    num_steps,
    width,
    angle_stride,
    num_rotated,
    KIND: gl.constexpr,
    DIM: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    LEAD: gl.constexpr,
):
    """width: of the result; a gated product's weights are twice as many."""
    GATED: gl.constexpr = KIND == _SILU_MUL
    dtype: gl.constexpr = x_desc.dtype
    x_ring = gl.allocate_shared_memory(dtype, [_STAGES * _GROUPS, _ROWS, _STEP], x_desc.layout)
    weight_ring = gl.allocate_shared_memory(dtype, [_STAGES, 2 * _HALF, _STEP], weight_desc.layout)
    weight_halves = weight_ring._reinterpret(dtype, [2 * _STAGES, _HALF, _STEP], weight_desc.layout)
    out_buffers = gl.allocate_shared_memory(
        out_desc.dtype, [2 * _GROUPS, _ROWS, _PART], out_desc.layout
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
    tensors = (out_desc, bias_ptr, x_ring, weight_ring, out_buffers, bars, counts)
    angles = (cos_ptr, sin_ptr, angle_stride, num_rows, num_rotated)
    gl.warp_specialize(
        [
            (_multiply_group, (tensors, angles, KIND, DIM, HAS_BIAS, 0, LEAD)),
            (_multiply_group, (tensors, angles, KIND, DIM, HAS_BIAS, 1, LEAD)),
            (_load, (rings, bars, counts, GATED)),
        ],
        [4, 1],  # warps, of all but the first
        [232, 40],  # and registers of their threads
    )


def multiply_and_activate(x: Tensor, weight: Tensor, bias: Tensor | None, kind: int) -> Tensor:
    """
    Args:
        x: (M, K), dense, bfloat16 or float16; K a multiple of 8, as TMA wants rows aligned.
        weight: (N, K), dense, as x. For SILU_MUL the first half of it makes gates.
        bias: (N,) or None.
        kind: QUICK_GELU, GELU_TANH or SILU_MUL.

    Returns:
        (M, N), or (M, N / 2) for SILU_MUL; its width is a multiple of 8 too.
    """
    width = len(weight) // 2 if kind == SILU_MUL else len(weight)
    out = x.new_empty((len(x), width))
    _launch(x, weight, bias, out, kind)
    return out


def multiply_and_rotate(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    dim: int,
    num_rotated: int,
) -> Tensor:
    """
    Args:
        x, weight, bias: as of `multiply_and_activate`.
        cos, sin: (M, at least dim / 2), any float type, dense in the last axis and of equal strides.
        dim: of a head, whose numbers 2 j and 2 j + 1 turn by angle j.
        num_rotated: columns of the result that are such heads; those behind them stay.

    Returns:
        (M, N).
    """
    assert cos.stride() == sin.stride()
    assert cos.stride(1) == 1
    out = x.new_empty((len(x), len(weight)))
    _launch(x, weight, bias, out, ROTATE, cos, sin, dim, num_rotated)
    return out


def _launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    kind: int,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    dim: int = 2,
    num_rotated: int = 0,
) -> None:
    num_rows, depth = x.shape
    if not num_rows:
        return
    num_steps = triton.cdiv(depth, _STEP.value)
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    tiles = triton.cdiv(num_rows, _GROUPS.value * _ROWS.value) * triton.cdiv(
        len(weight), 2 * _HALF.value
    )
    _multiply[(min(tiles, count_processors(x.device)),)](
        _describe(x, [_ROWS.value, _STEP.value], layout),
        _describe(weight, [_HALF.value, _STEP.value], layout),
        _describe(out, [_ROWS.value, _PART.value], layout),
        out if bias is None else bias,
        out if cos is None else cos,
        out if sin is None else sin,
        num_rows,
        num_steps,
        out.shape[1],
        0 if cos is None else cos.stride(0),
        num_rotated,
        KIND=kind,
        DIM=dim,
        HAS_BIAS=bias is not None,
        LEAD=min(_LEAD, num_steps),
        num_warps=4,
        maxnreg=168,
    )


def _describe(x: Tensor, box: list[int], layout: gl.NVMMASharedLayout) -> TensorDescriptor:
    return TensorDescriptor(x, list(x.shape), list(x.stride()), box, layout)
