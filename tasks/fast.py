"""
The fast lane: what a client waits for at the line goes past the queues of bulk work.

The threads of a worker may all be busy for minutes: a cpu worker's with large files, a GPU worker's
with full chunks. So each worker keeps a few threads that serve nothing but the fast lane, and wait
for it at lists of its own. What stands in a list is a wake-up and no more: one that is lost costs the
seconds until a sweep, which sends the work the ordinary way.
"""

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Final

import redis
import structlog

from tasks.broker import build_client

logger = structlog.get_logger(__name__)

EXPAND_LIST: Final = "darkroom.fast.expand"
"""Ids of jobs, in hex, that are to be expanded."""

PERMIT_LIST_PREFIX: Final = "darkroom.fast.gpu."
"""Followed by the model's name: permits for its items of the fast lane. What they hold says nothing."""

MAX_WAITING: Final = 10_000
"""Wake-ups that a list keeps; where nobody serves it, the oldest are dropped."""

WAIT_S: Final = 1
RETRY_S: Final = 1.0


def name_permit_list(model: str) -> str:
    return PERMIT_LIST_PREFIX + model


class FastLane:
    """
    One thread's wait at one list.

    Args:
        act: is given what a wake-up holds; what it raises is logged, for a sweep finds the work.
    """

    def __init__(self, broker_url: str, name: str, act: Callable[[str], object]) -> None:
        self._client = build_client(broker_url, timeout_s=WAIT_S + 5.0)
        self._name = name
        self._act = act

    def run(self, stop: threading.Event) -> None:
        """Take wake-ups until `stop` is set; what has begun by then is done."""
        while not stop.is_set():
            try:
                found = self._client.brpop([self._name], timeout=WAIT_S)
            except (redis.RedisError, OSError) as error:
                logger.warning("fast_lane_failed", error=type(error).__name__)
                stop.wait(RETRY_S)
                continue
            if found is None:
                continue
            try:
                self._act(str(found[1]))
            except Exception:
                # The edge of a thread that must not end: nobody else serves this lane.
                logger.exception("fast_lane_failed")
        self._client.close()


@contextmanager
def serving(
    runs: Iterable[Callable[[threading.Event], None]], stop: threading.Event
) -> Iterator[None]:
    """Run each in a thread of its own; the end of the block waits for what they have begun."""
    threads = [threading.Thread(target=run, args=(stop,), daemon=True) for run in runs]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()
