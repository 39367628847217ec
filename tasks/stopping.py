"""
A signal to stop that comes before a worker has begun: the process ends cleanly, and with 0.

Celery's handlers stand late, after minutes where weights are loaded. Until then nothing is leased, so
there is nothing to drain. Nothing heavy is imported here: this is the first thing of a worker.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_is_told = False


@contextmanager
def leaving_at_signal() -> Iterator[None]:
    """
    Inside, SIGTERM and SIGINT raise `SystemExit(0)`, unless somebody else handles them by then.

    Only in the main thread; blocks may stand in each other.
    """
    leave_if_told()
    before = {number: signal.signal(number, _leave) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) is _leave:
                signal.signal(number, handler)


def leave_if_told() -> None:
    """
    Ask once more, when others handle the signals: Python drops what is raised inside a destructor.

    Raises:
        SystemExit: with 0; a signal has come.
    """
    if _is_told:
        raise SystemExit(0)


def _leave(number: int, frame: FrameType | None) -> None:
    global _is_told
    _is_told = True
    raise SystemExit(0)
