"""
Advisory locks: one process at a time does something that two may do, but need not.

Nothing is ever right because of such a lock: what it guards is safe to do twice, and whoever has
waited too long for a holder that may be frozen goes ahead without it. It ends with its process,
however that dies.
"""

import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import text

from storage.db import Database


@contextmanager
def hold(database: Database, name: str) -> Iterator[bool]:
    """
    Try to take the lock of this name; yield whether we hold it, and let go in the end.

    On PostgreSQL it is the server's own; on SQLite, where all processes are on one host, a locked
    file beside the database.
    """
    digest = hashlib.sha256(name.encode()).digest()
    if database.engine.dialect.name == "sqlite":
        path = Path(f"{database.engine.url.database}.{digest[:8].hex()}.lock")
        with _hold_file(path) as is_ours:
            yield is_ours
        return
    key = {"key": int.from_bytes(digest[:8], "big", signed=True)}
    with database.autocommit() as connection:
        is_ours = bool(connection.scalar(text("SELECT pg_try_advisory_lock(:key)"), key))
        try:
            yield is_ours
        finally:
            if is_ours:
                connection.execute(text("SELECT pg_advisory_unlock(:key)"), key)


@contextmanager
def _hold_file(path: Path) -> Iterator[bool]:
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        if not _is_still_named(path, file.fileno()):  # its holder removed it while we waited
            yield False
            return
        try:
            yield True
        finally:
            # Removed while it is still ours: files would pile up, one for each job.
            path.unlink(missing_ok=True)


def _is_still_named(path: Path, descriptor: int) -> bool:
    try:
        return path.stat().st_ino == os.fstat(descriptor).st_ino
    except FileNotFoundError:
        return False
