"""`darkroom caption`: order, errors, exit codes, what stands on which stream."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import engine
from cli.inputs import load_picture
from cli.local import EngineOptions
from cli.main import app
from engine.errors import BadConfig
from engine.request import FinishReason, SamplingParams
from tests.cli.conftest import Invoke
from tests.cli.fakes import FakeLLM
from tests.cli.pictures import save_picture, save_pictures

pytestmark = pytest.mark.usefixtures("folder")

PROMPT = "Describe the image."


def records(ndjson: str) -> list[dict[str, Any]]:
    assert ndjson.endswith("\n")
    return [json.loads(line) for line in ndjson.splitlines()]


# Texts


def test_each_picture_gets_one_line_of_path_and_text(darkroom: Invoke) -> None:
    save_picture("cat.png", 12, 8)
    save_picture("dog.jpg", 14, 8)

    result = darkroom("caption", "dog.jpg", "cat.png")

    assert 0 == result.exit_code
    assert f"dog.jpg: {PROMPT} image 14x8\ncat.png: {PROMPT} image 12x8\n" == result.stdout
    assert "" == result.stderr


def test_texts_stand_in_input_order_though_results_come_in_another(
    darkroom: Invoke, llm: FakeLLM
) -> None:
    llm.num_ahead = 5
    save_pictures(12)

    result = darkroom("caption", "pics")

    widths = [int(line.split("x")[0].split()[-1]) for line in result.stdout.splitlines()]
    assert list(range(10, 22)) == widths


def test_text_of_many_lines_becomes_one_and_steers_no_terminal(
    darkroom: Invoke, llm: FakeLLM
) -> None:
    llm.texts = ["A cat.\n\n  Red:\t\x1b[31mno.\r\n"]
    save_picture("cat.png", 10)

    result = darkroom("caption", "cat.png")

    assert "cat.png: A cat. Red: \N{REPLACEMENT CHARACTER}[31mno.\n" == result.stdout


def test_options_reach_the_engine(darkroom: Invoke, llm: FakeLLM) -> None:
    save_picture("cat.png", 10)
    options = ["--model", "m", "--device", "cpu", "--dtype", "float32", "--max-model-len", "99"]
    options += ["--max-pixels", "5000"]
    how = ["--max-tokens", "7", "--temperature", "0.5", "--prompt", "Colour?"]

    result = darkroom("caption", "cat.png", *options, *how)

    assert "cat.png: Colour? image 10x10\n" == result.stdout
    assert EngineOptions("m", "cpu", "float32", 99, 5000) == llm.options
    assert SamplingParams(max_tokens=7, temperature=0.5) == llm.params
    assert {"image": 1, "video": 0} == llm.limits
    assert llm.is_closed


def test_every_option_has_a_variable(darkroom: Invoke, llm: FakeLLM) -> None:
    save_picture("cat.png", 10)

    result = darkroom(
        "caption",
        "cat.png",
        DARKROOM_MODEL="m",
        DARKROOM_DEVICE="cpu",
        DARKROOM_DTYPE="float32",
        DARKROOM_MAX_MODEL_LEN="99",
        DARKROOM_MAX_PIXELS="5000",
        DARKROOM_MAX_TOKENS="7",
        DARKROOM_TEMPERATURE="0.5",
        DARKROOM_PROMPT="Colour?",
        DARKROOM_JSON="1",
    )

    assert ["Colour? image 10x10"] == [record["text"] for record in records(result.stdout)]
    assert EngineOptions("m", "cpu", "float32", 99, 5000) == llm.options
    assert SamplingParams(max_tokens=7, temperature=0.5) == llm.params


# --json


def test_json_has_every_field(darkroom: Invoke) -> None:
    save_picture("cat.png", 12, 8)

    result = darkroom("caption", "cat.png", "--json")

    expected = {
        "path": "cat.png",
        "text": f"{PROMPT} image 12x8",
        "finish_reason": "stop",
        "num_prompt_tokens": 4,
        "num_tokens": 2,
        "width": 12,
        "height": 8,
        "used_width": 28,
        "used_height": 28,
        "ms": 6.2,
        "flags": [],
        "error": None,
    }
    assert [expected] == records(result.stdout)
    assert list(expected) == list(records(result.stdout)[0])


def test_json_says_of_a_bad_picture_what_is_wrong(darkroom: Invoke) -> None:
    Path("bad.png").write_bytes(b"no picture")
    save_picture("cat.png", 10)

    result = darkroom("caption", "bad.png", "cat.png", "nowhere.png", "--json")

    bad, cat, missing = records(result.stdout)
    assert 1 == result.exit_code
    assert (None, "error") == (bad["text"], bad["finish_reason"])
    assert {"code", "message", "retryable"} == set(bad["error"])
    assert "image_unreadable" == bad["error"]["code"]
    assert None is cat["error"]
    assert "file_not_found" == missing["error"]["code"]


@pytest.mark.parametrize("text", ['quote " and \\', "line\nbreak\u2028\u2029\x85", "naïve 東京 😀"])
def test_json_is_one_line_a_picture_whatever_the_text(
    darkroom: Invoke, llm: FakeLLM, text: str
) -> None:
    llm.texts = [text, text]
    save_pictures(2)

    result = darkroom("caption", "pics", "--json")

    assert [text, text] == [record["text"] for record in records(result.stdout)]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems want names to be valid text")
def test_file_whose_name_is_no_text_can_be_found_again_from_json(darkroom: Invoke) -> None:
    name = os.fsdecode(b"caf\xe9.png")
    save_picture("a.png", 10)
    Path("a.png").rename(name)

    result = darkroom("caption", name, "--json")

    assert [name] == [record["path"] for record in records(result.stdout)]
    assert 0 == darkroom("caption", name).exit_code


# What goes wrong


def test_bad_picture_costs_one_line_and_none_of_its_neighbours(darkroom: Invoke) -> None:
    save_pictures(3)
    Path("pics/1.png").write_bytes(b"no picture")

    result = darkroom("caption", "pics")

    error, summary = result.stderr.splitlines()
    assert 1 == result.exit_code
    assert ["pics/0.png", "pics/2.png"] == [
        line.split(":")[0] for line in result.stdout.splitlines()
    ]
    assert error.startswith("error: pics/1.png: Failed to load image: ")
    assert "note: 1 of 3 images failed." == summary


def test_clips_and_pictures_that_are_not_read_are_counted_once(darkroom: Invoke) -> None:
    save_picture("pics/cat.png", 10)
    for name in ("ball.mp4", "dog.heic"):
        Path("pics", name).touch()

    result = darkroom("caption", "pics", "pics")

    assert (0, 1) == (result.exit_code, len(result.stdout.splitlines()))
    assert [
        "note: 1 .heic left out: not read here. Convert to JPEG or PNG.",
        "note: 1 .mp4 left out: clips. `darkroom describe` reads them, if you name them.",
    ] == result.stderr.splitlines()


def test_missing_file_is_its_own_error_and_the_rest_is_done(darkroom: Invoke) -> None:
    save_picture("cat.png", 10)

    result = darkroom("caption", "nowhere.png", "cat.png")

    assert 1 == result.exit_code
    assert result.stdout.startswith("cat.png: ")
    assert "error: nowhere.png: There is no such file or folder." in result.stderr.splitlines()


def test_file_that_goes_away_before_it_is_read_is_its_own_error(
    darkroom: Invoke, llm: FakeLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_pictures(2)

    def load_and_lose(*args: Any) -> FakeLLM:
        Path("pics/0.png").unlink()
        return llm

    monkeypatch.setattr("cli.local.load_llm", load_and_lose)
    result = darkroom("caption", "pics")

    assert 1 == result.exit_code
    assert "error: pics/0.png: It cannot be read: No such file or directory.\n" in result.stderr
    assert result.stdout.startswith("pics/1.png: ")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_file_that_may_not_be_read_says_so(darkroom: Invoke) -> None:
    save_pictures(2)
    Path("pics/0.png").chmod(0)

    result = darkroom("caption", "pics")

    assert "error: pics/0.png: It cannot be read: Permission denied.\n" in result.stderr


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("nowhere", "There is no such file or folder."),
        ("*.jpg", "Nothing matches this pattern."),
        ("empty", "There are no pictures in this folder. A file with an unusual name is tried"),
        ("https://example.org/a.jpg", "Addresses are not fetched here."),
    ],
)
def test_nothing_found_is_one_line_and_loads_no_model(
    darkroom: Invoke, llm: FakeLLM, argument: str, message: str
) -> None:
    Path("empty").mkdir()

    result = darkroom("caption", argument)

    (line,) = result.stderr.splitlines()
    assert (1, "") == (result.exit_code, result.stdout)
    assert line.startswith(f"error: {argument}: {message}")
    assert None is llm.options


def test_model_that_cannot_be_loaded_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    save_picture("cat.png", 10)

    def refuse(**_: object) -> None:
        raise BadConfig("There is no model of that name.")

    monkeypatch.setattr("engine.LLM", refuse, raising=False)
    result = CliRunner().invoke(app, ["caption", "cat.png", "--model", "nope"])

    assert (2, "") == (result.exit_code, result.stdout)
    assert "error: There is no model of that name.\n" == result.stderr


def test_engine_that_is_not_installed_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    save_picture("cat.png", 10)
    monkeypatch.delitem(vars(engine), "LLM", raising=False)
    monkeypatch.setitem(sys.modules, "engine.llm", None)

    result = CliRunner().invoke(app, ["caption", "cat.png"])

    (line,) = result.stderr.splitlines()
    assert 2 == result.exit_code
    # Never by the bare name: on public indexes that is another project.
    assert "pip install -e '.[engine]'" in line


@pytest.mark.parametrize("error", [ImportError("no libm"), OSError("no\nlibcudart")])
def test_engine_that_is_damaged_is_one_line(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    save_picture("cat.png", 10)

    def fail(name: str) -> None:
        raise error

    monkeypatch.delitem(vars(engine), "LLM", raising=False)
    monkeypatch.setattr(engine, "__getattr__", fail)
    result = CliRunner().invoke(app, ["caption", "cat.png"])

    (line,) = result.stderr.splitlines()
    assert 2 == result.exit_code
    assert line.startswith("error: The engine cannot be loaded here: no")


@pytest.mark.parametrize(("device", "has_gpu"), [("cpu", True), ("auto", False)])
def test_cpu_reads_few_pictures_before_it_writes(
    monkeypatch: pytest.MonkeyPatch, device: str, has_gpu: bool
) -> None:
    save_picture("cat.png", 10)
    asked: dict[str, Any] = {}

    def refuse(**words: Any) -> None:
        asked.update(words)
        raise BadConfig("No more is needed.")

    monkeypatch.setattr("engine.LLM", refuse, raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: has_gpu)
    CliRunner().invoke(app, ["caption", "cat.png", "--device", device])

    assert 32 == asked["max_num_seqs"]


@pytest.mark.parametrize(
    "option",
    [
        ("--max-tokens", "0"),
        ("--temperature", "3"),
        ("--temperature", "nan"),
        ("--prompt", "caf\udce9"),
        ("--nope",),
    ],
)
def test_option_that_makes_no_sense_is_refused_before_anything_is_loaded(
    darkroom: Invoke, llm: FakeLLM, option: tuple[str, ...]
) -> None:
    save_picture("cat.png", 10)

    result = darkroom("caption", "cat.png", *option)

    assert 2 == result.exit_code
    assert option[0] in result.stderr
    assert None is llm.options


def test_engine_that_gives_up_leaves_what_was_finished(darkroom: Invoke, llm: FakeLLM) -> None:
    llm.give_up_after = 4
    save_pictures(8)

    result = darkroom("caption", "pics")

    assert 1 == result.exit_code
    assert 4 == len(result.stdout.splitlines())
    assert "error: The device is gone.\n" == result.stderr
    assert llm.is_closed


def test_texts_that_were_cut_off_are_counted(darkroom: Invoke, llm: FakeLLM) -> None:
    llm.finish_reason = FinishReason.LENGTH
    save_pictures(2)

    result = darkroom("caption", "pics")

    assert 0 == result.exit_code
    assert "note: 2 cut off at the token limit; --max-tokens raises it.\n" == result.stderr


# Ctrl-C


def test_ctrl_c_lets_what_is_under_way_end_and_begins_nothing_new(
    darkroom: Invoke, llm: FakeLLM
) -> None:
    llm.interrupt_after = [6]  # of the second four
    save_pictures(16)

    result = darkroom("caption", "pics")

    names = [line.split(":")[0] for line in result.stdout.splitlines()]
    assert 130 == result.exit_code
    assert [f"pics/{index}.png" for index in range(8)] == names
    assert "stopped: 8 of 16 images done.\n" == result.stderr
    assert llm.is_closed


def test_second_ctrl_c_keeps_what_is_finished_and_leaves(darkroom: Invoke, llm: FakeLLM) -> None:
    llm.interrupt_after = [5, 6]  # the first four, and the last two of the next four
    save_pictures(8)

    result = darkroom("caption", "pics")

    names = [line.split(":")[0] for line in result.stdout.splitlines()]
    assert 130 == result.exit_code
    assert [f"pics/{index}.png" for index in (0, 1, 2, 3, 6, 7)] == names
    assert "stopped: 6 of 8 images done.\n" == result.stderr
    assert llm.is_closed


def test_ctrl_c_while_the_model_loads_says_that_nothing_is_done(
    darkroom: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_pictures(2)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("cli.local.load_llm", interrupt)
    result = darkroom("caption", "pics")

    assert (130, "stopped: 0 of 2 images done.\n") == (result.exit_code, result.stderr)


# Pictures are read late


def test_pictures_are_read_as_the_engine_asks_and_never_all_at_once(
    darkroom: Invoke, llm: FakeLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm.num_ahead = 2
    num_shown = []
    save_pictures(6)

    def read(path: str) -> object:
        num_shown.append(llm.num_answered)
        return load_picture(path)

    monkeypatch.setattr("cli.questions.load_picture", read)
    darkroom("caption", "pics")

    assert [0, 1, 2, 3, 4, 5] == num_shown


def test_arguments_of_the_engine_are_pulled_as_it_has_room(darkroom: Invoke, llm: FakeLLM) -> None:
    llm.num_ahead = 2
    llm.interrupt_after = [2]
    save_pictures(6)

    darkroom("caption", "pics")

    assert 4 == llm.num_pulled
