"""
What the kernels for GPUs of the Hopper generation share, above all the two that attend: launches that
cost the host little, rows that come and go through descriptors which end where a picture or a prompt
ends, rings of tiles with their barriers, and how much of a processor a program takes.

What lies behind an end reads as zeros and is not written.
"""

from collections.abc import Hashable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from engine.kernels.gpu.processors import count_processors

FAR = gl.constexpr(1 << 30)  # no call has more rows
QUERIES = gl.constexpr(2)  # places for a group's queries: of this head and of the next
SHARED_BYTES = 226 << 10  # of a processor for one program, but for its barriers
MAX_HEADS = 4  # of one program: more leaves too few of them
MIN_PROGRAMS = 4  # a processor, before heads are put together
REGISTERS = {2: (168, 240, 24), 3: (128, 160, 32)}  # by groups: at the start, of a group, to fetch

_built: dict[tuple[Hashable, ...], Any] = {}


def launch(
    kernel: Any,
    grid: tuple[int, int, int],
    args: tuple[Any, ...],
    built_for: tuple[Hashable, ...],
    **options: Any,
) -> None:
    """
    `kernel[grid](*args, **options)`, but without looking each time for what Triton has built.

    That is a third to a half of what a launch costs the host: types are put into words for it, and constants
    compared. So what Triton has built for arguments of a kind is kept, and launched for all that are of
    that kind, as Triton's tutorial on softmax does.

    Args:
        args: all that the kernel takes, constants included.
        built_for: all of it that Triton builds another kernel for: the device; types; whether an address
            is a multiple of 16, as `of_pointer` says; numbers, but for floats and what the kernel does
            not specialise; constants. Options, and blocks and layouts of descriptors, follow from these.
    """
    key = (kernel, *built_for)
    built = _built.get(key)
    if built is None:
        built = _built[key] = kernel.warmup(*args, grid=grid, **options)
    built[grid](*args)


def of_pointer(x: Tensor) -> tuple[torch.dtype, bool]:
    """What a kernel is built for, of a tensor that it takes as a pointer."""
    return x.dtype, x.data_ptr() % 16 == 0


def describe(x: Tensor, rows: int, width: int) -> TensorDescriptor:
    """
    A descriptor of rows of one head of (T, heads, dim), for `fetch` and `send`.

    The copy engine knows bounds of the whole tensor only. So rows are counted from FAR before the
    picture's end, where the bound of their axis is. Two more axes bring that place to where this
    picture ends: one goes to its end, in rows, and one takes FAR rows off, in addresses that wrap
    around at 64 bits.
    """
    _, heads, dim = x.shape
    stride = x.stride(0)
    return TensorDescriptor(
        x,
        [0x7FFF0000, 0x7FFF0000, FAR.value, heads, dim],
        [(1 << 34) - stride, stride, stride, x.stride(1), 1],
        [1, 1, rows, 1, width],
        lay_out(width, x.itemsize, 5),
    )


@cache
def lay_out(width: int, itemsize: int, rank: int) -> Any:
    """How rows of so many numbers lie in shared memory, such that nobody waits for the same bank."""
    num_bytes = width * itemsize
    swizzle = min(num_bytes, 128) if num_bytes >= 32 else 0
    return gl.NVMMASharedLayout(swizzle, 8 * itemsize, rank)


@gluon.jit
def fetch(desc, start, length, row, head, column, full, to):
    """
    Copy rows of one head to (rows, width) in shared memory.

    start, length: of the picture, in rows of the tensor. row: the first, within the picture.
    """
    place = to._reinterpret(desc.dtype, [1, 1, to.shape[0], 1, to.shape[1]], desc.layout)
    at = [FAR, start + length, FAR - length + row, head, column]
    tma.async_copy_global_to_shared(desc, at, full, place)


@gluon.jit
def send(desc, start, length, row, head, column, tile):
    """The way back."""
    place = tile._reinterpret(desc.dtype, [1, 1, tile.shape[0], 1, tile.shape[1]], desc.layout)
    at = [FAR, start + length, FAR - length + row, head, column]
    tma.async_copy_shared_to_global(desc, at, place)


@gluon.jit
def make_barriers(PLACES: gl.constexpr, STAGES: gl.constexpr, GROUPS: gl.constexpr):
    """Of queries, keys and values, for each place of theirs: that it is full, and that it is empty."""
    one: gl.constexpr = mbarrier.MBarrierLayout()
    query_full = gl.allocate_shared_memory(gl.int64, [PLACES, 1], one)
    query_empty = gl.allocate_shared_memory(gl.int64, [PLACES, 1], one)
    key_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], one)
    key_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], one)
    value_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], one)
    value_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], one)
    for i in gl.static_range(PLACES):
        mbarrier.init(query_full.index(i), count=1)
        mbarrier.init(query_empty.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(key_full.index(i), count=1)
        mbarrier.init(key_empty.index(i), count=GROUPS)
        mbarrier.init(value_full.index(i), count=1)
        mbarrier.init(value_empty.index(i), count=GROUPS)
    fence_async_shared()
    return query_full, query_empty, key_full, key_empty, value_full, value_empty


@gluon.jit
def next_stage(stage, phase, STAGES: gl.constexpr):
    """Of a ring; its phase turns with each time around."""
    is_last = stage == STAGES - 1
    return gl.where(is_last, 0, stage + 1), gl.where(is_last, phase ^ 1, phase)


def count_stages(groups: int, tile: int, width: int) -> int:
    """Of the ring of keys and of values: as many as there is room for, and no more than are of use."""
    left = SHARED_BYTES - 2 * QUERIES.value * groups * 64 * width
    return min(left // (4 * tile * width), 4 if tile == 128 else 6)


def count_heads(heads: int, num_blocks: int, device: torch.device) -> int:
    """How many follow each other in one program, of so many blocks of rows in a call."""
    enough = MIN_PROGRAMS * count_processors(device)
    fitting = (n for n in range(MAX_HEADS, 1, -1) if heads % n == 0)
    return next((n for n in fitting if num_blocks * heads // n >= enough), 1)
