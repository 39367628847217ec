"""
What nothing needs any more is removed: blobs, and chats that ended long ago.

Blobs are those that no row ever named, because a process died between the blob and its row, and those
of files that were deleted, have expired, or held a request that is answered.

A blob younger than the grace period stays whatever SQL says: its row may be on its way. One process
collects at a time; two that do it harm nothing.
"""

import threading
from itertools import islice
from typing import Final

import structlog

from storage import chats, files, locks
from storage.errors import StorageError
from tasks.stores import Stores

logger = structlog.get_logger(__name__)

LOCK: Final = "collect"
PAGE: Final = 500
REST_S: Final = 0.05
"""Between two pages of chats: who else writes to SQLite has its turn."""

FOLLOWER_S: Final = 60.0
"""How often a process looks whether nobody collects any more."""


class Collector:
    """
    Args:
        grace_s: see `DARKROOM_BLOB_GRACE_S`.
        chat_lifetime_s: see `DARKROOM_CHAT_LIFETIME_S`.
        every_s: from the end of one round to the beginning of the next.
    """

    def __init__(
        self, stores: Stores, *, grace_s: float, chat_lifetime_s: float, every_s: float
    ) -> None:
        self._stores = stores
        self._grace_s = grace_s
        self._chat_lifetime_s = chat_lifetime_s
        self._every_s = every_s

    def run(self, stop: threading.Event) -> None:
        """Collect now and then until `stop` is set, if no other process does."""
        while not stop.is_set():
            try:
                with locks.hold(self._stores.database, LOCK) as is_ours:
                    while is_ours and not stop.is_set():
                        self.remove_chats(stop)  # first: they need no blob store
                        self.collect(stop)
                        stop.wait(self._every_s)
            except StorageError as error:
                logger.warning("collect_failed", error=error.code)
            except Exception:
                # The edge of a thread that must not end: the store would fill for ever.
                logger.exception("collect_failed")
            stop.wait(FOLLOWER_S)

    def collect(self, stop: threading.Event | None = None) -> int:
        """
        Look once at every blob. Returns how many were removed, half-written ones included.

        Raises:
            StorageError: the next round begins anew.
        """
        num_removed = self._stores.blobs.sweep(older_than_s=self._grace_s)
        keys = self._stores.blobs.list_keys(older_than_s=self._grace_s)
        while page := list(islice(keys, PAGE)):
            with self._stores.database.read() as session:
                unneeded = files.find_unneeded(session, page, grace_s=self._grace_s)
            for key in unneeded:
                self._stores.blobs.delete(key)
                num_removed += 1
            if stop is not None and stop.is_set():
                break
        if num_removed:
            logger.info("blobs_removed", num_blobs=num_removed)
        return num_removed

    def remove_chats(self, stop: threading.Event) -> int:
        """
        Remove the chats whose life is over, by the page. Returns how many.

        Raises:
            StorageError: the next round goes on.
        """
        num_removed = 0
        while not stop.wait(REST_S):
            with self._stores.database.write() as session:
                num_gone = chats.remove_page(session, older_than_s=self._chat_lifetime_s)
            num_removed += num_gone
            if not num_gone:
                break
        if num_removed:
            logger.info("chats_removed", num_chats=num_removed)
        return num_removed
