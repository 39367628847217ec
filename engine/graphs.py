"""
Decode steps as CUDA graphs: what takes the host 15 ms to launch, the device is told in one call.

A graph is fixed for a number of places and a greatest length, so both are rounded up: places that
are nobody's read and write scratch. A graph is made when it is first needed, in a moment; where that
fails, steps are launched one kernel at a time, as on a CPU. The plain ones, which keep no logits and
draw nothing, are made at the start for lengths up to ROWS_AT_START.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from engine.kernels import draw
from engine.recorder import Recorder, Recording
from engine.slots import LEN, NUM_COLUMNS, SLOT, Table
from engine.uploads import pin

ROWS_AT_START = 4096  # a prompt of large pictures, or of sixteen small ones, and its answer
LEAST_ROWS = 1024  # greatest lengths are this times a power of four: few graphs for all lengths
# Runs a step over a table on the device: (table, max_rows) -> logits (num, vocab).
Step = Callable[[Tensor, int], Tensor]
# (logits, table) -> ids, the likeliest or drawn; also keeps them for the next step.
Choose = Callable[[Tensor, Tensor], Tensor]
# Places, greatest length, whether logits are kept, whether tokens are drawn.
_Key = tuple[int, int, bool, bool]
_Chosen = tuple[Tensor, Tensor | None]  # token ids, and logits where they are kept
Graph = Recording[_Chosen]


@dataclass(frozen=True, slots=True)
class Replayed:
    """
    What a step left on the device. The next step of any graph writes over it.

    Attributes:
        token_ids: (num_seqs,), int64: the likeliest or drawn ones, which are kept in the slots too.
        logits: (num_seqs, vocab), where they were asked for.
    """

    token_ids: Tensor
    logits: Tensor | None


class Graphs:
    """
    Args:
        step: one decode step; every kernel it launches must read lengths and rows from the table.
        choose: greedy choice from the logits.
        recorder: for a CUDA device, and for these alone.
        max_num_seqs, max_rows: of any batch, and of any sequence.
        scratch: the slot that is nobody's.
        is_fixed: whether all batches and lengths have one graph, of the greatest.
        draw: a choice with what a longer table says behind NUM_COLUMNS; None where there are no such.
    """

    def __init__(
        self,
        step: Step,
        choose: Choose,
        recorder: Recorder,
        *,
        max_num_seqs: int,
        max_rows: int,
        scratch: int,
        is_fixed: bool = False,
        draw: Choose | None = None,
    ) -> None:
        self._step, self._choose, self._draw = step, choose, draw
        self._recorder = recorder
        self._sizes = [max_num_seqs] if is_fixed else bucket_sizes(max_num_seqs)
        self._max_rows = max_rows
        self._least_rows = max_rows if is_fixed else 1
        self._scratch = scratch
        self._graphs: dict[_Key, Graph] = {}
        self._logits: Tensor | None = None  # one for all graphs that keep them

    @property
    def are_given_up(self) -> bool:
        return self._recorder.is_given_up

    def find_size(self, num_seqs: int) -> int | None:
        """Places of the smallest graph for so many sequences; None where there are no graphs."""
        if self.are_given_up:
            return None
        return next((size for size in self._sizes if size >= num_seqs), None)

    def find(self, table: Table, *, keeps_logits: bool) -> Graph | None:
        """
        The graph of a step, made now where it is the first of its kind; None where there is none, so
        that the step has to be launched in the ordinary way.

        Args:
            table: of `Slots.table`, with as many places as `find_size` said; where tokens are to be
                drawn with that of `engine.kernels.draw` behind it.
        """
        most = bucket_rows(max(self._least_rows, int(table[LEN].max())), self._max_rows)
        key = (table.shape[1], most, keeps_logits, len(table) > NUM_COLUMNS)
        if key not in self._graphs:
            self._try_capture(key)
        return self._graphs.get(key)

    def replay(self, graph: Graph, table: Table, num_seqs: int) -> Replayed:
        """Run one step, of `find`'s graph for this table."""
        token_ids, logits = graph.replay(pin(table, self._recorder.device))
        return Replayed(token_ids[:num_seqs], None if logits is None else logits[:num_seqs])

    @torch.inference_mode()
    def capture_all(self) -> None:
        """Make the graphs that nearly all steps need, so that none of them has to wait for its own."""
        longest = max(self._least_rows, min(ROWS_AT_START, self._max_rows))
        # Once where both come to the same.
        buckets = {bucket_rows(rows, self._max_rows): None for rows in (longest, self._least_rows)}
        for most in buckets:
            for size in reversed(self._sizes):  # what the largest took, the others use again
                if not self.are_given_up:
                    self._try_capture((size, most, False, False))

    @property
    def num_graphs(self) -> int:
        return len(self._graphs)

    def _try_capture(self, key: _Key) -> None:
        size, max_rows, keeps_logits, draws = key
        num_columns = NUM_COLUMNS + draw.NUM_COLUMNS * draws
        nobody = np.zeros((num_columns, size), dtype=np.int64)
        nobody[SLOT], nobody[LEN] = self._scratch, 1
        run = partial(self._run, max_rows=max_rows, keeps_logits=keeps_logits)
        recording = self._recorder.try_record(run, pin(nobody, self._recorder.device))
        if recording is not None:
            self._graphs[key] = recording
        elif self.are_given_up:
            self._graphs.clear()

    def _run(self, table: Tensor, *, max_rows: int, keeps_logits: bool) -> _Chosen:
        choose = self._choose if len(table) == NUM_COLUMNS else self._draw
        assert choose is not None
        logits = self._step(table, max_rows)
        token_ids = choose(logits, table)
        if not keeps_logits:
            return token_ids, None
        if self._logits is None:
            self._logits = logits.new_empty(self._sizes[-1], logits.shape[1])
        return token_ids, self._logits[: len(logits)].copy_(logits)


def bucket_sizes(max_num_seqs: int) -> list[int]:
    """Numbers of places: an eighth of waste at most from 8 on, and not too many of them."""
    sizes = [1, 2, 4]
    step = 8
    while sizes[-1] < max_num_seqs:
        size = step if sizes[-1] < 8 else sizes[-1] + step
        sizes.append(size)
        if size >= 8 * step:
            step *= 2
    return [size for size in sizes if size < max_num_seqs] + [max_num_seqs]


def bucket_rows(num_rows: int, max_rows: int) -> int:
    """The greatest length that a graph for `num_rows` is made for."""
    most = LEAST_ROWS
    while most < num_rows:
        most *= 4
    return min(most, max(max_rows, num_rows))
