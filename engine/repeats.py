"""
Calls whose shapes come back, as CUDA graphs: launching them again costs the host one call.

An encoder call launches hundreds of kernels from Python, one at a time, while media threads want the
same interpreter. When a call comes for the second time it is recorded; from then on its kernels are
replayed over the same tensors, with new contents. Inputs and outputs are as large as pictures and
prompts, so that all recordings share them.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

from engine.recorder import Held, Recorder, Recording

MAX_GRAPHS = 16  # kept; the one that was not used for longest goes first
# Runs for which it must not have been used: recording takes the host longer than a call does, so where
# more sizes come in turn than are kept, those that are not there are run as they are.
MIN_UNUSED_RUNS = 100
MAX_SEEN = 256  # keys remembered of calls that came once

Call = Callable[..., Tensor]


class Repeats:
    """
    Args:
        recorder: for a CUDA device, and for these alone.
        max_graphs: how many are kept.
        min_unused_runs: after how many runs without it a graph may go.
    """

    def __init__(
        self,
        recorder: Recorder,
        *,
        max_graphs: int = MAX_GRAPHS,
        min_unused_runs: int = MIN_UNUSED_RUNS,
    ) -> None:
        self._recorder = recorder
        self._max_graphs = max_graphs
        self._min_unused_runs = min_unused_runs
        self._num_runs = 0
        self._last_run: dict[Hashable, int] = {}
        self._graphs: OrderedDict[Hashable, Recording[Tensor]] = OrderedDict()
        self._outputs = Held(recorder.device)
        self._seen: OrderedDict[Hashable, None] = OrderedDict()

    @property
    def num_graphs(self) -> int:
        return len(self._graphs)

    @property
    def are_given_up(self) -> bool:
        return self._recorder.is_given_up

    def run(self, key: Hashable, call: Call, *inputs: Tensor) -> Tensor:
        """
        Run a call, or replay it.

        Args:
            key: of everything that its kernels are given beside the inputs: numbers, choices, sizes
                of the inputs. Two calls of one key differ in what the inputs hold, in nothing else.
            call: takes the inputs. It reads nothing else that changes, and waits for nothing.

        Returns:
            Its output, the caller's to keep.
        """
        self._num_runs += 1
        repeat = self._graphs.get(key)
        if repeat is None:
            repeat = self._try_record(key, call, inputs)
        if repeat is None:
            return self._run(key, call, inputs)
        self._graphs.move_to_end(key)
        self._last_run[key] = self._num_runs
        return repeat.replay(*inputs).clone()  # the next replay writes over it

    def _run(self, key: Hashable, call: Call, inputs: tuple[Tensor, ...]) -> Tensor:
        # Inputs are held here too: kernels are built for how the addresses of what they read are
        # aligned, and those of a recording must have been loaded before.
        try:
            kept = None if self.are_given_up else self._recorder.hold(*inputs)
        except torch.OutOfMemoryError:
            kept = None  # no reason for a call to fail: it is run as it came, and not recorded next
        if kept is None:
            return call(*inputs)
        output = call(*kept)
        # Only now that the call has come to its end: all that it launches is built and loaded.
        self._seen[key] = None
        if len(self._seen) > MAX_SEEN:
            self._seen.popitem(last=False)
        return output

    def _try_record(
        self, key: Hashable, call: Call, inputs: tuple[Tensor, ...]
    ) -> Recording[Tensor] | None:
        if key not in self._seen:
            return None
        oldest = next(iter(self._graphs)) if len(self._graphs) >= self._max_graphs else None
        if oldest is not None and self._num_runs - self._last_run[oldest] < self._min_unused_runs:
            return None

        def call_and_hold(*kept: Tensor) -> Tensor:
            return self._outputs.hold(0, call(*kept))

        # NOTE: no kernel may be loaded while a call is recorded: Triton would never launch it again.
        repeat = self._recorder.try_record(call_and_hold, *inputs, num_warm_ups=0)
        if repeat is not None:
            self._graphs[key] = repeat
            if oldest is not None:
                del self._graphs[oldest], self._last_run[oldest]
        elif self.are_given_up:
            self._graphs.clear()
            self._last_run.clear()
            self._outputs.clear()
        return repeat
