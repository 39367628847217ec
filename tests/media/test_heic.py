"""HEIC, which is read where an operator asks and the extra is installed."""

import numpy as np
import pytest

from media.decoded import Fit
from media.errors import ImageFormatNotSupportedError, MediaError
from media.images import decode_image
from media.limits import IMAGE_LIMITS, ImageLimits
from media.pool import DecoderPool
from tests.media.files import catch, encode, exif, picture

pytest.importorskip("pillow_heif")

WITH_HEIC = ImageLimits(formats=(*IMAGE_LIMITS.formats, "HEIC"))


def heic(width: int = 64, height: int = 48, orientation: int = 1) -> bytes:
    return encode(picture(width, height), "HEIF", quality=90, exif=exif(orientation).tobytes())


def test_it_is_refused_by_name_unless_it_was_asked_for() -> None:
    error = catch(ImageFormatNotSupportedError, decode_image, heic())

    assert "the bytes are HEIC" in str(error)


def test_it_is_about_the_picture_that_was_saved() -> None:
    image = decode_image(heic(), WITH_HEIC)

    assert (64, 48) == (image.width_px, image.height_px)
    assert np.abs(image.pixels().astype(int) - np.asarray(picture(64, 48))).mean() < 8


def test_it_is_turned_upright() -> None:
    image = decode_image(heic(orientation=6), WITH_HEIC)

    assert (48, 64) == (image.width_px, image.height_px)


def test_limits_and_damage_are_told_as_of_other_formats() -> None:
    whole = heic()

    with pytest.raises(MediaError, match="64x48"):
        decode_image(whole, ImageLimits(formats=("HEIC",), max_pixels=1000))
    error = catch(MediaError, decode_image, whole[:-200], WITH_HEIC)
    assert "HEIC" in str(error)


def test_processes_give_the_same_pixels() -> None:
    with DecoderPool(1, image_limits=WITH_HEIC) as pool:
        for orientation in (1, 6):
            encoded = heic(orientation=orientation)
            for ask in (None, lambda _: Fit(30, 20)):
                expected = decode_image(encoded, WITH_HEIC, ask)
                assert np.array_equal(expected.view(), pool.decode_image(encoded, ask=ask).view())
