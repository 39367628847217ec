"""What an engine's finished requests take at least, where that is known."""

import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from engine import LLM, Request, SamplingParams, engine, floors
from engine.floors import Asked, Floors, Rates, count_patches, find_floors
from engine.request import ImageUsed, MediaKind
from tests.engine.pictures import CLIP, GREEDY, PICTURE, draw, draw_clip

RATES = Rates(1e9, 1e9)
LONG_S = 0.3  # next to what these prompts take to be prepared


@pytest.fixture
def known(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LLM]:
    """A small engine on a device whose rates somebody has worked out."""
    monkeypatch.setattr(floors, "RATES", {"cpu": RATES})
    with LLM(str(tiny_folder), max_num_seqs=4, enable_prefix_caching=True) as llm:
        yield llm


def read_floor_ms(llm: LLM) -> float:
    floor_s = llm.engine.read_usage().floor_s
    assert floor_s is not None
    return floor_s * 1000


def floors_of(llm: LLM) -> Floors:
    checkpoint = llm.engine.checkpoint
    return Floors(checkpoint.config, 4, RATES, checkpoint.dtype.itemsize)


def test_finished_requests_are_added_up_and_what_was_kept_is_no_work(known: LLM) -> None:
    expected = floors_of(known)
    ask: dict[str, Any] = {"prompt": PICTURE, "multi_modal_data": {"image": draw(1)}}
    (first,) = known.generate(ask, GREEDY, use_tqdm=False)
    patches = count_patches(known.engine.checkpoint.config, first.images[0])
    after_first = read_floor_ms(known)
    known.reset_prefix_cache()
    known.generate(ask, GREEDY, use_tqdm=False)  # its picture is known
    after_again = read_floor_ms(known)

    num = len(first.prompt_token_ids or ())
    assert [36] == patches
    assert after_first == pytest.approx(expected.of(Asked([36], num, 12)).total)
    assert after_again - after_first == pytest.approx(expected.of(Asked([], num, 12)).total)


def test_prompt_of_several_outputs_is_read_once_and_cached_tokens_are_not(known: LLM) -> None:
    expected = floors_of(known)
    text = "The same beginning of a prompt, long enough to be kept for others. " * 2
    two = SamplingParams(temperature=1.0, seed=1, max_tokens=3, ignore_eos=True, n=2)
    (result,) = known.generate(text, two, use_tqdm=False)
    before = read_floor_ms(known)
    (again,) = known.generate(text, GREEDY, use_tqdm=False)

    num = len(result.prompt_token_ids or ())
    once = expected.of(Asked([], num, 3)).total
    assert before == pytest.approx(once + expected.decode_ms(num, 3))
    assert again.num_cached_tokens
    rest = Asked([], num, 12, again.num_cached_tokens)
    assert read_floor_ms(known) - before == pytest.approx(expected.of(rest).total)


def test_frames_of_a_clip_see_each_other_in_pairs(known: LLM) -> None:
    ask: dict[str, Any] = {"prompt": CLIP, "multi_modal_data": {"video": draw_clip(1, 3)}}
    (result,) = known.generate(ask, GREEDY, use_tqdm=False)
    patches = count_patches(known.engine.checkpoint.config, result.images[0])

    assert 2 == len(patches)
    assert known.engine.read_usage().num_patches == sum(patches)


def test_log_says_the_share_of_the_floor_where_it_is_known(
    known: LLM, llm: LLM, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(engine, "USAGE_EVERY_S", 0.0)
    with caplog.at_level(logging.INFO, logger="engine"):
        known.generate("a", GREEDY, use_tqdm=False)
    said = [line for line in caplog.messages if line.startswith("engine_usage ")]
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="engine"):
        llm.generate("a", GREEDY, use_tqdm=False)
    unknown = [line for line in caplog.messages if line.startswith("engine_usage ")]

    assert any(float(line.partition(" of_floor=")[2]) > 0 for line in said)
    assert unknown
    assert not any("of_floor" in line for line in unknown)
    assert llm.engine.read_usage().floor_s is None


def test_usage_is_of_all_that_was_done(known: LLM) -> None:
    before = known.engine.read_usage()
    ask: dict[str, Any] = {"prompt": PICTURE, "multi_modal_data": {"image": draw(2)}}
    (result,) = known.generate(ask, GREEDY, use_tqdm=False)
    used = known.engine.read_usage().since(before)

    assert 36 == used.num_patches
    assert len(result.prompt_token_ids or ()) == used.num_prompt_tokens
    assert 11 == used.num_tokens  # the first one comes from the prompt
    assert used.encode_s > 0
    assert used.busy_s == pytest.approx(used.encode_s + used.prefill_s + used.decode_s)
    assert used.waited_for_media_s > 0
    assert (0, 0, 0) == (used.num_running, used.num_waiting, used.num_preparing)


def test_device_waits_for_pictures_that_come_last_too(known: LLM) -> None:
    before = known.engine.read_usage()
    was_asked, may_come = threading.Event(), threading.Event()

    def fetch() -> Image.Image:
        was_asked.set()
        assert may_come.wait(60)
        return draw(3)

    def ask() -> Iterator[Request]:
        yield Request(prompt=PICTURE, params=GREEDY, multi_modal_data={"image": fetch})
        assert was_asked.wait(60)
        time.sleep(LONG_S)
        yield Request(prompt="a", params=GREEDY)

    results = known.stream(ask())
    next(results)  # of the text, which was ready first
    may_come.set()
    list(results)

    assert known.engine.read_usage().since(before).waited_for_media_s > LONG_S


def test_nothing_is_said_of_families_and_devices_that_nobody_has_looked_at(llm: LLM) -> None:
    config = llm.engine.checkpoint.config
    siglip = SimpleNamespace(model_type="siglip_vision_model")

    assert find_floors(config, "NVIDIA H100 80GB HBM3", 4, 2) is not None
    for device in ("cpu", "NVIDIA GH200 480GB", "NVIDIA H100 PCIe", "NVIDIA H200 MIG 1g.18gb"):
        assert find_floors(config, device, 4, 2) is None
    for other in (
        SimpleNamespace(model_type="gemma3"),
        SimpleNamespace(model_type="llava", vision_config=siglip),
        SimpleNamespace(model_type="qwen2_vl", text_config=SimpleNamespace()),
    ):
        assert find_floors(other, "NVIDIA H100 80GB HBM3", 4, 2) is None


def test_features_that_came_as_they_are_were_not_encoded(llm: LLM) -> None:
    embedded = ImageUsed(0, 0, 0, 0, 0, 9, MediaKind.IMAGE)

    assert [] == count_patches(llm.engine.checkpoint.config, embedded)
