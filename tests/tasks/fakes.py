"""Small classes that fill a room's ports, and submissions to give them."""

import os
import signal
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

from bench import instant
from bench.instant import text_of
from engine.errors import EngineFailure, MediaRefused
from engine.request import Result
from tasks.app import TaskName
from tasks.config import Config
from tasks.dispatch import Dispatcher
from tasks.engines import Prompt
from tasks.errors import DeviceLostError

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
        self.aborted: set[str] = set()

    def abort(self, names: Collection[str]) -> None:
        self.aborted |= set(names)

    def read_progress(self) -> float:
        return len(self.prompts)

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
            if "bad picture" in text:
                refused = MediaRefused("The image is damaged.", code="image_unreadable")
                yield Result.failed(prompt.name, refused)
            elif "bad luck" in text:
                yield Result.failed(prompt.name, EngineFailure())
            elif "bad code" in text:
                raise RuntimeError("a bug")
            else:
                yield self.answer(prompt)
