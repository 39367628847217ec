"""
Decode steps as CUDA graphs: what takes the host 15 ms to launch, the device is told in one call.

A graph is fixed for a number of places and a greatest length, so both are rounded up: places that
are nobody's read and write scratch. A graph is made when it is first needed, in a moment; where that
fails, all graphs are given up and steps are launched one kernel at a time, as on a CPU. Those for
lengths up to LEAST_ROWS are made at the start.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.slots import LEN, NUM_COLUMNS, SLOT, Table

logger = logging.getLogger(__name__)

LEAST_ROWS = 1024  # greatest lengths are this times a power of four: few graphs for all lengths
# Runs a step over a table on the device: (table, max_rows) -> logits (num, vocab).
Step = Callable[[Tensor, int], Tensor]
# (logits, table) -> ids; also keeps them for the next step.
Choose = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Replayed:
    """
    What a step left on the device. The next step of any graph writes over it.

    Attributes:
        token_ids: (num_seqs,), int64: the likeliest ones, which are kept in the slots too.
        logits: (num_seqs, vocab), where they were asked for.
    """

    token_ids: Tensor
    logits: Tensor | None


@dataclass(frozen=True, slots=True)
class _Graph:
    graph: torch.cuda.CUDAGraph
    table: Tensor
    token_ids: Tensor
    logits: Tensor | None


class Graphs:
    """
    Args:
        step: one decode step; every kernel it launches must read lengths and rows from the table.
        choose: greedy choice from the logits.
        max_num_seqs, max_rows: of any batch, and of any sequence.
        scratch: the slot that is nobody's.
    """

    def __init__(
        self,
        step: Step,
        choose: Choose,
        *,
        device: torch.device,
        max_num_seqs: int,
        max_rows: int,
        scratch: int,
    ) -> None:
        self._step, self._choose = step, choose
        self._device = device
        self._sizes = bucket_sizes(max_num_seqs)
        self._max_rows = max_rows
        self._scratch = scratch
        self._graphs: dict[tuple[int, int, bool], _Graph] = {}
        self._logits: Tensor | None = None  # one for all graphs that keep them
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.are_given_up = False

    def find_size(self, num_seqs: int) -> int | None:
        """Places of the smallest graph for so many sequences; None where there are no graphs."""
        if self.are_given_up:
            return None
        return next((size for size in self._sizes if size >= num_seqs), None)

    def replay(self, table: Table, num_seqs: int, *, keeps_logits: bool) -> Replayed | None:
        """
        Run one step; None where it has to be launched in the ordinary way.

        Args:
            table: of `Slots.table`, with as many places as `find_size` said.
        """
        most = bucket_rows(int(table[LEN].max()), self._max_rows)
        key = (table.shape[1], most, keeps_logits)
        if key not in self._graphs and not self._try_capture(key):
            return None
        graph = self._graphs[key]
        graph.table.copy_(torch.from_numpy(table).pin_memory(), non_blocking=True)
        graph.graph.replay()
        logits = None if graph.logits is None else graph.logits[:num_seqs]
        return Replayed(graph.token_ids[:num_seqs], logits)

    @torch.inference_mode()
    def capture_all(self) -> None:
        """Make the graphs that nearly all steps need, so that none of them has to wait for its own."""
        for size in reversed(self._sizes):  # what the largest took, the others use again
            if not self.are_given_up:
                self._try_capture((size, bucket_rows(1, self._max_rows), False))

    @property
    def num_graphs(self) -> int:
        return len(self._graphs)

    def _try_capture(self, key: tuple[int, int, bool]) -> bool:
        try:
            self._graphs[key] = self._capture(*key)
        except Exception:
            # The edge of the driver: whatever a kernel does that no graph can hold.
            logger.warning("graphs were given up, steps will be slower", exc_info=True)
            self.are_given_up = True
            self._graphs.clear()
            return False
        return True

    def _capture(self, size: int, max_rows: int, keeps_logits: bool) -> _Graph:
        nobody = np.zeros((NUM_COLUMNS, size), dtype=np.int64)
        nobody[SLOT], nobody[LEN] = self._scratch, 1
        table = torch.from_numpy(nobody).to(self._device)
        main = torch.cuda.current_stream(self._device)
        graph = torch.cuda.CUDAGraph()
        self._stream.wait_stream(main)
        with torch.cuda.stream(self._stream):
            for _ in range(2):  # kernels are built and tuned, and workspaces taken, before
                self._run(table, max_rows, keeps_logits)
            self._stream.synchronize()
            # Media threads go on: only calls of this thread must fit into a graph.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                token_ids, logits = self._run(table, max_rows, keeps_logits)
            finally:
                graph.capture_end()
        main.wait_stream(self._stream)
        return _Graph(graph, table, token_ids, logits)

    def _run(
        self, table: Tensor, max_rows: int, keeps_logits: bool
    ) -> tuple[Tensor, Tensor | None]:
        logits = self._step(table, max_rows)
        token_ids = self._choose(logits, table)
        if not keeps_logits:
            return token_ids, None
        if self._logits is None:
            shape = (self._sizes[-1], logits.shape[1])
            self._logits = torch.empty(shape, dtype=logits.dtype, device=self._device)
        kept = self._logits[: len(logits)]
        kept.copy_(logits)
        return token_ids, kept


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
