"""
`darkroom api` as a process, for tests: settings come from DARKROOM_*.

    python -m tests.faults.api PORT [dies]

`dies`: it is killed when it has committed a job and is about to send the message that says so.
"""

import os
import signal
import sys
from typing import Any

import tasks.dispatch
from cli.server import run_api
from storage.ids import JobId
from tasks.dispatch import Dispatcher


class DyingDispatcher(Dispatcher):
    def send_expand(self, job: JobId, *, force: bool = False) -> bool:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError


def main(port: str, *words: str) -> int:
    if "dies" in words:
        this: Any = tasks.dispatch  # `run_api` looks there when it runs
        this.Dispatcher = DyingDispatcher
    return int(run_api("127.0.0.1", int(port)))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
