"""
How PostgreSQL is asked: no statement of a running job reads more rows than its work has.

What a lease or an export costs must not grow with the job. SQLite has no statistics that could be
old and no plans that are kept, so it is left out.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from sqlalchemy import Connection, event

from storage import items
from storage.db import Database
from tests.storage.rows import completions, lease, make_job

pytestmark = pytest.mark.services

NUM_ITEMS = 6000
Statement = tuple[str, Any]


@pytest.fixture
def postgresql(database: Database) -> Database:
    if database.engine.dialect.name == "sqlite":
        pytest.skip("PostgreSQL's plans")
    return database


@contextmanager
def recorded(database: Database) -> Iterator[list[Statement]]:
    """What is sent meanwhile: statements about items, in the driver's form, with parameters."""
    found: list[Statement] = []

    def record(_c: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        if " items" in statement:
            found.append((statement, parameters))

    event.listen(database.engine, "before_cursor_execute", record)
    try:
        yield found
    finally:
        event.remove(database.engine, "before_cursor_execute", record)


def count_rows_read(database: Database, sent: list[Statement]) -> int:
    """The most rows that any step of these statements' plans looked at; nothing is changed."""
    with database.engine.connect() as connection:
        most = max(_count(connection, *one) for one in sent)
        connection.rollback()
    return most


def _count(connection: Connection, statement: str, parameters: Any) -> int:
    explain = f"EXPLAIN (ANALYZE, FORMAT JSON) {statement}"
    found = connection.exec_driver_sql(explain, parameters).scalar_one()
    return max(_walk(found[0]["Plan"]))


def _walk(node: dict[str, Any]) -> Iterator[int]:
    removed = node.get("Rows Removed by Filter", 0) + node.get("Rows Removed by Join Filter", 0)
    yield int((node["Actual Rows"] + removed) * node["Actual Loops"])
    for child in node.get("Plans", ()):
        yield from _walk(child)


def run_half(database: Database, num_items: int) -> None:
    for _ in range(num_items // 1000):
        chunk = lease(database, 500)
        with database.write() as session:
            items.complete(session, completions(chunk.items))


def test_states_stand_in_the_statement_where_a_partial_index_needs_them(
    postgresql: Database,
) -> None:
    make_job(postgresql, 10)
    with recorded(postgresql) as sent:
        chunk = lease(postgresql, 5)
        with postgresql.write() as session:
            items.complete(session, completions(chunk.items))
            items.expire_leases(session)

    statements = "\n".join(statement for statement, _ in sent)
    assert "items.state = 'pending'" in statements
    assert "items.state = 'leased'" in statements
    assert "items.state = %" not in statements


def test_lease_and_commit_read_no_more_rows_than_their_chunk(postgresql: Database) -> None:
    make_job(postgresql, NUM_ITEMS)
    with postgresql.write() as session:
        items.refresh_statistics(session)
    run_half(postgresql, NUM_ITEMS)

    with recorded(postgresql) as sent:
        chunk = lease(postgresql, 64)
    leasing = count_rows_read(postgresql, sent)
    with recorded(postgresql) as sent_by_commit, postgresql.write() as session:
        items.complete(session, completions(chunk.items))
        session.rollback()  # so that EXPLAIN finds the leases as they were
    committing = count_rows_read(postgresql, sent_by_commit)

    assert 64 <= leasing <= 200
    assert 64 <= committing <= 200


def test_page_of_an_artifact_reads_no_more_rows_than_the_page(postgresql: Database) -> None:
    job = make_job(postgresql, NUM_ITEMS)
    with postgresql.write() as session:
        items.refresh_statistics(session)  # when no item has ended
    run_half(postgresql, 2 * NUM_ITEMS)

    with recorded(postgresql) as sent, postgresql.read() as session:
        page = items.list_by_line(session, job, after_line=1000, limit=100)

    assert 100 == len(page)
    assert 100 <= count_rows_read(postgresql, sent) <= 200
