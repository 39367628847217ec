"""
Producers on Redis: entries of the stream `darkroom:ingest` become jobs.

    XADD darkroom:ingest * submission '{"requests": [...], "idempotency_key": "mine-1"}'

Unlike a Celery message, an entry stays in the group's list of pending ones until we acknowledge it,
and that comes after the commit alone; one whose consumer died is claimed by another. So it makes its
job at least once, and by its key exactly once: an entry without a key has its own id for one.
What cannot be read goes to `darkroom:ingest:dead` with a reason.
"""

import contextlib
import json
import threading
from collections.abc import Iterable
from typing import Any, Final

import redis
import structlog

from storage.errors import IdempotencyConflictError, NotFoundError, StorageError
from tasks.broker import build_client
from tasks.config import Config
from tasks.dispatch import Dispatcher
from tasks.errors import BadSubmissionError
from tasks.stores import Stores
from tasks.submit import parse_submission, submit

logger = structlog.get_logger(__name__)

STREAM: Final = "darkroom:ingest"
DEAD: Final = "darkroom:ingest:dead"
GROUP: Final = "darkroom"
FIELD: Final = "submission"

BLOCK_MS: Final = 1000
PAGE: Final = 16
MAX_DEAD: Final = 10_000
RETRY_S: Final = 1.0

Entry = tuple[str, dict[str, str] | None]


class StreamIngest:
    """One consumer of the group."""

    def __init__(
        self,
        stores: Stores,
        dispatcher: Dispatcher,
        config: Config,
        broker_url: str,
        *,
        consumer: str,
    ) -> None:
        self._stores = stores
        self._dispatcher = dispatcher
        self._idle_ms = int(config.ingest_idle_s * 1000)
        self._client = build_client(broker_url, timeout_s=2 * BLOCK_MS / 1000 + 5.0)
        self._consumer = consumer
        self._claim_from = "0-0"

    def run(self, stop: threading.Event) -> None:
        """Take entries until `stop` is set."""
        while not stop.is_set():
            try:
                self.take_page()
            except redis.ResponseError:  # no such group: a new broker, or one that was emptied
                self._make_group(stop)
            except (redis.RedisError, OSError) as error:
                logger.warning("ingest_failed", error=type(error).__name__)
                stop.wait(RETRY_S)
            except StorageError as error:  # what was taken stays pending, and is claimed again
                logger.warning("ingest_failed", error=error.code)
                stop.wait(RETRY_S)
            except Exception:
                # The edge of a thread that must not end: the stream would grow for ever.
                logger.exception("ingest_failed")
                stop.wait(RETRY_S)
        with contextlib.suppress(redis.RedisError, OSError):
            self._client.close()

    def _make_group(self, stop: threading.Event) -> None:
        try:
            self._client.xgroup_create(STREAM, GROUP, id="0", mkstream=True)
        except redis.ResponseError as error:
            if "BUSYGROUP" not in str(error):
                logger.warning("ingest_failed", error=type(error).__name__)
                stop.wait(RETRY_S)
        except (redis.RedisError, OSError):
            stop.wait(RETRY_S)

    def take_page(self) -> int:
        """
        Take the entries of silent consumers first, then new ones; wait a second where there is none.

        Returns:
            How many were taken.

        Raises:
            redis.RedisError, StorageError: entries that were taken stay pending.
        """
        orphans = self._claim()
        new: list[Entry] = []
        if not orphans:
            answer = self._client.xreadgroup(
                GROUP, self._consumer, {STREAM: ">"}, count=PAGE, block=BLOCK_MS
            )
            new = _entries_of(answer)
        entries = orphans or new
        failed: Exception | None = None
        for entry_id, fields in entries:
            try:
                self._take(entry_id, fields)
            except redis.RedisError:
                raise
            except Exception as error:  # noqa: BLE001 - raised below: one must not hold up the rest
                failed = error
        if failed is not None:
            raise failed
        return len(entries)

    def _claim(self) -> list[Entry]:
        claimed = self._client.xautoclaim(
            STREAM, GROUP, self._consumer, self._idle_ms, self._claim_from, count=PAGE
        )
        self._claim_from = str(claimed[0])
        return list(claimed[1])

    def _take(self, entry_id: str, fields: dict[str, str] | None) -> None:
        if fields is not None:  # else it was deleted before it was claimed
            try:
                given = json.loads(fields.get(FIELD, ""))
                submission = parse_submission(given, default_key=f"stream-{entry_id}")
                submit(self._stores, self._dispatcher, submission)
            except ValueError as error:  # no JSON, or no submission
                reason = str(error) if isinstance(error, BadSubmissionError) else "not JSON"
                bury(self._client, fields.get(FIELD, ""), f"stream-{entry_id}", reason)
            except (IdempotencyConflictError, NotFoundError) as error:
                bury(self._client, fields.get(FIELD, ""), f"stream-{entry_id}", error.code)
        self._client.xack(STREAM, GROUP, entry_id)
        self._client.xdel(STREAM, entry_id)


def bury(client: redis.Redis, submission: str, origin: str, reason: str) -> None:
    """Keep what cannot become a job, with the reason, where its producer may look."""
    logger.warning("submission_buried", origin=origin, reason=reason)
    client.xadd(
        DEAD,
        {FIELD: submission[:65_536], "origin": origin, "reason": reason[:1024]},
        maxlen=MAX_DEAD,
        approximate=True,
    )


def _entries_of(answer: Any) -> list[Entry]:
    """redis-py answers with a list of pairs under protocol 2, and with a dict under 3."""
    if not answer:
        return []
    groups: Iterable[Any] = answer.values() if isinstance(answer, dict) else (a[1] for a in answer)
    found: list[Entry] = []
    for group in groups:
        nested = group[0] if group and isinstance(group[0], list) else group
        found += [(str(entry[0]), entry[1]) for entry in nested]
    return found
