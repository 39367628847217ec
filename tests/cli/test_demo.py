"""
What `darkroom demo` says of the samples, and the samples themselves.

Here the engine is a fake, in this process; tests/acceptance/test_demo.py goes through a service.
"""

import json
import re
from pathlib import Path

import pytest

from cli.demo import FOLDER, PHOTO
from media.images import read_image
from tests.cli.conftest import Invoke
from tests.cli.fakes import FakeLLM

MAX_BYTES = 1_000_000
MAX_PHOTO_BYTES = 120_000


@pytest.fixture
def expected() -> dict[str, str]:
    loaded: dict[str, str] = json.loads((FOLDER / "expected.json").read_text(encoding="utf-8"))
    return loaded


def answers(expected: dict[str, str]) -> dict[str, str]:
    return {
        name: "A photo." if sentence == PHOTO else sentence for name, sentence in expected.items()
    }


def test_true_sentences_are_marked_right(
    darkroom: Invoke, llm: FakeLLM, expected: dict[str, str]
) -> None:
    pytest.importorskip("av")
    llm.texts = answers(expected).values()
    num_drawn = sum(sentence != PHOTO for sentence in expected.values())

    result = darkroom("demo", "--offline")

    words = " ".join(result.stdout.split())
    assert 0 == result.exit_code
    assert all(f"{name} {text}" in words for name, text in answers(expected).items())
    assert num_drawn == result.stdout.count("right  ")
    assert f"{num_drawn} of {num_drawn} drawn samples are right" in result.stdout
    assert re.search(r"\d images/s", result.stdout)
    assert "darkroom caption FOLDER" in result.stdout
    assert "" == result.stderr


@pytest.mark.parametrize(("options", "exit_code"), [((), 0), (("--check",), 1)])
def test_wrong_sentence_is_shown_with_the_true_one_and_fails_a_check(
    darkroom: Invoke,
    llm: FakeLLM,
    expected: dict[str, str],
    options: tuple[str, ...],
    exit_code: int,
) -> None:
    pytest.importorskip("av")
    first, *_ = expected
    llm.texts = (answers(expected) | {first: "A cat."}).values()

    result = darkroom("demo", "--offline", *options)

    wrong, truth, *_ = result.stdout.splitlines()
    assert exit_code == result.exit_code
    assert ["WRONG", first, "A", "cat."] == wrong.split()
    assert "expected" == truth.split()[0]
    assert expected[first][:20] in truth


def test_service_that_is_not_installed_is_done_without(
    darkroom: Invoke, llm: FakeLLM, expected: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("av")
    llm.texts = answers(expected).values()
    monkeypatch.setattr("cli.demo.find_missing", lambda: "celery")

    result = darkroom("demo", "--check")

    assert 0 == result.exit_code
    assert "10 of 10 drawn samples are right" in result.stdout
    assert "The service is not installed here (celery is missing)" in result.stderr


def test_model_that_fails_on_a_photograph_fails_the_demo(
    darkroom: Invoke, llm: FakeLLM, expected: dict[str, str]
) -> None:
    pytest.importorskip("av")
    llm.texts = answers(expected).values()
    llm.give_up_after = len(expected) - 1

    result = darkroom("demo", "--offline")

    assert 1 == result.exit_code
    assert "error: The device is gone." in result.stderr


# The samples


def test_every_sample_has_its_sentence_and_every_sentence_its_sample(
    expected: dict[str, str],
) -> None:
    files = {path.name for path in FOLDER.iterdir()} - {"expected.json", "README.md"}

    assert files == set(expected)


def test_every_photograph_has_its_source_and_licence(expected: dict[str, str]) -> None:
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    rows = {row.split("|")[1].strip(): row for row in readme.splitlines() if row.startswith("| ")}

    photographs = [name for name, sentence in expected.items() if sentence == PHOTO]
    assert photographs
    for name in photographs:
        assert re.search(r"CC0|[Pp]ublic domain", rows[name])


def test_samples_are_small() -> None:
    sizes = {path.name: path.stat().st_size for path in FOLDER.iterdir()}

    assert sum(sizes.values()) < MAX_BYTES
    assert max(sizes.values()) < MAX_PHOTO_BYTES


def test_samples_are_pictures_of_many_sizes_and_one_clip(expected: dict[str, str]) -> None:
    pictures = [FOLDER / name for name in expected if not name.endswith(".mp4")]

    sizes = {(image.width_px, image.height_px) for image in map(read_image, pictures)}

    assert len(expected) - 1 == len(pictures)
    assert len(sizes) > 8
    assert (1280, 800) in sizes


def test_ball_of_the_clip_moves_from_the_left_to_the_right() -> None:
    pytest.importorskip("av")
    from media.video import decode_video

    frames = decode_video((FOLDER / "clip.mp4").read_bytes())

    pixels = frames.pixels().astype(int)
    is_ball = (pixels[..., 0] > 150) & (pixels[..., 1] < 90)
    centres = [mask.nonzero()[1].mean() for mask in is_ball]
    assert centres == sorted(centres)
    assert centres[0] < frames.width_px / 3
    assert centres[-1] > 2 * frames.width_px / 3


def test_samples_folder_that_is_missing_is_one_line(
    darkroom: Invoke, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("cli.demo.FOLDER", tmp_path)

    result = darkroom("demo", "--offline")

    assert (2, "error: The samples are not installed here.\n") == (result.exit_code, result.stderr)
