"""A replayed call says what it says when it is run, and what no graph can hold is run."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine.checkpoint import load_weights, read_checkpoint
from engine.config import EngineConfig
from engine.recorder import Recorder
from engine.repeats import Repeats
from tests.engine.test_repeats import visuals_of
from tests.engine.tiny import write_tiny_qwen2_vl

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def build(**words: int) -> Repeats:
    return Repeats(Recorder(torch.device("cuda"), "calls"), **words)


def test_replays_read_new_contents_and_leave_old_outputs() -> None:
    repeats = build()
    inputs = [torch.full((4,), float(number), device="cuda") for number in range(5)]

    outputs = [repeats.run("double", lambda x: 2 * x, x) for x in inputs]

    assert [[2.0 * number] * 4 for number in range(5)] == [x.tolist() for x in outputs]
    assert 1 == repeats.num_graphs


def test_the_least_used_graph_goes_first() -> None:
    repeats = build(max_graphs=2, min_unused_runs=0)
    x = torch.ones(4, device="cuda")
    for key in (1, 1, 2, 2, 1, 3, 3, 2):
        assert [key] * 4 == repeats.run(key, lambda x, key=key: key * x, x).tolist()

    assert 2 == repeats.num_graphs


def test_sizes_that_take_turns_do_not_push_each_other_out() -> None:
    repeats = build(max_graphs=2, min_unused_runs=6)
    x = torch.ones(4, device="cuda")
    recorded = []
    for key in (1, 1, 2, 2, 3, 3, 1, 2, 3, 3, 3, 3, 3):
        assert [key] * 4 == repeats.run(key, lambda x, key=key: key * x, x).tolist()
        recorded.append(set(repeats._graphs))

    assert [{1, 2}] * 9 == recorded[3:12]
    assert {2, 3} == recorded[12]


def test_what_is_queued_runs_before_what_is_recorded_meanwhile() -> None:
    """Recording waits for nothing: the device is asleep, and what it will read is not there yet."""
    repeats = build()
    weight = torch.randn(64, 64, device="cuda")

    def call(x: Tensor) -> Tensor:
        return torch.relu(x @ weight)

    inputs, outputs = [], []
    for number in range(4):
        torch.cuda._sleep(100_000_000)  # type: ignore[no-untyped-call]
        inputs.append(torch.full((16, 64), float(number), device="cuda") @ weight)
        outputs.append(repeats.run("x", call, inputs[-1]))

    assert 1 == repeats.num_graphs
    for x, output in zip(inputs, outputs, strict=True):
        torch.testing.assert_close(call(x), output)


def test_a_call_that_waits_for_the_device_is_run_instead() -> None:
    repeats = build()
    x = torch.ones(4, device="cuda")

    def waits(x: Tensor) -> Tensor:
        return x * x.sum().item()

    assert [[4.0] * 4] * 3 == [repeats.run("waits", waits, x).tolist() for _ in range(3)]
    assert repeats.are_given_up


def test_memory_comes_back_after_a_recording_that_failed() -> None:
    """Also what another stream has used: none of it would while torch believes that one is underway."""
    repeats = build()
    x = torch.ones(4, device="cuda")
    for _ in range(2):
        repeats.run("waits", lambda x: x * x.sum().item(), x)
    assert repeats.are_given_up
    torch.cuda.empty_cache()
    before = num_active_bytes()
    for _ in range(10):
        used = torch.zeros(1 << 20, dtype=torch.uint8, device="cuda")
        used.record_stream(torch.cuda.Stream())  # type: ignore[no-untyped-call]
        del used
        torch.cuda.synchronize()
    after = num_active_bytes()

    assert after - before < 3 << 20
    others = build()
    assert [[2.0] * 4] * 3 == [others.run("x", lambda x: 2 * x, x).tolist() for _ in range(3)]
    assert 1 == others.num_graphs


def num_active_bytes() -> int:
    """Also those of tensors that are gone, until all streams have done with them."""
    torch.empty(1, device="cuda")  # looks at who has
    return int(torch.cuda.memory_stats()["active_bytes.all.current"])


def test_calls_of_all_sizes_share_memory_and_say_what_they_say_when_run() -> None:
    torch.manual_seed(0)
    repeats = build()
    weight = torch.randn(64, 64, device="cuda")

    def call(x: Tensor, y: Tensor) -> Tensor:
        return torch.relu(x @ weight) + y

    with torch.inference_mode():
        for turn in range(60):
            size = 16 * (1 + turn * 7 % 5)
            x, y = (torch.randn(size, 64, device="cuda") for _ in range(2))
            torch.testing.assert_close(call(x, y), repeats.run(size, call, x, y))

    assert 5 == repeats.num_graphs


def test_call_that_finds_no_memory_is_run_and_recorded_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In the middle of its recording, where torch has to end it."""
    monkeypatch.setattr("engine.recorder.NUM_RESTING", 2)
    repeats = build()
    x = torch.ones(4, device="cuda")
    is_short = True

    def call(x: Tensor) -> Tensor:
        doubled = 2 * x
        if is_short and torch.cuda.is_current_stream_capturing():
            torch.empty(1 << 50, dtype=torch.uint8, device="cuda")
        return doubled

    for _ in range(3):
        assert [2.0] * 4 == repeats.run("short", call, x).tolist()
    assert 0 == repeats.num_graphs
    is_short = False
    for _ in range(4):
        assert [2.0] * 4 == repeats.run("short", call, x).tolist()

    assert not repeats.are_given_up
    assert 1 == repeats.num_graphs


@pytest.mark.parametrize("num_equal", [0, 12])
def test_pictures_look_the_same_in_a_replay(tmp_path: Path, num_equal: int) -> None:
    """Mixed sizes go through one kernel, many equal ones through dense batches."""
    write_tiny_qwen2_vl(tmp_path, seed=1)
    config = EngineConfig(model=str(tmp_path), dtype="bfloat16", device="cuda")
    checkpoint = read_checkpoint(config)
    load_weights(checkpoint, config)
    family = checkpoint.family
    sizes = [(84, 84)] * num_equal or [(56, 84), (112, 56), (56, 84), (84, 84)]
    visuals = visuals_of(family, sizes)
    expected = family.encode(visuals)

    family.repeats = build()
    for _ in range(4):
        found = family.encode(visuals)

        for one, other in zip(expected, found, strict=True):
            similarity = torch.cosine_similarity(one.float(), other.float(), dim=-1)
            assert similarity.min().item() > 0.999
    assert not family.repeats.are_given_up
    assert 1 == family.repeats.num_graphs
