"""An item that kills whoever runs it fails by itself, and its neighbours do not fail with it."""

from pathlib import Path

import pytest

from storage import items
from storage.blobs import FolderBlobs
from storage.db import Database
from storage.states import JobState
from tasks.config import load_config
from tasks.dispatch import Dispatcher
from tasks.stores import Stores
from tasks.submit import parse_submission, submit
from tests.faults.stack import Broker, find, stop
from tests.tasks.fakes import build_request
from tests.tasks.processes import open_fleet, wait_until

NUM_ITEMS = 24
POISON = 4


@pytest.mark.services
@pytest.mark.timeout(600)  # four workers have to start, one after the other
@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_item_that_kills_its_worker_fails_alone(
    tmp_path: Path, database: Database, database_url: str, broker: Broker
) -> None:
    stores = Stores(database, FolderBlobs(tmp_path / "blobs"))
    settings = {
        "HOME": str(tmp_path),
        "DATABASE_URL": database_url,
        "REDIS_URL": broker.url,
        "CHUNK_ITEMS": "8",
        "CHUNKS_IN_FLIGHT": "3",
        "LEASE_S": "4",  # on a busy machine a beat comes late, and a lost lease counts like a crash
        "HEARTBEAT_S": "0.5",
        "SWEEP_S": "0.3",
    }
    texts = {n: "kill the worker" if n == POISON else f"text {n}" for n in range(NUM_ITEMS)}
    with open_fleet(tmp_path, **settings) as fleet:
        cpu, worker = fleet.start("cpu"), fleet.start("gpu", "0.1")
        dispatcher = Dispatcher(load_config(home=tmp_path, chunk_items=8), broker.url)
        requests = [build_request(f"r-{n}", text) for n, text in texts.items()]
        job = submit(stores, dispatcher, parse_submission({"requests": requests})).job.id
        dispatcher.close()
        num_crashes = 0

        def is_over() -> bool:
            nonlocal worker, num_crashes
            if worker.poll() is not None:
                num_crashes += 1
                worker = fleet.start("gpu", "0.1")
            return find(database, job).state is JobState.COMPLETED

        wait_until(is_over, fleet, timeout_s=300)
        codes = stop(fleet, cpu, worker)

    with database.read() as session:
        ended = items.list_by_line(session, job)
    assert [0, 0] == codes
    assert 1 <= num_crashes <= 3
    assert {POISON: "worker_crash"} == {
        one.line - 1: one.error_code for one in ended if one.error_code is not None
    }
    assert NUM_ITEMS - 1 == find(database, job).num_completed
