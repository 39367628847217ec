"""How long kernels take, for those that are chosen by it. Not while a CUDA graph is captured."""

import statistics
from collections.abc import Callable

import torch

REPEATS, WARM_UP, IN_A_ROW = 7, 2, 4  # calls are launched while others run, as in a model


def time_ms(call: Callable[[], object]) -> float:
    """The median time of IN_A_ROW calls on the current CUDA device."""
    times = []
    for repeat in range(WARM_UP + REPEATS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        for _ in range(IN_A_ROW):
            call()
        end.record()
        end.synchronize()
        if repeat >= WARM_UP:
            times.append(begin.elapsed_time(end))
    return float(statistics.median(times))
