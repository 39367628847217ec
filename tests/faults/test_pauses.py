"""A worker that is frozen past its lease, and workers that are told to stop while they work."""

import signal
import sqlite3
import subprocess
import time
from pathlib import Path

import pytest
from sqlalchemy import text

from storage.blobs import FolderBlobs
from storage.db import Database
from storage.errors import DatabaseBusyError
from tasks.stores import Stores
from tests.faults.stack import (
    Broker,
    assert_output_is_whole,
    count_items_of,
    find,
    hand_in,
    look_at,
    stop,
    wait_until_begun,
    wait_until_completed,
)
from tests.services import freeze
from tests.tasks.processes import Fleet, open_fleet, wait_until

pytestmark = [pytest.mark.services, pytest.mark.timeout(600)]


@pytest.fixture
def stores(tmp_path: Path, database: Database) -> Stores:
    return Stores(database, FolderBlobs(tmp_path / "blobs"))


def settings_of(home: Path, database_url: str, broker: Broker, **more: str) -> dict[str, str]:
    return {
        "HOME": str(home),
        "DATABASE_URL": database_url,
        "REDIS_URL": broker.url,
        "CHUNK_ITEMS": "16",
        "CHUNKS_IN_FLIGHT": "2",
        "SWEEP_S": "0.5",
        **more,
    }


def test_frozen_worker_wakes_up_tries_to_commit_and_changes_nothing(
    tmp_path: Path, stores: Stores, database_url: str, broker: Broker
) -> None:
    # So long that what it holds can be counted before others have it.
    settings = settings_of(tmp_path, database_url, broker, LEASE_S="6", HEARTBEAT_S="0.5")
    with open_fleet(tmp_path, **settings) as fleet:
        fleet.start("cpu")
        frozen = fleet.start("gpu", "0.2")
        job = hand_in(stores, broker.url, tmp_path, 40)
        wait_until_begun(stores.database, job, fleet)
        freeze_outside(frozen, stores.database)
        num_done = count_items_of(stores.database, frozen, is_completed=True)
        num_held = count_items_of(stores.database, frozen)
        fleet.start("gpu")
        wait_until_completed(stores.database, job, fleet)
        before = find(stores.database, job)

        frozen.send_signal(signal.SIGCONT)
        wait_until(lambda: fleet.count_logged(frozen, "results_fenced") > 0, fleet, timeout_s=120)

        after = find(stores.database, job)
        assert frozen.poll() is None, fleet.logs()
    assert num_held > 0
    assert num_done == count_items_of(stores.database, frozen, is_completed=True)
    assert before.version == after.version
    assert (40, 0) == (after.num_completed, after.num_failed)
    assert_output_is_whole(stores, job, 40)


def freeze_outside(worker: "subprocess.Popen[bytes]", database: Database) -> None:
    """
    Between two of its transactions, that is.

    One that is frozen inside holds its locks: on SQLite nobody writes until it goes on, and
    PostgreSQL ends it after a minute.
    """
    for _ in range(100):
        freeze(worker.pid)
        if is_free(database):
            return
        worker.send_signal(signal.SIGCONT)
        time.sleep(0.05)
    pytest.fail("the worker is inside of transactions all the time")


def is_free(database: Database) -> bool:
    if database.engine.dialect.name == "sqlite":
        connection = sqlite3.connect(str(database.engine.url.database), timeout=0.5)
        try:
            connection.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError:
            return False
        finally:
            connection.close()
        return True
    try:
        with database.read() as session:
            session.execute(text("SET LOCAL lock_timeout = '500ms'"))
            session.execute(text("SELECT id FROM items FOR UPDATE"))
            session.execute(text("SELECT id FROM jobs FOR UPDATE"))
    except DatabaseBusyError:
        return False
    return True


def wait_until_busy(database: Database, worker: "subprocess.Popen[bytes]", fleet: Fleet) -> None:
    wait_until(lambda: count_items_of(database, worker) > 0, fleet, timeout_s=120)


def test_workers_told_to_stop_in_turn_lose_nothing_and_charge_nothing(
    tmp_path: Path, stores: Stores, database_url: str, broker: Broker
) -> None:
    with open_fleet(tmp_path, **settings_of(tmp_path, database_url, broker)) as fleet:
        cpu = fleet.start("cpu")
        # The first ones take a minute for all of it, so that there is work left for the others
        # however long these take to start.
        workers = [fleet.start("gpu", "0.4") for _ in range(2)]
        job = hand_in(stores, broker.url, tmp_path, 160)
        wait_until_begun(stores.database, job, fleet, num_completed=2)
        num_held = 0
        for place, worker in enumerate(workers):
            wait_until_busy(stores.database, worker, fleet)
            worker.send_signal(signal.SIGTERM)
            workers[place] = fleet.start("gpu", "0.05")
            assert 0 == worker.wait(timeout=60), fleet.logs()
            num_held += fleet.count_logged(worker, "items_released")
            assert 0 == count_items_of(stores.database, worker), fleet.logs()
        wait_until_completed(stores.database, job, fleet)
        assert [0, 0, 0] == stop(fleet, cpu, *workers), fleet.logs()

    outcome = look_at(stores.database, job)
    assert num_held > 0, "nothing was in flight"
    assert (160, 0) == (outcome.num_completed, outcome.num_failed)
    assert outcome.run_again > 0
    assert (0, 0) == (outcome.num_charged, outcome.num_suspects)
    assert_output_is_whole(stores, job, 160)
