"""What the tests of the command share: a folder to stand in, and a command without a model."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from cli.main import app
from tests.cli.fakes import FakeLLM

Invoke = Callable[..., Result]


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that the developer's own shell says about colours or options."""
    about_colour = {"NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"}
    for name in list(os.environ):
        if name in about_colour or name.startswith("DARKROOM_"):
            monkeypatch.delenv(name)


@pytest.fixture(autouse=True)
def own_ctrl_c() -> Iterator[None]:
    """The command takes Ctrl-C over, and keeps it where it ends because of it."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, the current one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def llm(monkeypatch: pytest.MonkeyPatch) -> FakeLLM:
    """The engine that the command will load."""
    fake = FakeLLM()
    monkeypatch.setattr("cli.local.load_llm", fake.load)
    return fake


@pytest.fixture
def darkroom(llm: FakeLLM) -> Invoke:
    """Run the command with these arguments."""

    def invoke(*args: str, **env: str) -> Result:
        return CliRunner().invoke(app, args, env=env, catch_exceptions=False)

    return invoke
