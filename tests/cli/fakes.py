"""An engine without a model: it reads media as the real one does and says what size they have."""

import itertools
import signal
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cli.local import EngineOptions
from engine import Request
from engine.errors import EngineError, EngineFailure, TooManyImages, TooManyVideos
from engine.inputs import Clip, Picture, UserText, fetch, parse_messages, read_clip, read_picture
from engine.request import (
    CompletionOutput,
    FinishReason,
    ImageUsed,
    MediaKind,
    Metrics,
    Result,
    SamplingParams,
)

Pulled = tuple[Request, str]  # with the text to answer; "" for the usual one


@dataclass(slots=True)
class FakeEngine:
    """What is asked of an engine beside results: how many words fit."""

    max_model_len: int = 4096

    @property
    def checkpoint(self) -> "FakeEngine":
        return self

    def count_tokens(self, text: str) -> int:
        return len(text.split())


@dataclass(slots=True)
class FakeLLM:
    """
    Answers with the prompt and the sizes of its media.

    Args:
        num_ahead: requests pulled before the first of them ends; they end last come, first served.
        texts: what to say instead, one for each request in the order of the requests.
        interrupt_after: results after which Ctrl-C is pressed, for each time that it is.
        give_up_after: results after which the engine fails.
        finish_reason: of every text.
    """

    num_ahead: int = 4
    texts: Iterable[str] | None = None
    interrupt_after: Sequence[int] = ()
    give_up_after: int | None = None
    finish_reason: FinishReason = FinishReason.STOP
    options: EngineOptions | None = None
    limits: Mapping[str, int] = field(default_factory=dict)
    params: SamplingParams | None = None
    num_pulled: int = 0
    num_answered: int = 0
    is_closed: bool = False
    engine: Any = field(default_factory=lambda: FakeEngine())

    def load(self, options: EngineOptions, limits: Mapping[str, int]) -> "FakeLLM":
        """Stands for `cli.local.load_llm`."""
        self.options, self.limits = options, limits
        return self

    def stream(self, requests: Iterable[Request], params: SamplingParams) -> Iterator[Result]:
        self.params = params
        texts = itertools.repeat("") if self.texts is None else self.texts
        waiting = self._pull(zip(requests, texts, strict=False))
        while ahead := list(itertools.islice(waiting, self.num_ahead)):
            for request, text in reversed(ahead):
                if self.num_answered in self.interrupt_after:
                    signal.raise_signal(signal.SIGINT)
                if self.num_answered == self.give_up_after:
                    raise EngineFailure("The device is gone.")
                result = self._answer(request, text)
                self.num_answered += 1
                yield result

    def _pull(self, waiting: Iterable[Pulled]) -> Iterator[Pulled]:
        for pulled in waiting:
            self.num_pulled += 1
            yield pulled

    def _answer(self, request: Request, text: str) -> Result:
        (message,) = parse_messages(request.messages)
        try:
            self._check_limits(message.parts)
            seen = [look(part, index) for index, part in enumerate(message.parts[:-1])]
            if not seen:
                text = text or f"all of {message.parts[0].text.count('[')}"  # type: ignore[union-attr]
        except EngineError as error:
            return Result.failed(request.request_id, error)
        prompt = message.parts[-1]
        assert isinstance(prompt, UserText)
        sizes = " ".join(f"{use.kind} {use.width}x{use.height}" for use in seen)
        text = text or f"{prompt.text} {sizes}"
        return Result(
            request_id=request.request_id,
            prompt=None,
            prompt_token_ids=(1, 2, 3, 4),
            outputs=[CompletionOutput(0, text, (1, 2), finish_reason=self.finish_reason)],
            metrics=Metrics(preprocess_ms=1.0, prefill_ms=2.0, decode_ms=3.25),
            images=seen,
        )

    def _check_limits(self, parts: Sequence[object]) -> None:
        num_pictures = sum(isinstance(part, Picture) for part in parts)
        num_clips = sum(isinstance(part, Clip) for part in parts)
        if num_pictures > self.limits.get("image", 1):
            raise TooManyImages(limit=self.limits["image"], given=num_pictures)
        if num_clips > self.limits.get("video", 1):
            raise TooManyVideos(limit=self.limits["video"], given=num_clips)

    def close(self) -> None:
        self.is_closed = True


def look(part: object, index: int) -> ImageUsed:
    if isinstance(part, Clip):
        clip = read_clip(fetch(part.source), part.sampling, {})
        size = clip.width_px, clip.height_px, 28, 28
        return ImageUsed(index, *size, 4, MediaKind.VIDEO, clip.num_frames)
    assert isinstance(part, Picture)
    image = read_picture(fetch(part.source))
    return ImageUsed(index, image.width_px, image.height_px, 28, 28, 1)
