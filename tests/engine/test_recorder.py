"""What is recorded, what of it is shared, and what happens where recording fails: without a GPU."""

import itertools
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from engine import recorder
from engine.graphs import Graphs
from engine.recorder import Held, Output, Recorder
from engine.repeats import Repeats
from engine.slots import LEN, NUM_COLUMNS

CPU = torch.device("cpu")


@dataclass
class Rerun:
    """In the place of a graph: runs the call again, over the memory that it had when it was recorded."""

    call: Callable[[], Any]
    output: Any

    def replay(self) -> None:
        kept, fresh = (
            (output,) if isinstance(output, Tensor) else output
            for output in (self.output, self.call())
        )
        for old, new in zip(kept, fresh, strict=True):
            if old is not None:
                old.copy_(new)


class Hands(Recorder):
    """Records without a GPU, unless it is told to fail."""

    def __init__(self) -> None:
        super().__init__(CPU, "hands")
        self.num_tried = 0
        self.error: Exception | None = None

    def _record(self, call: Callable[[], Output], num_warm_ups: int) -> tuple[Any, Output]:
        self.num_tried += 1
        if self.error is not None:
            raise self.error
        output = call()
        return Rerun(call, output), output


@pytest.fixture
def hands() -> Hands:
    return Hands()


def double(x: Tensor) -> Tensor:
    return 2 * x


def run_all(repeats: Repeats, sizes: list[int]) -> None:
    for turn, size in enumerate(sizes):
        x = torch.full((size,), float(turn))
        assert [2.0 * turn] * size == repeats.run(size, double, x).tolist()


def test_recordings_share_the_memory_of_the_largest(hands: Hands) -> None:
    repeats = Repeats(hands)

    run_all(repeats, [100, 100, 40, 40, 70, 70, 40, 100, 70])

    assert 3 == repeats.num_graphs
    memory = {
        tensor.untyped_storage().data_ptr()
        for recording in repeats._graphs.values()
        for tensor in (*recording.inputs, recording.output)
    }
    assert 2 == len(memory)  # of inputs and of outputs


def test_recording_keeps_its_memory_when_a_larger_one_comes(hands: Hands) -> None:
    repeats = Repeats(hands)

    run_all(repeats, [40, 40, 100, 100, 40, 100, 40])

    assert 2 == repeats.num_graphs


def test_buffers_are_told_apart_by_place_and_type() -> None:
    held = Held(CPU)
    one = held.hold(0, torch.ones(3))
    other = held.hold(1, torch.zeros(3))
    number = held.hold(0, torch.full((3,), 7))
    again = held.hold(0, torch.full((1, 2), 5.0))

    assert [0.0] * 3 == other.tolist()
    assert [7] * 3 == number.tolist()
    assert [[5.0, 5.0]] == again.tolist()
    assert [5.0, 5.0, 1.0] == one.tolist()


def test_outputs_stay_the_callers(hands: Hands) -> None:
    repeats = Repeats(hands)
    outputs = [repeats.run("x", double, torch.full((2,), float(n))) for n in range(5)]

    assert [[2.0 * n] * 2 for n in range(5)] == [output.tolist() for output in outputs]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"),
    ],
)
def test_memory_that_is_short_stops_recording_for_a_while(
    hands: Hands, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorder, "NUM_RESTING", 3)
    repeats = Repeats(hands, max_graphs=2, min_unused_runs=0)
    run_all(repeats, [10, 10, 20, 20])
    hands.error, hands.num_tried = error, 0
    run_all(repeats, [30, 30, 30, 40, 40, 10, 20])

    assert 1 == hands.num_tried
    assert 2 == repeats.num_graphs  # what there was is still used
    assert not repeats.are_given_up
    hands.error = None
    run_all(repeats, [30, 30, 30])
    assert 2 == hands.num_tried
    assert 30 in repeats._graphs


def test_memory_that_was_short_is_seen_behind_the_error_that_ended_the_recording(
    hands: Hands,
) -> None:
    repeats = Repeats(hands)
    hands.error = RuntimeError("the capture was invalidated")
    hands.error.__context__ = torch.OutOfMemoryError("CUDA out of memory")
    run_all(repeats, [10, 10, 10])

    assert not repeats.are_given_up


def test_what_no_graph_can_hold_is_not_tried_again(hands: Hands) -> None:
    repeats = Repeats(hands)
    run_all(repeats, [10, 10])
    hands.error = RuntimeError("operation not permitted when stream is capturing")
    run_all(repeats, [20, 20, 20, 30, 30, 10, 10])

    assert 3 == hands.num_tried  # the last one behind a call
    assert repeats.are_given_up
    assert 0 == repeats.num_graphs


def test_steps_go_on_with_the_graphs_that_there_are(hands: Hands) -> None:
    def step(table: Tensor, max_rows: int) -> Tensor:
        return table[LEN, :, None] * torch.ones(1, 5)

    graphs = Graphs(
        step,
        lambda logits, _: logits.argmax(1),
        hands,
        max_num_seqs=4,
        max_rows=1024,
        scratch=4,
    )
    table = torch.ones(NUM_COLUMNS, 2, dtype=torch.int64).numpy()
    assert graphs.find(table, keeps_logits=True) is not None
    hands.error = torch.OutOfMemoryError("CUDA out of memory")

    assert graphs.find(table[:, :1], keeps_logits=True) is None
    table[LEN] = 3
    graph = graphs.find(table, keeps_logits=True)
    assert graph is not None
    replayed = graphs.replay(graph, table, 2)
    assert [[3.0] * 5] * 2 == cast(Tensor, replayed.logits).tolist()
    assert not graphs.are_given_up


@pytest.mark.parametrize(
    ("max_rows", "is_fixed", "expected"),
    [
        (512, False, {512}),
        (3000, False, {1024, 3000}),
        (32_768, False, {1024, 4096}),
        (32_768, True, {32_768}),
    ],
)
def test_steps_of_usual_lengths_have_their_graphs_at_the_start(
    hands: Hands, max_rows: int, is_fixed: bool, expected: set[int]
) -> None:
    graphs = Graphs(
        lambda table, _: torch.ones(table.shape[1], 5),
        lambda logits, _: logits.argmax(1),
        hands,
        max_num_seqs=12,
        max_rows=max_rows,
        scratch=12,
        is_fixed=is_fixed,
    )
    graphs.capture_all()

    assert expected == {key[1] for key in graphs._graphs}
    assert len(expected) * (1 if is_fixed else 5) == graphs.num_graphs == hands.num_tried


class Allocator:
    """
    In the place of torch's on a GPU: a recording is underway until its end is told, and ending one in
    which a call has failed does not tell it. Calls run where they would be recorded.

    A pool that all recordings have left is not forgotten where memory of it is in use, and no other may
    be recorded into it.

    Attributes:
        num_uses: recordings of each pool that have not been released.
    """

    def __init__(self) -> None:
        self.is_broken = False
        self.underway: set[int] = set()
        self.num_uses: Counter[int] = Counter()
        self._pools = itertools.count(1)

    def new_pool(self) -> int:
        return next(self._pools)

    def wait_stream(self, stream: object) -> None: ...

    def begin(self, pool: int) -> None:
        assert pool not in self.underway
        assert self.num_uses.get(pool) != 0, "INTERNAL ASSERT FAILED"
        self.underway.add(pool)
        self.num_uses[pool] += 1

    def end(self, device: int, pool: int) -> None:
        if pool not in self.underway:
            raise RuntimeError("not currently recording to mempool_id")
        self.underway.remove(pool)

    def release(self, device: int, pool: int) -> None:
        self.num_uses[pool] -= 1

    def empty_cache(self) -> None:
        assert not self.underway, "INTERNAL ASSERT FAILED"


class CapturedGraph:
    """In the place of torch's: it uses its pool from the end of its recording until it goes."""

    def __init__(self, allocator: Allocator) -> None:
        self._allocator = allocator
        self._has_ended = False

    def capture_begin(self, pool: int, capture_error_mode: str) -> None:
        assert "thread_local" == capture_error_mode
        self._allocator.begin(pool)
        self._pool = pool

    def capture_end(self) -> None:
        if self._allocator.is_broken:
            raise RuntimeError("operation failed due to a previous error during capture")
        self._allocator.end(0, self._pool)
        self._has_ended = True

    def replay(self) -> None: ...

    def __del__(self) -> None:
        if self._has_ended:
            self._allocator.release(0, self._pool)


@pytest.fixture
def allocator(monkeypatch: pytest.MonkeyPatch) -> Allocator:
    fake = Allocator()
    for place, name, value in (
        (torch.cuda, "Stream", lambda device: fake),
        (torch.cuda, "current_stream", lambda device: fake),
        (torch.cuda, "stream", nullcontext),
        (torch.cuda, "CUDAGraph", lambda: CapturedGraph(fake)),
        (torch.cuda, "graph_pool_handle", fake.new_pool),
        (torch.cuda, "current_device", lambda: 0),
        (torch.cuda, "empty_cache", fake.empty_cache),
        (torch._C, "_cuda_endAllocateToPool", fake.end),
        (torch._C, "_cuda_releasePool", fake.release),
    ):
        monkeypatch.setattr(place, name, value, raising=False)
    return fake


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("operation not permitted when stream is capturing"),
    ],
)
def test_recording_that_cannot_be_ended_is_not_left_underway(
    allocator: Allocator, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorder, "NUM_RESTING", 0)
    ours, x = Recorder(CPU, "calls"), torch.ones(2)

    def fail(x: Tensor) -> Tensor:
        if allocator.is_broken and allocator.underway:
            raise error
        return 2 * x

    recorded = ours.try_record(fail, x)
    assert recorded is not None
    allocator.is_broken = True
    assert ours.try_record(fail, x) is None
    assert set() == allocator.underway
    assert {1: 1} == allocator.num_uses  # of the one that was recorded
    allocator.is_broken = False

    assert isinstance(error, torch.OutOfMemoryError) == (ours.try_record(fail, x) is not None)
    assert ours.is_given_up != isinstance(error, torch.OutOfMemoryError)


def test_call_that_fails_before_it_is_recorded_leaves_the_memory_of_others(
    allocator: Allocator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorder, "NUM_RESTING", 0)
    ours, x = Recorder(CPU, "calls"), torch.ones(2)

    def fail(x: Tensor) -> Tensor:
        raise torch.OutOfMemoryError

    recorded = [ours.try_record(call, x) for call in (double, fail, double)]

    assert [True, False, True] == [one is not None for one in recorded]
    assert {1: 2} == allocator.num_uses


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, RuntimeError])
@pytest.mark.parametrize("num_before", [0, 1])
def test_call_that_fails_while_it_is_recorded_is_recorded_later(
    allocator: Allocator, kind: type[Exception], num_before: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also as the first one, which is alone in its pool; with the others, where there are some."""
    monkeypatch.setattr(recorder, "NUM_RESTING", 0)
    monkeypatch.setattr(recorder.logger, "disabled", True)  # a log that is kept keeps the graph
    ours, x = Recorder(CPU, "calls"), torch.ones(2)
    before = [ours.try_record(double, x) for _ in range(num_before)]
    kinds = [kind]

    def fail_once(x: Tensor) -> Tensor:
        if allocator.underway and kinds:
            raise kinds.pop()("the recording goes on, and what was allocated stays")
        return 2 * x

    recorded = [ours.try_record(fail_once, x, num_warm_ups=0) for _ in range(2)]

    assert recorded[1] is not None
    assert not ours.is_given_up
    num_recorded = sum(one is not None for one in (*before, *recorded))
    assert [num_recorded] == [num for num in allocator.num_uses.values() if num]


@pytest.mark.parametrize("is_ready", [True, False])
def test_call_that_was_run_before_is_recorded_without_running_it(
    allocator: Allocator, is_ready: bool
) -> None:
    """Unless it cannot be: then this one and those after it are run first, and nothing is given up."""
    repeats = Repeats(Recorder(CPU, "calls"))
    calls: list[str] = []

    def call(x: Tensor) -> Tensor:
        calls.append(f"{len(x)} {'recorded' if allocator.underway else 'run'}")
        was_just_run = calls[-2:-1] == [f"{len(x)} run"]
        allocator.is_broken = bool(allocator.underway) and not is_ready and not was_just_run
        if allocator.is_broken:
            raise RuntimeError("operation not permitted when stream is capturing")
        return 2 * x

    for size in (1, 2, 1, 2):
        repeats.run(size, call, torch.ones(size))

    run_first = [] if is_ready else ["1 recorded", "1 run"]
    then = [] if is_ready else ["2 run"]
    assert ["1 run", "2 run", *run_first, "1 recorded", *then, "2 recorded"] == calls
    assert 2 == repeats.num_graphs
    assert not repeats.are_given_up


def test_call_is_run_and_recorded_over_the_same_memory(hands: Hands) -> None:
    """Kernels are built for the alignment of what they read: one that a caller cut may have another."""
    repeats = Repeats(hands)
    addresses: list[int] = []

    def call(x: Tensor) -> Tensor:
        addresses.append(x.data_ptr())
        return double(x)

    x = torch.ones(9)
    for cut in (x[1:], x[:8]):
        assert [2.0] * 8 == repeats.run("x", call, cut).tolist()

    assert 1 == repeats.num_graphs
    assert 1 == len(set(addresses))


def test_call_that_failed_when_it_was_run_is_run_again_before_it_is_recorded(hands: Hands) -> None:
    """It may have ended before all of its kernels were loaded."""
    repeats, x = Repeats(hands), torch.ones(2)

    def fail(x: Tensor) -> Tensor:
        raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError):
        repeats.run("x", fail, x)
    repeats.run("x", double, x)
    assert 0 == hands.num_tried
    repeats.run("x", double, x)

    assert 1 == hands.num_tried


def test_call_is_run_as_it_came_where_its_inputs_find_no_memory(
    hands: Hands, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And it is not recorded next: its kernels were loaded for other addresses."""
    repeats = Repeats(hands)

    def hold(*inputs: Tensor) -> tuple[Tensor, ...]:
        raise torch.OutOfMemoryError

    with monkeypatch.context() as patched:
        patched.setattr(hands, "hold", hold)
        run_all(repeats, [10, 10])
    assert 0 == hands.num_tried
    run_all(repeats, [10, 10])

    assert 1 == repeats.num_graphs


def test_memory_is_held_for_no_recordings_that_were_given_up(hands: Hands) -> None:
    repeats = Repeats(hands)
    run_all(repeats, [10, 10])
    hands.error = RuntimeError("operation not permitted when stream is capturing")
    run_all(repeats, [20, 20, 30])

    assert repeats.are_given_up
    assert {} == hands._inputs._buffers == repeats._outputs._buffers
