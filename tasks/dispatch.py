"""
Send a task by its name, after the commit and never before.

A send is a hint: it may fail in silence, because the sweeper finds in SQL whatever was not sent. So
it has little time and never raises for the broker's sake. Nothing here knows what a task does: the
API sends through this file and loads no engine.
"""

import math
from collections.abc import Mapping
from typing import Any, Final

import structlog
from kombu.exceptions import OperationalError
from redis.exceptions import RedisError

from storage.ids import JobId
from tasks.app import CPU_QUEUE, TaskName, build_app, build_queue, name_gpu_queue
from tasks.broker import build_client
from tasks.config import Config
from tasks.fast import EXPAND_LIST, MAX_WAITING, name_permit_list

logger = structlog.get_logger(__name__)

MAX_PERMITS_AT_ONCE: Final = 256
"""More than all workers together hold; the sweeper sends the rest when these are used up."""


class Dispatcher:
    """One process's way to send. Threads share it."""

    def __init__(self, config: Config, broker_url: str) -> None:
        self._app = build_app(config, broker_url)
        self._client = build_client(broker_url, timeout_s=config.send_timeout_s)
        self._chunk_items = config.chunk_items
        self._app.conf.broker_transport_options = {
            "socket_connect_timeout": config.send_timeout_s,
            "socket_timeout": config.send_timeout_s,
            "socket_keepalive": True,
            "max_retries": 0,
            "connect_retries_timeout": config.send_timeout_s,
        }

    def send_expand(self, job: JobId, *, force: bool = False) -> bool:
        """
        A job was made: turn its lines into items. Returns whether the broker took it.

        Args:
            force: do not wait for another process that is at it: it may be frozen.
        """
        return self._send(TaskName.EXPAND, CPU_QUEUE, {"job": job.hex, "force": force})

    def send_fast_expand(self, job: JobId) -> bool:
        """As `send_expand`, for a job of the fast lane: it waits behind no other."""
        return self._wake(EXPAND_LIST, job.hex)

    def send_fast_permit(self, model: str) -> bool:
        """Beside the permit in the model's queue: whichever is taken first does the work."""
        return self._wake(name_permit_list(model), "1")

    def send_finish(self, job: JobId, *, force: bool = False) -> bool:
        """A job's last item has ended: write its artifacts. Arguments as in `send_expand`."""
        return self._send(TaskName.FINISH, CPU_QUEUE, {"job": job.hex, "force": force})

    def send_sweep(self) -> bool:
        """Something may be stuck: look now instead of at the next beat."""
        return self._send(TaskName.SWEEP, CPU_QUEUE, {})

    def send_permits_for(self, model: str, num_items: int) -> int:
        """As many permits as so many items make chunks. Returns how many the broker took."""
        return self.send_permits(model, math.ceil(num_items / self._chunk_items))

    def send_permits(self, model: str, count: int) -> int:
        queue = name_gpu_queue(model)
        for number in range(min(count, MAX_PERMITS_AT_ONCE)):
            if not self._send(TaskName.RUN_CHUNK, queue, {"model": model}):
                return number
        return min(count, MAX_PERMITS_AT_ONCE)

    def count_queued(self, model: str) -> int | None:
        """Permits that wait for a worker; None if the broker does not answer."""
        try:
            return int(self._client.llen(name_gpu_queue(model)))
        except (RedisError, OSError):
            return None

    def take_permit(self, model: str) -> bool:
        """
        Take a permit that waits, for a thread that has just finished with one.

        Celery would hand it the next one too, but only when its loop looks again, up to a second
        later. A permit says nothing beyond its queue, so the message is taken off and not read.
        """
        try:
            return self._client.rpop(name_gpu_queue(model)) is not None
        except (RedisError, OSError):
            return False

    def close(self) -> None:
        self._app.close()
        self._client.close()

    def _wake(self, name: str, word: str) -> bool:
        try:
            with self._client.pipeline(transaction=False) as pipeline:
                pipeline.lpush(name, word)
                pipeline.ltrim(name, 0, MAX_WAITING - 1)
                pipeline.execute()
        except (RedisError, OSError) as error:
            logger.warning("send_failed", queue=name, error=type(error).__name__)
            return False
        return True

    def _send(self, name: TaskName, queue: str, arguments: Mapping[str, Any]) -> bool:
        try:
            to: Any = build_queue(queue)  # the stubs know a queue's name only
            self._app.send_task(name.value, kwargs=dict(arguments), queue=to, retry=False)
        except (OperationalError, RedisError, OSError) as error:
            logger.warning("send_failed", task=name.value, queue=queue, error=type(error).__name__)
            return False
        return True
