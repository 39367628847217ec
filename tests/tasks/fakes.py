"""Small classes that fill a room's ports, and submissions to give them."""

import os
import signal
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from bench import instant
from bench.instant import text_of
from engine.config import SAMPLING_KEYS, parse_part_options
from engine.errors import EngineError, EngineFailure, MediaRefused
from engine.request import CompletionOutput, FinishReason, ImageUsed, MediaKind, Result
from engine.usage import EngineUsage
from media.data_url import count_listed_frames, decode_data_url, decode_frames_url
from media.errors import MediaError
from media.frames import build_sampling
from media.images import decode_image
from media.limits import IMAGE_LIMITS, VIDEO_LIMITS
from media.video import decode_jpeg_frames, decode_video
from tasks.app import TaskName
from tasks.config import Config, MediaLimits
from tasks.dispatch import Dispatcher
from tasks.engines import Prompt
from tasks.errors import DecodersLostError, DeviceLostError

MODEL = "darkroom-tiny"
RED_DOT = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAUAAAAFCAYAAACNbyblAAAAHElEQVQI12P4//8/w38GIAXDIBKE0DHx"
    "gljNBAAO9TXL0Y4OHwAAAABJRU5ErkJggg=="
)


class RecordingDispatcher(Dispatcher):
    """Keeps what would have been sent."""

    def __init__(self, config: Config, broker_url: str) -> None:
        super().__init__(config, broker_url)
        self.sent: list[tuple[TaskName, str, dict[str, Any]]] = []

    def _wake(self, name: str, word: str) -> bool:
        return True

    def _send(self, name: TaskName, queue: str, arguments: Mapping[str, Any]) -> bool:
        self.sent.append((name, queue, dict(arguments)))
        return True

    def count(self, name: TaskName) -> int:
        return sum(sent == name for sent, _, _ in self.sent)


def build_request(
    custom_id: str, text: str = "What is this?", *, num_images: int = 0, **body: Any
) -> dict[str, Any]:
    parts: list[dict[str, Any]] = [{"type": "text", "text": text}]
    parts += [{"type": "image_url", "image_url": {"url": RED_DOT}} for _ in range(num_images)]
    content: Any = parts if num_images else text
    return {
        "custom_id": custom_id,
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {"model": MODEL, "messages": [{"role": "user", "content": content}], **body},
    }


class InstantEngine(instant.InstantEngine):
    """
    The benchmark's, which answers each prompt with its own text; here some words do harm.

    Args:
        delay_s: between two results of a stream, but for prompts that say "at once".
        on_prompt: called with the text of each prompt when the engine takes it.
    """

    def __init__(
        self, delay_s: float = 0.0, on_prompt: Callable[[str], None] = lambda text: None
    ) -> None:
        self.delay_s = delay_s
        self.on_prompt = on_prompt
        self.prompts: list[Prompt] = []
        self.usage: EngineUsage | None = None
        self.aborted: set[str] = set()

    def abort(self, names: Collection[str]) -> None:
        self.aborted |= set(names)

    def read_progress(self) -> float:
        return len(self.prompts)

    def read_usage(self) -> EngineUsage | None:
        return self.usage

    def stream(self, prompts: Iterable[Prompt]) -> Iterator[Result]:
        for prompt in prompts:
            self.prompts.append(prompt)
            text = text_of(prompt)
            self.on_prompt(text)
            if self.delay_s and "at once" not in text:
                time.sleep(self.delay_s)
            if "kill the worker" in text:
                os.kill(os.getpid(), signal.SIGKILL)
            if "lose the device" in text:
                raise DeviceLostError
            if "lose the decoders" in text:
                raise DecodersLostError
            if "bad picture" in text:
                refused = MediaRefused("The image is damaged.", code="image_unreadable")
                yield Result.failed(prompt.name, refused)
            elif "bad luck" in text:
                yield Result.failed(prompt.name, EngineFailure())
            elif "bad code" in text:
                raise RuntimeError("a bug")
            else:
                yield self.answer(prompt)


TWO_IMAGES = MediaLimits(image=2)


class SeeingEngine(InstantEngine):
    """
    Looks at pictures and clips with media's own decoding, and answers with what it was shown.

    Args:
        harm: the error of a prompt that must fail.
        max_model_len: in words; so many make a summary of many texts take several rounds.
        limits: of one prompt.
    """

    def __init__(
        self,
        *,
        harm: Callable[[Prompt], EngineError | None] = lambda prompt: None,
        max_model_len: int = 4096,
        limits: MediaLimits = TWO_IMAGES,
        delay_s: float = 0.0,
        on_prompt: Callable[[str], None] = lambda text: None,
    ) -> None:
        super().__init__(delay_s, on_prompt)
        self._harm = harm
        self._max_model_len = max_model_len
        self._limits = limits

    @property
    def limits(self) -> MediaLimits:
        return self._limits

    @property
    def max_model_len(self) -> int:
        return self._max_model_len

    @property
    def names(self) -> list[str]:
        """Of the prompts so far, without the item and the attempt: nothing is left of a whole item's."""
        return [".".join(prompt.name.split(".")[2:]) for prompt in self.prompts]

    def answer(self, prompt: Prompt) -> Result:
        error = self._harm(prompt)
        if error is not None:
            return Result.failed(prompt.name, error)
        parts = [
            part
            for message in prompt.messages
            if not isinstance(message["content"], str)
            for part in message["content"]
        ]
        try:
            seen = [self._look_at(part) for part in parts if part["type"] != "text"]
        except MediaError as refused:
            return Result.failed(prompt.name, MediaRefused(str(refused), code=refused.code))
        images = tuple(replace(image, index=index) for index, image in enumerate(seen))
        if not images:
            text = f"whole {text_of(prompt).count('[')}"
        elif images[0].kind is MediaKind.VIDEO and not images[0].times_s:
            text = f"seen {images[0].num_frames} frames"
        elif images[0].times_s:
            text = f"seen from {images[0].times_s[0]:g} to {images[0].times_s[-1]:g}"
        else:
            text = "seen " + " ".join(f"{image.width}x{image.height}" for image in images)
        output = CompletionOutput(0, text, (1, 2, 3), finish_reason=FinishReason.STOP)
        return Result(
            prompt.name, text, (1,) * 7, outputs=(output,), num_cached_tokens=2, images=images
        )

    def _look_at(self, part: Mapping[str, Any]) -> ImageUsed:
        if part["type"].startswith("image"):
            source = part["image_url"]["url"] if part["type"] == "image_url" else part["image"]
            if isinstance(source, str):
                source = decode_data_url(source, IMAGE_LIMITS)[0]
            image = decode_image(source() if callable(source) else source)
            return ImageUsed(0, image.width_px, image.height_px, 28, 28, 1)
        sampling = build_sampling(parse_part_options(part, SAMPLING_KEYS, "part").sampling)
        if part["type"] == "video_url":
            url = part["video_url"]["url"]
            if count_listed_frames(url) is not None:
                frames = decode_jpeg_frames(decode_frames_url(url, VIDEO_LIMITS), sampling)
            else:
                frames = decode_video(decode_data_url(url, VIDEO_LIMITS)[0], sampling)
        else:
            source = part["video"]
            frames = decode_video(source() if callable(source) else source, sampling)
        return ImageUsed(
            0,
            frames.width_px,
            frames.height_px,
            28,
            28,
            1,
            MediaKind.VIDEO,
            frames.num_frames,
            frames.times_s,
            frames.indices,
        )
