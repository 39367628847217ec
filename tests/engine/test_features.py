"""Encoded pictures are kept by what they are, within bytes, and change no answer."""

from pathlib import Path
from typing import Any

import pytest
import torch

from engine import LLM, Request
from engine.features import FeatureCache
from tests.engine.pictures import CLIP, GREEDY, PICTURE, draw, draw_clip, token_ids


def test_oldest_go_first_and_bytes_stay_below_the_limit() -> None:
    cache = FeatureCache(3 * 40)
    for name in (b"a", b"b", b"c"):
        cache.keep(name, torch.full((10,), ord(name), dtype=torch.float32))
    cache.find(b"a")
    cache.keep(b"d", torch.zeros(10))
    cache.keep(b"too large", torch.zeros(31))

    assert [True, False, True, True] == [
        cache.find(n) is not None for n in (b"a", b"b", b"c", b"d")
    ]
    assert 120 == cache.num_bytes
    cache.clear()
    assert (None, 0) == (cache.find(b"a"), cache.num_bytes)


def test_what_is_kept_is_a_copy() -> None:
    cache = FeatureCache(1 << 20)
    whole = torch.zeros(100, 4)
    cache.keep(b"a", whole[:2])
    whole += 1
    kept = cache.find(b"a")

    assert kept is not None
    assert 0 == kept.sum()
    assert 32 == kept.untyped_storage().nbytes()


def count_encoded(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    family = llm.engine.checkpoint.family
    encode, counts = family.encode, []

    def counted(visuals: Any) -> Any:
        counts.append(len(visuals))
        return encode(visuals)

    monkeypatch.setattr(type(family), "encode", staticmethod(counted))
    return counts


def test_many_prompts_about_one_picture_encode_it_once(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm.reset_mm_cache()
    counts = count_encoded(llm, monkeypatch)
    asked = [
        Request(prompt=f"{PICTURE}{n}", multi_modal_data={"image": draw(1)}) for n in range(20)
    ]
    kept = llm.generate(asked, GREEDY, use_tqdm=False)
    again = llm.generate(asked, GREEDY, use_tqdm=False)

    assert [1] == counts
    assert token_ids(kept) == token_ids(again)


def test_equal_pixels_of_another_kind_or_size_are_another(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm.reset_mm_cache()
    counts = count_encoded(llm, monkeypatch)
    picture = draw(4, 84, 84)
    forms: list[Any] = [
        {"prompt": PICTURE, "multi_modal_data": {"image": picture}},
        {"prompt": CLIP, "multi_modal_data": {"video": [picture, picture]}},
        {"prompt": CLIP, "multi_modal_data": {"video": draw_clip(1, 3)}},
        {
            "prompt": PICTURE,
            "multi_modal_data": {"image": picture},
            "mm_processor_kwargs": {"max_pixels": 56 * 56},
        },
    ]
    for form in forms:
        llm.generate(form, GREEDY, use_tqdm=False)

    assert [1, 1, 1, 1] == counts


def test_without_a_cache_every_picture_is_encoded(
    tiny_folder: Path, llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    without = LLM(str(tiny_folder), encoder_cache_bytes=0)
    counts = count_encoded(without, monkeypatch)
    form = {"prompt": PICTURE, "multi_modal_data": {"image": draw(1)}}
    answers = [without.generate(form, GREEDY, use_tqdm=False) for _ in range(2)]
    without.close()

    assert [1, 1] == counts
    assert token_ids(answers[0]) == token_ids(answers[1])
    assert token_ids(llm.generate(form, GREEDY, use_tqdm=False)) == token_ids(answers[0])
