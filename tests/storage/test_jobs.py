"""Jobs from their submission to their end, and who may see them."""

import hashlib
import threading
import traceback
from typing import Any

import pytest
import structlog.testing
from sqlalchemy import text
from sqlalchemy.orm import Session

from storage import events, files, items, jobs, tenants
from storage.db import HEAD, Database
from storage.errors import (
    BadDatabaseUrlError,
    CommitUnknownError,
    DatabaseRefusedError,
    DatabaseUnavailableError,
    IdempotencyConflictError,
    NotFoundError,
    StateConflictError,
)
from storage.ids import JobId, new_uuid
from storage.states import ITEM_MOVES, JOB_MOVES, TERMINAL_JOB_STATES, ItemState, JobState
from storage.tables import IS_OPEN, Job
from tests.storage.rows import (
    completions,
    lease,
    lease_or_none,
    make_file,
    make_job,
    make_tenant,
    new_items,
    new_job,
)

PEPPER = b"pepper"


def find(database: Database, job: JobId) -> Job:
    with database.read() as session:
        found = jobs.find(session, job)
    assert found is not None
    return found


def end_all(database: Database, job: JobId, count: int) -> None:
    chunk = lease(database, count)
    with database.write() as session:
        assert (job,) == items.complete(session, completions(chunk.items)).ended_jobs


# Submission


def test_same_key_and_body_give_the_same_job(database: Database) -> None:
    new = new_job(database, make_tenant(database), idempotency_key="key")
    with database.write() as session:
        first, is_first_new = jobs.create(session, new)
    with database.write() as session:
        second, is_second_new = jobs.create(session, new)

    assert (True, False) == (is_first_new, is_second_new)
    assert first.id == second.id


def test_same_key_with_another_body_is_a_conflict(database: Database) -> None:
    tenant = make_tenant(database)
    first = new_job(database, tenant, "one", idempotency_key="key")
    with database.write() as session:
        jobs.create(session, first)

    other = new_job(database, tenant, "two", idempotency_key="key")
    with pytest.raises(IdempotencyConflictError), database.write() as session:
        jobs.create(session, other)


def test_keys_of_two_tenants_do_not_meet(database: Database) -> None:
    submissions = [
        new_job(database, make_tenant(database, name), name, idempotency_key="key")
        for name in ("a", "b")
    ]
    with database.write() as session:
        made = [jobs.create(session, new) for new in submissions]

    assert [True, True] == [is_new for _, is_new in made]


def test_without_a_key_every_submission_is_a_job(database: Database) -> None:
    new = new_job(database, make_tenant(database))
    with database.write() as session:
        made = {jobs.create(session, new)[0].id for _ in range(3)}

    assert 3 == len(made)


def test_many_submissions_at_once_with_one_key_make_one_job(database: Database) -> None:
    new = new_job(database, make_tenant(database), idempotency_key="key")
    made: list[tuple[JobId, bool]] = []
    errors: list[Exception] = []

    def submit() -> None:
        try:
            for _ in range(5):
                with database.write() as session:
                    job, is_new = jobs.create(session, new)
                made.append((job.id, is_new))
        except Exception as error:  # noqa: BLE001 - shown by the main thread
            errors.append(error)

    threads = [threading.Thread(target=submit) for _ in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert [] == errors
    assert (50, 1) == (len(made), len({job for job, _ in made}))
    assert 1 == sum(is_new for _, is_new in made)


def test_fresh_job_counts_nothing_and_knows_its_window(database: Database) -> None:
    job = find(database, make_job(database, 0, is_started=False, window_s=3600))

    assert JobState.VALIDATING == job.state
    assert (0, 0, 0) == (job.num_total, job.num_completed, job.num_failed)
    assert pytest.approx(3600.0, abs=1.0) == job.expires_at - job.created_at


# Tenants


def test_nothing_of_another_tenant_is_found(database: Database) -> None:
    mine, other = make_tenant(database, "mine"), make_tenant(database, "other")
    job, file = make_job(database, 1, tenant=mine), make_file(database, mine)
    attempts: list[Any] = [
        lambda session: jobs.get(session, other, job),
        lambda session: jobs.cancel(session, other, job),
        lambda session: jobs.list_page(session, other, after=job),
        lambda session: files.get(session, other, file),
        lambda session: files.delete(session, other, file),
        lambda session: files.list_page(session, other, after=file),
    ]

    for attempt in attempts:
        with pytest.raises(NotFoundError), database.write() as session:
            attempt(session)
    with database.read() as session:
        pages = [jobs.list_page(session, other), files.list_page(session, other)]

    assert [([], False), ([], False)] == pages
    assert JobState.IN_PROGRESS == find(database, job).state


def test_api_key_finds_its_tenant_until_it_is_revoked(database: Database) -> None:
    tenant, other = make_tenant(database, "one"), make_tenant(database, "two")
    with database.write() as session:
        row, key = tenants.create_key(session, tenant, name="laptop", pepper=PEPPER)
    with database.read() as session:
        found = tenants.find_by_key(session, key, pepper=PEPPER)
        wrong = [
            tenants.find_by_key(session, typed, pepper=pepper)
            for typed, pepper in [
                (key[:-1] + ("0" if key[-1] != "0" else "1"), PEPPER),
                (key, b"another pepper"),
                ("dk_" + "0" * 16 + "_" + "0" * 64, PEPPER),
                ("", PEPPER),
                (key + "\n", PEPPER),
            ]
        ]
    with pytest.raises(NotFoundError), database.write() as session:
        tenants.revoke_key(session, other, row.id)
    with database.write() as session:
        tenants.revoke_key(session, tenant, row.id)
        revoked = tenants.find_by_key(session, key, pepper=PEPPER)

    assert found is not None
    assert tenant == found.id
    assert [None] * 5 == wrong
    assert revoked is None
    assert key.rsplit("_", 1)[1].encode() not in row.secret_hash


def test_expired_key_finds_nobody(database: Database) -> None:
    with database.write() as session:
        tenant = tenants.get_or_create(session, "tenant")
        _, key = tenants.create_key(session, tenant.id, name="k", pepper=PEPPER, lifetime_s=-1.0)
        found = tenants.find_by_key(session, key, pepper=PEPPER)

    assert found is None


def test_tenant_of_a_name_is_made_once(database: Database) -> None:
    assert make_tenant(database, "same") == make_tenant(database, "same")


def test_open_work_of_a_tenant_is_measured_from_its_jobs(database: Database) -> None:
    tenant = make_tenant(database)
    make_job(database, 4, tenant=tenant)
    make_job(database, 3, tenant=tenant)
    chunk = lease(database, 2)
    with database.write() as session:
        items.complete(session, completions(chunk.items))
        open_work = jobs.measure_open_work(session, tenant)

    assert jobs.OpenWork(num_items=5, num_bytes=2) == open_work


def test_job_that_validates_counts_with_all_the_lines_of_its_file(database: Database) -> None:
    tenant = make_tenant(database)
    make_job(database, 1, tenant=tenant, is_started=False, num_lines=9)
    with database.read() as session:
        open_work = jobs.measure_open_work(session, tenant)

    assert jobs.OpenWork(num_items=9, num_bytes=1) == open_work


# The same body again, without a key


def test_twin_is_the_newest_job_of_the_same_body_and_api_key(database: Database) -> None:
    tenant = make_tenant(database)
    with database.write() as session:
        key, _ = tenants.create_key(session, tenant, name="a", pepper=PEPPER)
    values: dict[str, Any] = {"tenant": tenant, "is_started": False}
    make_job(database, 0, **values, api_key_id=key.id)
    newest = make_job(database, 0, **values, api_key_id=key.id)
    make_job(database, 0, **values)
    make_job(database, 0, **values, api_key_id=key.id, idempotency_key="k")
    body = hashlib.sha256(b"body").digest()

    def find(api_key_id: str | None = key.id, body: bytes = body, within_s: float = 60.0) -> Any:
        with database.write() as session:
            jobs.lock_body(session, tenant, body)
            twin = jobs.find_twin(
                session, tenant, api_key_id=api_key_id, body_sha256=body, within_s=within_s
            )
        return None if twin is None else twin.id

    assert newest == find()
    assert find(api_key_id=None) not in (None, newest)
    assert find(body=bytes(32)) is None
    assert find(within_s=-60.0) is None


# Pages


def test_jobs_and_files_of_the_fast_lane_are_not_listed(database: Database) -> None:
    tenant = make_tenant(database)
    make_job(database, 0, tenant=tenant, priority=jobs.FAST_LANE, purpose=files.REQUEST_PURPOSE)
    listed = make_job(database, 0, tenant=tenant)
    with database.read() as session:
        page, _ = jobs.list_page(session, tenant)
        files_page, _ = files.list_page(session, tenant)

    assert [listed] == [job.id for job in page]
    assert ["batch"] == [file.purpose for file in files_page]


def test_versions_of_watched_jobs_are_read_together(database: Database) -> None:
    started, fresh = make_job(database, 2), make_job(database, 0, is_started=False)
    with database.read() as session:
        versions = jobs.read_versions(session, [started, fresh, JobId(new_uuid())])

    assert {started: 3, fresh: 1} == versions


def test_pages_cover_each_job_once_while_others_are_made(database: Database) -> None:
    tenant = make_tenant(database)
    made = [make_job(database, 0, tenant=tenant, is_started=False) for _ in range(7)]
    seen: list[JobId] = []
    after, has_more = None, True
    while has_more:
        with database.read() as session:
            page, has_more = jobs.list_page(session, tenant, after=after, limit=3)
        seen += [job.id for job in page]
        after = seen[-1]
        make_job(database, 0, tenant=tenant, is_started=False)

    assert made[::-1] == seen


def test_page_holds_the_first_errors_of_a_job_and_the_job_has_all(database: Database) -> None:
    tenant = make_tenant(database)
    errors = [{"code": "blank_line", "message": "é", "param": None, "line": n} for n in range(100)]
    made = make_job(database, 0, tenant=tenant, is_started=False)
    sound = make_job(database, 0, tenant=tenant)
    with database.write() as session:
        jobs.reject(session, made, errors)
    with database.read() as session:
        page, _ = jobs.list_page(session, tenant)
    with database.read() as session:
        whole = jobs.get(session, tenant, made)

    assert [(sound, None), (made, errors[:HEAD])] == [(job.id, job.errors) for job in page]
    assert errors == whole.errors


def test_pages_of_files_run_both_ways_and_leave_out_the_deleted(database: Database) -> None:
    tenant = make_tenant(database)
    made = [make_file(database, tenant) for _ in range(5)]
    with database.write() as session:
        files.delete(session, tenant, made[2])
    kept = made[:2] + made[3:]

    with database.read() as session:
        newest, _ = files.list_page(session, tenant)
        oldest, has_more = files.list_page(session, tenant, is_newest_first=False, limit=2)
        rest, is_end = files.list_page(
            session, tenant, is_newest_first=False, after=oldest[-1].id, limit=2
        )
        others, _ = files.list_page(session, tenant, purpose="vision")

    assert kept[::-1] == [file.id for file in newest]
    assert kept == [file.id for file in (*oldest, *rest)]
    assert (True, False) == (has_more, is_end)
    assert [] == others


# The way to the end


def test_job_ends_completed_with_its_artifacts(database: Database) -> None:
    tenant = make_tenant(database)
    job, output = make_job(database, 2, tenant=tenant), make_file(database, tenant)
    end_all(database, job, 2)

    with database.write() as session:
        finishing = jobs.start_finishing(session, job)
        assert finishing is not None
        state = jobs.finish(
            session,
            job,
            finish_attempt=finishing.finish_attempt,
            output_file=output,
            error_file=None,
        )
    found = find(database, job)

    assert JobState.COMPLETED == state == found.state
    assert (output, None) == (found.output_file_id, found.error_file_id)
    assert found.in_progress_at is not None
    assert found.finalizing_at is not None
    assert found.completed_at is not None
    assert found.created_at <= found.in_progress_at <= found.finalizing_at <= found.completed_at


def test_only_the_newest_of_two_finishers_is_believed(database: Database) -> None:
    job = make_job(database, 1)
    end_all(database, job, 1)
    with database.write() as session:
        numbers = [
            finishing.finish_attempt
            for _ in range(2)
            if (finishing := jobs.start_finishing(session, job))
        ]
        states = [
            jobs.finish(session, job, finish_attempt=number, output_file=None, error_file=None)
            for number in (1, 2, 2)
        ]
        late = jobs.start_finishing(session, job)

    assert [1, 2] == numbers
    assert [None, JobState.COMPLETED, None] == states
    assert late is None


def test_job_with_open_items_is_not_finished(database: Database) -> None:
    job = make_job(database, 2)
    chunk = lease(database, 1)
    with database.write() as session:
        items.complete(session, completions(chunk.items))
        finishing = jobs.start_finishing(session, job)

    assert finishing is None


def test_rejected_input_leaves_its_errors_and_no_items(database: Database) -> None:
    job = make_job(database, 5, is_started=False)
    errors = [{"code": "invalid_json_line", "line": 7, "message": "…", "param": None}]
    with database.write() as session:
        is_mine = [jobs.reject(session, job, errors) for _ in range(2)]
    found = find(database, job)

    assert [True, False] == is_mine
    assert (JobState.FAILED, errors, 0) == (found.state, found.errors, found.num_total)


def test_cancelling_twice_is_as_good_as_once(database: Database) -> None:
    tenant = make_tenant(database)
    job = make_job(database, 3, tenant=tenant)
    with database.write() as session:
        first = jobs.cancel(session, tenant, job)
        second = jobs.cancel(session, tenant, job)
        items.end_page(session, job, ItemState.CANCELLED)
        jobs.start_finishing(session, job)
        jobs.finish(session, job, finish_attempt=1, output_file=None, error_file=None)
        third = jobs.cancel(session, tenant, job)

    assert first.cancelling_at == second.cancelling_at
    assert JobState.CANCELLED == third.state
    assert lease_or_none(database, 1) is None
    assert 3 == find(database, job).num_cancelled


def test_job_cancelled_while_its_lines_are_read_ends_with_what_was_read(
    database: Database,
) -> None:
    tenant = make_tenant(database)
    job = make_job(database, 3, tenant=tenant, is_started=False)
    with database.write() as session:
        jobs.cancel(session, tenant, job)
        is_started = jobs.start(session, job)
        ended = items.end_page(session, job, ItemState.CANCELLED).ended_jobs

    assert not is_started
    assert (job,) == ended
    assert 3 == find(database, job).num_total


def test_job_that_has_ended_cannot_be_cancelled(database: Database) -> None:
    tenant = make_tenant(database)
    job = make_job(database, 1, tenant=tenant)
    end_all(database, job, 1)
    with database.write() as session:
        jobs.start_finishing(session, job)
        jobs.finish(session, job, finish_attempt=1, output_file=None, error_file=None)

    with pytest.raises(StateConflictError), database.write() as session:
        jobs.cancel(session, tenant, job)


def test_every_change_of_a_job_raises_its_version(database: Database) -> None:
    tenant = make_tenant(database)
    versions = []
    job = make_job(database, 0, tenant=tenant, is_started=False)
    versions.append(find(database, job).version)
    with database.write() as session:
        items.insert_page(session, job, new_items(2), after_line=0, expanded_bytes=1)
    versions.append(find(database, job).version)
    with database.write() as session:
        jobs.start(session, job)
    versions.append(find(database, job).version)
    end_all(database, job, 2)
    versions.append(find(database, job).version)

    assert sorted(set(versions)) == versions


def test_sweeper_finds_what_was_left_lying(database: Database) -> None:
    tenant = make_tenant(database)
    unexpanded = make_job(database, 0, tenant=tenant, is_started=False)
    ended = make_job(database, 1, tenant=tenant)
    end_all(database, ended, 1)
    cancelled = make_job(database, 1, tenant=tenant)
    with database.write() as session:
        jobs.cancel(session, tenant, cancelled)
        found = [
            jobs.list_unexpanded(session, older_than_s=-1.0),
            jobs.list_unexpanded(session, older_than_s=60.0),
            jobs.list_ended(session),
            jobs.list_cancelling(session),
            jobs.list_past_window(session),
        ]

    assert [[unexpanded], [], [ended], [cancelled], []] == found


def test_events_of_a_job_are_read_in_order_from_where_one_was(database: Database) -> None:
    tenant = make_tenant(database)
    job = make_job(database, 1, tenant=tenant)
    stranger = make_tenant(database, "stranger")
    with database.write() as session:
        for kind in ("created", "started", "completed"):
            events.record(session, tenant, job, kind, {"kind": kind})
        first = events.list_page(session, tenant, job, limit=1)
        rest = events.list_page(session, tenant, job, after=first[0].id)
        foreign = events.list_page(session, stranger, job)

    assert ["created", "started", "completed"] == [event.kind for event in (*first, *rest)]
    assert [] == foreign


# Ids, states, connections


def test_ids_sort_by_the_time_they_were_made() -> None:
    made = [new_uuid() for _ in range(100)]

    assert {7} == {one.version for one in made}
    assert [one.int >> 80 for one in made] == sorted(one.int >> 80 for one in made)
    assert 100 == len(set(made))


def test_states_that_have_no_way_out_are_the_terminal_ones() -> None:
    open_states = {state for state in JobState if f"'{state}'" in str(IS_OPEN)}
    assert open_states == set(JobState) - TERMINAL_JOB_STATES
    assert {"completed", "failed", "cancelled", "expired"} == {
        state for state, to in ITEM_MOVES.items() if not to
    }
    assert {"completed", "failed", "cancelled", "expired"} == {
        state for state, to in JOB_MOVES.items() if not to
    }


@pytest.mark.parametrize("url", ["", "nonsense", "sqlite://", "sqlite:///:memory:", "mysql://x/y"])
def test_database_urls_that_are_not_ours_are_refused(url: str) -> None:
    with pytest.raises(BadDatabaseUrlError):
        Database(url)


def test_database_that_does_not_answer_is_said_to_be_unavailable(tmp_path: Any) -> None:
    database = Database(f"postgresql://nobody@/nothing?host={tmp_path}")

    with pytest.raises(DatabaseUnavailableError):
        database.ping()


def test_refused_statement_is_logged_without_what_the_client_wrote(database: Database) -> None:
    row = {"a": "secret".upper()}  # a trace shows lines of the source too
    with (
        structlog.testing.capture_logs() as logs,
        pytest.raises(DatabaseRefusedError) as refused,
        database.write() as session,
    ):
        session.execute(text("INSERT INTO nowhere (a) VALUES (:a)"), row)

    assert ["statement_refused"] == [line["event"] for line in logs]
    assert "INSERT INTO nowhere" in logs[0]["statement"]
    trace = "".join(traceback.format_exception(refused.value))
    assert "nowhere" in trace
    assert "SECRET" not in trace + str(logs)


def end_connection(database: Database, session: Session) -> None:
    """Returns when the server's process of this session has ended."""
    pid = session.scalars(text("SELECT pg_backend_pid()")).one()
    with database.write() as other:
        end = text("SELECT pg_terminate_backend(:pid, 60000)")
        assert other.scalar(end, {"pid": pid})


def test_connection_lost_at_the_commit_leaves_the_outcome_open_and_the_pool_usable(
    database: Database,
) -> None:
    if database.engine.dialect.name == "sqlite":
        pytest.skip("SQLite has no connection to lose")
    with pytest.raises(CommitUnknownError), database.write() as session:  # noqa: PT012 - the block is the subject
        tenants.get_or_create(session, "tenant")
        end_connection(database, session)

    database.ping()


def test_connection_lost_before_the_commit_changes_nothing(database: Database) -> None:
    if database.engine.dialect.name == "sqlite":
        pytest.skip("SQLite has no connection to lose")
    job = make_job(database, 0, is_started=False)

    with pytest.raises(DatabaseUnavailableError), database.write() as session:  # noqa: PT012 - the block is the subject
        end_connection(database, session)
        items.insert_page(session, job, new_items(2), after_line=0, expanded_bytes=200)

    assert 0 == find(database, job).num_expanded


def test_block_that_raises_changes_nothing(database: Database) -> None:
    with pytest.raises(ZeroDivisionError), database.write() as session:  # noqa: PT012 - the block is the subject
        tenants.get_or_create(session, "gone")
        raise ZeroDivisionError
    with database.write() as session:
        first = tenants.get_or_create(session, "gone").created_at
    database.ping()

    assert first > 1.7e9


def test_job_is_found_by_its_idempotency_key_and_by_its_own_tenant_only(
    database: Database,
) -> None:
    tenant, other = make_tenant(database), make_tenant(database, "other")
    new = new_job(database, tenant, idempotency_key="key")
    with database.write() as session:
        job, _ = jobs.create(session, new)

    with database.read() as session:
        found = jobs.find_by_key(session, tenant, "key")
        foreign = jobs.find_by_key(session, other, "key")

    assert found is not None
    assert job.id == found.id
    assert foreign is None
