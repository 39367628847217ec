"""
How PostgreSQL is asked: no statement of a running job reads more rows than its work has.

What a lease or an export costs must not grow with the job. SQLite has no statistics that could be
old and no plans that are kept, so it is left out but for its choice among indexes.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, event, text

from storage import chats, files, items, jobs
from storage.db import Database, Session
from storage.ids import TenantId
from storage.states import ItemState
from storage.tables import Job
from tests.storage.rows import (
    completions,
    lease,
    let_leases_end,
    let_window_end,
    make_job,
    make_tenant,
    new_job,
)

pytestmark = pytest.mark.services

NUM_ITEMS = 6000
Statement = tuple[str, Any]


@pytest.fixture
def postgresql(database: Database) -> Database:
    if database.engine.dialect.name == "sqlite":
        pytest.skip("PostgreSQL's plans")
    return database


@contextmanager
def recorded(database: Database, *, about: str = " items") -> Iterator[list[Statement]]:
    """What is sent meanwhile: statements about items, in the driver's form, with parameters."""
    found: list[Statement] = []

    def record(_c: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        if about in statement:
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


def test_heart_and_sweep_read_no_more_rows_than_they_move(postgresql: Database) -> None:
    job = make_job(postgresql, NUM_ITEMS)
    with postgresql.write() as session:
        items.refresh_statistics(session)
    run_half(postgresql, NUM_ITEMS)
    chunk = lease(postgresql, 50)
    leases = {item.fence.lease for item in chunk.items}
    read: dict[str, int] = {}

    def measure(name: str, act: Any) -> None:
        with recorded(postgresql) as sent, postgresql.write() as session:
            assert act(session)
            session.rollback()  # so that EXPLAIN finds the rows as they were
        read[name] = count_rows_read(postgresql, sent)

    measure("renew", lambda session: items.renew(session, leases))
    fences = [item.fence for item in chunk.items]
    measure("release", lambda session: items.release(session, fences).items)
    measure("release all", lambda session: items.release_all(session, worker="worker-1").items)
    measure("count", lambda session: items.count_waiting(session, limit=100))
    let_leases_end(postgresql)
    measure("expire", lambda session: items.expire_leases(session, limit=100).items)
    let_window_end(postgresql, job)
    measure("end", lambda session: items.end_page(session, job, ItemState.EXPIRED, limit=60).items)

    assert {} == {name: count for name, count in read.items() if not 50 <= count <= 250}


def test_what_a_tenant_has_open_is_read_without_the_jobs_that_have_ended(
    postgresql: Database,
) -> None:
    tenant = make_tenant(postgresql)
    make_job(postgresql, 3, tenant=tenant)
    add_ended_jobs(postgresql, tenant, 3000)
    with recorded(postgresql, about="jobs") as sent, postgresql.read() as session:
        open_work = jobs.measure_open_work(session, tenant)
        jobs.count_open(session)
        unneeded = files.find_unneeded(session, ["a", "b"], grace_s=60.0)

    assert (3, ["a", "b"]) == (open_work.num_items, unneeded)
    assert count_rows_read(postgresql, sent) <= 10


def add_ended_jobs(database: Database, tenant: TenantId, count: int) -> None:
    """Of long ago, all from one file."""
    with database.write() as session:
        job = jobs.create(session, new_job(database, tenant))[0]
        others = [
            column.name for column in Job.__table__.columns if column.name not in ("id", "state")
        ]
        names = ", ".join(others)
        session.execute(
            text(
                f"INSERT INTO jobs (id, state, {names}) "  # noqa: S608 - names of columns
                f"SELECT CAST('0000' || substr(md5(n::text), 5) AS uuid), 'completed', {names} "
                "FROM jobs, generate_series(1, :count) AS n WHERE id = :job"
            ),
            {"count": count, "job": job.id},
        )
        session.execute(
            text("UPDATE jobs SET state = 'completed' WHERE id = :job"), {"job": job.id}
        )
        session.execute(text("ANALYZE jobs"))


def make_chats(database: Database, tenant: TenantId, count: int) -> None:
    for _ in range(count):
        chat = {"priority": jobs.FAST_LANE, "purpose": files.REQUEST_PURPOSE}
        make_job(database, 0, tenant=tenant, is_started=False, **chat)
    with database.engine.begin() as connection:
        connection.exec_driver_sql("ANALYZE jobs, files")


def test_lists_and_repeated_submissions_pass_chats_by(postgresql: Database) -> None:
    tenant = make_tenant(postgresql)
    listed = [make_job(postgresql, 0, tenant=tenant) for _ in range(3)]
    make_chats(postgresql, tenant, 300)

    with recorded(postgresql, about="jobs") as sent, postgresql.read() as session:
        page, _ = jobs.list_page(session, tenant, after=None, limit=10)
        twin = jobs.find_twin(
            session, tenant, api_key_id=None, body_sha256=page[0].body_sha256, within_s=600.0
        )
    with recorded(postgresql, about="files") as sent_for_files, postgresql.read() as session:
        files_page, _ = files.list_page(session, tenant, limit=10)

    assert listed[::-1] == [job.id for job in page]
    assert twin is not None
    assert 3 == len(files_page)
    assert 3 <= count_rows_read(postgresql, sent) <= 10
    assert 3 <= count_rows_read(postgresql, sent_for_files) <= 10


def test_ended_chats_go_without_a_look_at_other_jobs(postgresql: Database) -> None:
    tenant = make_tenant(postgresql)
    make_chats(postgresql, tenant, 2 * chats.PAGE)
    add_ended_jobs(postgresql, tenant, 3000)
    with postgresql.write() as session:
        session.execute(
            text(
                "UPDATE jobs SET state = 'completed', completed_at = created_at WHERE priority < 0"
            )
        )
        session.execute(text("ANALYZE"))

    with recorded(postgresql, about="jobs") as sent, postgresql.write() as session:
        walked_before = count_rows_walked(session, "jobs")
        num_removed = chats.remove_page(session, older_than_s=-60.0)
        walked_after = count_rows_walked(session, "jobs")
        session.rollback()  # so that EXPLAIN finds the rows as they were

    assert chats.PAGE == num_removed
    assert count_rows_read(postgresql, sent[:1]) < 1000
    # A table this small may be walked once to find a hundred rows, but not once for each of them.
    assert walked_after - walked_before < 4000


def count_rows_walked(session: Session, table: str) -> int:
    """Those read without an index so far, also by the database when it checks who points to a row."""
    query = text("SELECT pg_stat_get_xact_tuples_returned(CAST(:table AS regclass))")
    return int(session.scalar(query, {"table": table}) or 0)


def test_sqlite_walks_no_table_for_a_chat_that_goes(sqlite_template: bytes, tmp_path: Path) -> None:
    (tmp_path / "db").write_bytes(sqlite_template)
    database = Database(f"sqlite:///{tmp_path / 'db'}")
    chat: dict[str, Any] = {"priority": jobs.FAST_LANE, "purpose": files.REQUEST_PURPOSE}
    make_job(database, 1, **chat)
    with database.write() as session:
        session.execute(text("UPDATE jobs SET state = 'failed', failed_at = created_at"))

    with recorded(database, about="WHERE") as sent, database.write() as session:
        num_removed = chats.remove_page(session, older_than_s=-60.0)
    with database.engine.connect() as connection:
        plans = [
            row[3]
            for statement, parameters in sent
            for row in connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters)
        ]
        connection.rollback()
    database.close()

    assert (1, 9) == (num_removed, len(sent))
    assert [] == [step for step in plans if step.startswith("SCAN")]
    # Also what it asks itself: whether a job points to what goes.
    for name in ("retry_of", "input_file_id", "output_file_id", "error_file_id"):
        assert any(f"ix_jobs_{name} " in step for step in plans), name


def test_sqlite_takes_the_indexes_without_chats(sqlite_template: bytes, tmp_path: Path) -> None:
    (tmp_path / "db").write_bytes(sqlite_template)
    database = Database(f"sqlite:///{tmp_path / 'db'}")
    tenant = make_tenant(database)
    plans = {}

    def explain(name: str, ask: Callable[[Session], object], about: str) -> None:
        with recorded(database, about=about) as sent, database.read() as session:
            ask(session)
        with database.engine.connect() as connection:
            rows = connection.exec_driver_sql("EXPLAIN QUERY PLAN " + sent[0][0], sent[0][1])
            plans[name] = rows.all()[0][3].partition(" INDEX ")[2].partition(" ")[0]
            connection.rollback()

    explain("page", lambda session: jobs.list_page(session, tenant), "jobs")
    explain("files", lambda session: files.list_page(session, tenant), "files")
    explain("chats", lambda session: chats.remove_page(session, older_than_s=0.0), "jobs")
    explain(
        "twin",
        lambda session: jobs.find_twin(
            session, tenant, api_key_id=None, body_sha256=bytes(32), within_s=600.0
        ),
        "jobs",
    )
    database.close()

    assert {
        "page": "ix_jobs_listed",
        "files": "ix_files_listed",
        "twin": "ix_jobs_twins",
        "chats": "ix_jobs_chats",
    } == plans
