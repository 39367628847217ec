"""
The campaign over leaks, small: an engine that is sound passes, and each kind of leak is found.

`python -m bench.leaks` is the large one.
"""

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.leaks import Campaign, Look, judge, open_llm, read_heap
from engine import LLM, processor
from engine.features import FeatureCache
from engine.scheduler import Scheduler
from engine.slabs import SlabAllocator

NUM, BLOCK = 96, 12
CACHE_BYTES = 16 << 10
RENDERED_BYTES = 32 << 10


@pytest.fixture
def llm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LLM]:
    """One whose caches are full before the warm-up ends. What it logs holds traces, and is not kept."""
    monkeypatch.setattr(processor, "MAX_RENDERED_BYTES", RENDERED_BYTES)
    logging.disable(logging.CRITICAL)
    try:
        with open_llm(tmp_path, "cpu", 0) as llm:
            llm.engine._runner.cache.max_bytes = CACHE_BYTES
            yield llm
    finally:
        logging.disable(logging.NOTSET)


def campaign(llm: LLM, num: int = NUM) -> tuple[Look, list[str]]:
    """What is there at the end, and what is wrong."""
    looks = list(Campaign(llm, leave_s=0.05).run(num, BLOCK))
    return looks[-1], judge(looks, max_cache_bytes=CACHE_BYTES)[1]


def test_nothing_stays_of_requests_that_ended_or_left(llm: LLM) -> None:
    last, wrong = campaign(llm)

    assert [] == wrong
    assert NUM == last.asked
    assert NUM / 4 < last.left < NUM * 7 / 8
    assert last.refused > 0
    assert last.encoder_cache_bytes > CACHE_BYTES / 2
    assert RENDERED_BYTES / 2 < last.rendered_bytes <= RENDERED_BYTES


def _keep_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SlabAllocator, "free", lambda self, start: None)


def _forget_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    finish = Scheduler.finish

    def finish_some(self: Scheduler, sequences: Any) -> None:
        for sequence in sequences:
            if len(sequence.output_ids) > 1 and len(self._free_slots) > 8:
                sequence.slot = None
        finish(self, sequences)

    monkeypatch.setattr(Scheduler, "finish", finish_some)


def _keep_all_features(monkeypatch: pytest.MonkeyPatch) -> None:
    keep = FeatureCache.keep

    def keep_without_a_bound(self: FeatureCache, key: bytes, features: Any) -> None:
        self.max_bytes = 1 << 30
        keep(self, key, features)

    monkeypatch.setattr(FeatureCache, "keep", keep_without_a_bound)


@pytest.mark.parametrize(
    ("leak", "name"),
    [
        (_forget_slots, "slots_held"),
        (_keep_slabs, "rows_held"),
        (_keep_all_features, "the encoder cache"),
    ],
)
def test_leak_on_purpose_is_found(
    llm: LLM,
    monkeypatch: pytest.MonkeyPatch,
    leak: Callable[[pytest.MonkeyPatch], None],
    name: str,
) -> None:
    leak(monkeypatch)
    monkeypatch.setattr("bench.leaks.SETTLE_S", 0.1)
    _, wrong = campaign(llm, 4 * BLOCK)

    assert any(each.startswith(name) for each in wrong)


def test_objects_that_are_kept_are_found(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache that keeps the prompts of everybody, say."""
    kept = []
    prepare = llm.engine._processor.prepare

    def prepare_and_keep(request: Any) -> Any:
        prepared = prepare(request)
        kept.append([prepared, [str(number) for number in range(20)]])
        return prepared

    monkeypatch.setattr(llm.engine._processor, "prepare", prepare_and_keep)
    _, wrong = campaign(llm)

    assert any(each.startswith("python_blocks") for each in wrong)


SOUND = Look(*[0] * 25)


def line(**grown_by: int) -> list[Look]:
    """Twenty looks, each a thousand requests after the one before it."""
    return [
        replace(SOUND, asked=1000 * at, **{name: at * each for name, each in grown_by.items()})
        for at in range(1, 21)
    ]


def test_line_that_is_flat_is_told_from_one_that_grows() -> None:
    flat = line(rss_bytes=900_000, python_blocks=50)
    growing = line(rss_bytes=2_000_000)
    holding = line(heap_held_bytes=600_000)
    keeping = line(heap_free_bytes=2_000_000)
    noisy = [replace(each, rss_bytes=(at % 3) << 23) for at, each in enumerate(line())]
    noisy[-1] = replace(noisy[-1], rss_bytes=200 << 20)

    assert [] == judge(flat)[1]
    assert ["rss_bytes grew by 2000000 per 1,000 requests"] == judge(growing)[1]
    assert ["heap_held_bytes grew by 600000 per 1,000 requests"] == judge(holding)[1]
    assert [] == judge(keeping)[1]
    assert [] == judge(noisy)[1]


def test_heap_tells_what_is_held_from_what_is_kept() -> None:
    before = read_heap()
    if before is None:
        pytest.skip("no glibc, which could be asked")
    blocks = [torch.zeros(1 << 12) for _ in range(1000)]  # 16 kB each, so that none is mapped alone
    held = read_heap()
    del blocks[::2]  # those between stay, and nothing can be given back
    half = read_heap()

    assert held is not None
    assert half is not None
    assert 16_000_000 < held.held_bytes - before.held_bytes < 18_000_000
    assert 7_500_000 < held.held_bytes - half.held_bytes < 9_000_000
    assert 7_500_000 < half.free_bytes - held.free_bytes < 9_000_000
    assert 500 == len(blocks)


@pytest.mark.parametrize("name", ["descriptors", "threads", "python_blocks", "prepared", "lost"])
def test_each_thing_that_grows_is_named(name: str) -> None:
    (first, *_) = judge(line(**{name: 1000}))[1]

    assert first.startswith(name)
