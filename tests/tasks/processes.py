"""Worker processes for tests: started, watched and ended one by one."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]


class Fleet:
    """The processes of one test; all end with it."""

    def __init__(self, folder: Path, settings: dict[str, str]) -> None:
        self._folder = folder
        self._env = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            **{f"DARKROOM_{name}": value for name, value in settings.items()},
        }
        self.processes: list[subprocess.Popen[bytes]] = []
        self._logs: dict[int, Path] = {}

    def start(self, *words: str, module: str = "tests.tasks.worker") -> subprocess.Popen[bytes]:
        log = self._folder / f"worker-{len(self.processes)}-{words[0]}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "tests.quickly", module, *words],
                cwd=ROOT,
                env=self._env,
                stdout=output,
                stderr=output,
            )
        self.processes.append(process)
        self._logs[process.pid] = log
        return process

    def count_logged(self, process: "subprocess.Popen[bytes]", words: str) -> int:
        """How often this process has logged these words."""
        return self._logs[process.pid].read_text(errors="replace").count(words)

    def log_of(self, process: subprocess.Popen[bytes]) -> Path:
        number = self.processes.index(process)
        return next(self._folder.glob(f"worker-{number}-*.log"))

    def logs(self) -> str:
        return "\n".join(
            f"--- {path.name}\n{path.read_text()[-3000:]}"
            for path in sorted(self._folder.glob("worker-*.log"))
        )

    def end(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(signal.SIGCONT)
                process.kill()
            process.wait()


@contextmanager
def open_fleet(folder: Path, **settings: str) -> Iterator[Fleet]:
    fleet = Fleet(folder, settings)
    try:
        yield fleet
    finally:
        fleet.end()


def wait_until(condition: Callable[[], bool], fleet: Fleet, *, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, fleet.logs()
        time.sleep(0.05)
