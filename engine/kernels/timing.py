"""How long kernels take, for those that are chosen by it. Not while a CUDA graph is captured."""

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import torch

T = TypeVar("T")

REPEATS, WARM_UP, IN_A_ROW = 7, 2, 4  # calls are launched while others run, as in a model
# A GPU's cycles, some 2 ms: so long it is kept waiting until calls are launched, of which some take the
# host longer than the GPU. In a model they are replayed, and launching them does not count.
LAUNCH_CYCLES = 4_000_000

_is_by_time = ContextVar("is_by_time", default=True)
# Of the block of `choosing` that we are in: what was asked there, and the answer.
_answers: ContextVar[dict[tuple[Hashable, ...], Any] | None] = ContextVar("answers", default=None)


@contextmanager
def choosing(*, by_time: bool) -> Iterator[None]:
    """
    Say how kernels are chosen inside the block: by what they take, or always alike.

    Two kernels round otherwise, and no two starts measure the same. A block is the load of a model, in
    which `ask_once` has one answer to each question.
    """
    token, answers_token = _is_by_time.set(by_time), _answers.set({})
    try:
        yield
    finally:
        _is_by_time.reset(token)
        _answers.reset(answers_token)


def chooses_by_time() -> bool:
    return _is_by_time.get()


def ask_once(call: Callable[..., T], *args: Hashable) -> T:
    """
    What the call gives, or has given before in this block of `choosing`.

    So layers that are alike choose alike, also where memory was too short to compare all that there is:
    that is no answer to remember for longer.
    """
    answers = _answers.get()
    if answers is None:
        return call(*args)
    question = (call, *args)
    if question not in answers:
        answers[question] = call(*args)
    answer: T = answers[question]
    return answer


def time_ms(call: Callable[[], object]) -> float:
    """
    The least time of IN_A_ROW calls on the current CUDA device, however long launching them takes.

    Not the median: a host that is held up for longer than the GPU is kept waiting can make most of a
    kernel's times ten times as long.
    """
    times: list[float] = []
    for repeat in range(WARM_UP + REPEATS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        torch.cuda._sleep(LAUNCH_CYCLES)  # type: ignore[no-untyped-call]
        begin.record()
        for _ in range(IN_A_ROW):
            call()
        end.record()
        end.synchronize()
        if repeat >= WARM_UP:
            times.append(begin.elapsed_time(end))
    return min(times)
