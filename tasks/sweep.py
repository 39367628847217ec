"""
Repair what a crash or a lost message left. Any process may sweep; an advisory lock picks a leader.

What it finds is in SQL alone: leases that are over, items that wait while no permit does, jobs that
were never expanded or never finished, windows that ended, cancelled jobs with open items. Whatever
it does is safe to do twice, so a process that has not led for long sweeps once all the same: the
leader may be frozen.
"""

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Final, Literal

import structlog

from storage import items, jobs, locks
from storage.errors import StorageError
from storage.ids import JobId
from storage.states import ItemState
from tasks.config import Config
from tasks.dispatch import MAX_PERMITS_AT_ONCE, Dispatcher
from tasks.stores import Stores

logger = structlog.get_logger(__name__)

LOCK: Final = "sweep"
MAX_PAGES: Final = 100
"""Of each kind in one sweep: the others have their turn, and the next sweep goes on."""

RESEND_MAX_S: Final = 300.0
FORCE_AFTER_S: Final = 600.0
"""After which a job that others seem to work on is taken from them."""

Kind = Literal["expand", "finish"]

_UNREAD: Final = {
    "code": "not_read_in_time",
    "message": "The input could not be read before the completion window ended. Hand it in again.",
    "param": None,
    "line": None,
}


@dataclass(slots=True)
class _Sent:
    first_s: float
    next_s: float
    wait_s: float


class Sweeper:
    """
    One process's sweeper. It remembers what it has sent, so as not to send it at each beat.

    Args:
        read_clock: seconds of this process, as `time.monotonic`.
    """

    def __init__(
        self,
        stores: Stores,
        dispatcher: Dispatcher,
        config: Config,
        *,
        read_clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._read_clock = read_clock
        self._stores = stores
        self._dispatcher = dispatcher
        self._config = config
        self._sent: dict[tuple[Kind, JobId], _Sent] = {}

    def run(self, stop: threading.Event) -> None:
        """Sweep until `stop` is set: as the leader at each beat, otherwise now and then."""
        followed_since = time.monotonic()
        while not stop.is_set():
            try:
                with locks.hold(self._stores.database, LOCK) as is_leader:
                    while is_leader and not stop.is_set():
                        self.sweep()
                        stop.wait(self._config.sweep_s)
                # Leases must not wait for a frozen leader much longer than they last.
                if time.monotonic() - followed_since > self._config.lease_s / 2:
                    self.sweep()
                    followed_since = time.monotonic()
            except StorageError as error:
                logger.warning("sweep_failed", error=error.code)
            except Exception:
                # The edge of a thread that must not end: nothing else repairs anything.
                logger.exception("sweep_failed")
            stop.wait(self._config.sweep_s)

    def sweep(self) -> None:
        """
        Look once at everything.

        Raises:
            StorageError: the next sweep goes on.
        """
        self._expire_leases()
        self._reject_unread()
        self._end_items(self._list_past_window, ItemState.EXPIRED)
        self._end_items(self._list_cancelling, ItemState.CANCELLED)
        self._send_again("expand", self._list_unexpanded(), self._dispatcher.send_expand)
        self._send_again("finish", self._list_ended(), self._dispatcher.send_finish)
        self._send_permits()

    def _expire_leases(self) -> None:
        for _ in range(MAX_PAGES):
            with self._stores.database.write() as session:
                outcome = items.expire_leases(session)
            if not outcome.items:
                return
            logger.warning("leases_expired", num_items=len(outcome.items))
            for job in outcome.ended_jobs:
                self._dispatcher.send_finish(job)

    def _reject_unread(self) -> None:
        """No job stays for ever, not even one whose lines we cannot read."""
        with self._stores.database.read() as session:
            unread = jobs.list_unread(session)
        for job in unread:
            with self._stores.database.write() as session:
                is_mine = jobs.reject(session, job, [_UNREAD])
            if is_mine:
                logger.error("job_never_expanded", job=str(job))

    def _end_items(self, list_jobs: Callable[[], list[JobId]], state: ItemState) -> None:
        for job in list_jobs():
            for _ in range(MAX_PAGES):
                with self._stores.database.write() as session:
                    outcome = items.end_page(session, job, state)
                if not outcome.items:
                    break
                logger.info(
                    "items_ended", job=str(job), state=str(state), num_items=len(outcome.items)
                )
                if outcome.ended_jobs:
                    self._dispatcher.send_finish(job)

    def _send_again(self, kind: Kind, found: list[JobId], send: Callable[..., bool]) -> None:
        """
        Send what has waited since the sweep before, at growing intervals.

        The first message is on its way or being worked on more often than it is lost.
        """
        now = self._read_clock()
        for job in found:
            sent = self._sent.setdefault(
                (kind, job), _Sent(now, now + self._config.sweep_s, self._config.sweep_s)
            )
            if now >= sent.next_s:
                force = now - sent.first_s > FORCE_AFTER_S
                if not send(job, force=force):
                    return  # no broker: the next sweep finds it again
                logger.warning("sent_again", task=kind, job=str(job), force=force)
                sent.wait_s = min(2 * sent.wait_s, RESEND_MAX_S)
                sent.next_s = now + sent.wait_s
        there = set(found)
        for key in [key for key in self._sent if key[0] == kind and key[1] not in there]:
            del self._sent[key]

    def _send_permits(self) -> None:
        """As many as make up for those that were lost: what waits, less what is queued."""
        with self._stores.database.read() as session:
            waiting = items.count_waiting(
                session, limit=MAX_PERMITS_AT_ONCE * self._config.chunk_items
            )
        for model, num_items in waiting.items():
            queued = self._dispatcher.count_queued(model)
            if queued is None:
                return  # no broker: the next sweep finds it again
            wanted = min(math.ceil(num_items / self._config.chunk_items), MAX_PERMITS_AT_ONCE)
            if wanted > queued:
                self._dispatcher.send_permits(model, wanted - queued)

    def _list_past_window(self) -> list[JobId]:
        with self._stores.database.read() as session:
            return jobs.list_past_window(session)

    def _list_cancelling(self) -> list[JobId]:
        with self._stores.database.read() as session:
            return jobs.list_cancelling(session)

    def _list_unexpanded(self) -> list[JobId]:
        return self._list_all(partial(jobs.list_unexpanded, older_than_s=self._config.sweep_s))

    def _list_ended(self) -> list[JobId]:
        return self._list_all(jobs.list_ended)

    def _list_all(self, list_page: Callable[..., list[JobId]]) -> list[JobId]:
        """Page by page: jobs that cannot be helped, however many, hide no later one."""
        found: list[JobId] = []
        for _ in range(MAX_PAGES):
            with self._stores.database.read() as session:
                page = list_page(session, after=found[-1] if found else None)
            found += page
            if len(page) < jobs.PAGE:
                break
        return found
