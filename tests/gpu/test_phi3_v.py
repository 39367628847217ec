"""Phi-3.5-vision on a device: as its description says, with prompts on both sides of LongRoPE's length."""

from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

from engine import LLM, SamplingParams
from media.images import from_pil
from tests.engine.phi3_v_reference import Phi3VReference
from tests.engine.pictures import draw
from tests.engine.tiny_phi3_v import write_tiny_phi3_v

pytestmark = pytest.mark.gpu

NUM_PROMPTS, NUM_TOKENS = 24, 16
NUM_LIKELIEST = 10


@dataclass(frozen=True, slots=True)
class Expected:
    prompt: str
    pictures: list[Image.Image]
    token_ids: list[int]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("phi3_v")
    return write_tiny_phi3_v(folder, seed=4, hidden_size=256, num_attention_heads=4)


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[Expected]:
    reference = Phi3VReference(folder)
    cases = []
    for index in range(NUM_PROMPTS):
        pictures = [draw(10 * index + n, 40 + 7 * index, 90) for n in range(index % 3)]
        marks = "".join(f"<|image_{n + 1}|>\n" for n in range(len(pictures)))
        prompt = marks + "word " * (90 if index % 4 == 3 else index)  # 300 tokens are the length
        ids = reference.generate(
            prompt,
            images=[from_pil(picture) for picture in pictures],
            max_tokens=NUM_TOKENS,
            ignore_eos=True,
        )
        cases.append(Expected(prompt, pictures, ids))
    return cases


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("enforce_eager", [False, True])
def test_answers_are_close_to_the_description(
    folder: Path, expected: list[Expected], dtype: str, enforce_eager: bool
) -> None:
    params = SamplingParams(
        temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True, logprobs=NUM_LIKELIEST
    )
    asked = [
        {"prompt": case.prompt, "multi_modal_data": {"image": case.pictures}}
        if case.pictures
        else case.prompt
        for case in expected
    ]
    words = {"device": "cuda", "dtype": dtype, "enforce_eager": enforce_eager}

    with LLM(str(folder), max_num_seqs=16, limit_mm_per_prompt={"image": 2}, **words) as llm:  # type: ignore[arg-type]
        results = llm.generate(asked, params, use_tqdm=False)

    num_same = 0
    for case, result in zip(expected, results, strict=True):
        assert result.error is None
        (output,) = result.outputs
        assert output.logprobs is not None
        for step, (theirs, ours) in enumerate(zip(case.token_ids, output.token_ids, strict=True)):
            if theirs != ours:  # the first that differs: from there on, other things are asked
                assert theirs in output.logprobs[step]
                break
        else:
            num_same += 1
    assert num_same == NUM_PROMPTS or dtype == "bfloat16"
