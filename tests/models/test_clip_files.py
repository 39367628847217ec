"""
What the bundled model says of clips that come as files: the motion, whichever way the frames go in.

A few cases, or as many as DARKROOM_CLIP_CASES says; `make eval` counts over thousands.
"""

import os
from collections.abc import Iterator
from dataclasses import replace

import pytest

pytest.importorskip("av", reason="clips are encoded, which needs the extra `video`")

from engine import LLM
from media.frames import FrameSampling
from media.video import decode_video
from models.evaluate import GOALS, GREEDY, cases, conversation, evaluate

NUM_CASES = int(os.environ.get("DARKROOM_CLIP_CASES", "8"))


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM("darkroom-tiny", device="cpu", limit_mm_per_prompt={"image": 16}) as llm:
        yield llm


@pytest.mark.parametrize("kind", ["mp4", "mp4 as frames"])
def test_motion_is_described_right(llm: LLM, kind: str) -> None:
    report = evaluate(llm, kind, NUM_CASES, show=3)

    print(f"{kind}: {report['right']:.2%} of {NUM_CASES}")  # noqa: T201
    assert report["right"] >= GOALS[kind], report


def test_clip_by_its_url_and_the_same_frames_as_a_clip_are_one_prompt(llm: LLM) -> None:
    (case,) = cases("mp4", 1)
    assert case.file is not None
    encoded, num_frames = case.file
    pictures = [image.image for image in decode_video(encoded, FrameSampling(num_frames)).images]
    frames = replace(case, file=None, pictures=pictures)

    results = llm.chat([conversation(case), conversation(frames)], GREEDY, use_tqdm=False)

    assert results[0].prompt_token_ids == results[1].prompt_token_ids
    assert [case.answer] * 2 == [result.outputs[0].text for result in results]
