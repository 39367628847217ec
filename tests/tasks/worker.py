"""
A worker whose engine answers at once, as a process of its own; settings come from DARKROOM_*.

    python -m tests.tasks.worker gpu [DELAY_S]
    python -m tests.tasks.worker cpu
"""

import os
import sys
from collections.abc import Callable

from tasks.broker import open_broker
from tasks.config import load_config
from tasks.logs import configure_logging
from tasks.worker import run_cpu_worker, run_gpu_worker
from tests.tasks.fakes import MODEL, InstantEngine

TOOK_FIRST = "the engine took its first item"
"""In the log of a worker of this kind, once that has happened."""


def main(kind: str, delay_s: float = 0.0) -> int:
    configure_logging()
    config = load_config()
    env = dict(os.environ)
    with open_broker(config) as url:
        if kind == "cpu":
            return run_cpu_worker(config, url, env=env)
        return run_gpu_worker(config, url, InstantEngine(delay_s, tell_first()), MODEL, env=env)


def tell_first() -> Callable[[str], None]:
    told: list[str] = []

    def tell(text: str) -> None:
        if not told:
            print(TOOK_FIRST, flush=True)  # noqa: T201 - tests read it in the log
        told.append(text)

    return tell


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], *map(float, sys.argv[2:])))
