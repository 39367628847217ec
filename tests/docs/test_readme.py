"""README.md: what it shows of the engine does what it says. test_up.py runs what it shows of the service."""

import shlex
from collections.abc import Callable
from typing import Any

import pytest
from typer.testing import CliRunner

from cli.main import app
from tests.docs.pages import ROOT, find_blocks, read_page

PYTHON, COMMANDS = find_blocks(read_page("README.md"))[:2]


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def test_lines_from_python_describe_two_samples(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    run: Callable[..., None] = exec  # what the page shows is meant to be run

    run(compile(PYTHON.code, "README.md", "exec"), names)
    names["llm"].close()

    assert [
        "A large blue circle at the top left on a white background.",
        "A small pink cross at the top and a small purple square at the bottom on a white "
        "background.",
    ] == capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("line", COMMANDS.code.splitlines())
def test_commands_do_what_stands_behind_them(line: str) -> None:
    pytest.importorskip("av")
    program, *words = shlex.split(line, comments=True)

    run = CliRunner().invoke(app, words, env={"DARKROOM_DEVICE": "cpu"}, catch_exceptions=False)

    assert "darkroom" == program
    assert 0 == run.exit_code, run.stderr
    assert {
        "caption": 'samples/word.png: The text reads "darkroom".',
        "describe": "samples/clip.mp4: The red circle moves from the left to the right.",
        "demo": "10 of 10 drawn samples are right",
        "--help": "Usage:",
    }[words[0]] in run.stdout
