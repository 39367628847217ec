"""Sums of a device's time."""

import torch

from engine.meter import Meter, Work


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
