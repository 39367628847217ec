"""`darkroom up` or `serve` as a process, for tests that use the whole service."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import openai

from tests.services import find_free_ports

ROOT = Path(__file__).parents[2]
START_S = 200.0  # of a whole service on a machine with other work


def wait_until(is_true: Callable[[], bool], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_true():
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.1)


class Service:
    """A service in a home of its own, by default that of `darkroom up`."""

    def __init__(self, home: Path, *words: str) -> None:
        self.home, self.port = home, find_free_ports(1)[0]
        self.log = home / "up.log"
        settings = {k: v for k, v in os.environ.items() if not k.startswith("DARKROOM_")}
        self.env = settings | {
            "DARKROOM_HOME": str(home),
            "DARKROOM_SERVER": f"http://127.0.0.1:{self.port}",
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
        }
        words = (*(words or ("up",)), "--port", str(self.port), "--device", "cpu")
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "cli", *words],
                env=self.env,
                stdout=log,
                stderr=log,
            )
        self.client = openai.OpenAI(
            base_url=f"http://127.0.0.1:{self.port}/v1",
            api_key="EMPTY",
            _strict_response_validation=True,
        )

    def wait_for_workers(self, num_workers: int) -> None:
        def are_ready() -> bool:
            assert self.process.poll() is None, self.log.read_text(encoding="utf-8")[-2000:]
            return self.says('"event": "worker_ready"') >= num_workers

        wait_until(are_ready, START_S)

    def says(self, words: str) -> int:
        return self.log.read_text(encoding="utf-8", errors="replace").count(words)

    def darkroom(self, *args: str, **env: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [sys.executable, "-m", "cli", *args],
            env={**self.env, **env},
            capture_output=True,
            text=True,
            check=False,
        )

    def children(self) -> list[int]:
        found = subprocess.run(
            ["ps", "-o", "pid=", "--ppid", str(self.process.pid)],  # noqa: S607
            capture_output=True,
            text=True,
            check=False,
        )
        return [int(pid) for pid in found.stdout.split()]

    def stop(self) -> int:
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(120)

    def end(self) -> None:
        """Whatever has become of it."""
        for _ in range(2):  # twice: now
            self.process.terminate()
            try:
                self.process.wait(5)
            except subprocess.TimeoutExpired:
                continue
            return
        self.process.kill()
        self.process.wait()
