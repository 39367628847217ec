"""
The two streams of the command: texts go to stdout, everything else to stderr.

Where stderr is a terminal it holds a bar; in a pipe there are plain lines and no bar. Rich
respects NO_COLOR.
"""

import io
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TimeRemainingColumn,
)
from rich.text import Text

from cli.answers import Answer, one_line
from cli.inputs import CLIP_SUFFIXES, Found


class Screen:
    """
    What a run shows, and the numbers that it ends with.

    Args:
        noun: what is counted, in the plural: "images".
        as_json: an object for each answer, errors among them, in place of `path: text`.

    Attributes:
        num_done: answers shown. num_failed: those of them that are errors. num_cut_off: texts
            that the token limit ended. took_s: how long the bar was up, in seconds.
    """

    def __init__(self, noun: str, *, as_json: bool = False) -> None:
        self.num_done = self.num_failed = self.num_cut_off = 0
        self.took_s = 0.0
        self._noun = noun
        self._as_json = as_json
        self._out = sys.stdout
        if isinstance(self._out, io.TextIOWrapper):
            # A name need not be valid text, and a text need not fit the terminal's encoding.
            encoding = "utf-8" if as_json else None  # JSON is UTF-8 wherever it is written
            self._out.reconfigure(encoding=encoding, errors="backslashreplace")
        self._err = Console(file=sys.stderr)
        self._can_draw = can_draw(self._err)
        self._shares_terminal = self._can_draw and _are_one_terminal(self._out, sys.stderr)
        self._bar: Progress | None = None

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Say what takes so long, as long as it does."""
        with self._err.status(Text(f"{what} ...")) if self._can_draw else nullcontext():
            yield

    @contextmanager
    def progress(self, total: int) -> Iterator[None]:
        """Show the bar; it stays when it ends, as the run's own summary."""
        started = time.perf_counter()
        try:
            if not self._can_draw:
                yield
                return
            with _build_bar(self._err, self._noun) as self._bar:
                self._bar.add_task("", total=total)
                yield
        finally:
            self.took_s = time.perf_counter() - started
            self._bar = None

    def count(self, answer: Answer) -> None:
        """An answer is there, though its turn to be shown may come later."""
        if self._bar:
            self._bar.advance(self._bar.task_ids[0])

    def count_up(self, num_done: int, total: int) -> None:
        """So many are there, of so many."""
        if self._bar:
            self._bar.update(self._bar.task_ids[0], completed=num_done, total=total)

    def show(self, answer: Answer) -> None:
        self.num_done += 1
        self.num_failed += answer.error is not None
        self.num_cut_off += answer.is_cut_off
        if self._as_json:
            self.print(Text(answer.to_json()))
        for name, part in answer.list_part_lines():
            if part.error:
                self.complain(f"{name}: {one_line(part.error.message)}")
            elif not self._as_json:
                self.print(Text.assemble((name, "cyan"), f": {one_line(part.text or '')}"))
        if answer.error:
            self.complain(": ".join(answer.to_line()))
        elif not self._as_json:
            self.show_text(answer)

    def show_text(self, answer: Answer) -> None:
        """How a text is laid out for people."""
        path, text = answer.to_line()
        self.print(Text.assemble((path, "cyan"), f": {text}"))

    def print(self, line: Text) -> None:
        """A line of output; above the bar where both are on one terminal."""
        if self._shares_terminal:
            self._err.print(line, soft_wrap=True)
        else:
            print(line.plain, file=self._out, flush=True)

    def complain(self, message: str) -> None:
        self.note(message, label="error", style="bold red")

    def note(self, message: str, label: str = "note", style: str = "bold") -> None:
        """A line on stderr, above the bar."""
        self._err.print(Text.assemble((f"{label}:", style), f" {message}"), soft_wrap=True)

    def stopped(self, total: int) -> None:
        """What Ctrl-C left undone."""
        self.note(f"{self.num_done} of {total} {self._noun} done.", label="stopped")

    def sum_up(self, total: int) -> None:
        """What a reader of the output should know, where there is such a thing."""
        if self.num_failed and total > 1:
            self.note(f"{self.num_failed} of {total} {self._noun} failed.")
        if self.num_cut_off:
            self.note(f"{self.num_cut_off} cut off at the token limit; --max-tokens raises it.")


def note_left_out(screen: Screen, found: Found) -> None:
    """Which files of folders nobody looked at, and what to do."""
    for suffix, count in sorted(found.left_out.items()):
        cure = "not read here. Convert to JPEG or PNG."
        if suffix in CLIP_SUFFIXES:
            cure = "clips. `darkroom describe` reads them, if you name them."
        screen.note(f"{count} {suffix} left out: {cure}")


def can_draw(console: Console) -> bool:
    """Whether a bar may stand there."""
    # The stream is asked, not Rich: FORCE_COLOR makes Rich take any pipe for a terminal.
    return console.file.isatty() and not console.is_dumb_terminal


def _are_one_terminal(out: TextIO, err: TextIO) -> bool:
    return out.isatty() and os.fstat(out.fileno()).st_rdev == os.fstat(err.fileno()).st_rdev


def _build_bar(console: Console, noun: str) -> Progress:
    return Progress(
        BarColumn(),
        MofNCompleteColumn(),
        Rate(noun),
        TimeRemainingColumn(elapsed_when_finished=True),
        console=console,
        redirect_stdout=False,  # what goes to stdout is for programs too
    )


class Rate(ProgressColumn):
    """How many a second; in the end, of the whole run."""

    def __init__(self, noun: str) -> None:
        super().__init__()
        self._noun = noun

    def render(self, task: Task) -> Text:
        # The wait for the first answer included.
        took_s = task.finished_time
        speed = task.completed / took_s if took_s else task.speed
        return Text(f"{speed:.1f} {self._noun}/s" if speed else f"- {self._noun}/s")
