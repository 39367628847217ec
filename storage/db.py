"""
The way to the database: connections, transactions, and the database's own clock.

SQLite (WAL) and PostgreSQL (psycopg 3) are told apart here and in the few statements that must
differ. Vendor errors end here: whoever holds a session sees `storage.errors` only.

`write()` is BEGIN IMMEDIATE on SQLite, so that two writers queue for the lock instead of one of
them failing half-way; on PostgreSQL it is READ COMMITTED, and rows are locked one by one.
"""

import json
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import psycopg
import structlog
from sqlalchemy import Connection, Double, Engine, create_engine, event, text
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import (
    ArgumentError,
    DBAPIError,
    IntegrityError,
    InvalidatePoolError,
    OperationalError,
    SQLAlchemyError,
)
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm import Session as Session  # the type that other rooms name
from sqlalchemy.orm import sessionmaker
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement

from storage.errors import (
    BadDatabaseUrlError,
    CommitUnknownError,
    DatabaseBusyError,
    DatabaseRefusedError,
    DatabaseUnavailableError,
    StorageError,
)

logger = structlog.get_logger(__name__)

BUSY_TIMEOUT_S: Final = 10.0
"""How long a writer waits for the others. A transaction of ours takes milliseconds."""

STATEMENT_TIMEOUT_S: Final = 60.0
MAX_LOGGED_CHARS: Final = 400
"""Of a statement that the database refused."""

CONNECT_TIMEOUT_S: Final = 5.0
SILENT_S: Final = 30
"""How long a PostgreSQL is waited for from which nothing comes any more, not even an answer to the
kernel's probes: a host that vanished would hold a thread for a quarter of an hour."""

PING_AFTER_S: Final = 1.0
"""A connection that was idle for so long is asked whether it lives before it is used."""

_CONSTRAINT_TEXT: Final = "The database refused a row: a constraint does not allow it."

# PostgreSQL's words for "another transaction was in the way": deadlock, lock timeout, serialization.
_BUSY_SQLSTATES: Final = frozenset({"40001", "40P01", "55P03"})


class clock(FunctionElement[float]):  # noqa: N801 - reads as the SQL function that it is
    """
    The database's clock, in seconds since 1970, as an expression.

    All times in the tables are such numbers: both databases compare and add them alike, and no host
    but the database's has a say in when a lease ends.
    """

    type = Double()
    inherit_cache = True
    name = "clock"


@compiles(clock, "postgresql")
def _clock_on_postgresql(element: clock, compiler: SQLCompiler, **options: Any) -> str:
    # The start of the statement, not of the transaction; unlike clock_timestamp() it is one value
    # for the whole statement, so an index can be searched with it.
    return "CAST(EXTRACT(EPOCH FROM statement_timestamp()) AS DOUBLE PRECISION)"


@compiles(clock, "sqlite")
def _clock_on_sqlite(element: clock, compiler: SQLCompiler, **options: Any) -> str:
    # unixepoch('subsec') would need SQLite 3.42. Resolution: one millisecond.
    return "((julianday('now') - 2440587.5) * 86400.0)"


HEAD: Final = 20


class head_of(FunctionElement[Any]):  # noqa: N801 - as `clock`
    """The first `HEAD` entries of a column that holds a JSON array; null where it is null."""

    inherit_cache = True
    name = "head_of"


@compiles(head_of, "postgresql")
def _head_on_postgresql(element: head_of, compiler: SQLCompiler, **options: Any) -> str:
    return f"jsonb_path_query_array({compiler.process(element.clauses)}, '$[0 to {HEAD - 1}]')"


@compiles(head_of, "sqlite")
def _head_on_sqlite(element: head_of, compiler: SQLCompiler, **options: Any) -> str:
    column = compiler.process(element.clauses)
    return (  # no text of anybody's: a column's name and a number
        f"CASE WHEN {column} IS NOT NULL THEN (SELECT json_group_array(json(value)) "  # noqa: S608
        f"FROM (SELECT value FROM json_each({column}) LIMIT {HEAD})) END"
    )


class Database:
    """
    One process's way to one database. Threads share it; sessions are never shared.

    Args:
        url: `sqlite:///PATH` or `postgresql://…`; the driver is ours to choose.
        pool_size: connections kept; as many as there are threads that write at once.
    """

    def __init__(self, url: str, *, pool_size: int = 5) -> None:
        self._engine = build_engine(url, pool_size=pool_size)
        self._readers = _build_sessions(_for_reading(self._engine))
        self._writers = _build_sessions(self._engine.execution_options(is_write=True))

    @property
    def engine(self) -> Engine:
        """For migrations and tests; rooms use `read` and `write`."""
        return self._engine

    @contextmanager
    def read(self) -> Iterator[Session]:
        """
        A session that only reads and blocks nobody. Each statement sees the newest state of things.
        """
        with self._readers() as session, _translated():
            yield session

    @contextmanager
    def write(self) -> Iterator[Session]:
        """
        A transaction that is committed when the block ends, and rolled back when it raises.

        Raises:
            CommitUnknownError: the connection was lost after COMMIT was sent.
            DatabaseUnavailableError, DatabaseBusyError: nothing was changed.
        """
        with self._writers() as session:
            with _translated():
                yield session
                session.flush()
            with _translated(is_commit=True):
                session.commit()

    @contextmanager
    def autocommit(self) -> Iterator[Connection]:
        """A connection without transactions: it may stay open long, and locks nothing by that."""
        with _translated(), self._engine.connect() as connection:
            yield connection.execution_options(isolation_level="AUTOCOMMIT")

    @contextmanager
    def migrating(self) -> Iterator[Connection]:
        """A connection for migrations, which have their own transaction and timeouts."""
        with _translated(), self._engine.execution_options(is_write=True).connect() as connection:
            yield connection

    def ping(self) -> None:
        """Raise `DatabaseUnavailableError` unless the database answers."""
        with self.read() as session:
            session.execute(text("SELECT 1"))

    def close(self) -> None:
        self._engine.dispose()


def build_engine(url: str, *, pool_size: int = 5) -> Engine:
    """Raises `BadDatabaseUrlError` for anything but SQLite in a file, or PostgreSQL."""
    try:
        parsed = make_url(url)
    except ArgumentError as error:
        raise BadDatabaseUrlError from error
    match parsed.get_backend_name():
        case "sqlite" if parsed.database not in (None, "", ":memory:"):
            return _build_sqlite_engine(parsed, pool_size)
        case "postgresql":
            return _build_postgresql_engine(parsed, pool_size)
    raise BadDatabaseUrlError


_NUL: Final = re.compile(r"(\\\\)|\\u0000")  # a NUL, and no backslash before the text "u0000"


def encode_json(value: Any) -> str:
    """
    A value as the JSON columns take it.

    What JSON may hold and PostgreSQL's JSONB refuses, a NUL or half of a surrogate pair, is replaced:
    it comes from clients, in a stop string or a field's name, and must not hold up what stands there.
    """
    text = json.dumps(value, ensure_ascii=False).encode("utf-8", "replace").decode()
    return _NUL.sub(lambda found: found[1] or "\ufffd", text)


def explain(error: StorageError) -> str:
    """
    What the driver said, in one line, where a driver was asked; else "".

    For the operator's eyes only: it may name hosts and users, and never a password.
    """
    cause = error.__cause__
    said = cause.orig if isinstance(cause, DBAPIError) else cause
    lines = str(said or "").strip().splitlines()
    return lines[0] if lines else ""


def is_sqlite(session: Session) -> bool:
    return session.get_bind().dialect.name == "sqlite"


def insert_or_skip(session: Session, table: type[Any]) -> "postgresql.Insert | sqlite.Insert":
    """An INSERT that can take ON CONFLICT, in the words of this session's database."""
    return sqlite.insert(table) if is_sqlite(session) else postgresql.insert(table)


def _build_sqlite_engine(url: URL, pool_size: int) -> Engine:
    engine = create_engine(
        url.set(drivername="sqlite+pysqlite"),
        pool_size=pool_size,
        hide_parameters=True,
        json_serializer=encode_json,
        # The driver's own transactions are switched off: `_begin` sends ours.
        connect_args={"timeout": BUSY_TIMEOUT_S, "isolation_level": None},
    )

    @event.listens_for(engine, "connect")
    def _set_pragmas(connection: Any, record: object) -> None:
        cursor = connection.cursor()
        cursor.execute("PRAGMA journal_mode = WAL")
        cursor.execute("PRAGMA synchronous = FULL")  # NORMAL may lose the last commits in WAL
        cursor.execute("PRAGMA foreign_keys = ON")
        cursor.execute(f"PRAGMA busy_timeout = {int(BUSY_TIMEOUT_S * 1000)}")
        cursor.close()

    @event.listens_for(engine, "begin")
    def _begin(connection: Any) -> None:
        is_write = connection.get_execution_options().get("is_write", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if is_write else "BEGIN")

    return engine


def _build_postgresql_engine(url: URL, pool_size: int) -> Engine:
    settings = {
        "lock_timeout": BUSY_TIMEOUT_S,
        "statement_timeout": STATEMENT_TIMEOUT_S,
        "idle_in_transaction_session_timeout": STATEMENT_TIMEOUT_S,
    }
    engine = create_engine(
        url.set(drivername="postgresql+psycopg"),
        pool_size=pool_size,
        hide_parameters=True,  # clients' texts: never in an error, a traceback or a log
        json_serializer=encode_json,
        connect_args={
            "connect_timeout": int(CONNECT_TIMEOUT_S),
            "keepalives_idle": SILENT_S // 3,
            "keepalives_interval": SILENT_S // 6,
            "keepalives_count": 4,
            "tcp_user_timeout": SILENT_S * 1000,  # for what was sent and never acknowledged
            "options": " ".join(f"-c {name}={int(s * 1000)}ms" for name, s in settings.items()),
        },
    )

    # A restarted server costs a reconnect instead of an error, and yet a connection in steady use is
    # not asked each time: that was a quarter of a poll's round trips.
    @event.listens_for(engine, "checkin")
    def _note_use(connection: Any, record: Any) -> None:
        record.info["used_at_s"] = time.monotonic()

    @event.listens_for(engine, "checkout")
    def _ping_if_idle(connection: Any, record: Any, proxy: object) -> None:
        used_at_s = record.info.get("used_at_s")  # None: it has just been made
        if used_at_s is None or time.monotonic() - used_at_s < PING_AFTER_S:
            return
        try:
            engine.dialect.do_ping(connection)
        except psycopg.Error as error:
            raise InvalidatePoolError from error  # its neighbours are gone with it

    return engine


def _for_reading(engine: Engine) -> Engine:
    """
    Without transactions on PostgreSQL: under READ COMMITTED one shows nothing more to a reader, and
    costs two round trips. On SQLite a transaction is what keeps the statements of a read together.
    """
    if engine.dialect.name == "sqlite":
        return engine
    return engine.execution_options(isolation_level="AUTOCOMMIT")


def _build_sessions(engine: Engine) -> sessionmaker[Session]:
    # Rows stay readable after the commit, when their session is closed. Nothing is written behind
    # our back: statements are sent where they are written.
    return sessionmaker(engine, expire_on_commit=False, autoflush=False)


@contextmanager
def _translated(*, is_commit: bool = False) -> Iterator[None]:
    try:
        yield
    except SQLAlchemyError as error:
        raise _translate(error, is_commit=is_commit) from error
    except psycopg.Error as error:  # COPY goes past SQLAlchemy
        if isinstance(error, psycopg.IntegrityError):
            raise DatabaseRefusedError(_CONSTRAINT_TEXT) from error
        raise DatabaseUnavailableError from error


def _translate(error: SQLAlchemyError, *, is_commit: bool) -> StorageError:
    if isinstance(error, PoolTimeoutError):
        return DatabaseBusyError()
    if not isinstance(error, DBAPIError):
        return DatabaseRefusedError()
    if error.connection_invalidated:
        return CommitUnknownError() if is_commit else DatabaseUnavailableError()
    if _is_busy(error):
        return DatabaseBusyError()
    if _is_unavailable(error):
        return DatabaseUnavailableError()
    _log_refusal(error)
    if isinstance(error, IntegrityError):
        return DatabaseRefusedError(_CONSTRAINT_TEXT)
    return DatabaseRefusedError()


def _is_unavailable(error: DBAPIError) -> bool:
    """SQLite says "operational" of a missing table too: that is a refusal, and no waiting mends it."""
    return isinstance(error, OperationalError) and (
        getattr(error.orig, "sqlite_errorname", "") != "SQLITE_ERROR"
    )


def _log_refusal(error: DBAPIError) -> None:
    """Whoever mends it needs the statement, which no error's text holds. Never its parameters."""
    name = getattr(error.orig, "sqlstate", None) or getattr(error.orig, "sqlite_errorname", None)
    diag = getattr(error.orig, "diag", None)
    logger.error(
        "statement_refused",
        reason=name,
        constraint=getattr(diag, "constraint_name", None),
        statement=" ".join((error.statement or "").split())[:MAX_LOGGED_CHARS],
    )


def _is_busy(error: DBAPIError) -> bool:
    if getattr(error.orig, "sqlstate", None) in _BUSY_SQLSTATES:
        return True
    return getattr(error.orig, "sqlite_errorname", "").startswith(("SQLITE_BUSY", "SQLITE_LOCKED"))
