"""A product in parts of its depth: one program a tile and part."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.gpu import count_blocks
from engine.kernels.gpu.processors import count_processors

TILE_ROWS, TILE_COLUMNS = 64, 128
STEP_BYTES = 128  # of the depth
MAX_PARTS = 16
# To write and read a float32 of a part (8 bytes at 4 TB/s), as a share of what a processor takes for a
# depth of 1 of a tile (2 * TILE_ROWS * TILE_COLUMNS operations at 5 TFLOP/s).
PART_COST = 6.5e-4


@triton.jit(do_not_specialize=["num_rows"])
def _multiply(
    x_ptr,
    weight_ptr,
    out_ptr,
    row_scales_ptr,
    column_scales_ptr,
    num_rows,
    width,
    depth,
    part_depth,
    SCALED: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
):
    # Programs beside each other share weights, of which there are more.
    row = tl.program_id(0) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    column = tl.program_id(1) * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    part = tl.program_id(2)
    first = part * part_depth
    step = tl.arange(0, STEP)
    # What lies behind the end reads the last row, and is not written.
    x_row = tl.minimum(row, num_rows - 1).to(tl.int64)
    weight_row = tl.minimum(column, width - 1).to(tl.int64)
    x_at = x_ptr + x_row[:, None] * depth + (first + step)[None, :]
    weight_at = weight_ptr + weight_row[:, None] * depth + (first + step)[None, :]
    acc = tl.zeros((TILE_ROWS, TILE_COLUMNS), dtype=tl.float32)
    for _ in range(part_depth // STEP):
        acc = tl.dot(tl.load(x_at), tl.trans(tl.load(weight_at)), acc)
        x_at += STEP
        weight_at += STEP
    if SCALED:
        of_row = tl.load(row_scales_ptr + row, mask=row < num_rows, other=0.0)
        of_column = tl.load(column_scales_ptr + column, mask=column < width, other=0.0)
        acc = acc * of_row[:, None] * of_column[None, :]
    at = (part.to(tl.int64) * num_rows + row[:, None]) * width + column[None, :]
    tl.store(out_ptr + at, acc, mask=(row < num_rows)[:, None] & (column < width)[None, :])


def multiply(
    x: Tensor, weight: Tensor, row_scales: Tensor | None = None, scales: Tensor | None = None
) -> Tensor:
    """
    Args:
        x: (rows, depth), dense, 16 bits or fp8; depth a multiple of STEP_BYTES in numbers.
        weight: (width, depth), dense, as x.
        row_scales, scales: of fp8, float32, (rows, 1) and (width, 1).

    Returns:
        (parts, rows, width), float32.
    """
    num_rows, depth = x.shape
    width, step = len(weight), STEP_BYTES // x.itemsize
    down, across = count_blocks(num_rows, TILE_ROWS), count_blocks(width, TILE_COLUMNS)
    part_cost = PART_COST * num_rows * width / depth
    num_parts = _count_parts(depth // step, down * across, part_cost, x.device)
    out = torch.empty((num_parts, num_rows, width), dtype=torch.float32, device=x.device)
    if num_rows:
        _multiply[(down, across, num_parts)](
            x,
            weight,
            out,
            out if row_scales is None else row_scales,
            out if scales is None else scales,
            num_rows,
            width,
            depth,
            depth // num_parts,
            SCALED=scales is not None,
            TILE_ROWS=TILE_ROWS,
            TILE_COLUMNS=TILE_COLUMNS,
            STEP=step,
            num_warps=4,
            num_stages=4,
        )
    return out


def _count_parts(num_steps: int, num_tiles: int, part_cost: float, device: torch.device) -> int:
    """
    Equally deep ones, so many that the processor with the most work has least of it.

    Args:
        part_cost: to write a part and read it again, in tiles of the whole depth.
    """
    processors = count_processors(device)

    def cost(num_parts: int) -> float:
        busiest = count_blocks(num_tiles * num_parts, processors) / num_parts
        return busiest + part_cost * num_parts

    return min((n for n in range(1, MAX_PARTS + 1) if num_steps % n == 0), key=cost)
