"""
Logits to token ids, for the rows of one step at once, on whatever device the logits live.

The order is vLLM's: allowed ids, bias and the mask of `min_tokens`; penalties; temperature; min_p;
top_k; top_p; then the draw. Two things are ours:

- A row's answer depends on that row alone. What a draw is made with is one number, a pure function
  of the seed, the output's index and the position, computed in integers, so the place in the batch
  and the order of admission change nothing. Weights are summed up in float64, so that the order of
  sums, in which libraries and kernels differ, decides next to nothing. That is all that neighbours
  change: on a GPU one with penalties or log-probabilities takes the batch along to the kernel for
  float32, which may group sums in another way.
- Ties go to the lowest id: in greedy, at the edge of top_k and top_p, and in ranks. So top_k=1 is
  greedy, also where 16-bit logits are full of ties.

What a draw is, once penalties are done, engine/kernels/draw.py says. A GPU draws there where its kernel
runs; here is the same for all others, and looks for the likeliest few before it sorts a whole vocabulary.

It refuses to know sequences, tokenizers and stopping: the caller gives views and takes ids.

Axes: num_rows, vocab. The logits given are never written to.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.kernels import draw
from engine.kernels.greedy import NO_TOKEN, plain_argmax
from engine.request import ALL, Logprob, SamplingParams
from engine.uploads import upload

MAX_CANDIDATES = 1024  # ids that top_p looks at before it sorts the whole vocabulary
# Logits worked on at once, whatever the batch: up to 33 bytes each, so that 1.1 GB is the most (2026).
MAX_BLOCK_LOGITS = 1 << 25
MAX_SORTED_LOGITS = 1 << 23  # of rows that are sorted as a whole: up to 53 bytes each
SUM_WIDTH = 256  # weights that are summed up before it is known which of them are looked at


@dataclass(frozen=True, slots=True)
class SamplingRow:
    """
    One sequence, as the sampler sees it in one step.

    NOTE: the parameters must have passed `check_vocab`. On a GPU an id outside the logits ends the
    process, not the request.

    Args:
        params: of its request.
        seed: of its draws; the request's, or one that the engine chose. Greedy never reads it.
        position: number of output tokens so far.
        prompt_token_ids: with placeholders expanded; read by repetition_penalty only.
        output_token_ids: so far; read by penalties only.
        eos_token_ids: never chosen before min_tokens, unless the parameters ignore them anyway.
        sample_index: which of the request's n outputs, from 0.
    """

    params: SamplingParams
    seed: int
    position: int
    prompt_token_ids: Sequence[int] = ()
    output_token_ids: Sequence[int] = ()
    eos_token_ids: Sequence[int] = ()
    sample_index: int = 0


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """
    Log-probabilities at one place, before any parameter bent them.

    Args:
        logprob: of the chosen token.
        rank: of the chosen token, 1 is the likeliest.
        top: (token id, logprob, rank) of the likeliest ones, in order; or of `logprob_token_ids`,
            in theirs and without a rank.
    """

    logprob: float
    rank: int
    top: tuple[tuple[int, float, int | None], ...]

    def by_id(self, token_id: int, decode: Callable[[int], str]) -> dict[int, Logprob]:
        """As results hold them, the chosen `token_id` first; `decode` gives an id's text."""
        entries = {token_id: Logprob(self.logprob, self.rank, decode(token_id))}
        for index, logprob, rank in self.top:
            entries.setdefault(index, Logprob(logprob, rank, decode(index)))
        return entries


@dataclass(frozen=True, slots=True)
class _LogprobGroup:
    """
    Rows that asked for as many log-probabilities, still on the device.

    Args:
        rows: their numbers in the batch.
        ids: (num_rows, 1 + num_logprobs), int64; the chosen token first.
        logprobs: of these ids, float32.
        chosen_ranks: (num_rows,), int64.
        is_ranked: whether the ids behind the chosen one have the ranks 1, 2, ...
    """

    rows: tuple[int, ...]
    ids: Tensor
    logprobs: Tensor
    chosen_ranks: Tensor
    is_ranked: bool

    def read(self) -> Iterator[tuple[int, TokenLogprobs]]:
        """(row, its log-probabilities), on the host."""
        table = (self.rows, self.ids.tolist(), self.logprobs.tolist(), self.chosen_ranks.tolist())
        for row, ids, logprobs, chosen_rank in zip(*table, strict=True):
            ranks = range(1, len(ids)) if self.is_ranked else [None] * (len(ids) - 1)
            top = tuple(zip(ids[1:], logprobs[1:], ranks, strict=True))
            yield row, TokenLogprobs(logprobs[0], chosen_rank, top)


@dataclass(frozen=True, slots=True)
class Sampled:
    """
    One token for each row, still on the device: reading them is what waits for it.

    Args:
        token_ids: (num_rows,), int64, the logits' device; `NO_TOKEN` where none could be chosen.
    """

    token_ids: Tensor
    _logprob_groups: tuple[_LogprobGroup, ...] = ()

    def tolist(self) -> list[int]:
        """The ids on the host. One transfer; waits for the device."""
        ids: list[int] = self.token_ids.tolist()
        return ids

    def logprobs(self) -> list[TokenLogprobs | None]:
        """
        For each row its log-probabilities; None where it asked for none.

        Those of a row with `NO_TOKEN` mean nothing.
        """
        found: list[TokenLogprobs | None] = [None] * len(self.token_ids)
        for group in self._logprob_groups:
            for row, logprobs in group.read():
                found[row] = logprobs
        return found


# (logits, weights, uniform, rows) -> token ids, all of the same rows
_Draw = Callable[[Tensor, Tensor, Tensor, Sequence[SamplingRow]], Tensor]


class Sampler:
    """
    Chooses a token for each row of logits.

    Args:
        vocab_size: columns of the logits, padding of the vocabulary included.
        device: where the logits live.
        max_candidates: ids that top_p looks at before it sorts everything; changes speed only.
    """

    def __init__(
        self,
        vocab_size: int,
        device: torch.device | str,
        *,
        max_candidates: int = MAX_CANDIDATES,
    ) -> None:
        self.vocab_size = vocab_size
        self.device = torch.device(device)
        self._max_candidates = min(max_candidates, vocab_size)

    def sample(self, logits: Tensor, rows: Sequence[SamplingRow]) -> Sampled:
        """
        Choose one token for each row.

        Args:
            logits: (num_rows, vocab), any float type; not changed.
            rows: what each row belongs to, in the same order.

        Returns:
            The ids on the device. Nothing has waited for the device, unless the kernel that draws is
            tried for the first time, or does not run there and a row has top_p without top_k.

        Raises:
            ValueError: the shapes do not fit each other, which is a bug of the caller.
        """
        if logits.shape != (len(rows), self.vocab_size):
            raise ValueError(
                f"logits must be ({len(rows)}, {self.vocab_size}), got {tuple(logits.shape)}"
            )
        if all(is_simple(row.params, row.position) for row in rows):
            if all(row.params.greedy for row in rows):
                return self.sample_plain(logits)
            if draw.is_usable(logits):
                return Sampled(self._draw_in_kernel(logits, rows))
        blocks = []
        logprob_groups: list[_LogprobGroup] = []
        num_rows = max(1, MAX_BLOCK_LOGITS // self.vocab_size)
        for start in range(0, len(rows), num_rows):
            block = slice(start, start + num_rows)
            raw = logits[block].float()
            token_ids = self._choose(raw, rows[block])
            logprob_groups += _gather_logprobs(raw, token_ids, rows[block], start)
            blocks.append(token_ids)
        return Sampled(torch.cat(blocks), tuple(logprob_groups))

    def sample_plain(self, logits: Tensor) -> Sampled:
        """For rows that all are greedy and simple (`is_simple`): one argmax, and no rows needed."""
        # No cast to float32 first: it is exact, so it could not change which is the largest.
        return Sampled(plain_argmax(logits))

    def _choose(self, raw: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
        """raw: (num_rows, vocab), float32. Returns (num_rows,), int64."""
        logits = _penalise(_restrict(raw, rows), rows)
        drawn = [i for i, row in enumerate(rows) if not row.params.greedy]
        if drawn and draw.is_usable(logits):
            return self._draw_in_kernel(logits, rows)
        token_ids = plain_argmax(logits)
        if drawn:
            choice = self._draw(_take(logits, drawn), [rows[i] for i in drawn])
            index = _upload(drawn, self.device)
            # A row in which greedy finds nothing to choose has nothing to draw from either.
            token_ids[index] = torch.where(token_ids[index] == NO_TOKEN, NO_TOKEN, choice)
        return token_ids

    def _draw_in_kernel(self, logits: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
        """logits: (num_rows, vocab), any float type, after penalties. Returns (num_rows,), int64."""
        table = draw.table(
            [draw_numbers(row.params, row.seed, row.sample_index) for row in rows],
            [row.position for row in rows],
            len(rows),
        )
        return draw.draw(logits, upload(table, self.device))

    def _draw(self, logits: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
        """logits: (num_rows, vocab), float32, after penalties. Returns (num_rows,), int64."""
        weights = logits - logits.amax(dim=-1, keepdim=True)
        weights.div_(self._column([row.params.temperature for row in rows]).float()).exp_()
        if any(row.params.min_p > 0 for row in rows):
            least = self._column([row.params.min_p for row in rows]).float()
            weights.masked_fill_(weights < least, 0.0)
        uniform = self._column(draw_uniform(rows))
        # By how much of the order of its ids a row needs: none, the likeliest few, all of it.
        ways: dict[_Draw, list[int]] = {}
        for i, row in enumerate(rows):
            num_kept = self._top_k(row.params)
            if num_kept > self._max_candidates:
                ways.setdefault(self._draw_sorted, []).append(i)
            elif num_kept or row.params.top_p < 1.0:
                ways.setdefault(self._draw_from_top, []).append(i)
            else:
                ways.setdefault(_draw_from_all, []).append(i)
        if len(ways) == 1:
            (draw,) = ways
            return draw(logits, weights, uniform, rows)
        token_ids = torch.empty(len(rows), dtype=torch.int64, device=self.device)
        for draw, members in ways.items():
            index = _upload(members, self.device)
            given = logits[index], weights[index], uniform[index]
            token_ids[index] = draw(*given, [rows[i] for i in members])
        return token_ids

    def _top_k(self, params: SamplingParams) -> int:
        """0 for all, which a larger one means too; it may not even fit an int64."""
        return params.top_k if params.top_k < self.vocab_size else 0

    def _draw_from_top(
        self, logits: Tensor, weights: Tensor, uniform: Tensor, rows: Sequence[SamplingRow]
    ) -> Tensor:
        """For rows with a small top_k, or top_p: draw from the likeliest few of each."""
        num_candidates = max(self._top_k(row.params) or self._max_candidates for row in rows)
        token_ids, is_covered = self._pick_from_top(logits, weights, uniform, rows, num_candidates)
        is_sure = all(self._top_k(row.params) for row in rows)
        if num_candidates < self.vocab_size and not is_sure:
            missed = torch.nonzero(~is_covered).flatten()
            if len(missed):
                missed_rows = [rows[i] for i in missed.tolist()]
                given = logits[missed], weights[missed], uniform[missed]
                token_ids[missed] = self._draw_sorted(*given, missed_rows)
        return token_ids

    def _draw_sorted(
        self, logits: Tensor, weights: Tensor, uniform: Tensor, rows: Sequence[SamplingRow]
    ) -> Tensor:
        """For rows of which more than a few ids may be kept: some at a time, as sorting takes memory."""
        num_rows = max(1, MAX_SORTED_LOGITS // self.vocab_size)
        picked = []
        for start in range(0, len(rows), num_rows):
            block = slice(start, start + num_rows)
            of_block = logits[block], weights[block], uniform[block]
            picked.append(self._pick_from_top(*of_block, rows[block], self.vocab_size)[0])
        return torch.cat(picked)

    def _pick_from_top(
        self,
        logits: Tensor,
        weights: Tensor,
        uniform: Tensor,
        rows: Sequence[SamplingRow],
        num_candidates: int,
    ) -> tuple[Tensor, Tensor]:
        """
        Draw from the `num_candidates` likeliest ids, less those that top_k and top_p cut.

        Returns:
            token_ids: (num_rows,), int64.
            is_covered: (num_rows,), bool; False where top_p reaches behind the candidates.
        """
        ids = find_top(logits, num_candidates)
        values = weights.gather(-1, ids).double()
        # 1. top_k: candidates stand in order, so it cuts behind the k-th.
        top_k = self._column([self._top_k(row.params) or self.vocab_size for row in rows])
        place = torch.arange(num_candidates, device=self.device)
        values.masked_fill_(place >= top_k, 0.0)
        # 2. top_p: keep those before which less than p has been reached, of what top_k left.
        has_top_k = self._column([self._top_k(row.params) > 0 for row in rows])
        total = torch.where(
            has_top_k,
            values.sum(dim=-1, keepdim=True),
            weights.sum(dim=-1, keepdim=True, dtype=torch.float64),
        )
        sums = values.cumsum(dim=-1)
        # With top_p=1 rounding must not cut: a sum may reach 1.0 a little before the last token.
        wanted = self._column([_or_inf(row.params.top_p) for row in rows]) * total
        is_covered = (has_top_k | (sums[:, -1:] >= wanted)).flatten()
        values.masked_fill_(sums - values >= wanted, 0.0)
        # 3. the draw, among ids in their order
        if num_candidates == self.vocab_size:
            sums = torch.empty_like(values).scatter_(-1, ids, values).cumsum(dim=-1)
            return _search(sums, uniform * sums[:, -1:]).flatten(), is_covered
        ids, order = ids.sort(dim=-1)
        sums = values.gather(-1, order).cumsum(dim=-1)
        choice = _search(sums, uniform * sums[:, -1:])
        return ids.gather(-1, choice).flatten(), is_covered

    def _column(self, values: Sequence[float]) -> Tensor:
        """(num_rows, 1), one value a row; float64, int64 or bool, as the values are."""
        return _upload(values, self.device)[:, None]


def is_plain(params: SamplingParams) -> bool:
    """Greedy, and nothing else to do: worth asking once a request instead of once a step."""
    return params.greedy and is_simple(params)


def is_simple(params: SamplingParams, position: int = 0) -> bool:
    """Whether the logits of that position, and what a draw is made with, say all: as they come."""
    return (
        params.allowed_token_ids is None
        and not params.logit_bias
        and position >= params.min_tokens
        and not reads_history(params)
        and not _asks_logprobs(params)
    )


def draw_numbers(params: SamplingParams, seed: int, sample_index: int) -> draw.Numbers:
    """What a row is drawn with, for `draw.table`."""
    return draw.numbers(
        seed,
        sample_index,
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        min_p=params.min_p,
    )


def _take(tensor: Tensor, rows: list[int]) -> Tensor:
    """Some rows, in order; the tensor itself, without a copy, where that is all of them."""
    if len(rows) == len(tensor):
        return tensor
    return tensor[_upload(rows, tensor.device)]


def _upload(values: Sequence[float], device: torch.device, dtype: Any = None) -> Tensor:
    """(num,), without waiting for the device, as every plain copy to it would."""
    return upload(np.array(values, dtype=dtype), device)


def _is_restricted(row: SamplingRow) -> bool:
    params = row.params
    return bool(
        params.allowed_token_ids is not None or params.logit_bias or _is_before_min_tokens(row)
    )


def _is_before_min_tokens(row: SamplingRow) -> bool:
    return row.position < row.params.min_tokens


def reads_history(params: SamplingParams) -> bool:
    """Whether a draw depends on the tokens before it, so that they must have been read."""
    return (
        params.repetition_penalty != 1.0
        or params.presence_penalty != 0.0
        or params.frequency_penalty != 0.0
    )


def _index(token_ids: Iterable[int], line: Tensor) -> Tensor:
    """Those ids that have a logit: placeholders and ends of text may have none."""
    known = [token_id for token_id in token_ids if 0 <= token_id < len(line)]
    return _upload(known, line.device, np.int64)


def _asks_logprobs(params: SamplingParams) -> bool:
    return params.logprobs is not None or params.logprob_token_ids is not None


def _num_logprobs(params: SamplingParams, vocab_size: int) -> int | None:
    if params.logprob_token_ids is not None:
        return len(params.logprob_token_ids)
    if params.logprobs is None:
        return None
    return vocab_size if params.logprobs == ALL else min(params.logprobs, vocab_size)


def _restrict(raw: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """Allowed ids, bias, and the mask of min_tokens. Returns `raw` itself if no row needs any."""
    if not any(_is_restricted(row) for row in rows):
        return raw
    logits = raw.clone()
    for line, row in zip(logits, rows, strict=True):  # each line is a view of (vocab,)
        params = row.params
        if params.allowed_token_ids is not None:
            allowed = _upload(params.allowed_token_ids, line.device)
            kept = line[allowed]
            line.fill_(-math.inf)
            line[allowed] = kept
        if params.logit_bias:
            biased = _upload(list(params.logit_bias), line.device)
            line[biased] += _upload(list(params.logit_bias.values()), line.device, np.float32)
        if _is_before_min_tokens(row):
            ends = [
                *(params.stop_token_ids or ()),
                *(() if params.ignore_eos else row.eos_token_ids),
            ]
            # NOTE: assigned by index, a number of Python's would be copied with a wait for the device.
            line.index_fill_(0, _index(ends, line), -math.inf)
    return logits


def _penalise(logits: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """The three penalties. Returns `logits` itself if no row has one."""
    if not any(reads_history(row.params) for row in rows):
        return logits
    logits = logits.clone()
    for line, row in zip(logits, rows, strict=True):
        params = row.params
        if params.repetition_penalty != 1.0:
            index = _index(set(row.prompt_token_ids).union(row.output_token_ids), line)
            values = line[index]
            line[index] = torch.where(
                values > 0, values / params.repetition_penalty, values * params.repetition_penalty
            )
        if params.presence_penalty != 0.0 or params.frequency_penalty != 0.0:
            counts = Counter(row.output_token_ids)
            index = _upload(list(counts), line.device, np.int64)
            times = _upload(list(counts.values()), line.device, np.float32)
            line[index] -= params.frequency_penalty * times + params.presence_penalty
    return logits


def _gather_logprobs(
    raw: Tensor, token_ids: Tensor, rows: Sequence[SamplingRow], start: int
) -> Iterator[_LogprobGroup]:
    """
    Args:
        raw: (num_rows, vocab), float32, as the model gave them.
        token_ids: (num_rows,), int64, the chosen ones.
        start: the first row's number in the batch.
    """
    groups: dict[tuple[int, bool], list[int]] = {}
    for i, row in enumerate(rows):
        num_logprobs = _num_logprobs(row.params, raw.shape[-1])
        if num_logprobs is not None:
            is_ranked = row.params.logprob_token_ids is None
            groups.setdefault((num_logprobs, is_ranked), []).append(i)
    for (num_logprobs, is_ranked), members in groups.items():
        index = _upload(members, raw.device)
        logits = raw[index]
        chosen = token_ids[index, None].clamp(min=0)
        if is_ranked:
            top = find_top(logits, num_logprobs)
        else:
            listed = [rows[i].params.logprob_token_ids for i in members]
            top = upload(np.array(listed, dtype=np.int64), raw.device)
        ids = torch.cat((chosen, top), dim=-1)
        yield _LogprobGroup(
            rows=tuple(start + i for i in members),
            ids=ids,
            logprobs=(logits.gather(-1, ids).double() - _log_total(logits)).float(),
            chosen_ranks=_rank(logits, chosen),
            is_ranked=is_ranked,
        )


def find_top(logits: Tensor, num: int) -> Tensor:
    """
    The likeliest ids of each row, in order; of equal logits the lower id goes first.

    Of the blocks of a row, only those are looked at whose largest logits are the `num` largest: all that
    is wanted is in them. Selecting among the whole vocabulary takes many times as long.

    Args:
        logits: (num_rows, vocab), float32.

    Returns:
        (num_rows, num), int64.
    """
    num_rows, vocab = logits.shape
    width = 1 << max(2, round(math.log2(vocab / max(1, num)) / 2))
    if 2 * num * width > vocab:
        # + 0.0 turns -0.0 into 0.0, of which a sort that is stable leaves the lower id in front.
        return (logits + 0.0).sort(dim=-1, descending=True, stable=True).indices[:, :num]
    blocks = _cut_blocks(logits, width, -math.inf)
    numbers = torch.arange(blocks.shape[1], device=logits.device)
    picked = _order_keys(blocks.amax(dim=-1), numbers).topk(num).indices[..., None]
    values = blocks.gather(1, picked.expand(-1, -1, width)).view(num_rows, -1)
    ids = (picked * width + torch.arange(width, device=logits.device)).view(num_rows, -1)
    found = ids.gather(-1, _order_keys(values, ids).topk(num).indices)
    return found.clamp_(max=vocab - 1)  # of a row that is no numbers, what fills it up may be found


def _cut_blocks(values: Tensor, width: int, filling: float) -> Tensor:
    """(num_rows, num) -> (num_rows, blocks, width), the last one filled up."""
    missing = -values.shape[1] % width
    if missing:
        values = F.pad(values, (0, missing), value=filling)
    return values.view(len(values), -1, width)


def _order_keys(logits: Tensor, ids: Tensor) -> Tensor:
    """
    Integers in the order of the logits, all different: of equal logits the lower id is larger.

    With them any algorithm for sorting and selecting gives the same answer, on any device.

    Args:
        logits: (num_rows, num), float32.
        ids: (num,) or (num_rows, num), int64 below 2**32.

    Returns:
        (num_rows, num), int64.
    """
    # Read as integers, positive floats are in order and negative ones in reverse: flip those.
    bits = (logits + 0.0).view(torch.int32).to(torch.int64)  # + 0.0 turns -0.0 into 0.0
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return (ordered << 32) - ids


def _rank(logits: Tensor, chosen: Tensor) -> Tensor:
    """(num_rows,), int64: how many ids stand no lower than the chosen one, (num_rows, 1)."""
    value = logits.gather(-1, chosen)
    ids = torch.arange(logits.shape[-1], device=logits.device)
    return ((logits > value) | ((logits == value) & (ids <= chosen))).sum(dim=-1)


def _log_total(logits: Tensor) -> Tensor:
    """(num_rows, 1), float64: the logarithm of the sum of all exponentials."""
    largest = logits.amax(dim=-1, keepdim=True)
    total = (logits - largest).exp_().sum(dim=-1, keepdim=True, dtype=torch.float64)
    return largest.double() + total.log()


def _draw_from_all(
    _logits: Tensor, weights: Tensor, uniform: Tensor, _rows: Sequence[SamplingRow]
) -> Tensor:
    return _pick(weights, uniform)


def _pick(weights: Tensor, uniform: Tensor) -> Tensor:
    """
    The id at which the sum of weights exceeds its share of all of them.

    Args:
        weights: (num_rows, vocab), float32, 0 and more, not all of them 0.
        uniform: (num_rows, 1), float64, between 0 and 1.

    Returns:
        (num_rows,), int64; anything within the vocabulary for a row that is no numbers.
    """
    blocks = _cut_blocks(weights, SUM_WIDTH, 0.0)
    sums = blocks.sum(dim=-1, dtype=torch.float64).cumsum(dim=-1)
    wanted = uniform * sums[:, -1:]
    block = _search(sums, wanted)
    inside = blocks.gather(1, block[..., None].expand(-1, -1, SUM_WIDTH))[:, 0].double()
    before = F.pad(sums, (1, 0)).gather(-1, block)
    place = (inside.cumsum(dim=-1) + before <= wanted).sum(dim=-1, keepdim=True)
    # Summed up in another order a block may miss what it reached: then it is its last one.
    places = torch.arange(SUM_WIDTH, device=weights.device)
    last = torch.where(inside > 0, places, 0).amax(dim=-1, keepdim=True)
    return (block * SUM_WIDTH + torch.minimum(place, last)).flatten()


def _search(sums: Tensor, wanted: Tensor) -> Tensor:
    """(num_rows, 1), int64: where sums, (num_rows, num), first exceed what is wanted of each row."""
    return torch.searchsorted(sums, wanted, right=True).clamp_(max=sums.shape[-1] - 1)


def draw_uniform(rows: Sequence[SamplingRow]) -> list[float]:
    """A number for each row, strictly between 0 and 1, made of its seed, index and position."""
    found: list[float] = draw.uniform(
        [row.seed for row in rows],
        [row.sample_index for row in rows],
        [row.position for row in rows],
    ).tolist()
    return found


def mix_seed(engine_seed: int, number: int) -> int:
    """
    The seed of a request that names none: another for each number, and none that people write.

    Returns:
        63 bits, which `SamplingParams.seed` takes, so that a stamp can be asked again.
    """
    return int(draw.mix_key([engine_seed], [number])[0]) >> 1


def _or_inf(top_p: float) -> float:
    return top_p if top_p < 1.0 else math.inf
