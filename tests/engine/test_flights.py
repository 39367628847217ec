"""
Batches are launched before the tokens of earlier ones have been read, and nothing changes.

On a GPU that is how the engine always runs. Here a CPU is told to read as late.
"""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from engine import LLM, Request, Result, SamplingParams
from engine.graphs import Replayed
from engine.kernels.greedy import argmax
from engine.runner import Runner
from engine.sampler import Sampled, Sampler
from engine.uploads import Download
from tests.engine.conftest import LIMITS
from tests.engine.idle import assert_idle
from tests.engine.pictures import PICTURE, draw
from tests.engine.test_engine import by_name, poison_runner, random_request
from tests.engine.ways import read_late


@pytest.fixture(scope="module")
def late(tiny_folder: Path) -> Iterator[LLM]:
    """An engine that reads tokens two batches late, and waits for full prefills."""
    llm = LLM(str(tiny_folder), limit_mm_per_prompt=LIMITS, max_num_seqs=8)
    read_late(llm)
    yield llm
    llm.close()


def answers(results: list[Result]) -> dict[str, Any]:
    assert [] == [result.error for result in results if result.error]
    return {
        name: [(o.token_ids, o.text, o.finish_reason, o.stop_reason) for o in result.outputs]
        for name, result in by_name(results).items()
    }


def mixed(seed: int) -> list[Request]:
    """Draws, stop strings, log-probabilities, several outputs; and penalties, which look back."""
    rng = random.Random(seed)
    asked = [random_request(rng, str(name)) for name in range(12)]
    for number in range(4):
        penalised = SamplingParams(
            temperature=0.0, repetition_penalty=1.3, presence_penalty=0.5, max_tokens=9
        )
        greedy = SamplingParams(temperature=0.0, max_tokens=rng.randint(1, 30), ignore_eos=True)
        asked += [
            Request(prompt=f"p{number}", params=penalised, request_id=f"penalised {number}"),
            Request(prompt=f"g{number}", params=greedy, request_id=f"greedy {number}"),
        ]
    return asked


@pytest.mark.parametrize("seed", range(3))
def test_tokens_are_the_same_however_late_they_are_read(llm: LLM, late: LLM, seed: int) -> None:
    asked = mixed(seed)
    expected = answers(list(llm.stream(asked)))

    assert expected == answers(list(late.stream(asked)))
    assert_idle(late.engine)
    assert not late.engine._flights


def test_steps_are_launched_before_the_last_token_is_read(
    late: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    behind = []
    poison_runner(
        late,
        monkeypatch,
        "decode",
        lambda s: bool(behind.append(s.num_launched - len(s.output_ids))),  # type: ignore[func-returns-value]
    )
    params = SamplingParams(temperature=0.0, max_tokens=10, ignore_eos=True)
    late.generate("x", params, use_tqdm=False)

    assert [1, 2, 2, 2, 2, 2, 2, 2, 2] == behind


def test_sequence_that_ends_by_itself_leaves_its_late_steps_behind(late: LLM, llm: LLM) -> None:
    """Its rows and its slot go to others while steps with it are still in the air."""
    stop = [
        Request(
            prompt=f"{n}",
            params=SamplingParams(temperature=1.0, seed=n, max_tokens=60, stop=list("aeiou")),
            request_id=str(n),
        )
        for n in range(60)
    ]
    expected = answers(list(llm.stream(stop)))

    assert expected == answers(list(late.stream(stop)))
    assert any(outputs[0][2] == "stop" for outputs in expected.values())


@pytest.mark.parametrize("seed", range(2))
def test_whoever_leaves_while_batches_fly_costs_nobody_else(llm: LLM, late: LLM, seed: int) -> None:
    rng = random.Random(f"leave {seed}")
    staying = mixed(seed + 10)
    expected = answers(list(llm.stream(staying)))
    for _ in range(3):
        leaving = late.stream([random_request(rng, f"x{n}") for n in range(12)])
        for _ in range(rng.randrange(8)):
            next(leaving)
        leaving.close()  # type: ignore[attr-defined]
        assert_idle(late.engine)
        assert expected == answers(list(late.stream(staying)))


@pytest.mark.parametrize("method", ["prefill", "decode"])
def test_batch_that_fails_late_fails_its_own(
    late: LLM, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    asked = mixed(7)
    expected = answers(list(late.stream(asked)))
    bad = Request(
        prompt=f"{PICTURE}bad",
        multi_modal_data={"image": draw(3)},
        params=SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True),
        request_id="bad",
    )
    poison_runner(late, monkeypatch, method, lambda s: s.prepared.prompt == f"{PICTURE}bad")
    results = by_name(list(late.stream([*asked[:4], bad, *asked[4:]])))

    assert results.pop("bad").error is not None
    assert expected == answers(list(results.values()))
    assert_idle(late.engine)


@pytest.mark.parametrize("name", ["llm", "late"])
@pytest.mark.parametrize("fails", ["sample", "download"])
def test_step_that_fails_after_it_chose_is_repeated_from_the_same_tokens(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, name: str, fails: str
) -> None:
    """A graph keeps its likeliest tokens before anybody draws others; memory may end behind that."""
    chosen: LLM = request.getfixturevalue(name)
    runner, sampler = chosen.engine._runner, chosen.engine._sampler
    asked = mixed(5)
    expected = answers(list(chosen.stream(asked)))
    num_calls = num_failures = 0

    def fail_at_times(num_sequences: int) -> None:
        nonlocal num_calls, num_failures
        num_calls += 1
        if num_sequences > 1 and num_calls % 3 == 0:
            num_failures += 1
            raise MemoryError

    def replay(sequences: Any, *, keeps_logits: bool, draws: bool) -> Replayed:
        assert not draws
        logits = runner.decode(sequences)
        token_ids = argmax(logits)
        runner.keep(sequences, token_ids)
        return Replayed(token_ids, logits if keeps_logits else None)

    def download(token_ids: Tensor) -> Download:
        fail_at_times(len(token_ids))
        return Download(token_ids)

    def draw_ids(logits: Tensor, rows: Any) -> Sampled:
        fail_at_times(len(rows))
        return Sampler.sample(sampler, logits, rows)

    monkeypatch.setattr(runner, "replay", replay)
    monkeypatch.setattr(Runner, "draws", False)  # inside of graphs
    if fails == "sample":
        monkeypatch.setattr(sampler, "sample", draw_ids)
    else:
        monkeypatch.setattr("engine.engine.Download", download)
    found = answers(list(chosen.stream(asked)))

    assert expected == found
    assert num_failures > 5
    assert_idle(chosen.engine)


def test_last_token_is_launched_and_its_rows_go_to_who_waits(tiny_folder: Path) -> None:
    """A prompt that waits is read before the tokens of those that make room for it are."""
    llm = LLM(str(tiny_folder), max_num_seqs=2)
    llm.engine._max_flights = 2
    unread = []
    prefill = llm.engine._runner.prefill

    def count(sequences: Any) -> Any:
        unread.append(sum(len(half.sequences) for f in llm.engine._flights for half in f.halves))
        return prefill(sequences)

    llm.engine._runner.prefill = count  # type: ignore[method-assign]
    params = SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True)
    results = llm.generate(["a", "b", "c", "d"], params, use_tqdm=False)
    llm.close()

    assert [5] * 4 == [len(result.outputs[0].token_ids) for result in results]
    assert 2 <= unread[-1]
    assert_idle(llm.engine)
