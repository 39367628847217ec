"""
Waiting for a job to change, for as many clients as like to wait.

One loop a process asks SQL for the versions of all jobs that somebody waits for, in one statement:
a thousand waiting clients cost what one costs.
"""

import asyncio
from collections import defaultdict
from contextlib import suppress
from typing import Final

import structlog
from starlette.concurrency import run_in_threadpool

from storage import jobs
from storage.db import Database
from storage.errors import StorageError
from storage.ids import JobId

log = structlog.get_logger()

PERIOD_S: Final = 0.1
PERIOD_AFTER_ERROR_S: Final = 1.0


class Watcher:
    """Belongs to one event loop. The loop runs only while somebody waits."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._waiting: defaultdict[JobId, set[tuple[int, asyncio.Event]]] = defaultdict(set)
        self._task: asyncio.Task[None] | None = None
        self._polls: set[asyncio.Event] = set()
        self._are_polls_let_go = False

    async def wait(
        self, job: JobId, version: int, timeout_s: float, *, is_poll: bool = False
    ) -> None:
        """
        Return when the job has another version than this, or the time is over.

        Args:
            is_poll: return also when the server is told to stop: who polls can ask again elsewhere.
        """
        if is_poll and self._are_polls_let_go:
            return
        waiter = (version, asyncio.Event())
        if is_poll:
            self._polls.add(waiter[1])
        self._waiting[job].add(waiter)
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._watch())
        try:
            with suppress(TimeoutError):
                await asyncio.wait_for(waiter[1].wait(), timeout_s)
        finally:
            self._polls.discard(waiter[1])
            self._waiting[job].discard(waiter)
            if not self._waiting[job]:
                del self._waiting[job]

    def let_polls_go(self) -> None:
        """Send back who polls: the server stops, and would wait for them."""
        self._are_polls_let_go = True
        for changed in self._polls:
            changed.set()

    async def close(self) -> None:
        """Send everybody back who waits: the server stops."""
        for waiters in self._waiting.values():
            for _, changed in waiters:
                changed.set()
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task

    async def _watch(self) -> None:
        while self._waiting:
            period_s = PERIOD_S
            try:
                versions = await run_in_threadpool(self._read, list(self._waiting))
            except StorageError as error:
                # Nobody is told: whoever waits asks again at the end of its time, and hears then.
                log.warning("watch_failed", code=error.code)
                period_s = PERIOD_AFTER_ERROR_S
            else:
                for job, waiters in self._waiting.items():
                    for version, changed in waiters:
                        if versions.get(job) != version:
                            changed.set()
            await asyncio.sleep(period_s)

    def _read(self, watched: list[JobId]) -> dict[JobId, int]:
        with self._database.read() as session:
            return jobs.read_versions(session, watched)
