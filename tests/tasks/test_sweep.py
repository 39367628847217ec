"""What a crash or a lost message left is found again, from SQL alone."""

import threading
import time

import pytest

from storage import items, jobs
from storage.ids import JobId
from storage.states import ItemState, JobState
from storage.tables import Job
from tasks.app import TaskName
from tasks.broker import build_client
from tasks.config import Config
from tasks.dispatch import Dispatcher
from tasks.finish import finish
from tasks.stores import Stores
from tasks.submit import parse_submission, submit
from tasks.sweep import Sweeper
from tests.storage.rows import (
    lease,
    let_backoff_end,
    let_leases_end,
    let_window_end,
    make_job,
)
from tests.tasks.fakes import MODEL, RecordingDispatcher, build_request


@pytest.fixture
def soon(config: Config) -> Config:
    return config.model_copy(update={"sweep_s": 0.05, "chunk_items": 10})


@pytest.fixture
def queue(soon: Config, broker: str) -> Dispatcher:
    return Dispatcher(soon, broker)


def count_permits(broker: str) -> int:
    with build_client(broker) as client:
        return int(client.llen(f"darkroom.gpu.{MODEL}"))


def test_lost_permits_are_made_up_for_and_no_more(
    stores: Stores, queue: Dispatcher, soon: Config, broker: str
) -> None:
    make_job(stores.database, 25)
    sweeper = Sweeper(stores, queue, soon)

    sweeper.sweep()
    first = count_permits(broker)
    sweeper.sweep()

    assert (3, 3) == (first, count_permits(broker))


def test_leases_that_are_over_go_back_and_get_permits(
    stores: Stores, queue: Dispatcher, soon: Config, broker: str
) -> None:
    make_job(stores.database, 10)
    lease(stores.database, 10)
    let_leases_end(stores.database)
    sweeper = Sweeper(stores, queue, soon)

    sweeper.sweep()
    let_backoff_end(stores.database)
    sweeper.sweep()

    assert 1 == count_permits(broker)


def test_job_that_was_never_expanded_is_sent_again_but_not_at_each_beat(
    stores: Stores, dispatcher: RecordingDispatcher, soon: Config
) -> None:
    submit(stores, dispatcher, parse_submission({"requests": [build_request("a")]}))
    dispatcher.sent.clear()
    now_s = 1000.0
    sweeper = Sweeper(stores, dispatcher, soon, read_clock=lambda: now_s)
    dispatcher.count_queued = lambda model: 0  # type: ignore[method-assign]
    time.sleep(0.1)  # the database's clock, by which the job is old enough

    sweeper.sweep()
    at_once = dispatcher.count(TaskName.EXPAND)
    now_s += 0.06
    sweeper.sweep()
    sweeper.sweep()

    assert (0, 1) == (at_once, dispatcher.count(TaskName.EXPAND))


def test_jobs_that_cannot_be_helped_hide_no_later_one(
    stores: Stores,
    dispatcher: RecordingDispatcher,
    soon: Config,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(jobs, "PAGE", 2)
    monkeypatch.setattr(jobs.list_unexpanded, "__kwdefaults__", {"after": None, "limit": 2})
    for number in range(5):  # none of which is ever expanded
        submit(stores, dispatcher, parse_submission({"requests": [build_request(f"r-{number}")]}))
    dispatcher.sent.clear()
    now_s = 1000.0
    sweeper = Sweeper(stores, dispatcher, soon, read_clock=lambda: now_s)
    dispatcher.count_queued = lambda model: 0  # type: ignore[method-assign]
    time.sleep(0.1)  # the database's clock, by which the jobs are old enough

    sweeper.sweep()
    now_s += 0.06
    sweeper.sweep()

    assert 5 == len({sent["job"] for name, _, sent in dispatcher.sent if name is TaskName.EXPAND})


def test_broker_that_takes_nothing_delays_no_job_once_it_is_back(
    stores: Stores, dispatcher: RecordingDispatcher, soon: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit(stores, dispatcher, parse_submission({"requests": [build_request("a")]}))
    dispatcher.sent.clear()
    now_s = 1000.0
    sweeper = Sweeper(stores, dispatcher, soon, read_clock=lambda: now_s)
    dispatcher.count_queued = lambda model: 0  # type: ignore[method-assign]
    time.sleep(0.1)  # the database's clock, by which the job is old enough
    sweeper.sweep()

    with monkeypatch.context() as away:
        away.setattr(dispatcher, "_send", lambda *_: False)
        for _ in range(20):
            now_s += 60
            sweeper.sweep()
    sweeper.sweep()

    assert 1 == dispatcher.count(TaskName.EXPAND)


def test_job_that_is_never_expanded_ends_with_its_window(
    stores: Stores, dispatcher: RecordingDispatcher, soon: Config
) -> None:
    given = parse_submission({"requests": [build_request("a")]})
    job = submit(stores, dispatcher, given).job.id
    sweeper = Sweeper(stores, dispatcher, soon)
    dispatcher.count_queued = lambda model: 0  # type: ignore[method-assign]

    sweeper.sweep()
    before = find_job(stores, job).state
    let_window_end(stores.database, job)
    sweeper.sweep()

    after = find_job(stores, job)
    assert (JobState.VALIDATING, JobState.FAILED) == (before, after.state)
    assert ["not_read_in_time"] == [error["code"] for error in after.errors or []]


def find_job(stores: Stores, job: JobId) -> Job:
    with stores.database.read() as session:
        found = jobs.find(session, job)
    assert found is not None
    return found


def test_windows_and_cancellations_end_their_items(
    stores: Stores, dispatcher: RecordingDispatcher, soon: Config
) -> None:
    late, cancelled = make_job(stores.database, 5), make_job(stores.database, 5)
    lease(stores.database, 3)
    let_window_end(stores.database, late)
    with stores.database.write() as session:
        found = jobs.find(session, cancelled)
        assert found is not None
        jobs.cancel(session, found.tenant_id, cancelled)
    dispatcher.count_queued = lambda model: 0  # type: ignore[method-assign]

    Sweeper(stores, dispatcher, soon).sweep()

    assert 2 == dispatcher.count(TaskName.FINISH)
    with stores.database.read() as session:
        assert {ItemState.EXPIRED: 5} == jobs.count_items(session, late)
        assert {ItemState.CANCELLED: 5} == jobs.count_items(session, cancelled)
        lines = items.list_by_line(session, late)
    stored = [finish(stores, job) for job in (late, cancelled)]
    assert [JobState.EXPIRED, JobState.CANCELLED] == stored
    assert 5 == len(lines)


def test_finish_that_was_lost_is_sent_again(
    stores: Stores, dispatcher: RecordingDispatcher, soon: Config
) -> None:
    job = make_job(stores.database, 5)
    chunk = lease(stores.database, 5)
    with stores.database.write() as session:
        items.fail(
            session,
            [items.Failure(item.fence, "c", "m", is_transient=False) for item in chunk.items],
        )
    dispatcher.count_queued = lambda model: 0  # type: ignore[method-assign]
    now_s = 1000.0
    sweeper = Sweeper(stores, dispatcher, soon, read_clock=lambda: now_s)

    sweeper.sweep()
    now_s += 0.06
    sweeper.sweep()

    assert 1 == dispatcher.count(TaskName.FINISH)
    assert JobState.COMPLETED == finish(stores, job)


def test_one_of_many_sweepers_leads(
    stores: Stores, dispatcher: RecordingDispatcher, soon: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    swept: list[int] = []
    stop = threading.Event()
    threads = []
    for number in range(3):
        sweeper = Sweeper(stores, dispatcher, soon)
        monkeypatch.setattr(sweeper, "sweep", lambda number=number: swept.append(number))
        threads.append(threading.Thread(target=sweeper.run, args=(stop,)))
    for thread in threads:
        thread.start()
    while len(swept) <= 3:
        time.sleep(0.01)
    stop.set()
    for thread in threads:
        thread.join()

    assert 1 == len(set(swept))
