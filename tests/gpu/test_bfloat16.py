"""
In bfloat16 on a GPU the engine stays close to transformers' `generate`.

Equality cannot be asked for: kernels sum in another order, and near-ties fall either way. The rule:
two greedy outputs are walked to their first difference; there each side's token must be among the
ten that the other side holds likeliest.
"""

import json
import math
import random
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine import LLM, Request, Result, SamplingParams
from engine.config import BUNDLED_FOLDER
from engine.kernels import in_one
from engine.reference import Reference
from tests.engine.mixed import Mixed, mixed_requests
from tests.engine.tiny import write_tiny_qwen2_vl
from tests.engine.ways import in_pieces, keeping_prefixes

pytestmark = pytest.mark.gpu

TOP = 10


Counts = dict[str, int]


def compare(
    llm: LLM, reference: Reference, asked: list[Mixed], *, ignore_eos: bool
) -> dict[str, Counts]:
    """For each way of asking: how many outputs are equal, close at their first difference, or neither."""
    wanted = {m.name: m.ask(reference, ignore_eos=ignore_eos) for m in asked}
    ways = {
        "one call": [asked],
        "shuffled": [random.Random(5).sample(asked, len(asked))],
        "one by one": [[mixed] for mixed in asked],
        "in pieces": [asked],
        "from kept rows": [asked, asked],
    }
    contexts = {"in pieces": in_pieces(llm, 64), "from kept rows": keeping_prefixes(llm)}
    by_name = {mixed.name: mixed for mixed in asked}
    counts = {way: {"equal": 0, "close": 0, "apart": 0} for way in ways}
    for way, calls in ways.items():
        with contexts.get(way, nullcontext()):
            results = [r for call in calls for r in llm.stream(_requests(call, ignore_eos))]
        for result in results:
            assert result.error is None
            name = result.request_id
            verdict = _verdict(result, reference, by_name[name], wanted[name])
            counts[way][verdict] += 1
    return counts


def _requests(asked: list[Mixed], ignore_eos: bool) -> list[Request]:
    return [
        replace(
            mixed.request(),
            params=SamplingParams(
                temperature=0.0, max_tokens=mixed.max_tokens, ignore_eos=ignore_eos, logprobs=TOP
            ),
        )
        for mixed in asked
    ]


def _verdict(result: Result, reference: Reference, mixed: Mixed, theirs: list[int]) -> str:
    ours = list(result.outputs[0].token_ids)
    differing = [i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b]
    if not differing:
        return "equal" if len(ours) == len(theirs) else "apart"
    first = differing[0]
    logprobs = reference.logprobs(mixed.prompt, mixed.images, mixed.videos, theirs[: first + 1])
    their_top = logprobs[first].topk(TOP).indices.tolist()
    our_logprobs = result.outputs[0].logprobs
    assert our_logprobs is not None
    return "close" if ours[first] in their_top and theirs[first] in our_logprobs[first] else "apart"


def num_apart(counts: dict[str, Counts]) -> int:
    return sum(of_way["apart"] for of_way in counts.values())


def test_random_weights_stay_close_to_the_reference(tmp_path: Path) -> None:
    folder = write_tiny_qwen2_vl(tmp_path, seed=1)
    llm = LLM(str(folder), dtype="bfloat16", device="cuda", limit_mm_per_prompt={"image": 8})
    reference = Reference(folder, dtype=torch.bfloat16, device="cuda")

    counts = compare(llm, reference, mixed_requests(100), ignore_eos=True)

    print(json.dumps({"random weights, 100 requests": counts}))
    assert num_apart(counts) == 0


@pytest.mark.skipif(
    not (BUNDLED_FOLDER / "model.safetensors").is_file(), reason="the bundled weights are missing"
)
@pytest.mark.parametrize("first", range(0, 500, 50))
def test_bundled_model_stays_close_to_the_reference(first: int) -> None:
    """Of 500 requests so many at a time: processes beside each other can have some each."""
    llm = LLM("darkroom-tiny", device="cuda", limit_mm_per_prompt={"image": 8})
    reference = Reference(BUNDLED_FOLDER, dtype=torch.bfloat16, device="cuda")

    counts = compare(llm, reference, mixed_requests(50, first=first), ignore_eos=False)

    print(json.dumps({f"bundled model, 50 requests from {first} on": counts}))
    assert num_apart(counts) == 0


@pytest.mark.skipif(
    not (BUNDLED_FOLDER / "model.safetensors").is_file(), reason="the bundled weights are missing"
)
def test_products_that_go_on_with_their_sums_stay_close_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Activate, rotate, add and norm: in every call, though so few rows would not pay."""
    shares: list[float] = []

    def use_always(_name: str, compare: Callable[[int], float]) -> int:
        shares.append(compare(512))
        return 1

    monkeypatch.setattr(in_one, "choose_rows", use_always)
    llm = LLM("darkroom-tiny", device="cuda", limit_mm_per_prompt={"image": 8})
    if not shares:
        pytest.skip("products of our own are for Hopper")
    reference = Reference(BUNDLED_FOLDER, dtype=torch.bfloat16, device="cuda")

    counts = compare(llm, reference, mixed_requests(60), ignore_eos=False)

    print(json.dumps({"in one, 60 requests": counts}))
    assert math.inf not in shares
    assert num_apart(counts) == 0


def test_float32_on_the_gpu_answers_as_the_reference(tmp_path: Path) -> None:
    """No half precision, no flash kernel: the loops over slabs run on the GPU too."""
    folder = write_tiny_qwen2_vl(tmp_path, seed=2)
    llm = LLM(str(folder), dtype="float32", device="cuda", limit_mm_per_prompt={"image": 8})
    reference = Reference(folder, dtype=torch.float32, device="cuda")
    asked = mixed_requests(20)

    counts = compare(llm, reference, asked, ignore_eos=True)

    assert num_apart(counts) == 0
