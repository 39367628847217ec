"""The two values that decoding gives."""

import numpy as np
import pytest
from PIL import Image

from media.decoded import Frames, RGBImage
from media.images import from_pil
from tests.media.files import picture


def test_picture_takes_only_rgb() -> None:
    with pytest.raises(ValueError, match="from_pil"):
        RGBImage(Image.new("L", (2, 2)))


def test_pixels_are_rows_then_columns_then_channels() -> None:
    image = from_pil(picture(60, 40))

    pixels = image.pixels()

    assert (40, 60, 3) == pixels.shape
    assert np.uint8 == pixels.dtype


def test_frames_stack_in_order() -> None:
    images = tuple(from_pil(picture(6, 4, seed)) for seed in range(3))

    frames = Frames(images)

    assert (3, 6, 4) == (frames.num_frames, frames.width_px, frames.height_px)
    assert (3, 4, 6, 3) == frames.pixels().shape
    assert np.array_equal(images[2].pixels(), frames.pixels()[2])


def test_frames_have_one_size() -> None:
    with pytest.raises(ValueError, match="one size"):
        Frames((from_pil(picture(6, 4)), from_pil(picture(4, 6))))


def test_frames_are_never_none() -> None:
    with pytest.raises(ValueError, match="one picture or more"):
        Frames(())


def test_each_frame_has_its_time_and_index() -> None:
    image = from_pil(picture())

    with pytest.raises(ValueError, match="one time and one index"):
        Frames((image, image), times_s=(0.0,))
    with pytest.raises(ValueError, match="one time and one index"):
        Frames((image, image), indices=(0, 1, 2))


def test_a_frame_stands_for_its_share_of_the_source() -> None:
    images = (from_pil(picture(6, 4)),) * 3
    whole = Frames(images, (0.0, 0.5, 0.9), fps=10.0, source_num_frames=10, indices=(0, 5, 9))
    window = Frames(images, (1.0, 1.2, 1.5), fps=10.0, source_num_frames=90, indices=(10, 12, 15))

    assert 1 / 3 == pytest.approx(whole.frame_s)
    assert 0.2 == pytest.approx(window.frame_s)
    assert 0.45 == pytest.approx(Frames(images, (0.0, 0.5, 0.9)).frame_s)
    assert Frames(images).frame_s is None
    assert Frames(images).duration_s is None
    assert (1.0, 9.0) == (whole.duration_s, window.duration_s)
    assert Frames(images[:1], (0.0,)).frame_s is None
