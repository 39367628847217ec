"""
Rotary positions: a table of angles built once, and the rotation of query and key heads in place.

Axes: T tokens, heads (those of queries and keys together), dim, half = dim / 2. The first half of a
head is rotated against its second, as in transformers' `rotate_half`; the same angles serve both.
"""

import torch
from torch import Tensor

from engine.kernels import has_kernels
from engine.kernels.rows import store_


def rotate_(heads: Tensor, cos: Tensor, sin: Tensor, *, in_pairs: bool = False) -> None:
    """
    Rotate heads by their token's angles, in float32, written over them.

    Args:
        heads: (T, heads, dim), dense in dim; a view into the projections is what it is made for.
        cos, sin: (T, half) or wider: columns from half on are not read. Any float type.
        in_pairs: of heads whose neighbours turn each other, 0 and 1, 2 and 3, and not their halves.
    """
    if has_kernels(heads):
        from engine.kernels.gpu import rope

        rope.rotate_(heads, cos, sin, in_pairs=in_pairs)
        return
    half = heads.shape[-1] // 2
    cos, sin = (angles[:, None, :half].float() for angles in (cos, sin))
    parts = heads.view(*heads.shape[:-1], *((half, 2) if in_pairs else (2, half)))
    first, second = (part.float() for part in parts.unbind(-1 if in_pairs else -2))
    rotated = first * cos - second * sin, second * cos + first * sin
    parts.copy_(torch.stack(rotated, dim=-1 if in_pairs else -2))


def rotate_and_store_(
    heads: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    write_rows: Tensor,
) -> None:
    """
    `rotate_`, and put this call's keys and values into their KV rows: one pass instead of three.

    Args:
        heads: (T, heads + 2 * kv_heads, dim), a merged projection: queries, keys, values. Queries
            and keys are rotated in place.
        keys, values: (rows, kv_heads, dim) of a layer, in any float type; of fp8 see engine/kernels/rows.py.
        write_rows: (T,), int64.
    """
    kv_heads = keys.shape[1]
    if has_kernels(heads):
        from engine.kernels.gpu import rope

        rope.rotate_and_store_(heads, cos, sin, keys, values, write_rows)
        return
    rotate_(heads[:, :-kv_heads], cos, sin)
    store_(keys, write_rows, heads[:, -2 * kv_heads : -kv_heads])
    store_(values, write_rows, heads[:, -kv_heads:])


def build_table(inv_freq: Tensor, num_positions: int, scaling: float) -> tuple[Tensor, Tensor]:
    """
    The cosines and sines of every position.

    Args:
        inv_freq: (half,), float32.
        scaling: what both are multiplied by (1 for plain rotary positions).

    Returns:
        Two of (num_positions, half), float32.
    """
    positions = torch.arange(num_positions, device=inv_freq.device, dtype=torch.float32)
    angles = positions[:, None] * inv_freq.float()
    return angles.cos() * scaling, angles.sin() * scaling


def look_up(positions: Tensor, axis_of: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """
    Read the angles of each token from the table.

    Args:
        positions: (axes, T), int64, each below the table's length.
        axis_of: (half,), int64: the axis whose position turns each pair of numbers; M-RoPE has
            three, plain rotary positions one.
        cos, sin: the table.

    Returns:
        Two of (T, half), float32.
    """
    if has_kernels(positions):
        from engine.kernels.gpu import rope

        return rope.look_up(positions, axis_of, cos, sin)
    index = positions[axis_of].T
    return cos.gather(0, index), sin.gather(0, index)
