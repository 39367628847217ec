"""
Attention of one new token a sequence over its slab, straight on the KV rows.

Axes: num_seqs, heads, kv_heads, group = heads / kv_heads (the query heads that share one KV head),
dim. K and V of a layer: (rows, kv_heads, dim), as engine/slabs.py shares them out.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.kernels import has_kernels

# KV rows that one program reads; fixed, so that no neighbour changes a sum. Of 256, 512 and 1024 the
# fastest for all but a few long sequences (H100, 2026-11-27).
SPLIT_ROWS = 1024

# (query, keys, values, starts, lens, max_len, scale), as `attend` below
DecodeAttention = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int, float], Tensor]


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    starts: Tensor,
    lens: Tensor,
    max_len: int,
    scale: float,
    *,
    split_rows: int = SPLIT_ROWS,
) -> Tensor:
    """
    Attend from each sequence's newest token, whose row has been written, over all its rows.

    On a GPU a slab longer than `split_rows` is shared among programs, and a second kernel joins
    what they found. Nothing waits for the device, and only `max_len` and the shapes are fixed when
    a CUDA graph is captured: starts and lengths may change between replays. A sequence's output
    depends on its own rows alone, bit for bit, whatever stands beside it.

    Args:
        query: (num_seqs, heads, dim), dense in dim.
        keys, values: (rows, kv_heads, dim); the query's type, or float8_e4m3fn.
        starts: (num_seqs,), int32 or int64, device: the first row of each slab.
        lens: (num_seqs,), the same: rows in use. 0 for a place that holds no sequence.
        max_len: no length exceeds it; rows from it on are not read.
        scale: what the scores are multiplied by.
        split_rows: a power of two, at least 128.

    Returns:
        (num_seqs, heads, dim), dense; zeros where the length is 0.
    """
    if has_kernels(query):
        from engine.kernels.gpu import decode

        return decode.attend(query, keys, values, starts, lens, max_len, scale, split_rows)
    num_seqs, heads, dim = query.shape
    kv_heads = keys.shape[1]
    grouped = query.reshape(num_seqs, kv_heads, heads // kv_heads, dim)
    out = torch.zeros_like(grouped)
    for index, (start, length) in enumerate(zip(starts.tolist(), lens.tolist(), strict=True)):
        if length:
            rows = slice(start, start + min(length, max_len))
            out[index] = F.scaled_dot_product_attention(
                grouped[index],
                keys[rows].to(query.dtype).transpose(0, 1),
                values[rows].to(query.dtype).transpose(0, 1),
                scale=scale,
            )
    return out.view(num_seqs, heads, dim)
