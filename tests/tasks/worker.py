"""
A worker whose engine answers at once, as a process of its own; settings come from DARKROOM_*.

    python -m tests.tasks.worker gpu [DELAY_S]
    python -m tests.tasks.worker cpu
"""

import os
import sys

from tasks.broker import open_broker
from tasks.config import load_config
from tasks.logs import configure_logging
from tasks.worker import run_cpu_worker, run_gpu_worker
from tests.tasks.fakes import MODEL, InstantEngine


def main(kind: str, delay_s: float = 0.0) -> int:
    configure_logging()
    config = load_config()
    env = dict(os.environ)
    with open_broker(config) as url:
        if kind == "cpu":
            return run_cpu_worker(config, url, env=env)
        return run_gpu_worker(config, url, InstantEngine(delay_s), MODEL, env=env)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], *map(float, sys.argv[2:])))
