"""Processes that run together: who is started again and when, and how all of them are stopped."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cli.errors import ExitCode
from cli.group import MAX_FAILED_STARTS, MAX_RESTART_S, STEADY_S, Group, Member
from tests.waiting import wait_until

STUBBORN = """
import pathlib, signal, sys, time
told = []
signal.signal(signal.SIGTERM, lambda *_: told.append(1) or pathlib.Path(sys.argv[2]).touch())
pathlib.Path(sys.argv[1]).touch()
while len(told) < int(sys.argv[3]):
    time.sleep(0.01)
"""


def build(*members: Member) -> Group:
    return Group(dict(os.environ), command=(sys.executable, "-c"), members=list(members))


def run(*members: Member) -> tuple[ExitCode, Group]:
    group = build(*members)
    return group.run(stop_within_s=10_000.0), group


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.01)


def in_thread(act: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=act)
    thread.start()
    return thread


def press_ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_who_ends_again_and_again_is_started_later_each_time() -> None:
    member = Member("it", ())

    delays = []
    for _ in range(7):
        member.started_at = time.monotonic()
        delays.append(member.delay_restart())
    member.started_at = time.monotonic() - STEADY_S
    delays.append(member.delay_restart())

    assert [2, 4, 8, 16, 32, MAX_RESTART_S, MAX_RESTART_S, 2] == delays


def test_who_has_ended_is_reported_and_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("cli.group.RESTART_S", 0.05)
    program = "import os, pathlib, sys, time; p = pathlib.Path(sys.argv[1])\n"
    program += "if (p / '2').exists(): (p / '3').touch(); time.sleep(60)\n"
    program += "(p / ('2' if (p / '1').exists() else '1')).touch(); os.kill(os.getpid(), 9)"

    def stop() -> None:
        wait_for(tmp_path / "3")
        press_ctrl_c()

    thread = in_thread(stop)
    code, _ = run(Member("the worker", (program, str(tmp_path))))
    thread.join()

    told = capfd.readouterr().err.splitlines()
    assert ExitCode.DONE == code
    assert "darkroom: the worker was ended by SIGKILL; starting it again in 0.05 s." == told[0]
    assert (
        "darkroom: the worker was ended by SIGKILL, 2 times in a row; starting it again in 0.1 s."
        == told[1]
    )


def test_who_lets_others_go_first_is_started_so(tmp_path: Path) -> None:
    found = tmp_path / "found"
    program = "import os, pathlib, sys, time; end = time.monotonic() + 30\n"
    program += "while os.nice(0) == int(sys.argv[2]) and time.monotonic() < end: time.sleep(0.01)\n"
    program += "pathlib.Path(sys.argv[1]).write_text(str(os.nice(0))); raise SystemExit(2)"

    run(Member("it", (program, str(found), str(os.nice(0))), niceness=5))

    assert os.nice(0) + 5 == int(found.read_text())


def test_who_can_never_start_ends_all_of_them(capfd: pytest.CaptureFixture[str]) -> None:
    code, group = run(
        Member("the API", ("import time; time.sleep(60)",)),
        Member("worker of nowhere", ("raise SystemExit(2)",)),
    )

    assert ExitCode.USAGE == code
    assert "worker of nowhere cannot start: see the error above" in capfd.readouterr().err
    assert [None, None] == [member.process for member in group.members]


def test_who_could_not_start_again_and_again_ends_all_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("cli.group.RESTART_S", 0.001)
    starts = tmp_path / "starts"
    program = "import sys; open(sys.argv[1], 'a').write('1'); raise SystemExit(3)"

    code, group = run(
        Member("the API", ("import time; time.sleep(60)",)),
        Member("worker of nothing", (program, str(starts))),
    )

    told = capfd.readouterr().err.splitlines()
    assert ExitCode.UNREACHABLE == code
    assert "1" * MAX_FAILED_STARTS == starts.read_text()
    assert (
        "darkroom: worker of nothing could not start, see the error above; "
        "starting it again in 0.001 s."
    ) == told[0]
    assert (
        "darkroom: worker of nothing could not start, 5 times in a row: see the error above. Stopping."
    ) == told[-1]
    assert [None, None] == [member.process for member in group.members]


def test_who_has_run_is_started_again_for_as_long_as_something_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cli.group.RESTART_S", 0.001)
    monkeypatch.setattr("cli.group.MAX_RESTART_S", 0.001)
    starts, is_back = tmp_path / "starts", tmp_path / "back"
    program = "import os, pathlib, sys, time; p = pathlib.Path(sys.argv[1])\n"
    program += "num = len(p.read_text()) if p.exists() else 0; p.write_text('1' * (num + 1))\n"
    program += "if num == 0: os.kill(os.getpid(), 9)\n"
    program += f"if num <= {MAX_FAILED_STARTS}: raise SystemExit(3)\n"
    program += "pathlib.Path(sys.argv[2]).touch(); time.sleep(60)"

    def stop() -> None:
        wait_for(is_back)
        press_ctrl_c()

    thread = in_thread(stop)
    code, _ = run(Member("the worker", (program, str(starts), str(is_back))))
    thread.join()

    assert ExitCode.DONE == code
    assert is_back.exists()


def test_who_ran_for_long_has_run_whatever_it_ended_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cli.group.STEADY_S", 0.01)
    member = Member("the worker", ("import time; time.sleep(0.05); raise SystemExit(3)",))

    member.start([sys.executable, "-c"], {})
    wait_until(lambda: member.take_end() == ExitCode.UNREACHABLE)

    assert member.has_run


@pytest.mark.parametrize("num_needed", [2, 1000])
def test_who_does_not_come_to_an_end_is_hurried_and_then_killed(
    tmp_path: Path, num_needed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cli.group.HURRY_S", 10_000.0)  # nothing but the signals will end it
    is_up, is_told = tmp_path / "up", tmp_path / "told"

    def stop() -> None:
        wait_for(is_up)
        press_ctrl_c()
        wait_for(is_told)
        press_ctrl_c()
        if num_needed > 2:
            wait_until(lambda: group.num_asked == 2)  # or two signals may count as one
            press_ctrl_c()

    group = build(Member("it", (STUBBORN, str(is_up), str(is_told), str(num_needed))))
    thread = in_thread(stop)
    code = group.run(stop_within_s=10_000.0)
    thread.join()

    assert ExitCode.DONE == code
    assert (2 if num_needed == 2 else 3) == group.num_asked


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such signal")
def test_who_is_left_behind_by_a_killed_group_is_told_to_end(tmp_path: Path) -> None:
    program = "import sys; from cli.group import Group, Member\n"
    program += "Group({}, (sys.executable, '-c'), [Member('it', (sys.argv[1], *sys.argv[2:]))])"
    program += ".run(stop_within_s=9)"
    words = (STUBBORN, str(tmp_path / "up"), str(tmp_path / "told"), "1")
    group = subprocess.Popen([sys.executable, "-c", program, *words], cwd=Path(__file__).parents[2])
    wait_for(tmp_path / "up")

    group.kill()
    group.wait()
    wait_for(tmp_path / "told")

    assert (tmp_path / "told").exists()
