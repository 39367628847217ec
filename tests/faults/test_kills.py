"""
Workers killed at random while the broker dies and comes back empty: nothing is lost or doubled.

The profile is short; `make faults` runs the full one, 5,000 items with 40 kills and 3 losses of the
broker. The `database` fixture checks L1 to L7, changes included, when the test is over.
"""

import json
import os
import random
import subprocess
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest

from storage.blobs import FolderBlobs
from storage.db import Database
from storage.states import JobState
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
from tests.tasks.processes import open_fleet, wait_until

pytestmark = [pytest.mark.services, pytest.mark.timeout(900)]

NUM_WORKERS = 3
SEED = int(os.environ.get("DARKROOM_FAULT_SEED", "20261127"))


@dataclass(frozen=True)
class Profile:
    """
    Args:
        delay_s: of the engine, for each item.
        pause_s: between two faults, at least and at most.
    """

    num_items: int
    num_kills: int
    num_losses: int
    delay_s: float
    pause_s: tuple[float, float]
    timeout_s: float


SHORT = Profile(400, num_kills=5, num_losses=1, delay_s=0.1, pause_s=(0.2, 0.8), timeout_s=240)
FULL = Profile(5000, num_kills=40, num_losses=3, delay_s=0.06, pause_s=(0.2, 1.2), timeout_s=600)
PROFILE = FULL if os.environ.get("DARKROOM_FAULT_PROFILE") == "full" else SHORT


def test_killed_workers_and_a_broker_that_forgot_lose_and_double_nothing(
    tmp_path: Path, database: Database, database_url: str, broker: Broker
) -> None:
    chance = random.Random(SEED)
    settings = {
        "HOME": str(tmp_path),
        "DATABASE_URL": database_url,
        "REDIS_URL": broker.url,
        "CHUNK_ITEMS": "32",
        "CHUNKS_IN_FLIGHT": "2",
        "LEASE_S": "6",  # on a busy machine a beat comes late
        "HEARTBEAT_S": "0.5",
        "SWEEP_S": "0.5",
    }
    stores = Stores(database, FolderBlobs(tmp_path / "blobs"))
    faults = ["kill"] * PROFILE.num_kills + ["lose"] * PROFILE.num_losses
    chance.shuffle(faults)
    num_held = 0
    lost_keys: list[int] = []
    with open_fleet(tmp_path, **settings) as fleet:
        cpu = fleet.start("cpu")
        workers = [fleet.start("gpu", str(PROFILE.delay_s)) for _ in range(NUM_WORKERS)]
        job = hand_in(stores, broker.url, tmp_path, PROFILE.num_items)
        wait_until_begun(database, job, fleet)
        started = time.monotonic()
        for fault in faults:
            time.sleep(chance.uniform(*PROFILE.pause_s))
            assert find(database, job).state is JobState.IN_PROGRESS, "it ended too early"
            if fault == "lose":
                lost_keys.append(broker.lose())
                continue
            wait_until(lambda: find_busy(database, workers) != [], fleet, timeout_s=120)
            victim = chance.choice(find_busy(database, workers) or range(NUM_WORKERS))
            kill(workers[victim])
            num_held += count_items_of(database, workers[victim])
            workers[victim] = fleet.start("gpu", str(PROFILE.delay_s))
        wait_until_completed(database, job, fleet, timeout_s=PROFILE.timeout_s)
        took_s = time.monotonic() - started
        codes = stop(fleet, cpu, *workers)
        assert {0} == set(codes), fleet.logs()

    outcome = look_at(database, job)
    figures = {
        "database": database.engine.dialect.name,
        "seed": SEED,
        "num_kills": PROFILE.num_kills,
        "num_items_held_by_the_killed": num_held,
        "lost_keys": lost_keys,
        "took_s": round(took_s, 1),
        **asdict(outcome),
    }
    print(json.dumps(figures))  # noqa: T201 - the figures of a long run are what it is for
    assert num_held > 0, "no kill hit a worker at work"
    assert min(lost_keys) > 0, "there was nothing to lose"
    assert (PROFILE.num_items, 0) == (outcome.num_completed, outcome.num_failed)
    assert_output_is_whole(stores, job, PROFILE.num_items)


def kill(worker: "subprocess.Popen[bytes]") -> None:
    worker.kill()
    worker.wait()


def find_busy(database: Database, workers: "list[subprocess.Popen[bytes]]") -> list[int]:
    """Those at work, by their places: one that is still starting has nothing to lose."""
    return [n for n, worker in enumerate(workers) if count_items_of(database, worker)]
