"""
In bfloat16 on a GPU the engine stays close to transformers' `generate`.

Equality cannot be asked for: kernels sum in another order, and near-ties fall either way. The rule:
two greedy outputs are walked to their first difference; there each side's token must be among the
ten that the other side holds likeliest.
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine import LLM, Result, SamplingParams
from engine.config import BUNDLED_FOLDER
from engine.reference import Reference
from tests.engine.mixed import Mixed, mixed_requests
from tests.engine.tiny import write_tiny_qwen2_vl

pytestmark = pytest.mark.gpu

TOP = 10


def compare(
    llm: LLM, reference: Reference, asked: list[Mixed], *, ignore_eos: bool
) -> dict[str, int]:
    """How many outputs are equal, close at their first difference, or neither."""
    by_name = {mixed.name: mixed for mixed in asked}
    counts = {"equal": 0, "close": 0, "apart": 0}
    requests = []
    for mixed in asked:
        request = mixed.request(ignore_eos=ignore_eos)
        params = SamplingParams(
            temperature=0.0, max_tokens=mixed.max_tokens, ignore_eos=ignore_eos, logprobs=TOP
        )
        requests.append(replace(request, params=params))
    for result in llm.stream(requests):
        mixed = by_name[result.request_id]
        assert result.error is None
        counts[_verdict(result, reference, mixed, ignore_eos)] += 1
    return counts


def _verdict(result: Result, reference: Reference, mixed: Mixed, ignore_eos: bool) -> str:
    ours = list(result.outputs[0].token_ids)
    theirs = mixed.ask(reference, ignore_eos=ignore_eos)
    differing = [i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b]
    if not differing:
        return "equal" if len(ours) == len(theirs) else "apart"
    first = differing[0]
    logprobs = reference.logprobs(mixed.prompt, mixed.images, mixed.videos, theirs[: first + 1])
    their_top = logprobs[first].topk(TOP).indices.tolist()
    our_logprobs = result.outputs[0].logprobs
    assert our_logprobs is not None
    return "close" if ours[first] in their_top and theirs[first] in our_logprobs[first] else "apart"


def test_random_weights_stay_close_to_the_reference(tmp_path: Path) -> None:
    folder = write_tiny_qwen2_vl(tmp_path, seed=1)
    llm = LLM(str(folder), dtype="bfloat16", device="cuda", limit_mm_per_prompt={"image": 8})
    reference = Reference(folder, dtype=torch.bfloat16, device="cuda")

    counts = compare(llm, reference, mixed_requests(100), ignore_eos=True)

    print(json.dumps({"random weights, 100 requests": counts}))
    assert counts["apart"] == 0


@pytest.mark.skipif(
    not (BUNDLED_FOLDER / "model.safetensors").is_file(), reason="the bundled weights are missing"
)
def test_bundled_model_stays_close_to_the_reference() -> None:
    llm = LLM("darkroom-tiny", device="cuda", limit_mm_per_prompt={"image": 8})
    reference = Reference(BUNDLED_FOLDER, dtype=torch.bfloat16, device="cuda")

    counts = compare(llm, reference, mixed_requests(300), ignore_eos=False)

    print(json.dumps({"bundled model, 300 requests": counts}))
    assert counts["apart"] == 0


def test_float32_on_the_gpu_answers_as_the_reference(tmp_path: Path) -> None:
    """No half precision, no flash kernel: the loops over slabs run on the GPU too."""
    folder = write_tiny_qwen2_vl(tmp_path, seed=2)
    llm = LLM(str(folder), dtype="float32", device="cuda", limit_mm_per_prompt={"image": 8})
    reference = Reference(folder, dtype=torch.float32, device="cuda")
    asked = mixed_requests(20)

    counts = compare(llm, reference, asked, ignore_eos=True)

    assert counts["apart"] == 0
