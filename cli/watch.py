"""
Follows a batch to its end: a bar where stderr is a terminal, otherwise a line now and then.

A server that is away for a moment, to be restarted perhaps, does not end the watch.
"""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from cli.client import Client, Polled, ServerError, UnreachableError
from cli.show import Rate, can_draw

POLL_S: Final = 0.25
"""Between two looks at least, however often the batch changes."""

LINE_S: Final = 10.0
"""Between two lines of a pipe, unless the state changes."""

PATIENCE_S: Final = 60.0
RETRY_S: Final = 0.5
SPEED_S: Final = 120.0
"""The rate is that of so long: chunks end in bursts."""

Show = Callable[[dict[str, Any]], None]


def follow(client: Client, polled: Polled) -> Polled:
    """
    Show how a batch goes until it has ended.

    Raises:
        UnreachableError, ServerError: the server did not come back, or it refuses to answer.
    """
    with _showing() as show:
        while True:
            show(polled.batch)
            if polled.has_ended:
                return polled
            started = time.monotonic()
            polled = _poll(client, polled)
            time.sleep(max(0.0, POLL_S - (time.monotonic() - started)) * (not polled.has_ended))


def count_ended(batch: dict[str, Any]) -> int:
    counts = batch["request_counts"]
    return sum(counts[state] for state in ("completed", "failed", "expired", "cancelled"))


def describe(batch: dict[str, Any]) -> str:
    return f"{batch['status']} {count_ended(batch)}/{batch['request_counts']['total']}"


def _poll(client: Client, polled: Polled) -> Polled:
    deadline = None
    while True:
        try:
            return client.poll(polled.batch["id"], after=polled)
        except (UnreachableError, ServerError) as error:
            if isinstance(error, ServerError) and error.status < 500:
                raise
            if deadline is None:
                deadline = time.monotonic() + PATIENCE_S
                print(f"{error} Asking again for {PATIENCE_S:g} s.", file=sys.stderr)
            if time.monotonic() > deadline:
                raise
            time.sleep(RETRY_S)


@contextmanager
def _showing() -> Iterator[Show]:
    console = Console(file=sys.stderr)
    if not can_draw(console):
        yield _Lines().show
        return
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        Rate("items"),
        TimeRemainingColumn(elapsed_when_finished=True),
        console=console,
        redirect_stdout=False,
        speed_estimate_period=SPEED_S,
    ) as bar:
        task = bar.add_task("", total=None)

        def show(batch: dict[str, Any]) -> None:
            num_failed = batch["request_counts"]["failed"]
            failed = f", {num_failed} failed" if num_failed else ""
            bar.update(
                task,
                description=batch["status"] + failed,
                total=batch["request_counts"]["total"] or None,
                completed=count_ended(batch),
            )

        yield show


class _Lines:
    def __init__(self) -> None:
        self._state = ""
        self._shown = ""
        self._shown_at = 0.0
        self._first: tuple[float, int] | None = None

    def show(self, batch: dict[str, Any]) -> None:
        now, num_ended = time.monotonic(), count_ended(batch)
        if self._first is None and batch["request_counts"]["total"]:
            self._first = now, num_ended
        is_due = batch["status"] != self._state or now >= self._shown_at + LINE_S
        line = describe(batch)
        if not is_due or line == self._shown or batch["status"] == "completed":
            return  # how it has ended is said elsewhere
        self._state, self._shown, self._shown_at = batch["status"], line, now
        print(line + self._estimate(batch, now, num_ended), file=sys.stderr, flush=True)

    def _estimate(self, batch: dict[str, Any], now: float, num_ended: int) -> str:
        started, num_at_first = self._first or (now, num_ended)
        if now <= started or num_ended <= num_at_first:
            return ""
        rate = (num_ended - num_at_first) / (now - started)
        left_s = round((batch["request_counts"]["total"] - num_ended) / rate)
        minutes, seconds = divmod(left_s, 60)
        return f", {rate:.1f} items/s, {minutes // 60}:{minutes % 60:02}:{seconds:02} left"
