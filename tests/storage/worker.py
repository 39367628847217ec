"""
A worker without an engine, as a process of its own: leases, pretends, commits, until nothing waits.

    python -m tests.storage.worker DATABASE_URL CHUNK LEASE_S [stepped]

It prints its number of committed results when it ends, which it may not live to do. `stepped`: it
leases once, says so, and commits only after it was sent a line.
"""

import random
import sys
import time

from storage import items, jobs
from storage.db import Database
from storage.errors import StorageError
from storage.items import Completion
from tests.storage.rows import MODEL, completions


def step(url: str, chunk_size: int, lease_s: float) -> None:
    database = Database(url)
    with database.write() as session:
        chunk = items.lease(session, model=MODEL, worker="w", max_items=chunk_size, lease_s=lease_s)
    assert chunk is not None
    print("leased", len(chunk.items), flush=True)  # noqa: T201 - read by the test
    sys.stdin.readline()
    with database.write() as session:
        outcome = items.complete(session, completions(chunk.items))
    print("committed", len(outcome.items), flush=True)  # noqa: T201 - read by the test


def run(url: str, chunk_size: int, lease_s: float) -> int:
    database = Database(url)
    num_committed = 0
    while True:
        try:
            with database.write() as session:
                chunk = items.lease(
                    session, model=MODEL, worker="w", max_items=chunk_size, lease_s=lease_s
                )
            if chunk is None:
                with database.write() as session:
                    items.expire_leases(session)
                    if jobs.list_ended(session):
                        return num_committed
                time.sleep(0.02)
                continue
            results = [
                Completion(item.fence, f"text {item.line}", "stop", 800, 32, {"image": [640, 480]})
                for item in chunk.items
            ]
            random.shuffle(results)
            with database.write() as session:
                num_committed += len(items.complete(session, results).items)
        except StorageError as error:
            if not error.retryable:
                raise


if __name__ == "__main__":
    settings = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
    if sys.argv[4:] == ["stepped"]:
        step(*settings)
    else:
        print(run(*settings))  # noqa: T201 - read by the test
