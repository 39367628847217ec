"""Large JPEGs that may be decoded at a half, a quarter or an eighth of their size."""

from io import BytesIO

import numpy as np
import pytest
from PIL import Image, ImageOps

from media.decoded import Fit, Header
from media.images import decode_image
from tests.media.files import Pixels, encode, exif, picture

WANTED = (100, 60)


def fitted(encoded: bytes, size: tuple[int, int] = WANTED, *, may_draft: bool) -> Pixels:
    def ask(header: Header) -> Fit:
        return Fit(*size, may_draft=may_draft)

    return decode_image(encoded, ask=ask).pixels()


def drafted_by_pillow(encoded: bytes, drafted: tuple[int, int]) -> Pixels:
    with Image.open(BytesIO(encoded)) as image:
        image.draft("RGB", drafted)
        upright = ImageOps.exif_transpose(image)
        return np.asarray(upright.resize(WANTED, Image.Resampling.BICUBIC))


def psnr(one: Pixels, other: Pixels) -> float:
    error = np.mean((one.astype(float) - other) ** 2)
    return float(10 * np.log10(255**2 / error))


@pytest.mark.parametrize("size", [(800, 480), (805, 481), (400, 240), (200, 120)])
def test_draft_is_pillows_and_close_to_the_whole(size: tuple[int, int]) -> None:
    large = encode(picture(*size), "JPEG", quality=95)

    drafted = fitted(large, may_draft=True)
    whole = fitted(large, may_draft=False)

    assert np.array_equal(drafted_by_pillow(large, WANTED), drafted)
    assert not np.array_equal(whole, drafted)
    assert psnr(whole, drafted) > 35


def test_picture_on_its_side_is_drafted_by_its_own_sides() -> None:
    large = encode(picture(480, 800), "JPEG", exif=exif(6))

    drafted = fitted(large, may_draft=True)

    assert np.array_equal(drafted_by_pillow(large, WANTED[::-1]), drafted)


@pytest.mark.parametrize("size", [(199, 120), (200, 119), (100, 60), (50, 30)])
def test_pictures_below_twice_the_size_keep_their_pixels(size: tuple[int, int]) -> None:
    small = encode(picture(*size), "JPEG")

    assert np.array_equal(fitted(small, may_draft=False), fitted(small, may_draft=True))


@pytest.mark.parametrize("name", ["PNG", "WEBP", "AVIF"])
def test_other_formats_keep_their_pixels(name: str) -> None:
    large = encode(picture(400, 240), name)

    assert np.array_equal(fitted(large, may_draft=False), fitted(large, may_draft=True))
