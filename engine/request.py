"""
What goes into the engine beside the prompt, and what comes out: names and defaults are vLLM's.

Plain frozen values; nothing here knows a tensor, a tokenizer or a device. Everything that can be
checked without a model is checked when a value is made, so that whatever holds a `SamplingParams`
may trust it; what needs the vocabulary's size is checked by `check_vocab`.
"""

import copy
import logging
import math
import numbers
import operator
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Self

from engine.errors import (
    BadSamplingParams,
    EngineError,
    NothingAllowed,
    ResultError,
    to_result_error,
)

logger = logging.getLogger(__name__)

DEFAULT_MAX_TOKENS = 16
MAX_NUM_OUTPUTS = 16384
MAX_LOGPROBS = 20
MAX_LOGPROB_TOKEN_IDS = 128
MAX_LOGIT_BIAS = 100.0
REPETITION_PENALTIES = (1e-3, 1e3)
MAX_PATTERN_TOKENS = 1024
ALL = -1  # logprobs: every token of the vocabulary
MIN_TEMPERATURE = 0.01  # dividing logits by less overflows in half precision


class FinishReason(StrEnum):
    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"
    REPETITION = "repetition"


class Flag(StrEnum):
    """What a reader of the result should know, though it is no error."""

    CUT_OFF = "cut_off"  # max_tokens was never given, and the default cut the text
    EMPTY = "empty"  # finished without an error and without a visible character
    LOOPING = "looping"  # ended by repetition_detection


class _DefaultMaxTokens(int):
    """The default of `max_tokens`: 16, and known as never given, through copies and pickles too."""


@dataclass(frozen=True, slots=True)
class RepetitionDetectionParams:
    """
    End an output whose tail is one pattern of tokens, again and again.

    Args:
        max_pattern_size: longest pattern looked for, in tokens; 0 switches the detection off.
        min_pattern_size: shortest pattern, in tokens; 0 means 1.
        min_count: how often the pattern must stand in a row, at least 2.
    """

    max_pattern_size: int = 0
    min_pattern_size: int = 0
    min_count: int = 0

    def __post_init__(self) -> None:
        name = "repetition_detection"
        for part in ("max_pattern_size", "min_pattern_size", "min_count"):
            bounds = (0, MAX_PATTERN_TOKENS)
            _set(self, part, _integer(f"{name}.{part}", getattr(self, part), *bounds))
        if self.min_pattern_size > self.max_pattern_size:
            raise BadSamplingParams(
                f"{name}.min_pattern_size must be at most max_pattern_size="
                f"{self.max_pattern_size}, got {self.min_pattern_size}.",
                param=name,
            )
        if self.max_pattern_size > 0 and self.min_count < 2:
            raise BadSamplingParams(
                f"{name}.min_count must be at least 2, got {self.min_count}. "
                "To switch the detection off, set max_pattern_size to 0.",
                param=name,
            )

    def is_found_in(self, token_ids: Sequence[int]) -> bool:
        """Whether the output, as it stands, ends in `min_count` copies of one pattern."""
        for size in range(max(1, self.min_pattern_size), self.max_pattern_size + 1):
            length = size * self.min_count
            if length > len(token_ids):
                return False
            if token_ids[-1] != token_ids[-1 - size]:
                continue  # the cheap look first: this runs after every token
            tail = token_ids[-length:]
            if tail[size:] == tail[:-size]:
                return True
        return False


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """
    How to choose an output's tokens, and when to end it.

    Args:
        n: outputs for one prompt, 1 to 16384; 1 where sampling is greedy.
        presence_penalty: -2 to 2, taken off the logit of every token already in the output.
        frequency_penalty: -2 to 2, the same once for each time it is there.
        repetition_penalty: over 0 (0.001 to 1000); divides (or multiplies, where negative) the logit of every
            token that is in the prompt or the output.
        temperature: 0 to 2; 0 is greedy, and what lies between 0 and 0.01 becomes 0.01.
        top_p: over 0, up to 1: draw from the likeliest tokens that together reach this.
        top_k: draw from that many tokens; 0 (or -1) means all.
        min_p: 0 to 1: draw from tokens at least this likely, relative to the likeliest.
        seed: makes draws repeatable; None (or -1) lets the engine choose. Greedy needs none.
        stop: a string or several that end the output where they are complete.
        stop_token_ids: ids that end the output.
        ignore_eos: go on behind the model's end of text.
        max_tokens: at most so many output tokens; None means what is left of the context.
        min_tokens: neither the end of text nor a stop before so many output tokens.
        logprobs: log-probabilities of the so many likeliest tokens at each place, at most 20, and
            of the chosen one; 0 gives the chosen one alone, -1 all of the vocabulary.
        prompt_logprobs: not supported yet.
        logprob_token_ids: log-probabilities of just these ids (at most 128) and the chosen one.
        detokenize: False leaves the text empty.
        skip_special_tokens: leave special tokens out of the text.
        spaces_between_special_tokens: as the tokenizer takes it; most have no use for it.
        include_stop_str_in_output: keep what ended the output, string or token, in the text.
        structured_outputs: not supported yet.
        logit_bias: token id -> what is added to its logit, cut to -100..100.
        allowed_token_ids: the only ids to choose from.
        bad_words: not supported yet.
        repetition_detection: see `RepetitionDetectionParams`; a mapping will do.

    Lists are kept as tuples: a value may serve many requests and never changes. Another one like it is
    `dataclasses.replace(params, max_tokens=100)`, which is checked as a new one is.

    Raises:
        BadSamplingParams: a value is of a wrong type, not allowed, or not supported.
    """

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = _DefaultMaxTokens(DEFAULT_MAX_TOKENS)
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logprob_token_ids: Sequence[int] | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    structured_outputs: object | None = None
    logit_bias: Mapping[int, float] | None = field(default=None, hash=False)
    allowed_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str] | None = None
    repetition_detection: RepetitionDetectionParams | None = None

    def __post_init__(self) -> None:
        self._check_supported()
        self._check_flags()
        self._check_shape()
        self._check_lengths()
        self._check_token_ids()
        self._check_stop()
        self._check_logprobs()

    def _check_supported(self) -> None:
        for name in ("prompt_logprobs", "structured_outputs", "bad_words"):
            value = getattr(self, name)
            # An empty list of bad words forbids nothing, but 0 prompt logprobs would ask for some.
            is_given = value is not None and not (name == "bad_words" and value in ([], ()))
            if is_given:
                raise BadSamplingParams(f"{name} is not supported yet: leave it out.", param=name)
            _set(self, name, None)

    def _check_flags(self) -> None:
        for name in (
            "ignore_eos",
            "detokenize",
            "skip_special_tokens",
            "spaces_between_special_tokens",
            "include_stop_str_in_output",
        ):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise BadSamplingParams(
                    f"{name} must be True or False, got {_show(value)}.", param=name
                )

    def _check_shape(self) -> None:
        """The shape of the distribution: what bends logits, and the seed of the draw."""
        for name, low, high in (
            ("presence_penalty", -2.0, 2.0),
            ("frequency_penalty", -2.0, 2.0),
            ("temperature", 0.0, 2.0),
            ("min_p", 0.0, 1.0),
        ):
            _set(self, name, _number(name, getattr(self, name), low, high))
        for name, high, allowed in (
            ("top_p", 1.0, "over 0 and at most 1"),
            ("repetition_penalty", math.inf, "over 0"),
        ):
            value = _number(name, getattr(self, name), -math.inf, math.inf)
            if not 0 < value <= high:
                raise BadSamplingParams(f"{name} must be {allowed}, got {value}.", param=name)
            _set(self, name, value)
        # Within these a logit stays a number, whatever it is.
        _number("repetition_penalty", self.repetition_penalty, *REPETITION_PENALTIES)
        _set(self, "top_k", max(0, _integer("top_k", self.top_k, -1)))
        if 0 < self.temperature < MIN_TEMPERATURE:
            logger.warning("temperature_raised given=%s used=%s", self.temperature, MIN_TEMPERATURE)
            _set(self, "temperature", MIN_TEMPERATURE)
        if self.seed is not None:
            seed = _integer("seed", self.seed, -(2**63), 2**64 - 1)
            _set(self, "seed", None if seed == -1 else seed)

    def _check_lengths(self) -> None:
        _set(self, "n", _integer("n", self.n, 1, MAX_NUM_OUTPUTS))
        if self.greedy and self.n > 1:
            raise BadSamplingParams(
                f"n must be 1 when using greedy sampling, got {self.n}. "
                "All outputs would be the same; give a temperature over 0.",
                param="n",
            )
        if self.max_tokens_given and self.max_tokens is not None:
            _set(self, "max_tokens", _integer("max_tokens", self.max_tokens, 1))
        _set(self, "min_tokens", _integer("min_tokens", self.min_tokens, 0))
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            default = "" if self.max_tokens_given else " (the default; give max_tokens as well)"
            raise BadSamplingParams(
                f"min_tokens must be at most max_tokens={self.max_tokens}{default}, "
                f"got {self.min_tokens}.",
                param="min_tokens",
            )
        if isinstance(self.repetition_detection, Mapping):
            _set(self, "repetition_detection", _build_detection(self.repetition_detection))
        elif not isinstance(self.repetition_detection, RepetitionDetectionParams | None):
            raise BadSamplingParams(
                "repetition_detection must be a RepetitionDetectionParams or a mapping, got "
                f"{_show(self.repetition_detection)}.",
                param="repetition_detection",
            )

    def _check_token_ids(self) -> None:
        _set(self, "stop_token_ids", _token_ids("stop_token_ids", self.stop_token_ids) or ())
        for name in ("allowed_token_ids", "logprob_token_ids"):
            ids = _token_ids(name, getattr(self, name))
            if ids == ():
                raise BadSamplingParams(
                    f"{name} must hold at least one token id, got an empty list. "
                    "Leave it out to have no such list.",
                    param=name,
                )
            _set(self, name, ids)
        if self.logit_bias is not None:
            _set(self, "logit_bias", _build_bias(self.logit_bias))

    def _check_stop(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else _items("stop", self.stop)
        for text in stop:
            if not isinstance(text, str) or not text:
                raise BadSamplingParams(
                    f"stop must be strings of at least one character, got {_show(text)}.",
                    param="stop",
                )
        if stop and not self.detokenize:
            raise BadSamplingParams(
                "stop strings are only supported when detokenize is True. "
                "Set detokenize=True, or use stop_token_ids.",
                param="stop",
            )
        _set(self, "stop", tuple(dict.fromkeys(stop)))

    def _check_logprobs(self) -> None:
        if self.logprobs is not None:
            count = _integer("logprobs", self.logprobs, ALL)
            if count > MAX_LOGPROBS and self.logprob_token_ids is None:
                raise BadSamplingParams(
                    f"logprobs must be at most {MAX_LOGPROBS}, or -1 for all, got {count}.",
                    param="logprobs",
                )
            _set(self, "logprobs", count)
        if self.logprob_token_ids is None:
            return
        num_ids = len(self.logprob_token_ids)
        if num_ids > MAX_LOGPROB_TOKEN_IDS:
            raise BadSamplingParams(
                f"logprob_token_ids must be at most {MAX_LOGPROB_TOKEN_IDS} ids, got {num_ids}.",
                param="logprob_token_ids",
            )
        if self.logprobs not in (None, num_ids):
            raise BadSamplingParams(
                f"logprobs must be {num_ids}, the number of logprob_token_ids, when both are "
                f"given, got {self.logprobs}. Leave one out.",
                param="logprobs",
            )

    @classmethod
    def from_generation_config(cls, config: Mapping[str, Any]) -> Self:
        """
        The defaults that a model's author chose, where the caller names none.

        Args:
            config: `generation_config.json`, or `GenerationConfig.to_diff_dict()`. A key that is
                absent or None keeps our default. A `do_sample` of false that somebody wrote down
                means greedy; where it is absent nothing follows, as in vLLM.
        """
        names = {
            "temperature": "temperature",
            "top_p": "top_p",
            "top_k": "top_k",
            "min_p": "min_p",
            "repetition_penalty": "repetition_penalty",
            "presence_penalty": "presence_penalty",
            "frequency_penalty": "frequency_penalty",
            "max_new_tokens": "max_tokens",
        }
        chosen = {
            ours: config[theirs] for theirs, ours in names.items() if config.get(theirs) is not None
        }
        if config.get("do_sample") is False:
            chosen["temperature"] = 0.0
        return cls(**chosen)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` in the one form that it has once it has been checked."""
        assert isinstance(self.stop, tuple)
        return self.stop

    @property
    def max_tokens_given(self) -> bool:
        """False where `max_tokens` is 16 only because nobody gave a number."""
        return not isinstance(self.max_tokens, _DefaultMaxTokens)

    def check_vocab(self, vocab_size: int) -> None:
        """
        Check what needs the model: every token id named must be below `vocab_size`.

        Raises:
            BadSamplingParams: one is not.
        """
        for name in ("stop_token_ids", "allowed_token_ids", "logprob_token_ids", "logit_bias"):
            unknown = [index for index in getattr(self, name) or () if index >= vocab_size]
            if unknown:
                raise BadSamplingParams(
                    f"{name} must hold token ids below the vocabulary size of {vocab_size}, "
                    f"got {unknown[0]}.",
                    param=name,
                )

    def check_allowed(self, eos_token_ids: Collection[int]) -> None:
        """
        Check that something may be chosen at every step, the model's ends of text considered.

        Raises:
            NothingAllowed: `min_tokens` forbids all of `allowed_token_ids`.
        """
        if self.allowed_token_ids is None or not self.min_tokens:
            return
        forbidden = {*(self.stop_token_ids or ()), *(() if self.ignore_eos else eos_token_ids)}
        if forbidden.issuperset(self.allowed_token_ids):
            raise NothingAllowed(min_tokens=self.min_tokens)

    def clone(self) -> Self:
        return copy.deepcopy(self)


def _set(params: object, name: str, value: object) -> None:
    # Only while a value is made: afterwards it is frozen.
    object.__setattr__(params, name, value)


def _number(name: str, value: object, low: float, high: float) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise BadSamplingParams(f"{name} must be a number, got {_show(value)}.", param=name)
    number = float(value)
    if not math.isfinite(number):
        raise BadSamplingParams(f"{name} must be a finite number, got {number}.", param=name)
    if not low <= number <= high:
        raise BadSamplingParams(f"{name} must be in [{low:g}, {high:g}], got {number}.", param=name)
    return number


def _integer(name: str, value: object, low: int, high: int | None = None) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise BadSamplingParams(f"{name} must be a whole number, got {_show(value)}.", param=name)
    integer = operator.index(value)
    if integer < low or (high is not None and integer > high):
        allowed = f"at least {low}" if high is None else f"in [{low}, {high}]"
        raise BadSamplingParams(f"{name} must be {allowed}, got {integer}.", param=name)
    return integer


def _items(name: str, values: object) -> tuple[Any, ...]:
    if values is None:
        return ()
    if isinstance(values, str | bytes | Mapping) or not isinstance(values, Iterable):
        raise BadSamplingParams(f"{name} must be a list, got {_show(values)}.", param=name)
    return tuple(values)


def _token_ids(name: str, values: object) -> tuple[int, ...] | None:
    if values is None:
        return None
    ids = [_integer(name, value, 0) for value in _items(name, values)]
    return tuple(dict.fromkeys(ids))


def _build_bias(given: object) -> dict[int, float]:
    name = "logit_bias"
    if not isinstance(given, Mapping):
        raise BadSamplingParams(
            f"{name} must map token ids to numbers, got {_show(given)}.", param=name
        )
    bias = {}
    for key, value in given.items():
        # JSON knows only strings as keys, so "42" is the id 42 here and nowhere else.
        is_digits = isinstance(key, str) and key.isascii() and key.isdigit()
        token_id = _integer(name, int(key) if is_digits else key, 0)
        number = _number(name, value, -math.inf, math.inf)
        bias[token_id] = min(MAX_LOGIT_BIAS, max(-MAX_LOGIT_BIAS, number))
    return bias


def _build_detection(given: Mapping[str, Any]) -> RepetitionDetectionParams:
    name = "repetition_detection"
    known = ("max_pattern_size", "min_pattern_size", "min_count")
    unknown = [key for key in given if key not in known]
    if unknown:
        raise BadSamplingParams(
            f"{name} must have no keys but {', '.join(known)}, got {_show(unknown[0])}.", param=name
        )
    return RepetitionDetectionParams(**given)


def _show(value: object) -> str:
    # Not every repr: an object's own may be long, or hold an address.
    if isinstance(value, str):
        return repr(value if len(value) <= 40 else value[:37] + "...")
    if isinstance(value, bool | int | float | None):
        return repr(value)
    return f"a {type(value).__name__}"


@dataclass(frozen=True, slots=True)
class Logprob:
    """
    One token's log-probability at one place, before temperature and penalties.

    Args:
        logprob: natural logarithm.
        rank: 1 for the likeliest token of the vocabulary; of equally likely ones the lowest id
            comes first. None where it was not asked for.
        decoded_token: the token's text; U+FFFD stands for a part of a character.
    """

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """
    One of the `n` outputs of a prompt.

    Args:
        index: from 0.
        text: without special tokens and stop strings, unless the parameters ask for them.
        token_ids: all that were chosen, the one that ended the output included.
        cumulative_logprob: sum over the chosen tokens; None where no logprobs were asked for.
        logprobs: for each token the chosen and the likeliest ones, by id.
        finish_reason: None while the output is not finished.
        stop_reason: the stop string or the token id that ended it; None at the end of text.
        lora_request: always None; there for programs that look.
    """

    index: int
    text: str
    token_ids: Sequence[int]
    cumulative_logprob: float | None = None
    logprobs: Sequence[Mapping[int, Logprob]] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    lora_request: None = None

    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(frozen=True, slots=True)
class Metrics:
    """
    When things happened to one request, and what they cost. None means: it never got there.

    Args:
        arrival_time: when the engine took the request, in seconds since 1970.
        queued_ts, scheduled_ts, first_token_ts, last_token_ts: in seconds of one monotonic clock,
            comparable with each other only: ready to run, first admitted, first and last token.
        first_token_latency: from arrival to the first token, in seconds.
        num_generation_tokens: output tokens, of all outputs together.
        preprocess_ms: tokenising, resizing and cutting patches, on the host.
        preprocess_wait_ms: how much of it the device spent waiting.
        prefill_ms, decode_ms: this request's share of the batches that it was in; the encoder is part
            of the first.
    """

    arrival_time: float | None = None
    queued_ts: float | None = None
    scheduled_ts: float | None = None
    first_token_ts: float | None = None
    last_token_ts: float | None = None
    first_token_latency: float | None = None
    num_generation_tokens: int = 0
    preprocess_ms: float | None = None
    preprocess_wait_ms: float | None = None
    prefill_ms: float | None = None
    decode_ms: float | None = None


class MediaKind(StrEnum):
    IMAGE = "image"
    VIDEO = "video"
    EMBEDS = "embeds"


@dataclass(frozen=True, slots=True)
class ImageUsed:
    """
    One image, video or embedding as the model saw it.

    Args:
        index: its place among the prompt's media of this kind, from 0.
        width, height: as given, in pixels, EXIF orientation applied; 0 for embeddings.
        used_width, used_height: after resampling, in pixels; 0 for embeddings.
        num_tokens: prompt tokens that it took.
        kind: what it was.
        num_frames: of a video, after sampling; 1 of an image that is a frame of a video, for a model
            that sees no videos; None otherwise.
        times_s: of a video, when each of these frames is shown; None where they have no times.
        frame_indices: of a video, each frame's place in the source, from 0; None where unknown.
        num_frames_dropped: of a video, frames left out since they look like the one before; None
            where nobody asked for that.
    """

    index: int
    width: int
    height: int
    used_width: int
    used_height: int
    num_tokens: int
    kind: MediaKind = MediaKind.IMAGE
    num_frames: int | None = None
    times_s: tuple[float, ...] | None = None
    frame_indices: tuple[int, ...] | None = None
    num_frames_dropped: int | None = None


@dataclass(frozen=True, slots=True)
class Stamp:
    """
    What made a result, so that it can be made again.

    Args:
        model, revision: the checkpoint's name and commit; None where it has none.
        dtype, device: as torch names them, e.g. "bfloat16" and "cuda".
        engine_version: Darkroom's version.
        sampling: the sampling parameters in force, by name.
        seed: that the draws were made with; None for greedy.
        trust_remote_code: whether the checkpoint's own code was allowed to run.
        quantization: "fp8", or None.
        kv_cache_dtype: of KV rows, as torch names it.
    """

    model: str
    revision: str | None
    dtype: str
    device: str
    engine_version: str
    sampling: Mapping[str, Any] = field(hash=False)
    seed: int | None = None
    trust_remote_code: bool = False
    quantization: str | None = None
    kv_cache_dtype: str | None = None


@dataclass(frozen=True, slots=True)
class Result:
    """
    What one request ended in; every request ends in exactly one.

    Args:
        request_id: the engine's name for the request.
        prompt: its text; None where it came as token ids.
        prompt_token_ids: with the placeholders of images expanded.
        prompt_logprobs: always None; not supported yet.
        outputs: `n` of them, by index.
        finished: True, unless somebody watches a result grow.
        metrics: always filled, unlike vLLM's.
        lora_request, encoder_prompt, encoder_prompt_token_ids: always None; for programs that look.
        num_cached_tokens: prompt tokens whose KV rows were there before, for the first output.
        error: why there is no text; None where all went well.
        images: the media as the model saw them, in the prompt's order.
        stamp: what made this result; None where a request failed before anything was made.
        flags: what a reader should know, though it is no error.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: Sequence[int] | None
    prompt_logprobs: None = None
    outputs: Sequence[CompletionOutput] = ()
    finished: bool = True
    metrics: Metrics = field(default_factory=Metrics)
    lora_request: None = None
    encoder_prompt: None = None
    encoder_prompt_token_ids: None = None
    num_cached_tokens: int | None = None
    error: ResultError | None = None
    images: Sequence[ImageUsed] = ()
    stamp: Stamp | None = None
    flags: Sequence[Flag] = ()

    @classmethod
    def failed(
        cls,
        request_id: str,
        error: EngineError | ResultError,
        *,
        prompt: str | None = None,
        prompt_token_ids: Sequence[int] | None = None,
        metrics: Metrics | None = None,
        images: Sequence[ImageUsed] = (),
        stamp: Stamp | None = None,
    ) -> Self:
        """A result that holds one output without text, and says why."""
        nothing = CompletionOutput(index=0, text="", token_ids=[], finish_reason=FinishReason.ERROR)
        return cls(
            request_id=request_id,
            prompt=prompt,
            prompt_token_ids=prompt_token_ids,
            outputs=(nothing,),
            metrics=metrics or Metrics(),
            error=to_result_error(error) if isinstance(error, EngineError) else error,
            images=images,
            stamp=stamp,
        )


RequestOutput = Result  # the name that users of vLLM know


def find_flags(params: SamplingParams, outputs: Iterable[CompletionOutput]) -> tuple[Flag, ...]:
    """What to flag about the finished outputs of one request."""
    flags = set()
    for output in outputs:
        if output.finish_reason == FinishReason.LENGTH and not params.max_tokens_given:
            flags.add(Flag.CUT_OFF)
        if output.finish_reason == FinishReason.REPETITION:
            flags.add(Flag.LOOPING)
        if params.detokenize and not output.text.strip():
            flags.add(Flag.EMPTY)
    return tuple(sorted(flags))
