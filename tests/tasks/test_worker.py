"""Real workers on a real broker: they take work by all its ways, drain, and lose nothing."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from celery import Celery
from sqlalchemy import select

from storage import items, jobs
from storage.ids import JobId
from storage.states import ItemState, JobState
from storage.tables import Item, Job
from tasks.app import CPU_QUEUE
from tasks.broker import build_client
from tasks.config import Config
from tasks.dispatch import Dispatcher
from tasks.expand import expand
from tasks.ingest import DEAD, STREAM
from tasks.stores import Stores
from tasks.submit import parse_submission, submit
from tests.storage.rows import put_in_fast_lane
from tests.tasks.fakes import RecordingDispatcher, build_request
from tests.tasks.processes import Fleet, open_fleet, wait_until
from tests.tasks.worker import MOMENTS, TOOK_FIRST

pytestmark = pytest.mark.services


def settings_of(config: Config, broker: str, **more: str) -> dict[str, str]:
    return {
        "HOME": str(config.home),
        "DATABASE_URL": config.database_url,
        "REDIS_URL": broker,
        "CHUNK_ITEMS": "16",
        "LEASE_S": "30",
        "HEARTBEAT_S": "5",
        "SWEEP_S": "0.5",
        **more,
    }


def find_job(stores: Stores, job: JobId) -> Job:
    with stores.database.read() as session:
        found = jobs.find(session, job)
    assert found is not None
    return found


def is_over(stores: Stores, job: JobId) -> bool:
    return find_job(stores, job).state in (JobState.COMPLETED, JobState.FAILED)


def list_jobs(stores: Stores) -> list[Job]:
    """Of the default tenant, oldest first."""
    from storage import tenants

    with stores.database.write() as session:
        tenant = tenants.get_or_create(session, "default").id
        return jobs.list_page(session, tenant)[0][::-1]


def test_job_goes_through_real_workers_by_all_three_ways(
    tmp_path: Path, stores: Stores, config: Config, broker: str
) -> None:
    with open_fleet(tmp_path, **settings_of(config, broker)) as fleet:
        fleet.start("cpu")
        fleet.start("gpu")
        dispatcher = Dispatcher(config, broker)
        submission = {"requests": [build_request(f"r-{n}", f"text {n}") for n in range(40)]}
        submit(stores, dispatcher, parse_submission(submission))
        client = Celery(broker=broker, set_as_current=False)
        for _ in range(2):  # a doubled message is one job
            client.send_task(
                "darkroom.submit",
                kwargs={**submission, "idempotency_key": "by-task"},
                queue=CPU_QUEUE,
            )
        client.close()
        with build_client(broker) as redis:
            for _ in range(2):
                given = json.dumps({**submission, "idempotency_key": "by-stream"})
                redis.xadd(STREAM, {"submission": given})
            redis.xadd(STREAM, {"submission": "{"})
            redis.xadd(STREAM, {"submission": '{"requests": []}'})
            wait_until(
                lambda: (
                    len(list_jobs(stores)) == 3
                    and all(is_over(stores, job.id) for job in list_jobs(stores))
                    and redis.xlen(STREAM) == 0
                ),
                fleet,
                timeout_s=120,
            )
            assert 2 == redis.xlen(DEAD)
        dispatcher.close()
        codes = stop(fleet)

    assert [0, 0] == codes
    for job in list_jobs(stores):
        with stores.database.read() as session:
            lines = items.list_by_line(session, job.id)
        assert [f"> text {n}" for n in range(40)] == [line.text for line in lines]


def test_chat_passes_bulk_that_keeps_every_thread_busy(
    tmp_path: Path,
    stores: Stores,
    config: Config,
    broker: str,
    dispatcher: RecordingDispatcher,
) -> None:
    with open_fleet(tmp_path, **settings_of(config, broker, DRAIN_S="1")) as fleet:
        # Three chunks of 16, each item 60 s in the engine: no thread of the pool comes back.
        bulk = start_slow_job(stores, config, broker, fleet, delay_s=60, num_items=48)
        wait_until(lambda: count(stores, bulk) == {ItemState.LEASED: 48}, fleet, timeout_s=120)
        given = parse_submission({"requests": [build_request("chat", "answer at once")]})
        chat = submit(stores, dispatcher, given).job.id  # and nothing was sent
        put_in_fast_lane(stores.database, chat)
        sender = Dispatcher(config, broker)
        sender.send_fast_expand(chat)
        sender.close()

        wait_until(lambda: is_over(stores, chat), fleet, timeout_s=120)
        assert {ItemState.LEASED: 48} == count(stores, bulk)


def stop(fleet: Fleet) -> list[int]:
    for process in fleet.processes:
        process.send_signal(signal.SIGTERM)
    return [process.wait(timeout=60) for process in fleet.processes]


def start_slow_job(
    stores: Stores, config: Config, broker: str, fleet: Fleet, *, delay_s: float, num_items: int
) -> JobId:
    """A job of which some items are in the engine when this returns."""
    fleet.start("cpu")
    fleet.start("gpu", str(delay_s))
    log = fleet.log_of(fleet.processes[-1])
    dispatcher = Dispatcher(config, broker)
    requests = [build_request(f"r-{n}") for n in range(num_items)]
    job = submit(stores, dispatcher, parse_submission({"requests": requests})).job.id
    dispatcher.close()
    wait_until(lambda: TOOK_FIRST in log.read_text(), fleet, timeout_s=120)
    return job


def count(stores: Stores, job: JobId) -> dict[ItemState, int]:
    with stores.database.read() as session:
        return jobs.count_items(session, job)


def test_deadline_ends_a_worker_whose_engine_does_not_come_back(
    tmp_path: Path, stores: Stores, config: Config, broker: str
) -> None:
    with open_fleet(tmp_path, **settings_of(config, broker, DRAIN_S="1")) as fleet:
        job = start_slow_job(stores, config, broker, fleet, delay_s=300, num_items=20)
        worker = fleet.processes[-1]
        worker.send_signal(signal.SIGTERM)

        assert 75 == worker.wait(timeout=120), fleet.logs()  # the engine takes five minutes

        assert {ItemState.PENDING: 20} == count(stores, job), fleet.logs()


def test_worker_told_to_stop_while_it_starts_ends_well_and_holds_nothing(
    tmp_path: Path,
    stores: Stores,
    config: Config,
    broker: str,
    dispatcher: RecordingDispatcher,
) -> None:
    given = {"requests": [build_request(f"r-{n}") for n in range(60)]}
    job = submit(stores, dispatcher, parse_submission(given)).job.id
    expand(stores, dispatcher, config, job)
    with open_fleet(tmp_path, **settings_of(config, broker)) as fleet:
        starting = [fleet.start("gpu", "0", moment) for moment in MOMENTS]
        assert [0] * len(MOMENTS) == [worker.wait(timeout=120) for worker in starting], fleet.logs()
        assert {ItemState.PENDING: 60} == count(stores, job), fleet.logs()

        ready = fleet.start("gpu", "0.05", "ready")
        wait_until(lambda: fleet.count_logged(ready, "worker_ready") > 0, fleet, timeout_s=120)
        ready.send_signal(signal.SIGTERM)
        assert 0 == ready.wait(timeout=60), fleet.logs()

    assert ItemState.LEASED not in count(stores, job), fleet.logs()
    with stores.database.read() as session:
        assert {0} == set(session.scalars(select(Item.charged)))


def test_worker_without_a_model_says_what_to_give() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "cli", "worker"],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
    )

    assert 2 == run.returncode
    assert "--cpu" in run.stderr
