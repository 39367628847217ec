"""Encoder calls are rounded up to sizes that come back, and what fills them up changes nothing."""

from collections.abc import Callable, Hashable
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from engine.cache import Cache
from engine.checkpoint import load_weights, read_checkpoint
from engine.config import EngineConfig
from engine.families.internvl import InternVL
from engine.families.protocol import Family, Visual
from engine.families.qwen2_vl import Qwen2VL
from engine.kernels.pictures import Choice, Cut
from engine.rounding import power_up, round_up
from tests.engine.pictures import cut_clip, cut_picture, draw
from tests.engine.tiny_llava import write_tiny_internvl


class Runs:
    """In the place of `Repeats`, which need a GPU: runs every call, and keeps its key."""

    def __init__(self) -> None:
        self.keys: list[Hashable] = []

    def run(self, key: Hashable, call: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        self.keys.append(key)
        return call(*inputs)


@pytest.fixture
def family(tiny_folder: Path) -> Qwen2VL:
    config = EngineConfig(model=str(tiny_folder))
    checkpoint = read_checkpoint(config)
    load_weights(checkpoint, config)
    assert isinstance(checkpoint.family, Qwen2VL)
    return checkpoint.family


def visuals_of(family: Family, sizes: list[tuple[int, int]]) -> list[Visual]:
    found = []
    for seed, (width, height) in enumerate(sizes):
        image: Image.Image = draw(seed, width, height)
        found.append(cut_picture(family, image))
    clip = [draw(seed, 56, 56) for seed in range(16)]
    return [*found, cut_clip(family, clip)]


def test_filled_up_calls_give_the_same_features(
    family: Qwen2VL, monkeypatch: pytest.MonkeyPatch
) -> None:
    visuals = visuals_of(family, [(56, 84), (112, 56), (56, 84), (84, 84)])
    expected = family.encode(visuals)

    monkeypatch.setattr(family.encoder, "choice", Choice(Cut(), beats_dense=True))  # its twin, here
    monkeypatch.setattr(family.encoder, "has_varlen", True)
    runs = Runs()
    monkeypatch.setattr(family, "repeats", runs)
    found = family.encode(visuals)
    others = family.encode(visuals_of(family, [(56, 112), (84, 56), (56, 56)]))

    assert 1 == len(set(runs.keys))  # other sizes, one graph
    assert 4 == len(others)
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-4)


def test_equal_pictures_are_not_filled_up(family: Qwen2VL, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(family.encoder, "choice", Choice(Cut(), beats_dense=True))
    monkeypatch.setattr(family.encoder, "has_varlen", True)

    even = family.encoder.pack([24] * 9 + [16] * 8, rounds_up=True)
    others = family.encoder.pack([24] * 7, rounds_up=True)

    assert 24 * 9 + 16 * 8 == even.num_patches
    assert ((9, 24), (8, 16)) == even.runs
    assert not even.is_dense
    assert 256 == others.num_patches


def test_positions_that_are_kept_have_a_bound(
    family: Qwen2VL, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of one long clip are megabytes."""
    sizes = [(28 * across, 28 * down) for across in range(1, 7) for down in range(1, 7)]
    visuals = visuals_of(family, sizes)
    expected = family.encode(visuals)

    monkeypatch.setattr(family, "_known", Cache(4096))
    found = [features for visual in visuals for features in family.encode([visual])]

    assert 0 < family._known.num_bytes <= 4096
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("number", [1, 256, 257, 4095, 4096, 4097, 31_280, 32_768, 100_000])
def test_sizes_are_rounded_up_by_little(number: int) -> None:
    rounded = round_up(number)

    assert rounded >= number
    assert rounded % 256 == 0
    assert rounded - number < max(256, number / 16)


def test_powers_are_rounded_up_too() -> None:
    assert [16, 16, 32, 1024, 2048] == [power_up(n, 16) for n in (1, 16, 17, 1024, 1025)]


@pytest.mark.parametrize("number", [1, 2, 8, 9, 16, 17, 31, 33, 47, 56, 200])
def test_tiles_are_rounded_up_by_an_eighth_at_most(number: int) -> None:
    rounded = round_up(number, num_steps=8, least_step=1)

    assert number <= rounded <= number * 9 / 8


def test_few_sizes_are_left_between_powers_of_two() -> None:
    assert 16 == len({round_up(number) for number in range(16_385, 32_769)})
    assert 8 == len({round_up(number, num_steps=8, least_step=1) for number in range(33, 65)})


@pytest.fixture
def internvl(tmp_path: Path) -> InternVL:
    config = EngineConfig(model=str(write_tiny_internvl(tmp_path, seed=3)))
    checkpoint = read_checkpoint(config)
    load_weights(checkpoint, config)
    assert isinstance(checkpoint.family, InternVL)
    return checkpoint.family


def test_numbers_of_tiles_come_back_and_what_fills_them_up_is_left_out(
    internvl: InternVL, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures = [cut_picture(internvl, draw(seed, 56, 56)) for seed in range(40)]
    expected = internvl.encode(pictures)

    runs = Runs()
    monkeypatch.setattr(internvl, "repeats", runs)
    found = internvl.encode(pictures)
    for number in range(33, 40):
        assert number == len(internvl.encode(pictures[:number]))
    monkeypatch.setattr(internvl._encoder, "_most", 34)  # no call is larger, for being rounded up
    internvl.encode(pictures[:33])

    numbers = [key[1] for key in runs.keys if isinstance(key, tuple)]
    assert [40, *[36] * 4, *[40] * 3, 34] == numbers
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
