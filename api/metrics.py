"""
What Prometheus may ask: requests as this process counts them, and open work as SQL has it.

Each app has a registry of its own, so that two apps in a process count apart.
"""

import threading
import time
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from storage import items, jobs
from storage.db import Database

CONTENT_TYPE: Final = CONTENT_TYPE_LATEST
MAX_AGE_S: Final = 5.0
"""Open work is counted at most this often, however many ask: a hundred thousand take a while."""

MAX_COUNTED: Final = 100_000

_BUCKETS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 60.0, 300.0)


class Metrics:
    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "darkroom_http_requests",
            "Requests answered.",
            ["method", "route", "status"],
            registry=self._registry,
        )
        self._seconds = Histogram(
            "darkroom_http_request_seconds",
            "From the first byte of a request to the last of its answer; waiting polls included.",
            ["method", "route"],
            buckets=_BUCKETS,
            registry=self._registry,
        )
        self._jobs = Gauge(
            "darkroom_open_jobs", "Jobs that have not ended.", ["state"], registry=self._registry
        )
        self._items = Gauge(
            "darkroom_waiting_items",
            f"Items that may be leased now; of each model no more than {MAX_COUNTED} are counted.",
            ["model"],
            registry=self._registry,
        )
        self._lock = threading.Lock()
        self._read_at = float("-inf")

    def count_request(self, method: str, route: str, status: int, seconds: float) -> None:
        self._requests.labels(method, route, str(status)).inc()
        self._seconds.labels(method, route).observe(seconds)

    def expose(self, database: Database) -> bytes:
        with self._lock:
            if time.monotonic() - self._read_at > MAX_AGE_S:
                self._read_open_work(database)
                self._read_at = time.monotonic()
        return generate_latest(self._registry)

    def _read_open_work(self, database: Database) -> None:
        with database.read() as session:
            num_jobs = jobs.count_open(session)
            num_items = items.count_waiting(session, limit=MAX_COUNTED)
        self._jobs.clear()
        self._items.clear()
        for state, count in num_jobs.items():
            self._jobs.labels(state.value).set(count)
        for model, count in num_items.items():
            self._items.labels(model).set(count)
