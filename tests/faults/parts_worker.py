"""
A worker of its own that looks at clips, slowly, and writes down each prompt before it answers.

    python -m tests.faults.parts_worker DELAY_S LOG [LAST]

At part LAST it stands still, until somebody kills it.
"""

import os
import sys
import time
from pathlib import Path

from engine.request import Result
from tasks.broker import open_broker
from tasks.config import load_config
from tasks.engines import Prompt
from tasks.logs import configure_logging
from tasks.stopping import leaving_at_signal
from tasks.worker import run_gpu_worker
from tests.tasks.fakes import MODEL, SeeingEngine


class WritingEngine(SeeingEngine):
    def __init__(self, log: Path, delay_s: float, last: str | None) -> None:
        super().__init__(delay_s=delay_s)
        self._log = log
        self._last = last

    def answer(self, prompt: Prompt) -> Result:
        with self._log.open("a") as log:
            log.write(f"{prompt.name}\n")
        if prompt.name.split(".")[-1] == self._last:
            time.sleep(300)
        return super().answer(prompt)


def main(delay_s: str, log: str, last: str | None = None) -> int:
    configure_logging()
    config = load_config()
    with leaving_at_signal(), open_broker(config) as url:
        engine = WritingEngine(Path(log), float(delay_s), last)
        return run_gpu_worker(config, url, engine, MODEL, env=dict(os.environ))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
