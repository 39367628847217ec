"""The real command with the real engine and the bundled model: what stands on which stream."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

pytest.importorskip("av", reason="clips need PyAV, the extra `video`")

from cli.demo import FOLDER

ROOT = Path(__file__).parents[2]
EXPECTED: dict[str, str] = json.loads((FOLDER / "expected.json").read_text(encoding="utf-8"))
PICTURES = ("two.jpg", "one.png")

pytestmark = pytest.mark.usefixtures("folder")


def darkroom(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "from cli.main import main; main()", *args],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_pictures_are_captioned_as_they_are_drawn() -> None:
    paths = [str(FOLDER / name) for name in PICTURES]

    run = darkroom("caption", *paths)

    expected = [f"{path}: {EXPECTED[Path(path).name]}" for path in paths]
    assert (0, "") == (run.returncode, run.stderr)
    assert expected == run.stdout.splitlines()


def test_bad_pictures_are_a_line_each_and_cost_no_other_text() -> None:
    good = str(FOLDER / PICTURES[0])
    Path("bad.png").write_bytes(b"no picture")
    Image.new("1", (12_000, 12_000)).save("large.png")

    run = darkroom("caption", "bad.png", "large.png", good, "--json")

    bad, large, right = map(json.loads, run.stdout.splitlines())
    about_bad, about_large, summary = run.stderr.splitlines()
    assert 1 == run.returncode
    assert "image_unreadable" == bad["error"]["code"]
    assert "image_too_large" == large["error"]["code"]
    assert EXPECTED[PICTURES[0]] == right["text"]
    assert about_bad.startswith("error: bad.png: Failed to load image: ")
    assert about_large.startswith("error: large.png: Image dimensions 12000x12000")
    assert "note: 2 of 3 images failed." == summary


def test_clip_is_described_as_it_is_drawn() -> None:
    clip = str(FOLDER / "clip.mp4")

    run = darkroom("describe", clip)

    assert (0, "") == (run.returncode, run.stderr)
    assert f"{clip}: {EXPECTED['clip.mp4']}\n" == run.stdout


def test_clip_may_be_shown_as_many_images_as_frames_are_asked_for() -> None:
    run = darkroom("describe", str(FOLDER / "clip.mp4"), "--as", "images", "--frames", "3")

    assert (0, "") == (run.returncode, run.stderr)
    assert 1 == len(run.stdout.splitlines())


def test_prompt_without_room_says_which_option_helps_and_it_does() -> None:
    picture = str(FOLDER / PICTURES[1])
    options = ["--max-model-len", "60", "--max-tokens", "8"]

    refused = darkroom("caption", picture, *options)
    fitting = darkroom("caption", picture, *options, "--max-pixels", "3136")

    assert (1, "") == (refused.returncode, refused.stdout)
    assert "Here: lower --max-pixels or --frames, or raise --max-model-len." in refused.stderr
    assert 0 == fitting.returncode


def test_model_that_is_nowhere_is_one_line() -> None:
    run = darkroom("caption", str(FOLDER / PICTURES[0]), "--model", "./nowhere")

    assert (2, "") == (run.returncode, run.stdout)
    assert 1 == len(run.stderr.splitlines())
    assert run.stderr.startswith("error: The model './nowhere' cannot be loaded: ")
