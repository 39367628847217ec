"""
Processes of the `darkroom` command that run together: started, started again, and stopped.

It knows how they end and nothing of what they do.
"""

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Final

from cli.errors import ExitCode

WATCH_S: Final = 0.1
RESTART_S: Final = 2.0
MAX_RESTART_S: Final = 60.0
STEADY_S: Final = 60.0
"""Who has run for so long is well: its next end does not count as one more in a row."""

MAX_FAILED_STARTS: Final = 5
"""Of one that has never run: with the pauses between them, half a minute and more for what may pass."""

PATIENCE_S: Final = 3.0
HURRY_S: Final = 5.0
"""How long they have when they are told for the second time."""

_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

_LIBC: Final = ctypes.CDLL(None)
_PR_SET_PDEATHSIG: Final = 1  # linux/prctl.h


@dataclass(slots=True)
class Member:
    """
    One process.

    Args:
        name: for people: "the API".
        args: of the `darkroom` command.
        env: what its environment has beside the group's.
        hurry: the signal that tells it for the second time.
        niceness: 0, or more where others of this host go first.

    Attributes:
        num_ends: in a row, by itself, each soon after its start.
        num_failed_starts: of those, with the status of one that lacked what may come yet, from the first on.
        has_run: whether it ever ended in another way, or long after its start.
        not_before: when it may be started again, on the monotonic clock.
    """

    name: str
    args: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    hurry: signal.Signals = signal.SIGTERM
    niceness: int = 0
    process: "subprocess.Popen[bytes] | None" = None
    started_at: float = 0.0
    num_ends: int = 0
    num_failed_starts: int = 0
    has_run: bool = False
    not_before: float = 0.0

    def start(self, command: Sequence[str], env: Mapping[str, str]) -> None:
        self.started_at = time.monotonic()
        # A session of its own: Ctrl-C reaches the group's process alone, and that says who stops when.
        self.process = subprocess.Popen(  # noqa: S603 - our own command
            [*command, *self.args],
            env={**env, **self.env},
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=_end_with_parent if sys.platform == "linux" else None,
        )
        be_nice(self.process.pid, self.niceness)

    def take_end(self) -> int | None:
        """The exit status of a process that has ended since the last call."""
        if self.process is None or self.process.poll() is None:
            return None
        code, self.process = self.process.returncode, None
        if code == ExitCode.UNREACHABLE and time.monotonic() - self.started_at < STEADY_S:
            self.num_failed_starts += 1
        else:
            self.has_run = True
        return code

    @property
    def never_starts(self) -> bool:
        """Whether to wait for what it lacks is over: it is set up wrongly, and nobody had anything of it."""
        return not self.has_run and self.num_failed_starts >= MAX_FAILED_STARTS

    def delay_restart(self) -> float:
        """Set `not_before`, later after each of the ends in a row; return the delay, in seconds."""
        now = time.monotonic()
        self.num_ends = 1 if now - self.started_at >= STEADY_S else self.num_ends + 1
        delay_s = min(RESTART_S * 2.0 ** min(self.num_ends - 1, 10), MAX_RESTART_S)
        self.not_before = now + delay_s
        return delay_s


def be_nice(pid: int, niceness: int) -> None:
    """
    Let others of this host go before a process that was just started; a wish, and no more.

    Linux may share out time by sessions, where a process's own niceness counts inside of its session
    only, and the session's is told apart.
    """
    if niceness:
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, pid, niceness)
        with suppress(OSError):
            Path(f"/proc/{pid}/autogroup").write_text(str(niceness), encoding="ascii")


def _end_with_parent() -> None:
    """Ask Linux for a SIGTERM if the group's process is killed: nobody else would send one."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


@dataclass(slots=True)
class Group:
    """
    Args:
        env: of every member.
        command: what the members' arguments are for.

    Attributes:
        num_asked: how often SIGINT or SIGTERM have asked to stop.
    """

    env: Mapping[str, str]
    command: Sequence[str] = (sys.executable, "-m", "cli")
    members: list[Member] = field(default_factory=list)
    num_asked: int = 0

    def add(self, member: Member) -> None:
        self.members.append(member)

    def run(self, *, stop_within_s: float) -> ExitCode:
        """
        Keep all of them running until a signal asks to stop, or one says that it never will run.

        The first signal lets them come to their end, the second tells them to hurry, the third kills.

        Args:
            stop_within_s: after which they are killed.
        """
        code = ExitCode.DONE
        with _on_signals(self._ask_to_stop):
            try:
                while not self.num_asked and code is ExitCode.DONE:
                    for member in self.members:
                        code = max(code, self._keep_running(member))
                    time.sleep(WATCH_S)
            finally:
                self._stop(stop_within_s)
        return code

    def _ask_to_stop(self, _number: int, _frame: FrameType | None) -> None:
        self.num_asked += 1

    def _keep_running(self, member: Member) -> ExitCode:
        ended = member.take_end()
        if ended == ExitCode.USAGE:
            _say(f"{member.name} cannot start: see the error above. Stopping")
            return ExitCode.USAGE
        if member.never_starts:
            times = f"{member.num_failed_starts} times in a row"
            _say(f"{member.name} could not start, {times}: see the error above. Stopping")
            return ExitCode.UNREACHABLE
        if ended is not None:
            delay_s = member.delay_restart()
            often = f", {member.num_ends} times in a row" if member.num_ends > 1 else ""
            _say(f"{member.name} {_describe(ended)}{often}; starting it again in {delay_s:g} s")
        if member.process is None and time.monotonic() >= member.not_before:
            member.start(self.command, self.env)
        return ExitCode.DONE

    def _stop(self, within_s: float) -> None:
        num_asked, begun = self.num_asked, time.monotonic()
        deadline = begun + within_s
        is_told = is_hurried = False
        running = [member for member in self.members if member.process is not None]
        for member in running:
            _send(member, signal.SIGTERM)
        while running := [member for member in running if member.take_end() is None]:
            now = time.monotonic()
            if self.num_asked > num_asked and not is_hurried:
                is_hurried = True
                deadline = min(deadline, now + HURRY_S)
                for member in running:
                    _send(member, member.hurry)
            if now >= deadline or self.num_asked > num_asked + 1:
                for member in running:
                    _send(member, signal.SIGKILL)
            if not is_told and now >= begun + PATIENCE_S:
                is_told = True
                names = " and ".join(member.name for member in running)
                _say(f"waiting for {names}, {within_s:g} s at most. Ctrl-C again: now")
            time.sleep(WATCH_S)


def _send(member: Member, number: signal.Signals) -> None:
    if member.process is not None:
        member.process.send_signal(number)  # nothing happens where it has ended


def _describe(code: int) -> str:
    if code == ExitCode.UNREACHABLE:
        return "could not start, see the error above"
    if code < 0:
        return f"was ended by {signal.Signals(-code).name}"
    return f"ended with {code}"


def _say(text: str) -> None:
    print(f"darkroom: {text}.", file=sys.stderr, flush=True)


@contextmanager
def _on_signals(act: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    # What a shell has told us to ignore stays ignored: SIGINT in the background, SIGHUP under nohup.
    heard = [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, act) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
