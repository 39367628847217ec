"""
What the command says about each input: a line for people, an object for programs, in order.

It reads results and knows nothing of how they were made.
"""

import dataclasses
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

from cli.inputs import ClipReader
from engine.request import FinishReason, Result
from media.errors import MediaError
from tasks.summary import format_time

_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f]")  # a name or a text must not steer the terminal
# Line ends by any reader's idea, and the controls that some terminals obey.
_ESCAPES = {ord(c): f"\\u{ord(c):04x}" for c in (*map(chr, range(0x7F, 0xA0)), "\u2028", "\u2029")}

# The engine's and media's texts speak to programs; these say what to do on this command line.
_HINTS = {
    "frames_differ_in_size": "Or show them with --as images.",
    "max_tokens_too_large": "Here: lower --max-tokens.",
    "prompt_too_long": "Here: lower --max-pixels or --frames, or raise --max-model-len.",
    "video_too_large": "Here: lower --frames or --fps.",
}


@dataclass(frozen=True, slots=True)
class Problem:
    """Why an input got no text; `code` is a stable word, `message` is for people."""

    code: str
    message: str
    retryable: bool


@dataclass(frozen=True, slots=True)
class FramesUsed:
    """
    Which frames of a clip were looked at.

    Attributes:
        indices: their places in the source, from 0.
        times_s: their times, in seconds.
        num_dropped: frames left out since they look like the one before; None where nobody asked.
    """

    indices: tuple[int, ...] | None
    times_s: tuple[float, ...] | None
    num_dropped: int | None


@dataclass(frozen=True, slots=True)
class PartAnswer:
    """
    What became of one segment of a clip.

    Attributes:
        number: from 1.
        start_s, end_s: where it begins and ends, in seconds.
        error: why there is no text.
    """

    number: int
    start_s: float
    end_s: float
    text: str | None
    error: Problem | None
    frames: FramesUsed | None


@dataclass(frozen=True, slots=True)
class Answer:
    """
    What became of one input; the fields of `--json`, in their order.

    Attributes:
        path: of the input, as people wrote it.
        text: None where there is an error.
        finish_reason: why the text ended: "stop", "length", ...; "error" where there is none.
        num_prompt_tokens, num_tokens: of the prompt with its pictures, and of the text.
        width, height: of the picture (or the frames), in pixels.
        used_width, used_height: what the model saw of it, in pixels.
        ms: what the text cost, in milliseconds: preparing it, and its share of the batches it
            was in. Not how long it waited.
        flags: what a reader should know, though it is no error.
        error: why there is no text.
        frames: of a clip; None for a picture, which then has no such field in `--json`.
        parts: of a clip that was asked about segment by segment, in the same way; they have the frames.
    """

    path: str
    text: str | None = None
    finish_reason: str | None = None
    num_prompt_tokens: int | None = None
    num_tokens: int | None = None
    width: int | None = None
    height: int | None = None
    used_width: int | None = None
    used_height: int | None = None
    ms: float | None = None
    flags: tuple[str, ...] = ()
    error: Problem | None = None
    frames: FramesUsed | None = None
    parts: tuple[PartAnswer, ...] | None = None

    @classmethod
    def from_result(cls, path: str, result: Result, clip: ClipReader | None = None) -> Self:
        output = result.outputs[0] if result.outputs else None
        seen = result.images[0] if result.images else None
        error = result.error
        return cls(
            path,
            text=output.text if output and error is None else None,
            finish_reason=output.finish_reason.value if output and output.finish_reason else None,
            num_prompt_tokens=_count(result.prompt_token_ids),
            num_tokens=_count(output.token_ids if output else None),
            width=seen.width if seen else None,
            height=seen.height if seen else None,
            used_width=seen.used_width if seen else None,
            used_height=seen.used_height if seen else None,
            ms=_cost_ms(result),
            flags=tuple(flag.value for flag in result.flags),
            error=_explain(error.code, error.message, error.retryable) if error else None,
            frames=FramesUsed(clip.indices, clip.times_s, clip.num_dropped) if clip else None,
        )

    @classmethod
    def from_problem(cls, path: str, problem: MediaError) -> Self:
        error = _explain(problem.code, str(problem), problem.retryable)
        return cls(path, finish_reason=FinishReason.ERROR.value, error=error)

    @property
    def is_cut_off(self) -> bool:
        return self.finish_reason == FinishReason.LENGTH

    def to_line(self) -> tuple[str, str]:
        """The path and the text, or the error's message, as they stand in one line."""
        return one_line(self.path), one_line(self.error.message if self.error else self.text or "")

    def list_part_lines(self) -> Iterator[tuple[str, PartAnswer]]:
        """Each part, with how it is called in a line."""
        for part in self.parts or ():
            times = f"{format_time(part.start_s)} - {format_time(part.end_s)}"
            yield f"{one_line(self.path)} [{times}]", part

    def to_json(self) -> str:
        """One object in one line, by any reader's idea of a line."""
        fields: dict[str, Any] = dataclasses.asdict(self)
        for name in ("frames", "parts"):
            if fields[name] is None:
                del fields[name]
        return json.dumps(fields, ensure_ascii=False).translate(_ESCAPES)


def _explain(code: str, message: str, retryable: bool) -> Problem:
    hint = _HINTS.get(code)
    return Problem(code, f"{message} {hint}" if hint else message, retryable)


def _count(tokens: Any) -> int | None:
    return None if tokens is None else len(tokens)


def _cost_ms(result: Result) -> float | None:
    metrics = result.metrics
    steps = (metrics.preprocess_ms, metrics.prefill_ms, metrics.decode_ms)
    known = [step for step in steps if step is not None]
    return round(sum(known), 1) if known else None


def one_line(text: str) -> str:
    """The text without line breaks; other control characters become U+FFFD."""
    joined = " ".join(line.strip() for line in text.splitlines() if line.strip())
    return _CONTROLS.sub("\N{REPLACEMENT CHARACTER}", joined.replace("\t", " "))


class InOrder:
    """Holds back what came early, so that answers leave in the order of their inputs."""

    def __init__(self) -> None:
        self._waiting: dict[int, Answer] = {}
        self._next = 0

    def put(self, index: int, answer: Answer) -> None:
        self._waiting[index] = answer

    def take_ready(self) -> Iterator[Answer]:
        """Hand out every answer with nothing missing before it."""
        while self._next in self._waiting:
            answer = self._waiting.pop(self._next)
            self._next += 1
            yield answer

    def take_rest(self) -> Iterator[Answer]:
        """Hand out the others too, when nothing more will come."""
        for index in sorted(self._waiting):
            yield self._waiting.pop(index)
