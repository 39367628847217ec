"""
A token of each row of logits, drawn or the likeliest, for rows where the logits alone decide.

What `engine.sampler` says of the order of things holds here: min_p, top_k, top_p, then one number that
is a pure function of seed, index and position; ties go to the lowest id. Those that are left stand in
the order of their ids, and the draw is the first whose sum of weights, with those before it, exceeds
its share of all. Weights are float32, sums float64.

Axes: num_rows, vocab. What a row is drawn with stands in a table of integers, so that a decode step can
take it along: see `table`.
"""

import math
from collections.abc import Sequence
from functools import cache, lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine.kernels import has_kernels
from engine.kernels.greedy import NO_TOKEN, plain_argmax
from engine.kernels.trials import left_out_if_broken, unless_memory_is_short

# Rows of a table. Floats stand there as the bits of float64.
KEY, AT, TEMPERATURE, TOP_K, TOP_P, MIN_P = range(6)
NUM_COLUMNS = 6
GREEDY = (0,) * NUM_COLUMNS  # temperature 0.0: nothing else is read
# Fewer than float64 has, so that no draw is rounded up to the end of its interval.
UNIFORM_BITS = 48

_MASK_64 = 0xFFFFFFFFFFFFFFFF
_ADDED, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_MOST_INT = 2**31 - 1

Numbers = tuple[int, ...]


def numbers(
    seed: int,
    sample_index: int,
    *,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
) -> Numbers:
    """
    A row of `table`, its place AT left at 0.

    Args:
        seed: any; modulo 2**64.
        sample_index: from 0, below 2**64.
        temperature: 0 for the likeliest, or positive and finite.
        top_k: from 0; 0, or more than there are ids, for all.
        top_p: above 0, up to 1, which keeps all.
        min_p: from 0, which keeps all, up to 1.
    """
    if temperature == 0:
        return GREEDY
    return _numbers(seed, sample_index, temperature, min(top_k, _MOST_INT), top_p, min_p)


@lru_cache(1 << 12)  # where rows are drawn outside of the graph, each asks again in every step
def _numbers(
    seed: int, sample_index: int, temperature: float, top_k: int, top_p: float, min_p: float
) -> Numbers:
    row = np.zeros(NUM_COLUMNS, dtype=np.int64)
    row[KEY] = mix_key([seed], [sample_index]).view(np.int64).item()
    row[TOP_K] = top_k
    row.view(np.float64)[[TEMPERATURE, TOP_P, MIN_P]] = temperature, top_p, min_p
    return tuple(row.tolist())


def table(rows: Sequence[Numbers], positions: Sequence[int], num: int) -> npt.NDArray[np.int64]:
    """
    What `num` rows are drawn with, of which those behind the first few are nobody's and greedy.

    Args:
        rows: of `numbers`.
        positions: how many tokens each has.

    Returns:
        (NUM_COLUMNS, num), int64.
    """
    filled = np.zeros((NUM_COLUMNS, num), dtype=np.int64)
    if rows:
        filled[:, : len(rows)] = np.array(rows, dtype=np.int64).T
        filled[AT, : len(rows)] = positions
    return filled


def draw(logits: Tensor, draws: Tensor) -> Tensor:
    """
    A token of each row.

    On a GPU the same as on a CPU, but where the drawn number lies within rounding of a border between
    two tokens, a sum within rounding of top_p, or a weight of min_p: exponentials differ in their last
    places, and a total of weights that pieces of a row were summed up to is off by some 1e-7 of it.

    NOTE: while a CUDA graph is captured, only where `is_usable` was asked before.

    Args:
        logits: (num_rows, vocab), any float type.
        draws: (NUM_COLUMNS, num_rows), int64, of `table`.

    Returns:
        (num_rows,), int64; `NO_TOKEN` where the largest logit is not finite.
    """
    if is_usable(logits):
        from engine.kernels.gpu import draw as kernel

        return kernel.draw(logits, draws)
    return plain_draw(logits, draws)


def is_usable(logits: Tensor) -> bool:
    """
    Whether the kernel runs where these logits live, for their type and vocabulary.

    Asked only when something is to be drawn: the first time on a machine, Triton's compiler takes some
    three seconds.

    NOTE: the first call for a type and vocabulary must not come while a CUDA graph is captured.

    Args:
        logits: (num_rows, vocab); none of the numbers is read, so there may be no rows.
    """
    if not has_kernels(logits):
        return False
    return unless_memory_is_short(
        lambda: _try(logits.device, logits.dtype, logits.shape[1]), otherwise=False
    )


@cache
def _try(device: torch.device, dtype: torch.dtype, vocab: int) -> bool:
    """
    Draw from rows that leave no choice: greedy, without limits, and with top_k.

    Raises:
        OutOfMemoryError: so that it is tried again.
    """
    cold, single = (
        numbers(0, 0, temperature=temperature, top_k=top_k, top_p=1.0, min_p=0.0)
        for temperature, top_k in ((1e-3, 0), (1.0, 1))
    )
    rows = [GREEDY, cold, single]
    with left_out_if_broken("draw_kernel", device), torch.inference_mode():
        from engine.kernels.gpu import draw as kernel

        logits = torch.zeros((len(rows), vocab), dtype=dtype, device=device)
        logits[:, -1:].fill_(1.0)
        draws = torch.from_numpy(table(rows, [0] * len(rows), len(rows))).to(device)
        if kernel.draw(logits, draws).tolist() != [vocab - 1] * len(rows):
            raise RuntimeError(f"draws from {vocab} {dtype} are nonsense")
        return True
    return False


def plain_draw(logits: Tensor, draws: Tensor) -> Tensor:
    """`draw` in torch alone, as it is meant: all ids are sorted, whatever is asked."""
    vocab = logits.shape[1]
    # + 0.0 turns -0.0 into 0.0, of which a stable sort leaves the lower id in front.
    logits = logits.float() + 0.0
    likeliest = plain_argmax(logits)
    temperature, top_p, min_p = (
        draws[row].contiguous().view(torch.float64)[:, None] for row in (TEMPERATURE, TOP_P, MIN_P)
    )
    top_k = draws[TOP_K, :, None]
    is_drawn = temperature > 0
    weights = logits - logits.amax(dim=-1, keepdim=True)
    weights.div_(torch.where(is_drawn, temperature, 1.0).float()).exp_()
    weights.masked_fill_(weights < min_p.float(), 0.0)
    order = logits.sort(dim=-1, descending=True, stable=True).indices
    values = weights.gather(-1, order).double()
    place = torch.arange(vocab, device=logits.device)
    values.masked_fill_((place >= top_k) & (top_k > 0), 0.0)
    before = values.cumsum(dim=-1) - values
    # With top_p=1 rounding must not cut: a sum may reach all of it a little before the last token.
    wanted = torch.where(top_p < 1.0, top_p, math.inf) * values.sum(dim=-1, keepdim=True)
    values.masked_fill_(before >= wanted, 0.0)
    sums = torch.zeros_like(values).scatter_(-1, order, values).cumsum(dim=-1)
    share = _uniform(draws[KEY], draws[AT])[:, None] * sums[:, -1:]
    choice = torch.searchsorted(sums, share, right=True).clamp_(max=vocab - 1).flatten()
    return torch.where(is_drawn.flatten() & (likeliest != NO_TOKEN), choice, likeliest)


def _uniform(key: Tensor, at: Tensor) -> Tensor:
    """(num_rows,), float64: `uniform` on tensors, whose integers are signed and overflow as they should."""
    x = (key ^ at) + _signed(_ADDED)
    x = (x ^ _shift(x, 30)) * _signed(_FIRST)
    x = (x ^ _shift(x, 27)) * _signed(_SECOND)
    x ^= _shift(x, 31)
    return (_shift(x, 64 - UNIFORM_BITS).double() + 0.5) * 2.0**-UNIFORM_BITS


def _signed(x: int) -> int:
    return x - (1 << 64)  # all three have the highest bit


def _shift(x: Tensor, by: int) -> Tensor:
    return (x >> by) & ((1 << (64 - by)) - 1)


def uniform(
    seeds: Sequence[int], sample_indices: Sequence[int], positions: Sequence[int]
) -> npt.NDArray[np.float64]:
    """Numbers strictly between 0 and 1, made of these."""
    key = mix(mix_key(seeds, sample_indices) ^ np.array(positions, dtype=np.uint64))
    bits = (key >> np.uint64(64 - UNIFORM_BITS)).astype(np.float64)
    return (bits + 0.5) * 2.0**-UNIFORM_BITS


def mix_key(seeds: Sequence[int], sample_indices: Sequence[int]) -> npt.NDArray[np.uint64]:
    """What stays the same of an output's draws. Seeds are taken modulo 2**64."""
    wrapped = np.array([seed & _MASK_64 for seed in seeds], dtype=np.uint64)
    return mix(mix(wrapped) ^ np.array(sample_indices, dtype=np.uint64))


def mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """One step of splitmix64 (G. Steele, D. Lea, C. Flood, 2014), of each number."""
    x = x + np.uint64(_ADDED)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(_FIRST)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(_SECOND)
    return x ^ (x >> np.uint64(31))
