"""
What Prometheus may ask: requests as this process counts them, open work as SQL has it, and what the
workers' engines do, as the workers say it there.

Each app has a registry of its own, so that two apps in a process count apart.
"""

import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from storage import items, jobs, served
from storage.db import Database
from storage.served import Reported

CONTENT_TYPE: Final = CONTENT_TYPE_LATEST
MAX_AGE_S: Final = 5.0
"""Open work is counted at most this often, however many ask: a hundred thousand take a while."""

MAX_COUNTED: Final = 100_000

_BUCKETS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 60.0, 300.0)


# Of an engine, by the names that it gives them itself.
_SECONDS: Final[Mapping[str, str]] = {
    "encode_s": "encode",
    "prefill_s": "prefill",
    "decode_s": "decode",
}
_TOTALS: Final[Mapping[str, tuple[str, str]]] = {
    "waited_for_media_s": (
        "darkroom_engine_waited_for_media_seconds",
        "Time in which the device had nothing to do but wait for pictures that were fetched.",
    ),
    "num_patches": ("darkroom_engine_patches", "Patches of pictures encoded."),
    "num_prompt_tokens": ("darkroom_engine_prompt_tokens", "Prompt tokens read."),
    "num_tokens": ("darkroom_engine_tokens", "Tokens decoded; the first comes with its prompt."),
    "floor_s": (
        "darkroom_engine_floor_seconds",
        "What the requests that finished take at least, where that is known.",
    ),
}
_NOW: Final[Mapping[str, tuple[str, str]]] = {
    "num_running": ("darkroom_engine_running", "Outputs that read prompts or decode."),
    "num_waiting": ("darkroom_engine_waiting", "Outputs that are prepared and have not begun."),
    "num_preparing": ("darkroom_engine_preparing", "Requests whose media are made ready."),
}
_LABELS: Final = ("model", "worker")


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
        self._engines = _Engines()
        self._registry.register(self._engines)
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
            self._engines.reports = served.list_reports(session)
        self._jobs.clear()
        self._items.clear()
        for state, count in num_jobs.items():
            self._jobs.labels(state.value).set(count)
        for model, count in num_items.items():
            self._items.labels(model).set(count)


class _Engines(Collector):
    """Made anew for each that asks, so that a worker that has left is no longer there."""

    def __init__(self) -> None:
        self.reports: Sequence[Reported] = ()

    def collect(self) -> Iterable[Metric]:
        reports = self.reports
        seconds = CounterMetricFamily(
            "darkroom_engine_seconds",
            "The device's time by kind of work.",
            labels=(*_LABELS, "work"),
        )
        for key, work in _SECONDS.items():
            for labels, value in _values(reports, key):
                seconds.add_metric((*labels, work), value)
        yield seconds
        for key, (name, text) in _TOTALS.items():
            counter = CounterMetricFamily(name, text, labels=_LABELS)
            for labels, value in _values(reports, key):
                counter.add_metric(labels, value)
            yield counter
        for key, (name, text) in _NOW.items():
            gauge = GaugeMetricFamily(name, text, labels=_LABELS)
            for labels, value in _values(reports, key):
                gauge.add_metric(labels, value)
            yield gauge


def _values(reports: Iterable[Reported], key: str) -> Iterator[tuple[tuple[str, str], float]]:
    """Of those that know it."""
    for report in reports:
        value = report.usage.get(key)
        if value is not None:
            yield (report.model, str(report.number)), float(value)
