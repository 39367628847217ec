"""`darkroom describe`: clips, folders of frames, and what --json says about the frames."""

import json
from pathlib import Path

import pytest

pytest.importorskip("av", reason="clips need PyAV, the extra `video`")

from tests.cli.conftest import Invoke
from tests.cli.fakes import FakeLLM
from tests.cli.pictures import save_picture, save_pictures
from tests.media.clips import clip, shades

pytestmark = pytest.mark.usefixtures("folder")

PROMPT = "What happens?"


def test_clip_is_shown_as_a_video(darkroom: Invoke, llm: FakeLLM) -> None:
    Path("ball.mp4").write_bytes(clip(shades(20)))

    result = darkroom("describe", "ball.mp4")

    assert (0, f"ball.mp4: {PROMPT} video 64x48\n") == (result.exit_code, result.stdout)
    assert {"image": 0, "video": 1} == llm.limits


def test_clip_is_shown_as_images_where_that_is_asked_for(darkroom: Invoke, llm: FakeLLM) -> None:
    Path("ball.mp4").write_bytes(clip(shades(20)))

    result = darkroom("describe", "ball.mp4", "--as", "images", "--frames", "3")

    images = " ".join(["image 64x48"] * 3)
    assert (0, f"ball.mp4: {PROMPT} {images}\n") == (result.exit_code, result.stdout)
    assert {"image": 3, "video": 0} == llm.limits


@pytest.mark.parametrize("form", ["video", "images"])
def test_json_says_which_frames_were_looked_at_and_when_they_are_shown(
    darkroom: Invoke, form: str
) -> None:
    Path("ball.mp4").write_bytes(clip(shades(21), fps=10))

    result = darkroom("describe", "ball.mp4", "--frames", "5", "--json", "--as", form)

    record = json.loads(result.stdout)
    assert [0, 5, 10, 15, 20] == record["frames"]["indices"]
    assert [0.0, 0.5, 1.0, 1.5, 2.0] == pytest.approx(record["frames"]["times_s"])
    assert (64, 48) == (record["width"], record["height"])


def test_folder_of_frames_is_one_clip_without_times(darkroom: Invoke) -> None:
    for index in range(11):
        save_picture(f"clip/frame{index}.png", 20, 10)

    result = darkroom("describe", "clip", "--frames", "3", "--json")

    record = json.loads(result.stdout)
    assert f"{PROMPT} video 20x10" == record["text"]
    assert {"indices": [0, 5, 10], "times_s": None, "num_dropped": None} == record["frames"]


@pytest.mark.parametrize("form", ["video", "images"])
def test_bad_clip_is_its_own_error_and_the_others_are_described(
    darkroom: Invoke, form: str
) -> None:
    Path("a.mp4").write_bytes(clip(shades(8)))
    Path("b.mp4").write_bytes(b"no clip")
    Path("c.mp4").write_bytes(clip(shades(8)))

    result = darkroom("describe", "a.mp4", "b.mp4", "c.mp4", "gone.mp4", "--as", form)

    assert 1 == result.exit_code
    assert ["a.mp4", "c.mp4"] == [line.split(":")[0] for line in result.stdout.splitlines()]
    assert "error: b.mp4: Failed to load video: " in result.stderr
    assert "error: gone.mp4: There is no such file or folder.\n" in result.stderr
    assert "note: 2 of 4 clips failed.\n" in result.stderr


def test_frames_of_many_sizes_can_be_shown_as_images_only(darkroom: Invoke) -> None:
    save_pictures(2, "clip")

    as_video = darkroom("describe", "clip")
    as_images = darkroom("describe", "clip", "--as", "images")

    assert (1, 0) == (as_video.exit_code, as_images.exit_code)
    assert "--as images" in as_video.stderr
    assert f"clip: {PROMPT} image 10x10 image 11x10\n" == as_images.stdout


@pytest.mark.parametrize("form", ["video", "images"])
def test_options_say_which_frames_are_looked_at(darkroom: Invoke, form: str) -> None:
    still_then_moving = [shades(12)[max(place - 8, 0)] for place in range(20)]
    Path("ball.mp4").write_bytes(clip(still_then_moving, options={"g": "5", "sc_threshold": "0"}))

    def look(*options: str) -> dict[str, object]:
        result = darkroom("describe", "ball.mp4", "--json", "--as", form, *options)
        record = json.loads(result.stdout)
        assert record["error"] is None
        found: dict[str, object] = record["frames"]
        return found

    assert [10, 15] == look("--start", "1", "--end", "1.9", "--keyframes")["indices"]
    assert [0, 9, 19] == look("--fps", "5", "--frames", "3")["indices"]
    assert [0, 19] == look("--fps", "1")["indices"]
    seen = look("--frames", "20", "--dedupe")
    assert ([0, *range(9, 20)], 8) == (seen["indices"], seen["num_dropped"])


@pytest.mark.parametrize(
    "option",
    [
        *(("--frames", "0"), ("--as", "film"), ("--fps", "0"), ("--fps", "nan"), ("--start", "-1")),
        ("--end", "0"),
    ],
)
def test_option_that_makes_no_sense_is_refused(darkroom: Invoke, option: tuple[str, str]) -> None:
    result = darkroom("describe", "ball.mp4", *option)

    assert 2 == result.exit_code
    assert option[0] in result.stderr


def test_clip_in_segments_is_told_part_by_part_and_as_a_whole(
    darkroom: Invoke, llm: FakeLLM
) -> None:
    llm.num_ahead = 1
    Path("ball.mp4").write_bytes(clip(shades(30), fps=10))
    Path("short.mp4").write_bytes(clip(shades(5), fps=10))

    result = darkroom("describe", "ball.mp4", "short.mp4", "--segments", "1s", "--frames", "3")

    assert [
        f"ball.mp4 [0:00 - 0:01]: {PROMPT} video 64x48",
        f"ball.mp4 [0:01 - 0:02]: {PROMPT} video 64x48",
        f"ball.mp4 [0:02 - 0:03]: {PROMPT} video 64x48",
        "ball.mp4: all of 3",
        f"short.mp4 [0:00 - 0:00.5]: {PROMPT} video 64x48",
        f"short.mp4: {PROMPT} video 64x48",
    ] == result.stdout.splitlines()
    assert 0 == result.exit_code


def test_segments_that_begin_while_the_last_frame_is_shown_see_it(
    darkroom: Invoke, llm: FakeLLM
) -> None:
    llm.num_ahead = 1
    Path("slides.mp4").write_bytes(clip(shades(3), times_ms=[0, 5000, 10_000]))

    result = darkroom("describe", "slides.mp4", "--segments", "2s", "--json")

    record = json.loads(result.stdout)
    times = [part["frames"]["times_s"] for part in record["parts"]]
    assert [[0.0], [0.0], [0.0, 5.0], [5.0], [5.0], [10.0], [10.0], [10.0]] == times


def test_json_of_a_clip_in_segments_has_its_parts_with_their_frames(
    darkroom: Invoke, llm: FakeLLM
) -> None:
    llm.num_ahead = 1
    Path("ball.mp4").write_bytes(clip(shades(40), fps=10))

    options = ("--segments", "2", "--frames", "2", "--start", "1", "--end", "3", "--json")
    result = darkroom("describe", "ball.mp4", *options)

    record = json.loads(result.stdout)
    assert ("all of 2", 12, 6) == (
        record["text"],
        record["num_prompt_tokens"],
        record["num_tokens"],
    )
    assert "frames" not in record
    assert [(1, 1.0, 2.0), (2, 2.0, 3.0)] == [
        (part["number"], part["start_s"], part["end_s"]) for part in record["parts"]
    ]
    assert [[1.0, 1.9], [2.0, 3.0]] == [part["frames"]["times_s"] for part in record["parts"]]
    assert [None, None] == [part["error"] for part in record["parts"]]


def test_what_has_no_segments_is_its_own_error(darkroom: Invoke, llm: FakeLLM) -> None:
    llm.num_ahead = 1
    save_pictures(2, "folder")
    Path("bad.mp4").write_bytes(b"no clip")
    Path("good.mp4").write_bytes(clip(shades(5), fps=10))

    result = darkroom("describe", "folder", "bad.mp4", "good.mp4", "--segments", "5")

    assert 1 == result.exit_code
    assert "good.mp4: all of 5" == result.stdout.splitlines()[-1]
    assert "error: folder: A folder of frames has no times" in result.stderr
    assert "error: bad.mp4: Failed to load video: " in result.stderr


@pytest.mark.parametrize("text", ["ten", "0", "0s", "10m", "-3", "1001"])
def test_segments_that_cannot_be_are_named(darkroom: Invoke, text: str) -> None:
    result = darkroom("describe", "ball.mp4", f"--segments={text}")

    assert 2 == result.exit_code
    assert "segments" in result.stderr
