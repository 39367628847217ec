"""
The queue as a state machine: any order of what clients, workers and the sweeper do keeps L1 to L7.

The model is a dictionary of what each item should be. What ran as one worker's lease is kept after
it was lost, so that zombies try to commit all the time.
"""

import os
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import text

from storage import invariants, items, jobs
from storage.db import Database
from storage.ids import ItemId, JobId, TenantId
from storage.items import Chunk, Failure, Fence
from storage.states import TERMINAL_ITEM_STATES, ItemState, JobState
from tests.storage.rows import (
    completion,
    lease_or_none,
    let_backoff_end,
    let_leases_end,
    make_job,
    make_tenant,
)

NUM_EXAMPLES = int(os.environ.get("DARKROOM_QUEUE_EXAMPLES", "12"))
NUM_STEPS = 40
TABLES = ("results", "items", "jobs", "files", "tenants", "items_log", "jobs_log")


class Queue(RuleBasedStateMachine):
    database: Database

    def __init__(self) -> None:
        super().__init__()
        with self.database.write() as session:
            for table in TABLES:
                session.execute(text(f"DELETE FROM {table}"))  # noqa: S608 - our own words
        self.tenants = [make_tenant(self.database, name) for name in ("a", "b")]
        self.jobs: dict[JobId, TenantId] = {}
        self.chunks: list[Chunk] = []
        self.held: dict[ItemId, Fence] = {}
        self.ended: dict[ItemId, ItemState] = {}
        self.attempts: dict[ItemId, int] = {}

    @rule(
        count=st.integers(1, 6),
        tenant=st.integers(0, 1),
        priority=st.integers(-1, 1),
    )
    def submit(self, count: int, tenant: int, priority: int) -> None:
        owner = self.tenants[tenant]
        self.jobs[make_job(self.database, count, tenant=owner, priority=priority)] = owner

    @rule(count=st.integers(1, 8))
    def lease(self, count: int) -> None:
        chunk = lease_or_none(self.database, count)
        if chunk is None:
            return
        assert len(chunk.items) <= count
        for item in chunk.items:
            fence = item.fence
            assert fence.item not in self.held, "leased twice"
            assert fence.item not in self.ended, "leased after its end"
            assert self.attempts.get(fence.item, 0) + 1 == fence.attempt
            self.attempts[fence.item] = fence.attempt
            self.held[fence.item] = fence
        self.chunks.append(chunk)

    @precondition(lambda self: self.chunks)
    @rule(data=st.data())
    def heartbeat(self, data: st.DataObject) -> None:
        chunk = data.draw(st.sampled_from(self.chunks))
        with self.database.write() as session:
            kept = items.renew(session, [chunk.lease])

        assert {item.fence.item for item in chunk.items if self.is_held(item.fence)} == kept

    @precondition(lambda self: self.chunks)
    @rule(data=st.data(), is_answer_lost=st.booleans())
    def commit(self, data: st.DataObject, is_answer_lost: bool) -> None:
        fences = self.draw_fences(data)
        expected = {fence.item for fence in fences if self.is_held(fence)}
        results = [completion(fence) for fence in fences]
        with self.database.write() as session:
            outcome = items.complete(session, results)
        assert expected == outcome.items
        self.end(outcome.items, ItemState.COMPLETED)
        self.check_ended(outcome)
        if is_answer_lost:
            with self.database.write() as session:
                assert expected <= items.find_committed(session, fences)
                assert set() == items.complete(session, results).items

    @precondition(lambda self: self.chunks)
    @rule(data=st.data(), is_transient=st.booleans())
    def fail(self, data: st.DataObject, is_transient: bool) -> None:
        fences = self.draw_fences(data)
        failures = [Failure(fence, "code", "Text.", is_transient) for fence in fences]
        with self.database.write() as session:
            outcome = items.fail(session, failures)
        assert {fence.item for fence in fences if self.is_held(fence)} == outcome.items
        self.reread(outcome.items)
        self.check_ended(outcome)

    @precondition(lambda self: self.chunks)
    @rule(data=st.data(), is_crash=st.booleans())
    def give_back(self, data: st.DataObject, is_crash: bool) -> None:
        fences = self.draw_fences(data)
        with self.database.write() as session:
            if is_crash:
                outcome = items.report_crash(session, fences)
            else:
                outcome = items.release(session, fences)
        assert {fence.item for fence in fences if self.is_held(fence)} == outcome.items
        self.reread(outcome.items)
        self.check_ended(outcome)

    @precondition(lambda self: self.held)
    @rule(limit=st.integers(1, 10))
    def lose_leases(self, limit: int) -> None:
        let_leases_end(self.database)
        num_held = len(self.held)
        with self.database.write() as session:
            outcome = items.expire_leases(session, limit=limit)
        assert min(limit, num_held) == len(outcome.items)
        self.reread(outcome.items)
        self.check_ended(outcome)
        while self.held:  # the model has no word for "over, but not taken back"
            with self.database.write() as session:
                rest = items.expire_leases(session)
            self.reread(rest.items)

    @rule()
    def wait_for_backoff(self) -> None:
        let_backoff_end(self.database)

    @precondition(lambda self: self.jobs)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        job = data.draw(st.sampled_from(sorted(self.jobs)))
        with self.database.write() as session:
            state = jobs.get(session, self.jobs[job], job).state
            if state in (JobState.IN_PROGRESS, JobState.CANCELLING):
                jobs.cancel(session, self.jobs[job], job)
        with self.database.write() as session:
            outcome = items.end_page(session, job, ItemState.CANCELLED, limit=4)
        self.end(outcome.items, ItemState.CANCELLED)
        self.check_ended(outcome)

    @rule()
    def finish_what_has_ended(self) -> None:
        with self.database.write() as session:
            for job in jobs.list_ended(session):
                finishing = jobs.start_finishing(session, job)
                assert finishing is not None
                state = jobs.finish(
                    session,
                    job,
                    finish_attempt=finishing.finish_attempt,
                    output_file=None,
                    error_file=None,
                )
                assert state in (JobState.COMPLETED, JobState.CANCELLED)

    @invariant()
    def invariants_hold(self) -> None:
        with self.database.read() as session:
            assert [] == invariants.find_violations(session)
            rows = session.execute(
                text("SELECT id, state, attempt FROM items WHERE state <> 'pending'")
            ).all()
        found = {item: (ItemState(state), attempt) for item, state, attempt in rows}
        expected: dict[Any, Any] = {
            item: (ItemState.LEASED, fence.attempt) for item, fence in self.held.items()
        }
        expected |= {
            item: (state, self.attempts.get(item, 0)) for item, state in self.ended.items()
        }
        assert expected == found

    def draw_fences(self, data: st.DataObject) -> list[Fence]:
        chunk = data.draw(st.sampled_from(self.chunks))
        fences = [item.fence for item in chunk.items]
        return data.draw(st.lists(st.sampled_from(fences), min_size=1, unique=True))

    def is_held(self, fence: Fence) -> bool:
        return self.held.get(fence.item) == fence

    def end(self, ended: frozenset[ItemId], state: ItemState) -> None:
        for item in ended:
            self.held.pop(item, None)
            assert item not in self.ended, "ended twice"
            self.ended[item] = state

    def reread(self, given_back: frozenset[ItemId]) -> None:
        """Whether a try was the last is the tests' of items; here only that nothing is lost."""
        with self.database.read() as session:
            for item in given_back:
                query = text("SELECT state FROM items WHERE id = :id")
                state = ItemState(session.scalars(query, {"id": item}).one())
                assert state in (ItemState.PENDING, ItemState.FAILED)
                if state is ItemState.FAILED:
                    self.end(frozenset({item}), state)
                else:
                    del self.held[item]

    def check_ended(self, outcome: items.Outcome) -> None:
        with self.database.read() as session:
            for job in outcome.ended_jobs:
                assert TERMINAL_ITEM_STATES >= set(jobs.count_items(session, job))


def test_queue_keeps_its_promises_in_any_order(database: Database) -> None:
    machine = type("QueueOnDatabase", (Queue,), {"database": database})

    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=NUM_EXAMPLES,
            stateful_step_count=NUM_STEPS,
            deadline=None,
            print_blob=True,
            suppress_health_check=list(HealthCheck),
        ),
    )
