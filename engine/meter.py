"""
How long the device is at work, and on what: the sums that say where the time of a batch goes.

On a GPU a span is the time between two marks in the device's own queue, so measuring waits for
nothing; what stands between spans is time in which the queue was empty. On a CPU it is the host's.
"""

import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum

import torch


class Work(StrEnum):
    """What a span of the device's time is spent on."""

    ENCODE = "encode"
    PREFILL = "prefill"
    DECODE = "decode"


@dataclass(frozen=True, slots=True)
class Usage:
    """
    What a device has done since its meter was made; take two and look at the differences.

    Attributes:
        ms: time spent on each kind of work.
        calls: how many spans that were; those of no units go on with the one before.
        units: patches encoded, prompt tokens read, tokens decoded.
    """

    ms: dict[Work, float]
    calls: dict[Work, int]
    units: dict[Work, int]

    def since(self, before: "Usage") -> "Usage":
        """What was done after `before`."""
        return Usage(
            {work: self.ms[work] - before.ms[work] for work in Work},
            {work: self.calls[work] - before.calls[work] for work in Work},
            {work: self.units[work] - before.units[work] for work in Work},
        )


class Meter:
    """One device's sums. The thread that runs the device counts; any thread may read."""

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._lock = threading.Lock()
        self._ms = dict.fromkeys(Work, 0.0)
        self._calls = dict.fromkeys(Work, 0)
        self._units = dict.fromkeys(Work, 0)
        # Marks whose time has not come yet, in the order of the queue.
        self._marks: deque[tuple[Work, int, torch.cuda.Event, torch.cuda.Event]] = deque()
        self._spare: list[torch.cuda.Event] = []

    @contextmanager
    def span(self, work: Work, units: int) -> Iterator[None]:
        """Count what is queued inside the block, or done in it on a CPU. Blocks never overlap."""
        if not self._is_cuda:
            started = time.perf_counter()
            yield
            self._add(work, units, (time.perf_counter() - started) * 1000)
            return
        first, last = self._mark(), self._mark()
        first.record()
        yield
        last.record()
        with self._lock:
            self._marks.append((work, int(units > 0), first, last))
            self._units[work] += units
            self._settle()

    def read(self) -> Usage:
        """The sums so far; of a GPU, what it has finished."""
        with self._lock:
            self._settle()
            return Usage(dict(self._ms), dict(self._calls), dict(self._units))

    def peek(self) -> Usage:
        """As `read`, but without asking the device, which may hang: times lag by the last calls."""
        with self._lock:
            return Usage(dict(self._ms), dict(self._calls), dict(self._units))

    def _add(self, work: Work, units: int, ms: float) -> None:
        with self._lock:
            self._ms[work] += ms
            self._calls[work] += units > 0
            self._units[work] += units

    def _mark(self) -> torch.cuda.Event:
        return self._spare.pop() if self._spare else torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]

    def _settle(self) -> None:
        """Take the marks that the device has passed."""
        try:
            while self._marks and self._marks[0][3].query():  # type: ignore[no-untyped-call]
                work, calls, first, last = self._marks.popleft()
                self._ms[work] += first.elapsed_time(last)
                self._calls[work] += calls
                self._spare += [first, last]
        except RuntimeError:
            # The device is lost, as the requests that it ran are told. A sum is no reason to raise.
            self._marks.clear()
