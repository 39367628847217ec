"""Prompts longer than a prefill are read in pieces: same tokens, no stall, and nothing left behind."""

import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine import LLM, Request, SamplingParams
from engine.sequence import Sequence as Running
from tests.engine.conftest import LIMITS
from tests.engine.idle import assert_idle, num_free_rows
from tests.engine.pictures import CLIP, GREEDY, PICTURE, draw, draw_clip, token_ids
from tests.engine.test_engine import by_name, poison_runner, random_request
from tests.engine.test_features import count_encoded
from tests.engine.test_flights import answers
from tests.engine.ways import in_pieces, read_late

BUDGET = 24
LONG = Request(
    prompt=f"{PICTURE}and{CLIP}{'x' * 70}",
    multi_modal_data={"image": draw(1, 200, 150), "video": draw_clip(2, 5)},
    params=GREEDY,
    request_id="long",
)


@pytest.fixture(params=["read at once", "read late"])
def small(request: pytest.FixtureRequest, tiny_folder: Path) -> Iterator[LLM]:
    """Prefills of few tokens, on a CPU as it is and as a GPU would have it."""
    llm = LLM(str(tiny_folder), limit_mm_per_prompt=LIMITS, max_num_batched_tokens=BUDGET)
    if request.param == "read late":
        read_late(llm)
    yield llm
    llm.close()


def record_pieces(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[int]]]:
    """What ran, in order, and how many tokens of each sequence."""
    ran = []
    for method in ("prefill", "decode"):
        run = getattr(llm.engine._runner, method)

        def recorded(sequences: Sequence[Running], method: str = method, run: Any = run) -> Tensor:
            sizes = [s.num_scheduled if method == "prefill" else 1 for s in sequences]
            ran.append((method, sizes))
            return run(sequences)  # type: ignore[no-any-return]

        monkeypatch.setattr(llm.engine._runner, method, recorded)
    return ran


@pytest.mark.parametrize("seed", range(3))
def test_tokens_do_not_depend_on_how_a_prompt_is_cut(llm: LLM, seed: int) -> None:
    """Draws, stop strings, log-probabilities, several outputs."""
    rng = random.Random(f"pieces {seed}")
    asked = [random_request(rng, str(name)) for name in range(12)]
    expected = answers(list(llm.stream(asked)))
    for num_tokens in (7, 33):
        with in_pieces(llm, num_tokens):
            assert expected == answers(list(llm.stream(asked)))


def test_the_last_layer_goes_on_with_the_ends_of_prompts_alone(llm: LLM) -> None:
    """Of the other tokens its keys and values are all that anybody reads."""
    num_rows: list[int] = []
    last = llm.engine._runner._text.layers[-1].mlp.down
    hook = last.register_forward_pre_hook(lambda _, given: num_rows.append(given[0].shape[1]))
    asked = [Request(prompt=f"{'y' * size}", params=GREEDY) for size in (9, 30, 17)]
    try:
        answered = list(llm.stream(asked))
    finally:
        hook.remove()

    assert all(result.error is None for result in answered)
    assert num_rows
    assert max(num_rows) <= len(asked)


def test_pictures_are_encoded_once_and_when_their_piece_comes(
    small: LLM, llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = token_ids(llm.generate(LONG, use_tqdm=False))
    counts = count_encoded(small, monkeypatch)
    small.engine._runner.cache.max_bytes = 0
    num_pieces = []
    poison_runner(small, monkeypatch, "prefill", lambda s: num_pieces.append(s.num_scheduled))  # type: ignore[arg-type,return-value]

    assert expected == token_ids(small.generate(LONG, use_tqdm=False))
    assert len(num_pieces) > 5
    assert [1, 1] == counts


def test_those_that_run_decode_between_the_pieces(
    small: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = record_pieces(small, monkeypatch)
    small.engine._scheduler._patience = 0
    runs = SamplingParams(temperature=0, max_tokens=400, ignore_eos=True)

    def source() -> Iterator[Request]:
        yield Request(prompt="runs", params=runs)
        while len(ran) < 2:
            time.sleep(0.001)
        yield Request(prompt="x" * 100, params=GREEDY)

    assert 2 == len(list(small.stream(source())))
    first = ran.index(("prefill", [BUDGET]))

    assert [
        ("prefill", [BUDGET]),
        ("decode", [1]),
        ("prefill", [BUDGET]),
        ("decode", [1]),
        ("prefill", [BUDGET]),
        ("decode", [1]),
        ("prefill", [BUDGET]),
        ("decode", [1]),
        ("prefill", [4]),
        ("decode", [1, 1]),
    ] == ran[first : first + 10]


def test_whoever_leaves_half_read_gives_all_back_at_once(
    small: LLM, llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = SamplingParams(temperature=0, max_tokens=59, ignore_eos=True)
    staying = Request(prompt="stays", params=params, request_id="stays")
    expected = token_ids(llm.generate(staying, use_tqdm=False))
    num_pieces, free = 0, set()
    prefill = small.engine._runner.prefill

    def leave(sequences: Sequence[Running]) -> Tensor:
        nonlocal num_pieces
        logits = prefill(sequences)
        if any(s.prepared.prompt == LONG.prompt for s in sequences):
            num_pieces += 1
            if num_pieces == 3:
                small.engine.abort_named(["long"])
        return logits

    def look(_: Running) -> bool:
        if num_pieces == 3:
            free.add(num_free_rows(small.engine))
        return False

    monkeypatch.setattr(small.engine._runner, "prefill", leave)
    poison_runner(small, monkeypatch, "decode", look)
    (result,) = list(small.stream([LONG, staying]))

    assert expected == token_ids([result])
    assert 3 == num_pieces
    slab = small.engine._scheduler._slabs.largest_slab
    assert {slab - 64} == free  # of the one that stays
    assert_idle(small.engine)


@pytest.mark.parametrize("number", [0, 2, -1])
def test_piece_that_fails_ends_its_own_request(
    small: LLM, llm: LLM, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    others = [Request(prompt=f"{n}" * 20, params=GREEDY, request_id=str(n)) for n in range(5)]
    expected = answers(list(llm.stream(others)))

    def is_poisoned(sequence: Running) -> bool:
        if sequence.prepared.prompt != LONG.prompt:
            return False
        return sequence.is_read if number < 0 else sequence.num_computed == number * BUDGET

    poison_runner(small, monkeypatch, "prefill", is_poisoned)
    results = by_name(list(small.stream([*others[:2], LONG, *others[2:]])))

    error = results.pop("long").error
    assert error is not None
    assert "engine_failure" == error.code
    assert expected == answers(list(results.values()))
    assert_idle(small.engine)


def test_piece_may_be_repeated(small: LLM, llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that ends behind a call whose rows were written: its halves write them again."""
    asked = [
        Request(prompt=f"{n}" * size, params=GREEDY, request_id=str(n))
        for n, size in enumerate((90, 5, 6, 50, 7, 8, 62, 3))
    ]
    expected = answers(list(llm.stream(asked)))
    prefill, num_failures = small.engine._runner.prefill, 0

    def prefill_and_fail(sequences: Sequence[Running]) -> Tensor:
        nonlocal num_failures
        logits = prefill(sequences)
        if len(sequences) > 1:
            num_failures += 1
            raise torch.OutOfMemoryError
        return logits

    monkeypatch.setattr(small.engine._runner, "prefill", prefill_and_fail)
    results = list(small.stream(asked))

    assert expected == answers(results)
    assert num_failures > 1
    assert_idle(small.engine)


def test_all_of_a_long_prompt_counts_as_its_prefill(
    small: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = record_pieces(small, monkeypatch)
    (result,) = small.generate("x" * 100, GREEDY, use_tqdm=False)
    metrics = result.metrics

    assert [("prefill", [BUDGET])] * 4 + [("prefill", [4])] == ran[:5]
    assert metrics.prefill_ms is not None
    assert metrics.scheduled_ts is not None
    assert metrics.first_token_ts is not None
    # In milliseconds; each flight takes from the one before it, or from its launch.
    took_ms = (metrics.first_token_ts - metrics.scheduled_ts) * 1000
    assert took_ms * 0.7 < metrics.prefill_ms <= took_ms * 1.01
