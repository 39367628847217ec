"""What `make eval` asks, and how it judges, with a fake engine that knows the answers."""

from collections.abc import Iterable, Iterator
from typing import cast

import numpy as np
import pytest

pytest.importorskip("av", reason="clips are encoded, which needs the extra `video`")

from engine import LLM, CompletionOutput, Request, Result
from media.frames import FrameSampling
from media.video import decode_video
from models import evaluate
from models.evaluate import GOALS, cases

KINDS = list(GOALS)


class FakeLLM:
    """Says, for each request in turn, what it was told to say."""

    def __init__(self, texts: list[str]) -> None:
        self.texts = texts

    def stream(self, requests: Iterable[Request]) -> Iterator[Result]:
        for request in requests:
            text = self.texts[int(request.request_id)]
            output = CompletionOutput(index=0, text=text, token_ids=(1,))
            yield Result(request.request_id, None, None, outputs=(output,))


@pytest.mark.parametrize("kind", KINDS)
def test_the_true_answer_is_right_and_another_is_not(kind: str) -> None:
    asked = list(cases(kind, 6))
    texts = [case.answer for case in asked]
    texts[2] = "A large red square."

    report = evaluate.evaluate(cast(LLM, FakeLLM(texts)), kind, 6, show=3)

    assert report["right"] == round(5 / 6, 4)
    assert [wrong["said"] for wrong in report["wrong"]] == ["A large red square."]


def test_reversed_clips_are_the_same_clips_backwards() -> None:
    forwards, backwards = list(cases("video", 12)), list(cases("video reversed", 12))

    for there, back in zip(forwards, backwards, strict=True):
        assert [p.tobytes() for p in there.pictures] == [p.tobytes() for p in back.pictures[::-1]]
        assert there.question == back.question
    assert [c.answer for c in forwards] != [c.answer for c in backwards]


def test_clip_as_a_file_and_its_frames_show_the_same() -> None:
    for file, frames in zip(cases("mp4", 3), cases("mp4 as frames", 3), strict=True):
        assert file.file is not None
        encoded, num_frames = file.file
        decoded = decode_video(encoded, FrameSampling(num_frames))
        for expected, image in zip(frames.pictures, decoded.images, strict=True):
            assert np.abs(np.asarray(expected, np.int16) - image.pixels()).mean() < 3
        assert (file.question, file.answer) == (frames.question, frames.answer)
        assert decoded.source_num_frames is not None
        assert decoded.source_num_frames >= 20 > num_frames


def test_cases_are_the_same_every_time() -> None:
    first, again = list(cases("images", 3)), list(cases("images", 3))

    assert [c.answer for c in first] == [c.answer for c in again]
    assert [p.tobytes() for c in first for p in c.pictures] == [
        p.tobytes() for c in again for p in c.pictures
    ]
