"""A clip in segments, result by result: what fails, and what comes of the rest."""

from collections.abc import Sequence

from cli.answers import Answer
from cli.questions import Question, Segmented
from cli.segments import SegmentedClip
from engine.errors import EngineError, EngineFailure, MediaRefused
from engine.request import CompletionOutput, FinishReason, Result
from media.segments import Look
from tasks.summary import Stitcher, Subject

DAMAGED = MediaRefused("Damaged.", code="video_unreadable")


def open_clip(num_segments: int = 3, room: int = 1000) -> SegmentedClip:
    segments = [Look(float(n), n + 1.0, float(n), None) for n in range(num_segments)]
    clip = Segmented("a.mp4", "What?", lambda: segments, lambda *_: Question("a.mp4", []))
    stitcher = Stitcher(Subject.VIDEO, (), "What?", room, lambda text: len(text.split()))
    return SegmentedClip(0, clip, stitcher)


def say(name: str, text: str | EngineError) -> Result:
    if isinstance(text, EngineError):
        return Result.failed(name, text)
    output = CompletionOutput(0, text, (1, 2), finish_reason=FinishReason.STOP)
    return Result(name, None, (1, 2, 3), outputs=(output,))


def take(clip: SegmentedClip, texts: Sequence[str | EngineError]) -> list[str]:
    """The names of the prompts that come after so many parts."""
    names: list[str] = []
    for number, text in enumerate(texts, 1):
        names += clip.take(say(f"0.{number}", text))
    return names


def end(clip: SegmentedClip) -> Answer:
    assert clip.answer is not None
    return clip.answer


def test_part_that_fails_keeps_its_error_and_costs_no_other() -> None:
    clip = open_clip()

    assert ["0.s1.0"] == take(clip, ["one", DAMAGED, "three"])
    assert {} == clip.take(say("0.s1.0", "both"))

    answer = end(clip)
    assert ("both", None, 9, 6) == (
        answer.text,
        answer.error,
        answer.num_prompt_tokens,
        answer.num_tokens,
    )
    assert answer.parts is not None
    assert ["one", None, "three"] == [part.text for part in answer.parts]
    assert answer.parts[1].error is not None
    assert "video_unreadable" == answer.parts[1].error.code


def test_clip_without_a_text_has_the_first_error() -> None:
    clip = open_clip(2)

    assert [] == take(clip, [DAMAGED, EngineFailure()])

    answer = end(clip)
    assert answer.text is None
    assert answer.error is not None
    assert "video_unreadable" == answer.error.code


def test_summary_that_fails_is_the_clips_error_and_the_parts_stay() -> None:
    clip = open_clip()
    take(clip, ["one", "two", "three"])
    clip.take(say("0.s1.0", EngineFailure()))

    answer = end(clip)
    assert answer.error is not None
    assert "engine_failure" == answer.error.code
    assert answer.parts is not None
    assert ["one", "two", "three"] == [part.text for part in answer.parts]


def test_many_texts_take_several_rounds() -> None:
    clip = open_clip(4, room=40)

    names = take(clip, ["word " * 12] * 4)
    following = [clip.take(say(name, f"{name} word")) for name in names]

    assert ["0.s1.0", "0.s1.1"] == names
    assert [[], ["0.s2.0"]] == [list(prompts) for prompts in following]
    assert {} == clip.take(say("0.s2.0", "all"))
    assert "all" == end(clip).text
