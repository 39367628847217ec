"""A deterministic engine gives a request the same numbers, to the last bit, whoever is there beside it."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest

from engine import LLM, BadConfig, Request, SamplingParams
from tests.engine.mixed import mixed_requests

Numbers = list[tuple[int, list[tuple[int, float]]]]


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    llm = LLM(
        "darkroom-tiny",
        dtype="float32",
        device="cpu",
        limit_mm_per_prompt={"image": 8, "video": 1},
        encoder_cache_bytes=0,
        deterministic=True,
    )
    yield llm
    llm.close()


def build_requests(num: int) -> list[Request]:
    asked = [mixed.request(ignore_eos=True) for mixed in mixed_requests(num, "deterministic")]
    return [
        replace(request, params=replace(request.params, max_tokens=4 + n % 9, logprobs=2))
        for n, request in enumerate(asked)
        if isinstance(request.params, SamplingParams)
    ]


def ask(llm: LLM, requests: Sequence[Request]) -> dict[str, Numbers]:
    """Of each request, the tokens and the logprobs that were the likeliest at each, exactly."""
    found = {}
    for result in llm.stream(requests):
        output = result.outputs[0]
        assert output.logprobs is not None
        by_token = [
            [(token_id, each.logprob) for token_id, each in step.items()]
            for step in output.logprobs
        ]
        found[result.request_id] = list(zip(output.token_ids, by_token, strict=True))
    return found


def test_a_request_does_not_depend_on_its_neighbours(llm: LLM) -> None:
    requests = build_requests(19)  # over the places of one decode call
    alone: dict[str, Numbers] = {}
    for request in requests:
        alone |= ask(llm, [request])
    shuffled = list(requests)
    random.Random(3).shuffle(shuffled)

    assert 19 == len(alone)
    assert alone == ask(llm, requests)
    assert alone == ask(llm, shuffled)
    assert alone == ask(llm, shuffled[:7]) | ask(llm, shuffled[7:])


def test_a_prefix_of_another_is_refused() -> None:
    with pytest.raises(BadConfig, match="exclude each other"):
        LLM("darkroom-tiny", deterministic=True, enable_prefix_caching=True)
