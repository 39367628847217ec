"""Leases, fences, ends: what a worker may do to an item, and what it may not."""

import threading
from collections import Counter
from typing import Any

import pytest
from sqlalchemy import text

from storage import invariants, items, jobs
from storage.db import Database
from storage.errors import DatabaseRefusedError, StaleExpansionError
from storage.ids import ItemId, JobId, LeaseId, new_uuid
from storage.items import Failure, Fence, NewItem
from storage.states import ItemState, JobState
from storage.tables import Job
from tests.storage.rows import (
    MODEL,
    completion,
    completions,
    lease,
    lease_or_none,
    let_backoff_end,
    let_leases_end,
    let_window_end,
    make_job,
    make_tenant,
    new_items,
)


def count_items(database: Database, job: JobId) -> dict[ItemState, int]:
    with database.read() as session:
        return jobs.count_items(session, job)


def find_job(database: Database, job: JobId) -> Job:
    with database.read() as session:
        found = jobs.find(session, job)
    assert found is not None
    return found


# Lines become items


def test_page_put_in_twice_is_refused_and_changes_nothing(database: Database) -> None:
    job = make_job(database, 5, is_started=False)

    with pytest.raises(StaleExpansionError), database.write() as session:
        items.insert_page(session, job, new_items(5), after_line=0, expanded_bytes=500)

    assert {ItemState.PENDING: 5} == count_items(database, job)


def test_expansion_goes_on_where_it_stopped(database: Database) -> None:
    job = make_job(database, 5, is_started=False)
    with database.write() as session:
        items.insert_page(
            session, job, new_items(3, after_line=5), after_line=5, expanded_bytes=800
        )
        jobs.start(session, job)

    found = find_job(database, job)

    assert (8, 8, 800) == (found.num_total, found.num_expanded, found.expanded_bytes)


def test_refused_lines_are_failed_items_from_the_start(database: Database) -> None:
    job = make_job(database, 2, is_started=False)
    refused = NewItem(3, None, 200, 100, error=("invalid_json_line", "Line 3 is no JSON."))
    with database.write() as session:
        items.insert_page(session, job, [refused], after_line=2, expanded_bytes=300)
        jobs.start(session, job)
        page = items.list_by_commit(session, job)

    found = find_job(database, job)

    assert (3, 1) == (found.num_total, found.num_failed)
    assert [(1, 3, "invalid_json_line")] == [(one.seq, one.line, one.error_code) for one in page]


def test_custom_id_stands_once_in_a_job(database: Database) -> None:
    job = make_job(database, 1, is_started=False)
    twin = NewItem(2, "item-1", 100, 100)

    with pytest.raises(DatabaseRefusedError), database.write() as session:
        items.insert_page(session, job, [twin], after_line=1, expanded_bytes=200)

    assert {ItemState.PENDING: 1} == count_items(database, job)


# Leases


def test_items_are_leased_in_input_order_with_what_a_worker_needs(database: Database) -> None:
    make_job(database, 10)

    chunk = lease(database, 4)

    assert [1, 2, 3, 4] == [item.line for item in chunk.items]
    assert [0, 100, 200, 300] == [item.body_offset for item in chunk.items]
    assert {1} == {item.fence.attempt for item in chunk.items}


def test_nothing_is_leased_of_another_model_or_before_validation_ends(database: Database) -> None:
    make_job(database, 3, model="another")
    make_job(database, 3, is_started=False)

    chunk = lease_or_none(database, 10)

    assert chunk is None


def test_lower_priority_number_runs_first_and_age_decides_between_equals(
    database: Database,
) -> None:
    late = make_job(database, 1, priority=5)
    first = make_job(database, 1)
    second = make_job(database, 1)
    urgent = make_job(database, 1, priority=-3)

    order = [lease(database, 1).items[0].job for _ in range(4)]

    assert [urgent, first, second, late] == order


def test_fast_lane_can_be_leased_by_itself_and_goes_first_everywhere(database: Database) -> None:
    make_job(database, 3, priority=-10)
    chats = [make_job(database, 1, priority=jobs.FAST_LANE) for _ in range(2)]

    with database.write() as session:
        fast, none = (
            items.lease(session, model=MODEL, worker="w", max_items=64, max_priority=jobs.FAST_LANE)
            for _ in range(2)
        )
    late = make_job(database, 1, priority=jobs.FAST_LANE)
    mixed = lease(database, 2)

    assert fast is not None
    assert none is None
    assert {(job, jobs.FAST_LANE) for job in chats} == {(i.job, i.priority) for i in fast.items}
    assert [late] == [item.job for item in mixed.items if item.priority == jobs.FAST_LANE]
    assert 2 == len(mixed.items)


def test_tenant_with_least_in_flight_comes_first(database: Database) -> None:
    large = make_job(database, 1000, tenant=make_tenant(database, "large"))
    small = make_job(database, 100, tenant=make_tenant(database, "small"))

    order = [lease(database, 50).items[0].job for _ in range(5)]

    assert [large, small, large, small, large] == order


def test_small_jobs_fill_a_chunk_together(database: Database) -> None:
    first, second = make_job(database, 2), make_job(database, 5)

    chunk = lease(database, 4)

    assert [first, first, second, second] == [item.job for item in chunk.items]


def test_items_waiting_for_their_next_try_are_left_alone(database: Database) -> None:
    make_job(database, 1)
    chunk = lease(database, 1)
    with database.write() as session:
        failure = Failure(
            chunk.items[0].fence, "timeout", "Timed out.", is_transient=True, retry_after_s=30
        )
        items.fail(session, [failure])

    early = lease_or_none(database, 1)
    let_backoff_end(database)
    late = lease_or_none(database, 1)

    assert early is None
    assert late is not None
    assert (2, 1) == (late.items[0].fence.attempt, late.items[0].charged)


def test_item_that_waits_is_passed_over_and_its_neighbours_are_not(database: Database) -> None:
    make_job(database, 3)
    chunk = lease(database, 1)
    with database.write() as session:
        failure = Failure(
            chunk.items[0].fence, "timeout", "Timed out.", is_transient=True, retry_after_s=30
        )
        items.fail(session, [failure])

    rest = lease(database, 10)

    assert [2, 3] == [item.line for item in rest.items]


def test_threads_never_lease_an_item_twice(database: Database) -> None:
    make_job(database, 400)
    taken: list[ItemId] = []
    errors: list[Exception] = []

    def work() -> None:
        try:
            while True:
                with database.write() as session:
                    chunk = items.lease(session, model=MODEL, worker="w", max_items=7)
                if chunk is None:
                    return
                taken.extend(item.fence.item for item in chunk.items)
        except Exception as error:  # noqa: BLE001 - shown by the main thread
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert [] == errors
    assert 400 == len(taken)
    assert {1} == set(Counter(taken).values())


def test_lease_skips_rows_that_another_session_holds(database: Database) -> None:
    if database.engine.dialect.name == "sqlite":
        pytest.skip("SQLite locks no rows: writers wait for each other")
    make_job(database, 20)
    with database.write() as other:
        other.execute(text("SELECT id FROM items WHERE line <= 10 FOR UPDATE"))

        chunk = lease(database, 20)

    assert list(range(11, 21)) == [item.line for item in chunk.items]


def test_heartbeat_keeps_a_lease_and_tells_which_are_lost(database: Database) -> None:
    make_job(database, 4)
    mine, other = lease(database, 2), lease(database, 2)
    with database.write() as session:
        items.release(session, [other.items[0].fence])
        kept = items.renew(session, [mine.lease, other.lease])

    assert {*(item.fence.item for item in mine.items), other.items[1].fence.item} == kept


def test_renewal_locks_rows_in_the_order_of_all_others(database: Database) -> None:
    if database.engine.dialect.name == "sqlite":
        pytest.skip("SQLite has one writer")
    make_job(database, 6)
    first, second = lease(database, 3, lease_s=90.0), lease(database, 3, lease_s=60.0)
    ids = [item.fence.item for chunk in (first, second) for item in chunk.items]
    leases = [first.lease, second.lease]  # its index would lead to the second one's rows before
    renewed: list[int] = []

    def renew() -> None:
        with database.write() as session:
            renewed.append(len(items.renew(session, leases)))

    with database.write() as session:
        lock = text("SELECT id FROM items WHERE id = :id FOR UPDATE NOWAIT")
        session.execute(lock, {"id": ids[0]})
        thread = threading.Thread(target=renew)
        thread.start()
        waiting = text("SELECT count(*) FROM pg_locks WHERE NOT granted")
        while not session.scalar(waiting):
            assert thread.is_alive()

        session.execute(lock, {"id": ids[-1]})  # else both would wait for each other
    thread.join()

    assert [6] == renewed


def test_lease_that_is_over_cannot_be_renewed(database: Database) -> None:
    make_job(database, 2)
    chunk = lease(database, 2)
    let_leases_end(database)

    with database.write() as session:
        kept = items.renew(session, [chunk.lease])

    assert set() == kept


# Ends


def test_completion_moves_counters_and_says_which_item_was_the_last(database: Database) -> None:
    job = make_job(database, 3)
    chunk = lease(database, 3)

    with database.write() as session:
        first = items.complete(session, completions(chunk.items[:2]))
    with database.write() as session:
        last = items.complete(session, completions(chunk.items[2:]))
    found = find_job(database, job)

    assert ((), (job,)) == (first.ended_jobs, last.ended_jobs)
    assert (3, 36, 12) == (
        found.num_completed,
        found.num_prompt_tokens,
        found.num_completion_tokens,
    )


def test_one_commit_may_hold_items_of_several_jobs(database: Database) -> None:
    first, second = make_job(database, 2), make_job(database, 3)
    chunk = lease(database, 5)

    with database.write() as session:
        outcome = items.complete(session, completions(chunk.items))

    assert {first, second} == set(outcome.ended_jobs)
    assert (2, 3) == (
        find_job(database, first).num_completed,
        find_job(database, second).num_completed,
    )


@pytest.mark.parametrize("is_taken_again", [False, True])
def test_after_the_lease_is_lost_nothing_is_committed(
    database: Database, is_taken_again: bool
) -> None:
    job = make_job(database, 3)
    zombie = lease(database, 3)
    let_leases_end(database)
    if is_taken_again:
        with database.write() as session:
            items.expire_leases(session)
        let_backoff_end(database)
        lease(database, 3)

    with database.write() as session:
        fences = [item.fence for item in zombie.items]
        failures = [Failure(fence, "x", "x", is_transient=False) for fence in fences]
        written = [
            items.complete(session, completions(zombie.items)),
            items.fail(session, failures),
            items.release(session, fences),
            items.report_crash(session, fences),
        ]

    assert [items.Outcome(frozenset())] * 4 == written
    assert {ItemState.LEASED: 3} == count_items(database, job)
    assert (0, 0) == (find_job(database, job).num_completed, find_job(database, job).num_failed)


def test_fence_asks_for_lease_and_attempt_both(database: Database) -> None:
    job = make_job(database, 1)
    fence = lease(database, 1).items[0].fence
    other_lease = Fence(fence.item, lease_of_nobody(), fence.attempt)
    other_attempt = Fence(fence.item, fence.lease, fence.attempt + 1)

    with database.write() as session:
        outcomes = [
            items.complete(session, [completion(forged)]) for forged in (other_lease, other_attempt)
        ]

    assert [frozenset(), frozenset()] == [outcome.items for outcome in outcomes]
    assert {ItemState.LEASED: 1} == count_items(database, job)


def lease_of_nobody() -> LeaseId:
    return LeaseId(new_uuid())


def test_commit_whose_answer_was_lost_is_read_back_and_counts_once(database: Database) -> None:
    job = make_job(database, 2)
    chunk = lease(database, 2)
    fences = [item.fence for item in chunk.items]
    with database.write() as session:
        items.complete(session, completions(chunk.items[:1]))

    with database.read() as session:
        committed = items.find_committed(session, fences)
    with database.write() as session:
        again = items.complete(session, completions(chunk.items))

    assert {fences[0].item} == committed
    assert {fences[1].item} == again.items
    assert 2 == find_job(database, job).num_completed


def test_permanent_failure_ends_an_item_at_once(database: Database) -> None:
    job = make_job(database, 1)
    fence = lease(database, 1).items[0].fence

    with database.write() as session:
        outcome = items.fail(
            session, [Failure(fence, "image_unreadable", "Broken.", is_transient=False)]
        )
        page = items.list_by_line(session, job)

    assert (job,) == outcome.ended_jobs
    assert [("failed", "image_unreadable")] == [(one.state, one.error_code) for one in page]


def test_transient_failures_end_an_item_after_max_attempts(database: Database) -> None:
    job = make_job(database, 1)
    states: list[ItemState] = []
    for _ in range(3):
        let_backoff_end(database)
        fence = lease(database, 1).items[0].fence
        with database.write() as session:
            items.fail(session, [Failure(fence, "timeout", "Timed out.", is_transient=True)])
        states += count_items(database, job)

    assert [ItemState.PENDING, ItemState.PENDING, ItemState.FAILED] == states


def test_release_charges_nothing_however_often(database: Database) -> None:
    make_job(database, 1)
    for _ in range(10):
        with database.write() as session:
            chunk = items.lease(session, model=MODEL, worker="w", max_items=1)
            assert chunk is not None
            items.release(session, [chunk.items[0].fence])

    last = lease(database, 1).items[0]

    assert (11, 0) == (last.fence.attempt, last.charged)


def test_worker_that_ends_gives_back_all_of_its_own_and_is_charged_nothing(
    database: Database,
) -> None:
    job = make_job(database, 5)
    for worker, num_items in (("w", 1), ("w", 2), ("other", 1)):
        with database.write() as session:
            assert items.lease(session, model=MODEL, worker=worker, max_items=num_items)
    let_leases_end(database)

    with database.write() as session:
        given_back = items.release_all(session, worker="w").items
        again = items.release_all(session, worker="w").items

    assert (3, 0) == (len(given_back), len(again))
    assert {ItemState.PENDING: 4, ItemState.LEASED: 1} == count_items(database, job)
    assert {0} == {item.charged for item in lease(database, 9).items}


def test_item_that_crashes_workers_runs_alone_then_fails(database: Database) -> None:
    job = make_job(database, 3)
    companies = []
    for _ in range(2):
        companies.append(len(lease(database, 10).items))
        let_leases_end(database)
        with database.write() as session:
            items.expire_leases(session)
        let_backoff_end(database)

    alone = lease(database, 10)
    let_leases_end(database)
    with database.write() as session:
        items.expire_leases(session)
        page = items.list_by_line(session, job)

    assert [3, 3] == companies
    assert (1, True) == (len(alone.items), alone.is_alone)
    assert [(1, "worker_crash")] == [(one.line, one.error_code) for one in page]
    assert {ItemState.FAILED: 1, ItemState.PENDING: 2} == count_items(database, job)


def test_reported_suspects_run_alone_and_their_neighbours_do_not(database: Database) -> None:
    make_job(database, 4)
    chunk = lease(database, 4)
    with database.write() as session:
        items.report_crash(session, [chunk.items[0].fence])
        items.release(session, [item.fence for item in chunk.items[1:]])
    let_backoff_end(database)

    neighbours, suspect = lease(database, 10), lease(database, 10)

    assert ([2, 3, 4], False) == ([item.line for item in neighbours.items], neighbours.is_alone)
    assert ([1], True) == ([item.line for item in suspect.items], suspect.is_alone)


def test_sweep_takes_one_page_the_oldest_first(database: Database) -> None:
    job = make_job(database, 5)
    lease(database, 5)
    with database.write() as session:
        session.execute(text("UPDATE items SET lease_until = 100.0 - line"))

    with database.write() as session:
        swept = items.expire_leases(session, limit=2)
        left = session.scalars(
            text("SELECT line FROM items WHERE state = 'leased' ORDER BY line")
        ).all()

    assert 2 == len(swept.items)
    assert [1, 2, 3] == left
    assert {ItemState.LEASED: 3, ItemState.PENDING: 2} == count_items(database, job)


def test_cancelled_job_ends_page_by_page_and_keeps_what_was_done(database: Database) -> None:
    tenant = make_tenant(database)
    job = make_job(database, 6, tenant=tenant)
    chunk = lease(database, 3)
    with database.write() as session:
        items.complete(session, completions(chunk.items[:1]))
        jobs.cancel(session, tenant, job)

    pages = []
    for _ in range(4):
        with database.write() as session:
            pages.append(items.end_page(session, job, ItemState.CANCELLED, limit=3))
    with database.write() as session:
        late = items.complete(session, completions(chunk.items))

    assert [3, 2, 0, 0] == [len(page.items) for page in pages]
    assert [(), (job,), (), ()] == [page.ended_jobs for page in pages]
    assert set() == late.items
    assert {ItemState.COMPLETED: 1, ItemState.CANCELLED: 5} == count_items(database, job)


def test_window_that_is_over_stops_leasing_and_expires_what_is_left(database: Database) -> None:
    job = make_job(database, 4)
    chunk = lease(database, 2)
    with database.write() as session:
        items.complete(session, completions(chunk.items))
    let_window_end(database, job)

    nothing = lease_or_none(database, 2)
    with database.write() as session:
        over = jobs.list_past_window(session)
        items.end_page(session, job, ItemState.EXPIRED)
        finishing = jobs.start_finishing(session, job)
    assert finishing is not None
    with database.write() as session:
        state = jobs.finish(session, job, finish_attempt=1, output_file=None, error_file=None)

    assert nothing is None
    assert [job] == over
    assert JobState.EXPIRED == state


def test_running_job_is_not_ended_by_a_stray_page(database: Database) -> None:
    job = make_job(database, 2)

    with database.write() as session:
        pages = [
            items.end_page(session, job, state)
            for state in (ItemState.CANCELLED, ItemState.EXPIRED)
        ]

    assert [set(), set()] == [set(page.items) for page in pages]


# What has ended


def test_live_results_come_in_the_order_of_commits_and_each_once(database: Database) -> None:
    job = make_job(database, 9)
    chunk = lease(database, 9)
    for index in (8, 0, 4):
        with database.write() as session:
            items.complete(session, completions([chunk.items[index]]))
    with database.write() as session:
        items.fail(session, [Failure(chunk.items[2].fence, "x", "X.", is_transient=False)])
        items.complete(session, completions(chunk.items[5:7]))

    seen, after = [], 0
    with database.read() as session:
        while page := items.list_by_commit(session, job, after_seq=after, limit=2):
            seen += page
            after = page[-1].seq

    assert [9, 1, 5, 3, 6, 7] == [one.line for one in seen]
    assert [1, 2, 3, 4, 5, 6] == [one.seq for one in seen]


def test_live_results_can_be_asked_for_by_state_and_by_name(database: Database) -> None:
    job = make_job(database, 4)
    chunk = lease(database, 4)
    with database.write() as session:
        items.complete(session, completions(chunk.items[:3]))
        items.fail(session, [Failure(chunk.items[3].fence, "x", "X.", is_transient=False)])

    def find_lines(**filters: Any) -> list[int]:
        with database.read() as session:
            return [one.line for one in items.list_by_commit(session, job, **filters)]

    assert [1, 2, 3] == find_lines(state=ItemState.COMPLETED)
    assert [4] == find_lines(state=ItemState.FAILED)
    assert [4] == find_lines(custom_id="item-4")
    assert [2] == find_lines(custom_id="item-2", state=ItemState.COMPLETED)
    assert [] == find_lines(custom_id="item-2", after_seq=2)


def test_artifact_pages_cover_each_item_once_in_input_order(database: Database) -> None:
    job = make_job(database, 25)
    chunk = lease(database, 25)
    with database.write() as session:
        items.complete(session, completions(chunk.items[::-1]))

    lines, texts, after = [], [], 0
    with database.read() as session:
        while page := items.list_by_line(session, job, after_line=after, limit=7):
            lines += [one.line for one in page]
            texts += [one.text for one in page]
            after = page[-1].line

    assert list(range(1, 26)) == lines
    assert [f"text {line}" for line in lines] == texts


def test_waiting_items_are_counted_by_model(database: Database) -> None:
    make_job(database, 5)
    make_job(database, 7, model="another")
    lease(database, 2)

    with database.read() as session:
        waiting = items.count_waiting(session, limit=100)
        bounded = items.count_waiting(session, limit=5)

    assert {MODEL: 3, "another": 7} == waiting
    assert {MODEL: 3, "another": 5} == bounded


@pytest.mark.parametrize("num_failures", [0, 1, 5, 9, 1000])
def test_backoff_stays_within_its_bounds(num_failures: int) -> None:
    delays = [items.draw_backoff_s(num_failures) for _ in range(200)]

    assert 0.0 <= min(delays)
    assert max(delays) <= min(2.0 ** min(num_failures, 20), 900.0)


def test_broken_rows_are_found(database: Database) -> None:
    job = make_job(database, 2)
    with database.write() as session:
        session.execute(text("UPDATE jobs SET num_completed = 1"))
        found = invariants.find_violations(session)
        session.execute(text("UPDATE jobs SET num_completed = 0"))

    assert {"L5", "L6"} == {violation.statement[:2] for violation in found}
    assert 2 == find_job(database, job).num_total
