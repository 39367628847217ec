"""
A worker whose engine answers at once, as a process of its own; settings come from DARKROOM_*.

    python -m tests.tasks.worker gpu [DELAY_S [MOMENT]]
    python -m tests.tasks.worker cpu
"""

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from celery import signals

from cli.garbage import settle
from tasks import worker
from tasks.broker import open_broker
from tasks.config import load_config
from tasks.logs import configure_logging
from tasks.run import Runner
from tasks.stopping import leaving_at_signal
from tasks.worker import run_cpu_worker, run_gpu_worker
from tests.tasks.fakes import MODEL, InstantEngine

TOOK_FIRST = "the engine took its first item"
"""In the log of a worker of this kind, once that has happened."""


MOMENTS = ("loading", "dropped", "registered", "handlers")
"""Of a worker's start, at which it can be told to stop, by itself."""


def main(kind: str, delay_s: str = "0", moment: str = "") -> int:
    configure_logging()
    config = load_config()
    env = dict(os.environ)
    with leaving_at_signal(), open_broker(config) as url:
        settle()
        if kind == "cpu":
            return run_cpu_worker(config, url, env=env)
        if moment:
            worker.IDLE_S = 0.01  # type: ignore[misc]  # it looks for work at once
            stop_at(moment)
        engine = InstantEngine(float(delay_s), tell_first())
        return run_gpu_worker(config, url, engine, MODEL, env=env)


def stop_at(moment: str) -> None:
    match moment:
        case "loading":
            tell_to_stop()
        case "dropped":  # what a handler raises here, Python drops
            Dying()
        case "registered":
            start = Runner.start

            def start_and_stop(runner: Runner) -> None:
                start(runner)
                tell_to_stop()

            Runner.start = start_and_stop  # type: ignore[assignment,method-assign]
        case "handlers":  # the last that Celery does before its own stand
            signals.celeryd_after_setup.connect(tell_to_stop, weak=False)


class Dying:
    def __del__(self) -> None:
        tell_to_stop()


def tell_to_stop(**_: Any) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def tell_first() -> Callable[[str], None]:
    told: list[str] = []

    def tell(text: str) -> None:
        if not told:
            print(TOOK_FIRST, flush=True)  # noqa: T201 - tests read it in the log
        told.append(text)

    return tell


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
