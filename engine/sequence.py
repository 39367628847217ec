"""One output's progress: the only value in the engine that changes as it runs."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from engine.kernels.draw import Numbers
from engine.prefixes import Key
from engine.processor import Prepared
from engine.request import CompletionOutput, FinishReason, Logprob
from engine.sampler import SamplingRow, draw_numbers, is_plain, is_simple, reads_history
from engine.text import Detokenizer


@dataclass(slots=True, eq=False)
class Sequence:
    """
    One of a request's `n` outputs while it grows.

    Attributes:
        ticket: the engine's number for the request.
        prepared: what all outputs of the request share.
        index: which output, from 0.
        seed: of its draws.
        features: (num_tokens, hidden) of each picture or clip, by its place among the prompt's, once
            encoded; one dict for all of a request's outputs, so that it is encoded once.
        encoded: places of those that the encoder ran for, shared by a request's outputs too; others
            were kept from before, or are those of another request at the same time.
        is_plain, reads_history: what the sampler asks of its parameters, asked once.
        is_simple_later: so too; whether `is_simple`, once it has min_tokens.
        draw_numbers: what its tokens are drawn with, for `engine.kernels.draw.table`.
        start: first row of its slab; None while it has none.
        slot: its place among those that decode together; None while it has none.
        num_computed: prompt tokens whose rows were there before the newest prefill.
        num_scheduled: of the piece behind them, which that prefill reads; usually the whole prompt.
        num_cached: prompt tokens whose rows are copied from another slab, not computed.
        copied_from: first row of that slab, until they have been.
        num_launched: tokens that the device was told to choose; some may not have been read yet.
        output_ids: chosen so far, and read.
    """

    ticket: int
    prepared: Prepared
    index: int
    seed: int
    eos_token_ids: tuple[int, ...]
    detokenizer: Detokenizer
    priority: int = 0
    features: dict[int, Tensor] = field(default_factory=dict)
    encoded: set[int] = field(default_factory=set)
    is_plain: bool = field(init=False)
    reads_history: bool = field(init=False)
    draw_numbers: Numbers = field(init=False)
    is_simple_later: bool = field(init=False)
    start: int | None = None
    slot: int | None = None
    num_computed: int = 0
    num_scheduled: int = 0
    num_cached: int = 0
    copied_from: int | None = None
    num_launched: int = 0
    output_ids: list[int] = field(default_factory=list)
    logprobs: list[Mapping[int, Logprob]] = field(default_factory=list)
    cumulative_logprob: float = 0.0
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None

    def __post_init__(self) -> None:
        self.is_plain = is_plain(self.prepared.params)
        self.reads_history = reads_history(self.prepared.params)
        self.draw_numbers = draw_numbers(self.prepared.params, self.seed, self.index)
        self.is_simple_later = is_simple(self.prepared.params, self.prepared.params.min_tokens)

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prepared.token_ids)

    @property
    def max_tokens(self) -> int:
        """See `Prepared.max_tokens`."""
        return self.prepared.max_tokens

    @property
    def both_ways(self) -> tuple[tuple[int, int], ...]:
        """See `Prepared.both_ways`."""
        return self.prepared.both_ways

    @property
    def prefix_keys(self) -> tuple[Key, ...]:
        """See `Prepared.prefix_keys`."""
        return self.prepared.prefix_keys

    @property
    def num_read(self) -> int:
        """Prompt tokens whose rows are there once the newest prefill has run."""
        return self.num_computed + self.num_scheduled

    @property
    def is_read(self) -> bool:
        """Whether that prefill reads the prompt to its end, so that a token follows."""
        return self.num_read == self.num_prompt_tokens

    @property
    def num_rows(self) -> int:
        """KV rows in use once the newest token's own have been written."""
        return self.num_prompt_tokens + self.num_launched

    @property
    def num_rows_at_most(self) -> int:
        return self.num_prompt_tokens + self.max_tokens

    @property
    def wants_token(self) -> bool:
        """Whether another token is to be chosen, as far as is known before the last ones are read."""
        return self.finish_reason is None and self.num_launched < self.max_tokens

    @property
    def is_finished(self) -> bool:
        return self.finish_reason is not None

    @property
    def is_simple(self) -> bool:
        """Whether the next token is drawn from the logits as they come; see `sampler.is_simple`."""
        return self.is_simple_later and self.num_launched >= self.prepared.params.min_tokens

    def sampling_row(self) -> SamplingRow:
        return SamplingRow(
            params=self.prepared.params,
            seed=self.seed,
            position=self.num_launched,
            prompt_token_ids=self.prepared.token_ids,
            output_token_ids=self.output_ids,
            eos_token_ids=self.eos_token_ids,
            sample_index=self.index,
        )

    def push(self, token_id: int) -> None:
        """Take the next token, and see whether it ends the output."""
        params = self.prepared.params
        self.output_ids.append(token_id)
        num_tokens = len(self.output_ids)
        ends_by_eos = token_id in self.eos_token_ids and not params.ignore_eos
        ends_by_id = token_id in (params.stop_token_ids or ())
        if num_tokens >= params.min_tokens and (ends_by_eos or ends_by_id):
            self.finish_reason = FinishReason.STOP
            self.stop_reason = None if ends_by_eos else token_id
            if params.include_stop_str_in_output:
                self.detokenizer.push(token_id)
            return
        self.detokenizer.push(token_id)
        if self.detokenizer.stop_reason is not None:
            self.finish_reason = FinishReason.STOP
            self.stop_reason = self.detokenizer.stop_reason
        elif num_tokens >= self.max_tokens:
            self.finish_reason = FinishReason.LENGTH
        elif params.repetition_detection is not None and params.repetition_detection.is_found_in(
            self.output_ids
        ):
            self.finish_reason = FinishReason.REPETITION

    def output(self) -> CompletionOutput:
        self.detokenizer.finish()
        wants_logprobs = self.prepared.params.logprobs is not None or bool(self.logprobs)
        return CompletionOutput(
            index=self.index,
            text=self.detokenizer.text,
            token_ids=list(self.output_ids),
            cumulative_logprob=self.cumulative_logprob if wants_logprobs else None,
            logprobs=list(self.logprobs) if wants_logprobs else None,
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
        )
