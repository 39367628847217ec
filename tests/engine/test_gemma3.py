"""What of Gemma 3 tests/engine/families.py does not say: long prompts, and what is refused."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from engine import LLM
from engine.attention import MAX_RUN, TextContext, _cut_runs, attend_text, using
from engine.errors import BadConfig
from tests.engine.pictures import GREEDY, cut_picture, draw, token_ids
from tests.engine.tiny_llava import GEMMA, write_tiny_gemma3, write_tiny_text

DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
PARTIAL = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
DEFAULT = {"rope_type": "default", "rope_theta": 1e4}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"rope_parameters": {"full_attention": DYNAMIC, "sliding_attention": DEFAULT}},
            r"positions are of the type 'dynamic', which changes with the length",
        ),
        (
            {"model_type": "phi3", "rope_parameters": PARTIAL},
            r"turn a part of each head only \(partial_rotary_factor\)",
        ),
        ({"use_bidirectional_attention": True}, r"it makes embeddings and no answers"),
        ({"final_logit_softcapping": 30.0}, r"bounds its scores \(final_logit_softcapping\)"),
    ],
)
def test_text_model_that_would_answer_otherwise_is_refused(
    tmp_path: Path, changes: Mapping[str, Any], said: str
) -> None:
    text = {"model_type": "gemma3_text", **GEMMA, **changes}
    if "rope_parameters" in changes:
        text = {name: value for name, value in text.items() if name != "rope_scaling"}
    write_tiny_text(tmp_path, changes={"text": text})

    with pytest.raises(BadConfig, match=said):
        LLM(str(tmp_path))


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    with LLM(str(write_tiny_gemma3(tmp_path_factory.mktemp("gemma3")))) as llm:
        yield llm


@pytest.mark.parametrize("window", [None, 7, 1500])
def test_long_prompts_are_seen_run_by_run_as_by_one_mask(window: int | None) -> None:
    size, pictures = 2500, [(3, 40), (1200, 1300), (1300, 1310), (2490, 2500)]
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, heads, size, 8, generator=generator) for heads in (4, 2, 2))
    context = TextContext(
        [torch.zeros(size, 2, 8)],
        [torch.zeros(size, 2, 8)],
        torch.arange(size),
        [0],
        [size],
        [size],
    )
    with using(replace(context, both_ways=[pictures])):
        seen, _ = attend_text(Layer(), query, key, value, None, scaling=0.3, sliding_window=window)
    mask = torch.ones(size, size, dtype=torch.bool).tril()
    for begin, end in pictures:
        mask[begin:end, begin:end] = True
    if window is not None:
        mask = mask.triu(1 - window)
    expected = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=0.3, enable_gqa=True
    )

    torch.testing.assert_close(expected.transpose(1, 2), seen, atol=1e-5, rtol=1e-5)
    assert max(end - begin for begin, end, _ in _cut_runs(size, pictures)) <= MAX_RUN


@pytest.mark.parametrize("window", [None, 7, 1500])
def test_long_prompts_in_pieces_are_seen_as_whole(window: int | None) -> None:
    size, pictures = 2500, [(3, 40), (1200, 1300), (1300, 1310), (2490, 2500)]
    generator = torch.Generator().manual_seed(1)
    qkv = [torch.randn(1, heads, size, 8, generator=generator) for heads in (4, 2, 2)]
    keys, values = ([torch.zeros(size, 2, 8)] for _ in range(2))

    def attend(begin: int, end: int) -> Tensor:
        spans = [(first - begin, last - begin) for first, last in pictures if begin <= first < end]
        context = TextContext(
            keys, values, torch.arange(begin, end), [0], [end], [end - begin], both_ways=[spans]
        )
        with using(context):
            q, k, v = (x[:, :, begin:end] for x in qkv)
            piece, _ = attend_text(Layer(), q, k, v, None, scaling=0.3, sliding_window=window)
        return piece

    whole = attend(0, size)
    pieces = [attend(*ends) for ends in pairwise((0, 40, 1200, 1300, 1900, size))]

    torch.testing.assert_close(whole, torch.cat(pieces, dim=1), atol=1e-5, rtol=1e-5)


class Layer(torch.nn.Module):
    layer_idx = 0


def test_picture_that_came_as_features_is_seen_both_ways_too(llm: LLM) -> None:
    picture, family = draw(3, 90, 70), llm.engine.checkpoint.family
    features = family.encode([cut_picture(family, picture)])[0]
    prompt = "USER: <start_of_image>What is this?"
    seen, handed = (
        llm.generate(
            {"prompt": prompt, "multi_modal_data": {"image": media}}, GREEDY, use_tqdm=False
        )
        for media in (picture, features[None])
    )

    assert token_ids(seen) == token_ids(handed)


def test_prompt_with_all_of_a_picture_written_out_is_left_as_it_is(llm: LLM) -> None:
    short, whole = (
        "x<start_of_image>y",
        "x\n\n<start_of_image><image_soft_token><end_of_image>\n\ny",
    )
    family = llm.engine.checkpoint.family

    assert whole == family.read_text(short) == family.read_text(whole)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("preprocessor_config.json", {"do_pan_and_scan": True}),
        ("preprocessor_config.json", {"size": {"height": 60, "width": 60}}),
        ("config.json", {"mm_tokens_per_image": 9}),
    ],
)
def test_pictures_that_are_read_otherwise_are_refused(
    tmp_path: Path, name: str, changes: Mapping[str, Any]
) -> None:
    file = write_tiny_gemma3(tmp_path) / name
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    with pytest.raises(BadConfig, match="in another way than the published ones"):
        LLM(str(tmp_path))
