"""Real worker processes, some of them killed or frozen: nothing is lost, nothing counts twice."""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from sqlalchemy import text

from storage import items, jobs
from storage.db import Database
from storage.ids import JobId
from storage.tables import Job
from tests.services import freeze
from tests.storage.rows import completions, lease, let_backoff_end, make_job

ROOT = Path(__file__).parents[2]
NUM_ITEMS = 1200
NUM_KILLS = 8


def start_worker(
    url: str, *, chunk: int = 16, lease_s: float = 2.0, is_stepped: bool = False
) -> subprocess.Popen[str]:
    words = [url, str(chunk), str(lease_s), *(["stepped"] if is_stepped else [])]
    return subprocess.Popen(
        [sys.executable, "-m", "tests.quickly", "tests.storage.worker", *words],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def find_job(database: Database, job: JobId) -> Job:
    with database.read() as session:
        found = jobs.find(session, job)
    assert found is not None
    return found


def test_workers_killed_at_random_lose_and_double_nothing(
    database: Database, database_url: str
) -> None:
    job = make_job(database, NUM_ITEMS)
    chance = random.Random(7)
    workers = [start_worker(database_url) for _ in range(2)]
    deadline = time.monotonic() + 120.0
    num_killed = 0
    while find_job(database, job).num_completed < NUM_ITEMS:
        assert time.monotonic() < deadline
        time.sleep(chance.uniform(0.02, 0.2))
        if num_killed < NUM_KILLS:
            victim = chance.randrange(2)
            workers[victim].kill()
            workers[victim].communicate()
            workers[victim] = start_worker(database_url)
            num_killed += 1
    codes = [worker.wait(timeout=60) for worker in workers]
    for worker in workers:
        worker.communicate()

    with database.read() as session:
        lines = session.scalars(
            text("SELECT line FROM items JOIN results ON item_id = items.id ORDER BY line")
        ).all()
        seqs = session.scalars(text("SELECT seq FROM results ORDER BY seq")).all()

    assert [0, 0] == codes
    assert list(range(1, NUM_ITEMS + 1)) == lines
    assert list(range(1, NUM_ITEMS + 1)) == seqs


def test_frozen_worker_that_wakes_up_commits_nothing(database: Database, database_url: str) -> None:
    # It is frozen between its lease and its commit. One that is frozen within a transaction holds
    # its rows, and on SQLite the only lock there is for writing, until it wakes up or dies.
    job = make_job(database, 8)
    worker = start_worker(database_url, chunk=8, lease_s=1.0, is_stepped=True)
    assert worker.stdin is not None
    assert worker.stdout is not None
    assert "leased 8" == worker.stdout.readline().strip()
    freeze(worker.pid)
    time.sleep(1.1)
    with database.write() as session:
        swept = items.expire_leases(session)
    let_backoff_end(database)
    chunk = lease(database, 8)
    with database.write() as session:
        items.complete(session, completions(chunk.items[:4]))

    worker.send_signal(signal.SIGCONT)
    answer, _ = worker.communicate("commit\n", timeout=60)

    assert 8 == len(swept.items)
    assert "committed 0" == answer.strip()
    assert 4 == find_job(database, job).num_completed
    with database.read() as session:
        assert {2} == set(session.scalars(text("SELECT attempt FROM results")))
