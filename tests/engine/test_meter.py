"""Sums of a device's time."""

import logging

import pytest
import torch

from engine import LLM, engine
from engine.meter import Meter, Work
from tests.engine.pictures import PICTURE, draw


def test_what_was_done_between_two_looks() -> None:
    meter = Meter(torch.device("cpu"))
    with meter.span(Work.ENCODE, 100):
        pass
    before = meter.read()
    with meter.span(Work.DECODE, 3):
        pass
    with meter.span(Work.DECODE, 4):
        pass
    used = meter.read().since(before)

    assert (0, 7) == (used.units[Work.ENCODE], used.units[Work.DECODE])
    assert (0, 2) == (used.calls[Work.ENCODE], used.calls[Work.DECODE])
    assert used.ms[Work.ENCODE] == 0 < used.ms[Work.DECODE]


def test_working_engine_says_what_its_device_does(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    llm.reset_mm_cache()  # others have looked at this picture
    monkeypatch.setattr(engine, "USAGE_EVERY_S", 0.0)
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
