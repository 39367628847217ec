"""
The Celery application: its settings, and those that it refuses.

SQL is the truth and Redis is the wire: a message carries no data that SQL lacks, so a lost one costs
seconds and a doubled one nothing. The settings follow from that, and from measured losses: a permit
is acknowledged when it arrives, since its work is found again in SQL; what runs on the cpu queue is
acknowledged when it is done. There are no results, no schedules, no priorities and no remote control
in the broker: SQL has them.

Tasks are known by their names alone (`TaskName`), so whoever sends one imports no task.
"""

from collections.abc import Mapping
from enum import StrEnum
from typing import Any, Final

from celery import Celery
from kombu import Exchange, Queue

from tasks.config import Config
from tasks.errors import UnsafeSettingError

CPU_QUEUE: Final = "darkroom.cpu"
GPU_QUEUE_PREFIX: Final = "darkroom.gpu."
GPU_POOL: Final = "threads"


class TaskName(StrEnum):
    """What can be sent. Arguments are strings: ids in hex, a model's name."""

    EXPAND = "darkroom.expand"
    RUN_CHUNK = "darkroom.run_chunk"
    FINISH = "darkroom.finish"
    SWEEP = "darkroom.sweep"
    SUBMIT = "darkroom.submit"


def build_app(config: Config, broker_url: str) -> Celery:
    """An application without tasks: workers add theirs, senders need none."""
    app = Celery("darkroom", broker=broker_url, set_as_current=False)
    app.conf.update(
        task_serializer="json",
        accept_content=["json"],
        result_backend=None,
        task_ignore_result=True,
        task_acks_late=False,  # permits; the tasks of the cpu queue say otherwise themselves
        task_reject_on_worker_lost=True,
        task_default_queue=CPU_QUEUE,
        task_queues=[build_queue(CPU_QUEUE)],
        worker_prefetch_multiplier=1,
        worker_disable_prefetch=True,  # a busy worker holds no permit that an idle one could use
        worker_enable_remote_control=False,
        worker_hijack_root_logger=False,
        worker_send_task_events=False,
        worker_cancel_long_running_tasks_on_connection_loss=False,  # leases make it irrelevant
        worker_soft_shutdown_timeout=0.0,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,  # for ever: a worker outlives its broker
        broker_transport_options={
            "visibility_timeout": config.visibility_timeout_s,
            "unacked_restore_interval": 5,
            "unacked_restore_throttle": 1,  # with the default of 10, recovery waits 100 s longer
            "socket_keepalive": True,
            "socket_connect_timeout": 5.0,
            "socket_timeout": 30.0,
            "health_check_interval": 10,
        },
        enable_utc=True,
        timezone="UTC",
    )
    return app


def build_queue(name: str) -> Queue:
    """
    A queue that messages reach by its own name, through the default exchange.

    Any other exchange keeps its bindings in Redis, and a broker that was emptied would drop what is
    sent to a queue whose binding is gone.
    """
    return Queue(name, Exchange(""), routing_key=name)


def name_gpu_queue(model: str) -> str:
    return GPU_QUEUE_PREFIX + model


def refuse_unsafe(app: Celery, pool: str, env: Mapping[str, str], *, is_gpu: bool) -> None:
    """
    Stop a start that is known to lose work.

    Args:
        pool: Celery's word for how tasks run: threads, prefork, solo, …
        env: the process's environment.

    Raises:
        UnsafeSettingError: naming the setting, and what it would cost.
    """
    problems = list(_find_unsafe(app.conf, pool, env, is_gpu=is_gpu))
    if problems:
        raise UnsafeSettingError(" ".join(problems))


def _find_unsafe(conf: Any, pool: str, env: Mapping[str, str], *, is_gpu: bool) -> Any:
    if is_gpu and pool != GPU_POOL:
        why = {
            "solo": "a running task blocks the connection to the broker, and a stop loses it",
            "prefork": "a process that is forked cannot use the device, and reloads the weights",
        }.get(pool, "it was never tried with an engine")
        yield f"The pool {pool!r} is refused for a GPU worker: {why}. Use {GPU_POOL!r}."
    if env.get("REMAP_SIGTERM"):
        yield (
            "REMAP_SIGTERM is refused: a stop would lose the running task. Unset it; a worker "
            "drains on SIGTERM by itself."
        )
    if conf.worker_soft_shutdown_timeout:
        yield (
            "worker_soft_shutdown_timeout is refused: it loses the running task or does nothing. "
            "Use DARKROOM_DRAIN_S."
        )
    if set(conf.accept_content) != {"json"} or conf.task_serializer != "json":
        yield (
            "Serializers other than JSON are refused: whoever writes to the broker could run "
            "anything. Leave task_serializer and accept_content as they are."
        )
    if conf.result_backend:
        yield "A result backend is refused: results are in the database. Unset result_backend."
    if not conf.worker_disable_prefetch or conf.worker_prefetch_multiplier != 1:
        yield (
            "Prefetching is refused: a busy worker would keep permits from idle ones. Leave "
            "worker_disable_prefetch and worker_prefetch_multiplier as they are."
        )
    if is_gpu and (conf.task_time_limit or conf.task_soft_time_limit):
        yield "Time limits are refused on a GPU worker: the pool drops them in silence."
