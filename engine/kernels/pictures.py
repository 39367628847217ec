"""
Attention among the patches of each picture, many pictures of any sizes in one call.

Axes: T patches, heads, dim; pictures. Every patch sees all of its own picture and nothing else.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.kernels import has_kernels

DIMS = (64, 80, 96, 128)  # widths of heads that the kernel takes


def attend(
    query: Tensor, key: Tensor, value: Tensor, starts: Tensor, max_len: int, scale: float
) -> Tensor:
    """
    Args:
        query, key, value: (T, heads, dim), dense in dim: views into one projection will do.
        starts: (pictures + 1,), int32, device: where each picture begins, and the last one ends.
        max_len: no picture has more patches.
        scale: what the scores are multiplied by.

    Returns:
        (T, heads, dim), dense. Rows behind the last picture mean nothing.
    """
    if has_kernels(query) and query.shape[2] in DIMS:
        from engine.kernels.gpu import pictures

        return pictures.attend(query, key, value, starts, max_len, scale)
    sizes = starts.diff().tolist()
    out = torch.zeros_like(query, memory_format=torch.contiguous_format)
    queries, keys, values = (
        torch.split(x[: sum(sizes)].transpose(0, 1), sizes, dim=1) for x in (query, key, value)
    )
    attended = [
        F.scaled_dot_product_attention(q, k, v, scale=scale)
        for q, k, v in zip(queries, keys, values, strict=True)
    ]
    out[: sum(sizes)] = torch.cat(attended, dim=1).transpose(0, 1)
    return out
