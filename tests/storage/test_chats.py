"""Chats that ended long ago go with all that hangs on them, and nothing else goes."""

from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import func, select, text

from storage import chats, events, files, items, jobs, parts
from storage.db import Database
from storage.errors import NotFoundError
from storage.ids import JobId
from storage.items import Failure
from storage.parts import Answer, NewPart
from storage.states import ItemState, JobState
from storage.tables import Base, Job
from tests.storage.rows import completion, lease, let_window_end, make_job, make_tenant

KEPT = {"tenants", "items_log", "jobs_log", "parts_log"}


def make_chat(database: Database, *, is_started: bool = True) -> JobId:
    chat: dict[str, Any] = {"priority": jobs.FAST_LANE, "purpose": files.REQUEST_PURPOSE}
    return make_job(database, 1, is_started=is_started, **chat)


def finish(database: Database, job: JobId) -> JobState | None:
    with database.write() as session:
        found = jobs.start_finishing(session, job)
        assert found is not None
        number = found.finish_attempt
        state = jobs.finish(session, job, finish_attempt=number, output_file=None, error_file=None)
        events.record(session, found.tenant_id, job, f"batch.{state}")
    return state


def complete(database: Database, job: JobId) -> None:
    (leased,) = lease(database, 1).items
    assert job == leased.job
    with database.write() as session:
        parts.keep(session, [NewPart(leased.fence, b"plan", Answer(n, text="a")) for n in (1, 2)])
        items.complete(session, [completion(leased.fence)])


def fail(database: Database, job: JobId) -> None:
    (leased,) = lease(database, 1).items
    with database.write() as session:
        items.fail(session, [Failure(leased.fence, "bad_image", "No.", is_transient=False)])


def cancel(database: Database, job: JobId) -> None:
    with database.write() as session:
        jobs.cancel(session, make_tenant(database), job)
        items.end_page(session, job, ItemState.CANCELLED)


def expire(database: Database, job: JobId) -> None:
    let_window_end(database, job)
    with database.write() as session:
        items.end_page(session, job, ItemState.EXPIRED)


def remove(database: Database, older_than_s: float = -60.0, limit: int = chats.PAGE) -> int:
    """By default all that have ended: as if it were a minute later than it is."""
    with database.write() as session:
        return chats.remove_page(session, older_than_s=older_than_s, limit=limit)


def count_rows(database: Database) -> dict[str, int]:
    with database.read() as session:
        counts = {
            table.name: session.scalar(select(func.count()).select_from(table)) or 0
            for table in Base.metadata.sorted_tables
        }
    return {name: count for name, count in counts.items() if count and name not in KEPT}


@pytest.mark.parametrize("end", [complete, fail, cancel, expire])
def test_chat_leaves_no_row_however_it_ended(
    database: Database, end: Callable[[Database, JobId], None]
) -> None:
    chat = make_chat(database)
    end(database, chat)
    before_its_end = remove(database)
    assert finish(database, chat)

    assert (0, 1, 0) == (before_its_end, remove(database), remove(database))
    assert {} == count_rows(database)
    with database.read() as session, pytest.raises(NotFoundError):
        jobs.get(session, make_tenant(database), chat)


def test_chat_that_was_refused_leaves_no_row(database: Database) -> None:
    chat = make_chat(database, is_started=False)
    with database.write() as session:
        assert jobs.reject(session, chat, [{"code": "bad", "line": 1}])

    assert 1 == remove(database)
    assert {} == count_rows(database)


def test_batches_and_chats_that_are_young_or_not_over_stay(database: Database) -> None:
    batch = make_job(database, 1)
    complete(database, batch)
    finish(database, batch)
    young = make_chat(database)
    complete(database, young)
    finish(database, young)
    before = count_rows(database)
    young_removed = remove(database, older_than_s=3600.0)
    waiting = make_chat(database)
    validating = make_chat(database, is_started=False)

    assert 0 == young_removed
    assert {"jobs": 2, "files": 2, "items": 2, "results": 2, "parts": 4, "events": 2} == before
    assert 1 == remove(database)
    with database.read() as session:
        left = set(session.scalars(select(Job.id)))
    assert {batch, waiting, validating} == left
    assert {"jobs": 3, "files": 3, "items": 3, "results": 1, "parts": 2, "events": 1} == (
        count_rows(database)
    )


def test_life_counts_from_the_end_and_not_from_the_beginning(database: Database) -> None:
    chat = make_chat(database)
    complete(database, chat)
    finish(database, chat)
    with database.write() as session:
        session.execute(text("UPDATE jobs SET created_at = created_at - 7200"))
    too_soon = remove(database, older_than_s=3600.0)
    with database.write() as session:
        session.execute(text("UPDATE jobs SET completed_at = completed_at - 7200"))

    assert (0, 1) == (too_soon, remove(database, older_than_s=3600.0))


def test_chat_that_another_job_names_stays_and_holds_up_no_other(database: Database) -> None:
    named, other = (make_chat(database) for _ in range(2))
    for chat in (named, other):
        complete(database, chat)
        finish(database, chat)
    make_job(database, 1, retry_of=named)

    assert (1, 0) == (remove(database), remove(database))
    with database.read() as session:
        assert jobs.find(session, named)
        assert jobs.find(session, other) is None


def test_chats_go_by_the_page_the_oldest_first(database: Database) -> None:
    made = [make_chat(database) for _ in range(5)]
    for chat in made:
        complete(database, chat)
        finish(database, chat)

    assert 2 == remove(database, limit=2)
    with database.read() as session:
        left = list(session.scalars(select(Job.id).order_by(Job.id)))
    assert made[2:] == left
    assert [2, 1, 0] == [remove(database, limit=2) for _ in range(3)]


def test_chats_of_many_parts_go_by_smaller_pages(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "MAX_PARTS_READ", 3)
    made = [make_chat(database) for _ in range(3)]  # of two parts each
    for chat in made:
        complete(database, chat)
        finish(database, chat)

    assert 1 == remove(database)
    with database.read() as session:
        assert made[1:] == list(session.scalars(select(Job.id).order_by(Job.id)))
    assert [1, 1, 0] == [remove(database) for _ in range(3)]
    assert {} == count_rows(database)


def test_chats_come_and_go_and_none_is_taken_for_an_earlier_one(database: Database) -> None:
    """SQLite gives the numbers of items again: L7 must hold of the parts all the same."""
    for _ in range(2):
        chat = make_chat(database)
        complete(database, chat)
        finish(database, chat)
        assert 1 == remove(database)


def test_two_who_remove_do_not_wait_for_each_other(database: Database) -> None:
    if database.engine.dialect.name == "sqlite":
        pytest.skip("every writer is alone there")
    for _ in range(3):
        chat = make_chat(database)
        complete(database, chat)
        finish(database, chat)

    with database.write() as session:
        first = chats.remove_page(session, older_than_s=-60.0, limit=2)
        second = remove(database)

    assert (2, 1) == (first, second)
    assert {} == count_rows(database)
