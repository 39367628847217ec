"""Sums of a device's time."""

import logging
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from engine import LLM, SamplingParams, engine, meter
from engine.meter import Meter, Work
from engine.sampler import Sampled, Sampler
from tests.engine.pictures import PICTURE, draw


def test_what_was_done_between_two_looks() -> None:
    sums = Meter(torch.device("cpu"))
    with sums.span(Work.ENCODE, 100):
        pass
    before = sums.read()
    with sums.span(Work.DECODE, 3):
        pass
    with sums.span(Work.DECODE, 4):
        pass
    used = sums.read().since(before)

    assert (0, 7) == (used.units[Work.ENCODE], used.units[Work.DECODE])
    assert (0, 2) == (used.calls[Work.ENCODE], used.calls[Work.DECODE])
    assert used.ms[Work.ENCODE] == 0 < used.ms[Work.DECODE]


def test_choosing_a_token_is_work_of_the_call_before(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    ahead_s = 0.0
    sample = Sampler.sample

    def take_long(*given: Any) -> Sampled:
        nonlocal ahead_s
        ahead_s += 1000
        return sample(*given)

    clock = SimpleNamespace(perf_counter=lambda: time.perf_counter() + ahead_s)
    monkeypatch.setattr(meter, "time", clock)
    monkeypatch.setattr(Sampler, "sample", take_long)
    before = llm.engine.meter.read()
    llm.generate("a", SamplingParams(max_tokens=4, ignore_eos=True), use_tqdm=False)
    used = llm.engine.meter.read().since(before)

    assert [1, 3] == [used.ms[work] // 1_000_000 for work in (Work.PREFILL, Work.DECODE)]
    assert [1, 3] == [used.calls[work] for work in (Work.PREFILL, Work.DECODE)]


def test_sums_of_a_lost_device_raise_nothing(llm: LLM) -> None:
    class Lost:
        def query(self) -> bool:
            raise RuntimeError("CUDA error: unspecified launch failure")

    lost: Any = Lost()
    llm.engine.meter._marks.append((Work.DECODE, 1, lost, lost))
    before = llm.engine.meter.peek()
    (result,) = llm.generate("a", SamplingParams(max_tokens=4, ignore_eos=True), use_tqdm=False)

    assert result.error is None
    assert 3 == llm.engine.meter.read().since(before).calls[Work.DECODE]


def test_working_engine_says_what_its_device_does(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    llm.reset_mm_cache()  # others have looked at this picture
    monkeypatch.setattr(engine, "USAGE_EVERY_S", 0.0)
    llm.generate(
        "x", use_tqdm=False
    )  # else the first time would begin with what others did long ago
    with caplog.at_level(logging.INFO, logger="engine"):
        llm.generate({"prompt": PICTURE, "multi_modal_data": {"image": draw(1)}}, use_tqdm=False)
    said = [
        dict(word.split("=") for word in record.getMessage().split()[1:])
        for record in caplog.records
        if record.getMessage().startswith("engine_usage ")
    ]

    assert any(float(line["encode"]) > 0 for line in said)
    assert any(float(line["tokens_s"]) > 0 for line in said)
    assert {"1"} <= {line["running"] for line in said}
    for line in said:
        parts = (float(line[work]) for work in ("encode", "prefill", "decode"))
        assert float(line["busy"]) == pytest.approx(sum(parts), abs=0.002)
