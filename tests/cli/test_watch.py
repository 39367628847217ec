"""How a batch is followed: bars on a terminal, lines in a pipe, and servers that are away."""

import re
from collections.abc import Iterator
from contextlib import redirect_stderr
from dataclasses import dataclass, field
from typing import Any

import pytest

from cli import watch
from cli.client import Client, Polled, ServerError, UnreachableError
from tests.cli.test_terminal import COLOUR, Terminal, terminal

__all__ = ["terminal"]


def build_polled(status: str, total: int = 0, completed: int = 0, failed: int = 0) -> Polled:
    counts = {"total": total, "completed": completed, "failed": failed}
    counts |= {"expired": 0, "cancelled": 0}
    return Polled({"id": "batch_1", "status": status, "request_counts": counts}, "")


@dataclass
class FakeClient:
    """Answers with these, one after the other; an error is raised."""

    answers: Iterator[Polled | Exception]
    num_polls: int = field(default=0)

    def poll(self, batch: str, *, after: Polled | None = None) -> Polled:
        self.num_polls += 1
        answer = next(self.answers)
        if isinstance(answer, Exception):
            raise answer
        return answer


def follow(*answers: Polled | Exception) -> Polled:
    first, *rest = answers
    assert isinstance(first, Polled)
    client: Any = FakeClient(iter(rest))
    return watch.follow(client, first)


@pytest.fixture(autouse=True)
def no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten seconds pass between two looks, and none is waited for."""
    clock = iter(range(0, 10_000, 5))
    monkeypatch.setattr("cli.watch.time.sleep", lambda _: None)
    monkeypatch.setattr("cli.watch.time.monotonic", lambda: float(next(clock)))


AWAY = UnreachableError("http://h", ConnectionRefusedError(111, "Connection refused"))
COURSE = (
    build_polled("validating"),
    build_polled("in_progress", 300),
    build_polled("in_progress", 300, 90, 10),
    build_polled("finalizing", 300, 290, 10),
    build_polled("completed", 300, 290, 10),
)


def test_pipe_gets_a_line_now_and_then_with_rate_and_time_left(
    capsys: pytest.CaptureFixture[str],
) -> None:
    last = follow(*COURSE)

    lines = capsys.readouterr().err.splitlines()
    assert COURSE[-1] is last
    assert ["validating 0/0", "in_progress 0/300"] == lines[:2]
    assert re.fullmatch(r"in_progress 100/300, \d+\.\d items/s, 0:00:\d\d left", lines[2])
    assert lines[3].startswith("finalizing 300/300, ")
    assert 4 == len(lines)


def test_terminal_gets_a_bar_with_failures_rate_and_time(terminal: Terminal) -> None:
    with redirect_stderr(terminal.stream):
        follow(*COURSE)

    screen = COLOUR.sub("", terminal.close())
    assert re.search(r"completed, 10 failed ━+ 300/300 .*items/s .*\d:\d\d:\d\d", screen)


def test_server_that_is_away_for_a_moment_is_asked_again(
    capsys: pytest.CaptureFixture[str],
) -> None:
    first, *_, last = COURSE

    found = follow(first, AWAY, AWAY, ServerError(503, "Not yet.", None), last)

    assert last is found
    told = capsys.readouterr().err
    assert 1 == told.count("http://h does not answer: Connection refused.")
    assert "Asking again for 60 s." in told


@pytest.mark.parametrize("error", [AWAY, ServerError(404, "None.", "not_found")])
def test_server_that_stays_away_or_refuses_ends_the_watch(error: Exception) -> None:
    with pytest.raises(type(error)):
        follow(COURSE[0], *[error] * 100)


def test_client_takes_an_address_that_is_none_as_out_of_reach() -> None:
    for server in ("127.0.0.1:8000", "http://127.0.0.1:99999", "http://[", "ftp:/"):
        with pytest.raises(UnreachableError, match="does not answer"):
            Client(server).list_models()
