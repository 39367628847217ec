"""
The engine says what transformers' `generate` says, token for token, however requests come.

float32 on a CPU, greedy. Once with random weights, whose answers are long and odd, and once with the
bundled model, which stops by itself.
"""

import random
from pathlib import Path

import pytest

from engine import LLM
from engine.config import BUNDLED_FOLDER
from engine.reference import Reference
from tests.engine.families import NUM_ASKED
from tests.engine.mixed import Mixed, mixed_requests
from tests.engine.tiny import write_tiny_qwen2_vl
from tests.engine.ways import in_pieces, keeping_prefixes

# `make exactness` asks 300 and 100, all of them in all ways. transformers takes 0.1 s for each.
NUM_BUNDLED = 300 if NUM_ASKED else 120
NUM_RANDOM = NUM_ASKED or 30
NUM_OTHERWISE = 60  # asked alone, in pieces and from kept rows, too

Answers = dict[str, tuple[int, ...]]


def answers(llm: LLM, asked: list[Mixed], *, ignore_eos: bool) -> Answers:
    requests = [mixed.request(ignore_eos=ignore_eos) for mixed in asked]
    results = list(llm.stream(requests))
    assert [r.error for r in results if r.error] == []
    assert len(asked) == len(results)
    return {result.request_id: tuple(result.outputs[0].token_ids) for result in results}


def expected_answers(reference: Reference, asked: list[Mixed], *, ignore_eos: bool) -> Answers:
    return {m.name: tuple(m.ask(reference, ignore_eos=ignore_eos)) for m in asked}


def check_all_ways(llm: LLM, reference: Reference, asked: list[Mixed], *, ignore_eos: bool) -> None:
    shuffled = random.Random(5).sample(asked, len(asked))

    in_one_call = answers(llm, asked, ignore_eos=ignore_eos)
    in_another_order = answers(llm, shuffled, ignore_eos=ignore_eos)
    some = asked if NUM_ASKED else asked[:NUM_OTHERWISE]
    with keeping_prefixes(llm):
        with in_pieces(llm, 64):
            read_in_pieces = answers(llm, some[::-1], ignore_eos=ignore_eos)
        from_kept_rows = answers(llm, some, ignore_eos=ignore_eos)
    one_by_one: Answers = {}
    for mixed in some:
        one_by_one |= answers(llm, [mixed], ignore_eos=ignore_eos)
    expected = expected_answers(reference, asked, ignore_eos=ignore_eos)

    assert len(set(expected.values())) > len(asked) // 4  # equal answers would prove nothing
    assert expected == in_one_call
    assert expected == in_another_order
    of_some = {mixed.name: expected[mixed.name] for mixed in some}
    assert of_some == one_by_one
    assert of_some == read_in_pieces
    assert of_some == from_kept_rows


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"text_heads": 6, "text_kv_heads": 3, "text_width": 96, "mrope_section": (2, 3, 3)},
    ],
)
def test_random_weights_answer_as_the_reference_in_any_order(
    tmp_path: Path, shape: dict[str, object]
) -> None:
    folder = write_tiny_qwen2_vl(tmp_path, seed=3, **shape)  # type: ignore[arg-type]
    llm = LLM(str(folder), limit_mm_per_prompt={"image": 8}, max_num_seqs=24)

    check_all_ways(llm, Reference(folder), mixed_requests(NUM_RANDOM), ignore_eos=True)


@pytest.mark.timeout(900)  # a minute of work on a machine that does nothing else
@pytest.mark.skipif(
    not (BUNDLED_FOLDER / "model.safetensors").is_file(), reason="the bundled weights are missing"
)
def test_bundled_model_answers_as_the_reference_in_any_order() -> None:
    llm = LLM("darkroom-tiny", limit_mm_per_prompt={"image": 8})

    check_all_ways(llm, Reference(BUNDLED_FOLDER), mixed_requests(NUM_BUNDLED), ignore_eos=False)
