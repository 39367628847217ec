"""
An engine that answers at once, so that what is left to measure is the queue.

It stands here and not in `tasks`, because no setting or option of a service may ever lead to it: the
installed package does not hold this folder. As a program it is a GPU worker, complete but for the
model; settings come from DARKROOM_*:

    python -m bench.instant MODEL
"""

import os
import sys
import time
from collections.abc import Collection, Iterable, Iterator

from engine.request import CompletionOutput, FinishReason, Result, SamplingParams
from engine.usage import EngineUsage
from media.video import measure_clip
from tasks.broker import open_broker
from tasks.config import MediaLimits, load_config
from tasks.engines import Prompt
from tasks.logs import configure_logging
from tasks.worker import run_gpu_worker


class InstantEngine:
    """Answers each prompt with its own text. It looks at no picture."""

    @property
    def limits(self) -> MediaLimits:
        return MediaLimits(image=2)

    @property
    def defaults(self) -> SamplingParams:
        return SamplingParams(temperature=0.0)

    @property
    def max_model_len(self) -> int:
        return 4096

    def measure_clip(self, encoded: bytes) -> tuple[float, ...]:
        return measure_clip(encoded)

    def count_tokens(self, text: str) -> int:
        return len(text.split())

    def stream(self, prompts: Iterable[Prompt]) -> Iterator[Result]:
        for prompt in prompts:
            yield self.answer(prompt)

    def answer(self, prompt: Prompt) -> Result:
        text = text_of(prompt)
        output = CompletionOutput(0, f"> {text}", (1, 2, 3), finish_reason=FinishReason.STOP)
        return Result(prompt.name, text, (1,) * 7, outputs=(output,))

    def abort(self, names: Collection[str]) -> None:
        pass

    def read_progress(self) -> float:
        return time.monotonic()  # it cannot stall

    def read_usage(self) -> EngineUsage | None:
        return None

    def close(self) -> None:
        pass


def text_of(prompt: Prompt) -> str:
    """The text of a prompt's last message."""
    content = prompt.messages[-1]["content"]
    if isinstance(content, str):
        return content
    return " ".join(part["text"] for part in content if part["type"] == "text")


def main(model: str) -> int:
    configure_logging()
    config = load_config()
    with open_broker(config) as url:
        return run_gpu_worker(config, url, InstantEngine(), model, env=dict(os.environ))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
