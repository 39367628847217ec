"""
A worker's start and stop: one engine and the permits of its model, or the tasks of the cpu queue.

A GPU worker is one Celery worker with a pool of threads, a few permits in flight. On SIGTERM it
drains: what the engine has begun goes on until the deadline, everything else is given back at once,
and at the deadline the rest, all without a charge. Celery waits for running tasks without limit, so
a thread of ours watches the clock and ends the process. A second SIGTERM is the deadline. Before
Celery handles signals nothing is leased, and one ends the process at once (`tasks.stopping`).

The sweeper runs in a thread of every worker: what a lost message left behind is found again as long
as any process lives.
"""

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from enum import IntEnum
from functools import partial
from typing import TYPE_CHECKING, Any, Final
from uuid import UUID

import redis
import structlog
from celery import Celery, Task, signals
from celery.exceptions import Reject

from media.addresses import AddressRules
from media.folder import FolderReader
from media.limits import IMAGE_LIMITS, VIDEO_LIMITS
from media.s3_url import parse_open_prefix
from storage.errors import IdempotencyConflictError, NotFoundError, StorageError
from storage.ids import JobId
from tasks.app import (
    CPU_QUEUE,
    GPU_POOL,
    TaskName,
    build_app,
    build_queue,
    name_gpu_queue,
    refuse_unsafe,
)
from tasks.broker import build_client, refuse_unsafe_broker
from tasks.collect import Collector
from tasks.config import Config
from tasks.dispatch import Dispatcher
from tasks.engines import EnginePort
from tasks.errors import BadSettingError, BadSubmissionError
from tasks.expand import expand
from tasks.fast import EXPAND_LIST, FastLane, name_permit_list, serving
from tasks.finish import finish
from tasks.hosts import HELD_S, RedisLimits
from tasks.ingest import StreamIngest, bury
from tasks.prefetch import NUM_FAST_PLACES, NUM_PLACES, Fetch, Preparer, refuse_to_fetch
from tasks.run import GIVE_BACK_S, Runner
from tasks.stopping import leave_if_told, leaving_at_signal
from tasks.stores import Stores, open_stores
from tasks.submit import parse_submission, submit
from tasks.sweep import Sweeper

if TYPE_CHECKING:
    from media.buckets import BucketConfig
    from media.fetch import FetchConfig

logger = structlog.get_logger(__name__)

CPU_THREADS: Final = 4
FAST_CPU_THREADS: Final = 2
FAST_GPU_THREADS: Final = 4
"""Chunks of the fast lane that are in flight beside the others."""

FETCH_THREADS: Final = NUM_PLACES + NUM_FAST_PLACES
"""They only wait: for hosts that are slow, and for room."""

EXIT_GRACE_S: Final = 1.0
"""From the deadline to the worker's last act, whatever its threads are doing."""

IDLE_S: Final = 30.0

CLOSE_S: Final = 10.0
"""How long Celery may take to close when no item is left."""

BUSY_S: Final = 1.0


class ExitCode(IntEnum):
    """Why a worker ended; a supervisor restarts it after any but the first."""

    DRAINED = 0
    ENGINE_LOST = 70
    DEADLINE = 75


def run_gpu_worker(
    config: Config,
    broker_url: str,
    engine: EnginePort,
    model: str,
    *,
    env: dict[str, str],
    fetch: Fetch | None = None,
) -> ExitCode:
    """
    Serve one model's permits until the process is told to stop. Blocks, in the main thread.

    Args:
        env: the process's environment, where some settings hide that lose work.
        fetch: in the place of `open_fetch`'s.

    Raises:
        BadSettingError, ServedOtherwiseError: it does not start.
    """
    with leaving_at_signal(), ExitStack() as open_things:
        config.refuse_other_limits(model, engine.limits)
        app = build_app(config, broker_url)
        refuse_unsafe(app, GPU_POOL, env, is_gpu=True)
        refuse_unsafe_broker(broker_url)
        stores = open_stores(config, num_threads=config.chunks_in_flight + FAST_GPU_THREADS + 4)
        open_things.callback(stores.close)
        dispatcher = Dispatcher(config, broker_url)
        open_things.callback(dispatcher.close)
        pool = ThreadPoolExecutor(FETCH_THREADS, thread_name_prefix="fetch")
        open_things.callback(pool.shutdown, wait=False, cancel_futures=True)
        fetch = fetch or open_things.enter_context(open_fetch(config, env, broker_url))
        runner = Runner(
            stores,
            dispatcher,
            config,
            engine,
            Preparer(
                stores,
                model,
                engine.limits,
                engine.defaults,
                fetch,
                pool,
                engine.measure_clip,
            ),
            worker=name_worker(),
            on_engine_lost=lambda: os._exit(ExitCode.ENGINE_LOST),
        )
        app.conf.task_queues = [build_queue(name_gpu_queue(model))]
        _add_permit_task(app, runner)
        lanes = [
            FastLane(broker_url, name_permit_list(model), lambda _: runner.run_chunk(is_fast=True))
            for _ in range(FAST_GPU_THREADS)
        ]
        runs = [lane.run for lane in lanes] + [partial(look_when_idle, runner)]

        def begin() -> None:
            leasing.enter_context(serving(runs, runner.is_draining))
            logger.info("worker_ready", model=model, queue=name_gpu_queue(model))

        runner.start()
        drain = Drain(runner, config.drain_s)
        try:
            with _sweeping(stores, dispatcher, config), ExitStack() as leasing:
                _serve(app, config.chunks_in_flight, begin, drain.on_signal)
        finally:
            drain.finish()
            runner.stop()
            is_all_back = give_back(runner)
        logger.info(
            "worker_ended", num_completed=runner.num_completed, num_failed=runner.num_failed
        )
        return ExitCode.DRAINED if is_all_back else ExitCode.DEADLINE


def run_cpu_worker(config: Config, broker_url: str, *, env: dict[str, str]) -> ExitCode:
    """
    Serve the cpu queue and the stream of submissions until the process is told to stop.

    Raises:
        UnsafeSettingError: it does not start.
    """
    with leaving_at_signal(), ExitStack() as open_things:
        app = build_app(config, broker_url)
        refuse_unsafe(app, GPU_POOL, env, is_gpu=False)
        refuse_unsafe_broker(broker_url)
        stores = open_stores(config, num_threads=CPU_THREADS + FAST_CPU_THREADS + 4)
        open_things.callback(stores.close)
        dispatcher = Dispatcher(config, broker_url)
        open_things.callback(dispatcher.close)
        _add_cpu_tasks(app, stores, dispatcher, config, broker_url)
        ingest = StreamIngest(stores, dispatcher, config, broker_url, consumer=name_worker())

        def expand_fast(job: str) -> None:
            with _logged(TaskName.EXPAND, job=job):
                expand(stores, dispatcher, config, JobId(UUID(job)))

        collector = Collector(
            stores,
            grace_s=config.blob_grace_s,
            chat_lifetime_s=config.chat_lifetime_s,
            every_s=config.collect_s,
        )
        lanes = [FastLane(broker_url, EXPAND_LIST, expand_fast) for _ in range(FAST_CPU_THREADS)]

        def begin() -> None:
            logger.info("worker_ready", queue=CPU_QUEUE)

        with (
            _sweeping(stores, dispatcher, config),
            _in_thread("ingest", ingest.run),
            _in_thread("collector", collector.run),
            serving([lane.run for lane in lanes], threading.Event()),
        ):
            _serve(app, CPU_THREADS, begin, lambda: None)
    return ExitCode.DRAINED


def look_when_idle(runner: Runner, stop: threading.Event) -> None:
    """
    Look for work without a permit, now and then, when there is none in hand.

    So a broker that is away, or a connection to it that is dead and does not know it, costs time only.
    """
    while not stop.wait(IDLE_S):
        while not runner.num_in_flight and runner.run_chunk():
            pass


def name_worker() -> str:
    return f"{socket.gethostname()[:64]}-{os.getpid()}-{secrets.token_hex(3)}"


# The tasks themselves: thin, and an error of one is logged, for SQL knows what is still to be done.


def _add_permit_task(app: Celery, runner: Runner) -> None:
    @app.task(name=TaskName.RUN_CHUNK.value, acks_late=False)
    def run_chunk(model: str) -> None:
        del model  # the queue has said it; one that was sent to the wrong queue finds nothing
        with _logged(TaskName.RUN_CHUNK):
            runner.run_permits()


def _add_cpu_tasks(
    app: Celery, stores: Stores, dispatcher: Dispatcher, config: Config, broker_url: str
) -> None:
    sweeper = Sweeper(stores, dispatcher, config)

    @app.task(name=TaskName.EXPAND.value, acks_late=True)
    def expand_job(job: str, *, force: bool = False) -> None:
        with _logged(TaskName.EXPAND, job=job):
            expand(stores, dispatcher, config, JobId(UUID(job)), force=force)

    @app.task(name=TaskName.FINISH.value, acks_late=True)
    def finish_job(job: str, *, force: bool = False) -> None:
        with _logged(TaskName.FINISH, job=job):
            finish(stores, JobId(UUID(job)), force=force)

    @app.task(name=TaskName.SWEEP.value, acks_late=True)
    def sweep() -> None:
        with _logged(TaskName.SWEEP):
            sweeper.sweep()

    @app.task(name=TaskName.SUBMIT.value, acks_late=True, bind=True)
    def submit_job(self: "Task[Any, Any]", /, **given: Any) -> None:
        _submit(stores, dispatcher, broker_url, given, f"task-{self.request.id}")


def _submit(
    stores: Stores, dispatcher: Dispatcher, broker_url: str, given: dict[str, Any], origin: str
) -> None:
    """SQL does not know this one yet: it is acknowledged when it does, or put back."""
    try:
        try:
            submit(stores, dispatcher, parse_submission(given, default_key=origin))
        except (BadSubmissionError, IdempotencyConflictError, NotFoundError) as error:
            reason = str(error) if isinstance(error, BadSubmissionError) else error.code
            with build_client(broker_url) as client:
                bury(client, json.dumps(given), origin, reason)
    except Exception as error:
        # Whatever it is: Celery would acknowledge it, and with that it would be lost.
        is_known = isinstance(error, StorageError | redis.RedisError)
        code = error.code if isinstance(error, StorageError) else type(error).__name__
        logger.warning("submission_put_back", origin=origin, error=code, exc_info=not is_known)
        time.sleep(BUSY_S)  # or it would come back at once, again and again
        raise Reject(code, requeue=True) from error


@contextmanager
def _logged(task: TaskName, **facts: str) -> Iterator[None]:
    with structlog.contextvars.bound_contextvars(task=task.value, **facts):
        try:
            yield
        except StorageError as error:
            logger.warning("task_failed", error=error.code)
        except Exception:
            # The edge of a task: Celery would only log it too. The sweeper sends it again.
            logger.exception("task_failed")


# Around Celery


def _serve(
    app: Celery, num_threads: int, on_start: Callable[[], None], on_stop: Callable[[], None]
) -> None:
    """
    Run a Celery worker in this thread until a signal ends it.

    Args:
        on_start: called when Celery's handlers stand, and no sooner: whoever leases before them would
            be killed without a drain.
        on_stop: runs in the handler.
    """
    worker_class: Any = app.Worker

    class Worker(worker_class):  # type: ignore[misc]
        def on_start(self) -> None:
            super().on_start()
            leave_if_told()
            on_start()

    def stop(**_: Any) -> None:
        on_stop()

    def keep_logging(**_: Any) -> None:
        """Ours is set up; a receiver keeps Celery from setting up its own."""

    signals.worker_shutting_down.connect(stop)
    signals.setup_logging.connect(keep_logging)
    try:
        Worker(
            pool=GPU_POOL,
            concurrency=num_threads,
            hostname=f"darkroom@{name_worker()}",
            quiet=True,
            without_mingle=True,
            without_gossip=True,
            without_heartbeat=True,
        ).start()
    except SystemExit:
        logger.info("worker_stopping")
    finally:
        signals.worker_shutting_down.disconnect(stop)
        signals.setup_logging.disconnect(keep_logging)


class Drain:
    """What happens between the first signal and the end of the process."""

    def __init__(self, runner: Runner, drain_s: float) -> None:
        self._runner = runner
        self._drain_s = drain_s
        self._num_signals = 0
        self._told = threading.Event()
        self._told_twice = threading.Event()
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="drain", daemon=True)
        self._thread.start()

    def on_signal(self) -> None:
        """In a signal handler: set an event, and nothing more."""
        self._num_signals += 1
        (self._told if self._num_signals == 1 else self._told_twice).set()

    def finish(self) -> None:
        """The tasks have returned, so there is nothing left to watch."""
        self._is_over.set()
        self._told.set()
        self._told_twice.set()
        self._thread.join()

    def _watch(self) -> None:
        self._told.wait()
        if self._is_over.is_set():
            return
        logger.info("drain_begun", num_items=self._runner.num_in_flight, deadline_s=self._drain_s)
        deadline = time.monotonic() + self._drain_s
        releasing = _begin(self._runner.drain)
        while self._runner.num_in_flight and time.monotonic() < deadline:
            if self._told_twice.wait(0.05):
                break
        num_left = self._runner.num_in_flight
        abandoning = _begin(self._runner.abandon)
        for thread in (releasing, abandoning):
            thread.join(EXIT_GRACE_S / 2)
        if not self._is_over.wait(EXIT_GRACE_S / 2 if num_left else CLOSE_S):
            # Threads that are inside the engine cannot be ended in any other way.
            logger.warning("drain_deadline", num_items=num_left)
            is_all_back = give_back(self._runner) and not num_left
            os._exit(ExitCode.DRAINED if is_all_back else ExitCode.DEADLINE)


def give_back(runner: Runner) -> bool:
    """A worker's last act. Returns whether the database has said that it holds nothing any more."""
    said: list[bool] = []
    _begin(lambda: said.append(runner.give_back(GIVE_BACK_S))).join(GIVE_BACK_S)
    if said != [True]:
        logger.error("leases_left", worker=runner.worker)
    return said == [True]


def _begin(act: Callable[[], None]) -> threading.Thread:
    """In a thread of its own: a database that does not answer must not hold up the clock."""
    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    return thread


@contextmanager
def _sweeping(stores: Stores, dispatcher: Dispatcher, config: Config) -> Iterator[None]:
    with _in_thread("sweeper", Sweeper(stores, dispatcher, config).run):
        yield


@contextmanager
def _in_thread(name: str, run: Callable[[threading.Event], None]) -> Iterator[None]:
    stop = threading.Event()
    thread = threading.Thread(target=run, args=(stop,), name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


@contextmanager
def open_fetch(
    config: Config, env: dict[str, str], broker_url: str | None = None
) -> Iterator[Fetch]:
    """
    The one way out to the network, for the block; refusing where it is not installed.

    Args:
        broker_url: over which limits of hosts are shared; None: they are not.

    Raises:
        ValueError: a timeout makes no sense; the text names its variable.
        BadSettingError: likewise, of a bucket or a folder.
    """
    try:
        from media.buckets import BadProfileError, BadRegionError
        from media.fetch import FetchConfig, fetch_timeout_from, video_fetch_timeout_from
        from media.sources import Sources, SourcesThread
    except ModuleNotFoundError:
        yield refuse_to_fetch
        return
    fetching = FetchConfig(
        image_fetch_timeout_s=fetch_timeout_from(env),
        video_fetch_timeout_s=video_fetch_timeout_from(env),
        rules=AddressRules(
            allowed_networks=config.media_allowed_networks,
            allowed_hosts=frozenset(config.media_allowed_hosts),
            denied_networks=config.media_denied_networks,
        ),
        ports=frozenset({80, 443, *config.media_ports}),
    )
    try:
        sources = Sources(
            fetching,
            buckets=_read_buckets(config),
            folder=_read_folder(config),
            shared=None if broker_url is None else _share_limits(config, broker_url, fetching),
        )
    except BadProfileError as error:
        raise BadSettingError(f"DARKROOM_MEDIA_S3_PROFILE: {error}.") from error
    except BadRegionError as error:
        raise BadSettingError(f"DARKROOM_MEDIA_S3_REGION: {error}.") from error
    except ValueError as error:
        raise BadSettingError(
            "DARKROOM_MEDIA_S3_ENDPOINT_URL is no address: give http://HOST:PORT or https://HOST."
        ) from error
    with SourcesThread(sources) as thread:
        yield thread.fetch_all


def _read_buckets(config: Config) -> "BucketConfig | None":
    from media.buckets import BucketConfig

    if not config.media_s3_buckets:
        return None
    try:
        prefixes = tuple(parse_open_prefix(text) for text in config.media_s3_buckets)
    except ValueError as error:
        raise BadSettingError(f"DARKROOM_MEDIA_S3_BUCKETS: {error}.") from error
    return BucketConfig(
        prefixes,
        profile=config.media_s3_profile,
        endpoint_url=config.media_s3_endpoint_url,
        region=config.media_s3_region,
    )


def _share_limits(config: Config, broker_url: str, fetching: "FetchConfig") -> RedisLimits:
    longest_s = max(fetching.whole_timeout_s(IMAGE_LIMITS), fetching.whole_timeout_s(VIDEO_LIMITS))
    return RedisLimits(
        broker_url,
        max_connections=config.media_host_connections,
        max_rate=config.media_host_rate,
        held_s=max(HELD_S, 2 * longest_s),
    )


def _read_folder(config: Config) -> FolderReader | None:
    if config.media_root is None:
        return None
    try:
        return FolderReader(config.media_root.expanduser())
    except ValueError as error:
        raise BadSettingError(f"DARKROOM_MEDIA_ROOT: {error}.") from error
