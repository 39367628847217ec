"""
Calls as CUDA graphs: recorded once, then replayed over the same memory with new contents.

A call that cannot be recorded is run as it is, which is slower and says the same. Where memory was
short recording rests for a while; what else goes wrong would go wrong again, and is not tried again.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from engine.rounding import power_up

logger = logging.getLogger(__name__)

# Calls that would have been recorded, after one for which there was no memory. A call that fails to be
# recorded takes as long as several, and makes the allocator give back all that it has kept.
NUM_RESTING = 1000
OUT_OF_MEMORY = ("out of memory", "ALLOC_FAILED")  # as drivers and libraries say it

Output = TypeVar("Output")


class Held:
    """
    Memory that calls share which never run at the same time: one buffer for each place and type.

    It is as large as the largest that was held, to the next power of two. Who holds a part of one that
    was too small for others keeps that one.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers: dict[tuple[int, torch.dtype], Tensor] = {}

    def hold(self, place: int, given: Tensor) -> Tensor:
        """A copy of `given`, until the next one of this place."""
        number, key = given.numel(), (place, given.dtype)
        if key not in self._buffers or len(self._buffers[key]) < number:
            self._buffers[key] = torch.empty(
                power_up(number, 1), dtype=given.dtype, device=self._device
            )
        return self._buffers[key][:number].view(given.shape).copy_(given, non_blocking=True)

    def clear(self) -> None:
        self._buffers.clear()


@dataclass(frozen=True, slots=True)
class Recording(Generic[Output]):
    """A call over `inputs`, which leaves its result in `output`."""

    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, ...]
    output: Output

    def replay(self, *inputs: Tensor) -> Output:
        """Run it over other contents. The next replay, of any recording beside it, writes over both."""
        for kept, given in zip(self.inputs, inputs, strict=True):
            kept.copy_(given, non_blocking=True)
        self.graph.replay()
        return self.output


class Recorder:
    """
    Recordings of one recorder share their memory, so they are replayed in turn, on one stream.

    Args:
        device: a CUDA device.
        name: of what is recorded, for the log.
    """

    def __init__(self, device: torch.device, name: str) -> None:
        self.is_given_up = False
        self.device = device
        self._name = name
        self._min_warm_ups = 0
        self._num_resting = 0
        self._inputs = Held(device)
        self._stream: torch.cuda.Stream | None = None
        self._pool: Any = None
        self._is_pool_kept = False  # by a recording

    def hold(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Copies, where all that is recorded finds its inputs; the next ones are written over them."""
        return tuple(self._inputs.hold(place, given) for place, given in enumerate(inputs))

    def try_record(
        self, call: Callable[..., Output], *inputs: Tensor, num_warm_ups: int = 1
    ) -> Recording[Output] | None:
        """
        Run a call so many times, then record it; None where that fails, or is not tried now.

        Args:
            call: takes the inputs. It reads nothing else that changes, and waits for nothing.
            num_warm_ups: in which kernels are built, loaded and tuned. None are needed for a call that
                was run before with inputs that were held; where it cannot be recorded all the same, it
                is run once first, and so are all others from then on.
        """
        if self.is_given_up:
            return None
        if self._num_resting:
            self._num_resting -= 1
            return None
        num_warm_ups = max(num_warm_ups, self._min_warm_ups)
        try:
            kept = self.hold(*inputs)
            graph, output = self._record(partial(call, *kept), num_warm_ups)
            return Recording(graph, kept, output)
        except Exception as error:
            # The edge of the driver: whatever a kernel does that no graph can hold, or memory.
            is_short = _is_out_of_memory(error)
            otherwise = "are run first" if num_warm_ups == 0 else "were given up"
            what = "find no memory" if is_short else otherwise
            logger.warning("%s %s, calls will be slower", self._name, what, exc_info=True)
        # NOTE: not above, where the error still holds what its call had allocated.
        if is_short:
            self._num_resting = NUM_RESTING
            torch.cuda.empty_cache()
        elif num_warm_ups == 0:
            self._min_warm_ups = 1
            return self.try_record(call, *inputs)
        else:
            self.is_given_up = True
            self._inputs.clear()
        return None

    def _record(
        self, call: Callable[[], Output], num_warm_ups: int
    ) -> tuple[torch.cuda.CUDAGraph, Output]:
        if self._stream is None:
            self._stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
            self._pool = torch.cuda.graph_pool_handle()
        main = torch.cuda.current_stream(self.device)
        graph = torch.cuda.CUDAGraph()
        self._stream.wait_stream(main)
        try:
            with torch.cuda.stream(self._stream):
                for _ in range(num_warm_ups):
                    call()
                # Nothing runs while it is recorded, so nobody waits for what is queued: the device goes
                # on with that. Media threads go on too: only calls of this thread must fit into a graph.
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                try:
                    output = call()
                finally:
                    graph.capture_end()
        except BaseException:
            self._leave_pool()
            raise
        finally:
            main.wait_stream(self._stream)
        self._is_pool_kept = True
        return graph, output

    def _leave_pool(self) -> None:
        """
        Tell torch's allocator that a recording is over whose end failed.

        It does not notice by itself (torch 2.11, `CUDAGraph::capture_end`). While it believes that one
        is underway, `empty_cache` is an error, and what another stream has used never comes back. The
        functions are private to torch, which calls them so in `torch.cuda.use_mem_pool`.

        Nor does it record into a pool that all recordings have left (`create_or_incref_pool`): the one
        that failed may have been the only one.
        """
        device = torch.cuda.current_device()
        try:
            torch._C._cuda_endAllocateToPool(device, self._pool)
        except RuntimeError:  # it had noticed
            if self._is_pool_kept:
                return
        else:
            torch._C._cuda_releasePool(device, self._pool)
        self._pool = torch.cuda.graph_pool_handle()  # those recorded before keep the old one
        self._is_pool_kept = False


def _is_out_of_memory(error: BaseException | None) -> bool:
    """Also where ending the recording failed for it."""
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError) or any(w in str(error) for w in OUT_OF_MEMORY):
            return True
        error = error.__cause__ or error.__context__
    return False
