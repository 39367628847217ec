"""`limit_mm_per_prompt={"frames": …}`: a limit for each clip, whatever form it comes in."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from engine import LLM, Result, SamplingParams
from tests.engine.pictures import draw_clip
from tests.media.files import animation

GIF = animation("GIF", [(n * 20, 0, 0) for n in range(6)], duration=100)
FEW = SamplingParams(max_tokens=1, temperature=0.0)


@pytest.fixture(scope="module")
def limited(tiny_folder: Path) -> Iterator[LLM]:
    with LLM(str(tiny_folder), limit_mm_per_prompt={"frames": 4}, device="cpu") as llm:
        yield llm


def ask(llm: LLM, clip: Any, **options: Any) -> Result:
    content = [{"type": "video", "video": clip, **options}, {"type": "text", "text": "What?"}]
    return llm.chat([{"role": "user", "content": content}], FEW, use_tqdm=False)[0]


@pytest.mark.parametrize(
    ("options", "num_frames"), [({}, 4), ({"num_frames": 3}, 3), ({"fps": 5}, 3)]
)
def test_as_many_frames_as_the_limit_are_looked_at(
    limited: LLM, options: dict[str, Any], num_frames: int
) -> None:
    result = ask(limited, GIF, **options)

    assert result.error is None
    assert num_frames == result.images[0].num_frames


@pytest.mark.parametrize("options", [{"num_frames": 5}, {"num_frames": -1}, {"fps": 10}])
def test_more_that_were_asked_for_are_refused(limited: LLM, options: dict[str, Any]) -> None:
    error = ask(limited, GIF, **options).error

    assert error is not None
    assert ("too_many_frames", False) == (error.code, error.retryable)
    assert "At most 4 frame(s) of a clip" in error.message


def test_frames_that_are_frames_already_are_counted_too(limited: LLM) -> None:
    error = ask(limited, draw_clip(1, 6)).error

    assert error is not None
    assert "asks for 6." in error.message
    assert ask(limited, draw_clip(1, 4)).error is None
