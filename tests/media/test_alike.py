"""Frames that look alike: what is told apart, and what is left out."""

import numpy as np
import pytest
from PIL import Image, ImageDraw

from media.alike import drop_alike, measure_change
from media.decoded import Frames, RGBImage
from media.frames import DEFAULT_MIN_CHANGE


def draw(x: int, colour: str = "red") -> Image.Image:
    """A small square, a hundredth of the picture, on grey."""
    image = Image.new("RGB", (320, 240), "grey")
    ImageDraw.Draw(image).rectangle((x, 100, x + 27, 127), fill=colour)
    return image


def as_frames(*images: Image.Image) -> Frames:
    places = range(len(images))
    return Frames(
        tuple(RGBImage(image) for image in images),
        times_s=tuple(place / 2 for place in places),
        indices=tuple(3 * place for place in places),
        source_num_frames=100,
    )


def test_first_frame_and_each_that_differs_from_the_last_kept_one_stay() -> None:
    frames = as_frames(draw(10), draw(10), draw(200), draw(200), draw(200), draw(10))

    kept = drop_alike(frames, DEFAULT_MIN_CHANGE)

    assert (3, (0.0, 1.0, 2.5), (0, 6, 15)) == (kept.num_dropped, kept.times_s, kept.indices)
    assert [frames.images[place] for place in (0, 2, 5)] == list(kept.images)
    assert 100 == kept.source_num_frames


def test_nothing_is_looked_at_unless_it_was_asked_for() -> None:
    frames = as_frames(draw(10), draw(10))

    assert frames is drop_alike(frames, None)
    assert frames.num_dropped is None


def test_slow_movement_adds_up_until_it_is_seen() -> None:
    frames = as_frames(*(draw(10 + x) for x in range(40)))

    kept = drop_alike(frames, DEFAULT_MIN_CHANGE)

    assert 3 <= kept.num_frames <= 30
    assert kept.indices is not None
    assert max(np.diff(kept.indices)) <= 3 * 10


@pytest.mark.parametrize("colour", ["#b43c3c", "yellow", "black"])
def test_small_thing_is_seen_whatever_its_colour(colour: str) -> None:
    nothing = RGBImage(draw(10, "grey"))

    assert measure_change(nothing, RGBImage(draw(10, colour))) > DEFAULT_MIN_CHANGE


def test_noise_of_a_camera_is_no_change() -> None:
    rng = np.random.default_rng(1)

    def noisy() -> RGBImage:
        pixels = np.asarray(draw(10), np.float64) + rng.normal(0, 3, (240, 320, 3))
        return RGBImage(Image.fromarray(pixels.clip(0, 255).astype(np.uint8)))

    assert measure_change(noisy(), noisy()) < DEFAULT_MIN_CHANGE


def test_change_is_in_levels_of_the_field_that_differs_most() -> None:
    dark, light = Image.new("RGB", (64, 64), (10, 10, 10)), Image.new("RGB", (64, 64), (10, 10, 10))
    light.paste((50, 50, 50), (0, 0, 16, 16))

    assert 40 == measure_change(RGBImage(dark), RGBImage(light))
    assert 0 == measure_change(RGBImage(dark), RGBImage(dark))
