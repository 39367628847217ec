"""
Attention of prompts, or pieces of them, over their slabs: every token sees the rows up to its own.

Axes: T tokens, heads, kv_heads, dim; prompts. K and V of a layer: (rows, kv_heads, dim), as
engine/slabs.py shares them out.
"""

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.kernels import has_kernels, is_hopper
from engine.kernels.trials import left_out_if_broken, unless_memory_is_short

DIMS = (64, 128)  # widths of heads that the kernel takes, in 16 bits
# Of the comparison at the start: new tokens and rows of each prompt.
PROMPTS = ((1, 1), (129, 129), (0, 0), (300, 421), (5, 700), (64, 64))
APART = 0.02  # of two attentions in 16 bits, to one more than their size

# (query, keys, values, query_starts, slab_starts, lens, max_queries, scale), as `attend` below
PrefillAttention = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, int, float], Tensor]


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
    """
    Attend from each prompt's newest tokens, whose rows have been written, over all its rows.

    Nothing waits for the device, and only `max_queries` and the shapes are fixed when a CUDA graph is
    captured. A prompt's output depends on its own rows alone, bit for bit, whatever stands beside it.

    Args:
        query: (T, heads, dim), dense in dim. Each prompt's tokens are the last of its rows.
        keys, values: (rows, kv_heads, dim), dense in dim, of the query's type.
        query_starts: (prompts + 1,), int32, device: where each prompt's tokens begin, and the last
            one's end. A prompt may have none.
        slab_starts: (prompts,) or more, int32, device: the first row of each slab, in any order.
        lens: (prompts,), int32, device: rows in use, those of these tokens included.
        max_queries: no prompt has more tokens here.
        scale: what the scores are multiplied by; over 0.

    Returns:
        (T, heads, dim), dense. Rows behind the last prompt mean nothing.
    """
    if has_kernels(query):
        from engine.kernels.gpu import prompts_hopper

        return prompts_hopper.attend(
            query, keys, values, query_starts, slab_starts, lens, max_queries, scale
        )
    out = torch.full_like(query, torch.nan, memory_format=torch.contiguous_format)
    first, *ends = query_starts.tolist()
    for end, start, length in zip(ends, slab_starts.tolist(), lens.tolist(), strict=False):
        size = end - first
        assert size <= min(length, max_queries)
        if size:
            rows = slice(start, start + length)
            last = torch.arange(length - size, length, device=query.device)
            out[first:end] = F.scaled_dot_product_attention(
                query[first:end].transpose(0, 1),
                keys[rows].transpose(0, 1),
                values[rows].transpose(0, 1),
                attn_mask=torch.arange(length, device=query.device) <= last[:, None],
                scale=scale,
                enable_gqa=True,
            ).transpose(0, 1)
        first = end
    return out


def is_usable(device: torch.device, dtype: torch.dtype, dim: int) -> bool:
    """
    Whether the kernel runs there, and says what torch's FlashAttention says. Nothing is timed: the
    kernel was faster at every shape that was measured, so that all starts of an engine choose alike.

    The first time on a machine, Triton's compiler takes some five seconds.

    NOTE: not while a CUDA graph is captured.
    """
    if device.type != "cuda" or dim not in DIMS or dtype not in (torch.float16, torch.bfloat16):
        return False
    return unless_memory_is_short(lambda: _try(device, dtype, dim), False)


@cache
def _try(device: torch.device, dtype: torch.dtype, dim: int) -> bool:
    """
    Raises:
        OutOfMemoryError: so that it is tried again.
    """
    if not is_hopper(device) or not has_kernels(torch.empty(1, device=device)):
        return False
    trial = left_out_if_broken("prompts_kernel", device)
    with trial, torch.cuda.device(device), torch.inference_mode():
        _compare(device, dtype, dim)
        return True
    return False


def _compare(device: torch.device, dtype: torch.dtype, dim: int) -> None:
    """
    With torch's, over slabs in falling order between which nothing is a number.

    Raises:
        RuntimeError: the kernel computes nonsense.
    """
    heads, kv_heads = 6, 2
    generator = torch.Generator(device).manual_seed(0)

    def draw(num: int, heads: int) -> Tensor:
        shape = num, heads, dim
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    sizes, lens = zip(*PROMPTS, strict=True)
    query = draw(sum(sizes), heads)
    num_rows = sum(lens) + 8 * len(lens) + 256
    keys, values = (
        torch.full((num_rows, kv_heads, dim), torch.nan, dtype=dtype, device=device)
        for _ in range(2)
    )
    starts = [sum(lens[index + 1 :]) + 8 * (len(lens) - index) for index in range(len(lens))]
    for start, length in zip(starts, lens, strict=True):
        for rows in (keys, values):
            rows[start : start + length] = draw(length, kv_heads)
    firsts = [sum(sizes[:index]) for index in range(len(sizes) + 1)]
    query_starts, slab_starts, lengths = (
        torch.tensor(x, dtype=torch.int32, device=device) for x in (firsts, [*starts, 0], lens)
    )
    most, scale = max(sizes), dim**-0.5
    expected, *_ = torch.ops.aten._flash_attention_forward(
        query, keys, values, query_starts, slab_starts, most, max(lens), 0.0, True, False,
        scale=scale, seqused_k=lengths,
    )  # fmt: skip
    actual = attend(query, keys, values, query_starts, slab_starts, lengths, most, scale)
    if not torch.allclose(actual, expected, rtol=APART, atol=APART):
        raise RuntimeError(f"heads of {dim} come out as nonsense")
