"""
`darkroom api` and `darkroom up`: the HTTP server, and a whole service on this machine.

`up` starts the API, a worker for the cpu queue and one for a model, each as a process of its own, on
one broker; it starts a worker again that ended by itself, and stops all of them when it is told to.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING, Final

from cli.errors import ExitCode
from cli.service import prepare_database, reported

if TYPE_CHECKING:
    from tasks.config import Config

API_THREADS: Final = 40
WATCH_S: Final = 0.2
RESTART_AFTER_S: Final = 2.0  # a worker that cannot start is not started hundreds of times a minute
STOP_GRACE_S: Final = 15.0  # beyond the workers' own deadline


def run_api(host: str, port: int) -> ExitCode:
    """
    Serve HTTP until the process is told to stop.

    Requests need no key only where nothing is configured and only this host can ask.

    Raises:
        CannotStartError: the message says what to change.
    """
    with reported():
        from api.app import create_app
        from api.config import ApiConfig, ServedModel
        from api.server import build_server
        from tasks.broker import open_broker, ping
        from tasks.config import DEFAULT_TENANT, load_config
        from tasks.dispatch import Dispatcher
        from tasks.logs import configure_logging
        from tasks.stores import load_pepper, open_stores

        configure_logging()
        config = load_config()
        prepare_database(config)
        is_open = not config.database_url
        api_config = ApiConfig(
            pepper=load_pepper(config),
            is_open=is_open,
            open_tenant=DEFAULT_TENANT,
            models=tuple(ServedModel(name) for name in config.models),
            max_batch_lines=config.max_lines,
        )
        with (
            open_broker(config) as url,
            closing(open_stores(config, num_threads=API_THREADS)) as stores,
            closing(Dispatcher(config, url)) as dispatcher,
        ):
            app = create_app(
                api_config,
                stores.database,
                stores.blobs,
                notify_created=dispatcher.send_expand,
                notify_cancelled=lambda _job: dispatcher.send_sweep(),
                pings={"broker": partial(ping, url)},
            )
            build_server(app, api_config, host=host, port=port).run()
    return ExitCode.DONE


def run_up(model: str, host: str, port: int, worker_options: Sequence[str]) -> ExitCode:
    """
    Run a whole service until Ctrl-C.

    Args:
        worker_options: of `darkroom worker --model`, as they were given.

    Raises:
        CannotStartError: the message says what to change.
    """
    with reported():
        from tasks.broker import open_broker
        from tasks.config import load_config
        from tasks.logs import configure_logging

        configure_logging()
        config = load_config()
        prepare_database(config)
        with open_broker(config) as url:
            env = {
                **os.environ,
                "DARKROOM_REDIS_URL": url,
                "DARKROOM_MODELS": _models(config, model),
            }
            env.pop("DARKROOM_REDIS_URL_FILE", None)  # it was read, and said the same
            group = Group(env)
            group.add("api", "--host", host, "--port", str(port))
            group.add("worker", "--cpu")
            group.add("worker", "--model", model, *worker_options)
            print(
                f"darkroom: http://{host}:{port}, data in {config.home}; Ctrl-C stops", flush=True
            )
            group.run(stop_within_s=config.drain_s + STOP_GRACE_S)
    return ExitCode.DONE


def _models(config: "Config", model: str) -> str:
    """DARKROOM_MODELS with the served one in it, so that the API knows its name and limits."""
    import json

    known = {name: limits.model_dump() for name, limits in config.models.items()}
    return json.dumps({model: config.limits_of(model).model_dump()} | known)


@dataclass(slots=True)
class Member:
    """One process of a group; `not_before` is when it may be started again."""

    args: tuple[str, ...]
    process: "subprocess.Popen[bytes] | None" = None
    not_before: float = 0.0


@dataclass(slots=True)
class Group:
    """Processes of the `darkroom` command that run together."""

    env: Mapping[str, str]
    members: list[Member] = field(default_factory=list)
    is_stopping: bool = False

    def add(self, *args: str) -> None:
        self.members.append(Member(args))

    def run(self, *, stop_within_s: float) -> None:
        """Keep all of them running until SIGINT or SIGTERM; then stop them, the hard way at last."""
        with _on_signals(self._ask_to_stop):
            try:
                while not self.is_stopping:
                    for member in self.members:
                        self._keep_running(member)
                    time.sleep(WATCH_S)
            finally:
                self._stop(time.monotonic() + stop_within_s)

    def _ask_to_stop(self, _number: int, _frame: FrameType | None) -> None:
        self.is_stopping = True

    def _keep_running(self, member: Member) -> None:
        now = time.monotonic()
        if member.process is not None and member.process.poll() is None:
            return
        if member.process is not None:
            code = member.process.returncode
            print(f"darkroom: {' '.join(member.args)} ended with {code}", file=sys.stderr)
            member.process, member.not_before = None, now + RESTART_AFTER_S
            if code == ExitCode.USAGE:  # it will not start the next time either
                self.is_stopping = True
        if now >= member.not_before and not self.is_stopping:
            # A group of its own: Ctrl-C reaches us alone, and we say who stops when.
            member.process = subprocess.Popen(  # noqa: S603 - our own command
                [sys.executable, "-m", "cli", *member.args], env=self.env, start_new_session=True
            )

    def _stop(self, deadline: float) -> None:
        running = [m.process for m in self.members if m.process is not None]
        for process in running:
            process.send_signal(signal.SIGTERM)
        for process in running:
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextmanager
def _on_signals(act: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    before = {number: signal.signal(number, act) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
