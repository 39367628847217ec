"""What a session costs, and what it does when the server was away."""

import pytest
from sqlalchemy import text

from storage import db
from storage.db import Database

pytestmark = pytest.mark.services

END_OTHERS = text(  # returns when they have ended
    "SELECT pg_terminate_backend(pid, 60000) FROM pg_stat_activity "
    "WHERE datname = current_database() AND pid <> pg_backend_pid()"
)


@pytest.fixture
def postgresql(database: Database) -> Database:
    if database.engine.dialect.name == "sqlite":
        pytest.skip("SQLite has no connection to lose")
    return database


def test_connections_that_died_while_they_were_idle_are_made_anew(
    postgresql: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    with postgresql.read() as first, postgresql.read() as second:  # two, to be found dead
        first.execute(text("SELECT 1"))
        second.execute(text("SELECT 1"))
    other = Database(postgresql.engine.url.render_as_string(hide_password=False))
    with other.read() as session:
        session.execute(END_OTHERS)
    other.close()
    monkeypatch.setattr(db, "PING_AFTER_S", 0.0)

    with postgresql.read() as first, postgresql.write() as second:
        answers = [one.scalar(text("SELECT 1")) for one in (first, second)]

    assert [1, 1] == answers


def test_reader_holds_no_transaction_open(postgresql: Database) -> None:
    with postgresql.read() as reader, postgresql.read() as watcher:
        pid = reader.scalar(text("SELECT pg_backend_pid()"))
        state = watcher.scalar(
            text("SELECT state FROM pg_stat_activity WHERE pid = :pid"), {"pid": pid}
        )

    assert "idle" == state
