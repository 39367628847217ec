"""Every mode of Pillow: the same pixels as Pillow and transformers give, or a reason not to."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageCms

from media.errors import ImageValuesNotSupportedError
from media.images import from_pil
from tests.media.files import catch, picture

OPAQUE_MODES = ["1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV"]
DEEP_GREYS = {"I;16": "<u2", "I;16L": "<u2", "I;16B": ">u2", "I;16N": "=u2"}


def on_white(image: Image.Image) -> Image.Image:
    """What transformers does with transparency."""
    rgba = image.convert("RGBA")
    white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, rgba).convert("RGB")


def translucent(seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (9, 11, 4), dtype=np.uint8)
    return Image.fromarray(values)


@pytest.mark.parametrize("mode", OPAQUE_MODES)
def test_opaque_modes_equal_pillows_conversion(mode: str) -> None:
    image = picture().convert(mode)

    assert np.array_equal(np.asarray(image.convert("RGB")), from_pil(image).pixels())


def test_lab_equals_pillows_conversion() -> None:
    to_lab = ImageCms.buildTransform(
        ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB"
    )
    image = ImageCms.applyTransform(picture(), to_lab)
    assert image is not None

    assert np.array_equal(np.asarray(image.convert("RGB")), from_pil(image).pixels())


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_transparency_is_laid_on_white_as_transformers_does(mode: str) -> None:
    image = translucent()
    image = image.convert("LA") if mode == "LA" else image
    image = image.quantize(16).convert("PA") if mode == "PA" else image
    assert mode == image.mode

    assert np.array_equal(np.asarray(on_white(image)), from_pil(image).pixels())


@pytest.mark.parametrize(("mode", "straight"), [("RGBa", "RGBA"), ("La", "LA")])
def test_premultiplied_transparency_is_laid_on_white_too(mode: str, straight: str) -> None:
    image = translucent().convert(straight).convert(mode)

    expected = np.asarray(on_white(image.convert(straight)))
    assert np.array_equal(expected, from_pil(image).pixels())


def test_palette_with_alpha_of_its_own_is_laid_on_white() -> None:
    image = translucent().quantize(8)
    assert "transparency" not in image.info

    assert np.array_equal(np.asarray(on_white(image)), from_pil(image).pixels())


@pytest.mark.parametrize(
    ("mode", "key"), [("RGB", (10, 20, 30)), ("L", 10), ("1", 0), ("P", 2), ("P", b"\x00\x80")]
)
def test_colour_keys_are_laid_on_white(mode: str, key: int | bytes | tuple[int, ...]) -> None:
    image = picture().convert(mode)
    image.info["transparency"] = key

    assert np.array_equal(np.asarray(on_white(image)), from_pil(image).pixels())


@pytest.mark.parametrize("mode", DEEP_GREYS)
def test_16_bit_grey_keeps_its_high_byte_in_every_byte_order(mode: str) -> None:
    values = np.array([[0, 255, 256, 0x8000, 0xFFFF]], dtype=np.uint16)
    image = Image.frombytes(mode, (5, 1), values.astype(DEEP_GREYS[mode]).tobytes())

    assert [0, 0, 1, 128, 255] == from_pil(image).pixels()[0, :, 2].tolist()


def test_32_bit_integers_of_8_bits_equal_pillows_conversion() -> None:
    image = picture().convert("L").convert("I")

    assert np.array_equal(np.asarray(image.convert("RGB")), from_pil(image).pixels())


def test_32_bit_integers_of_16_bits_keep_their_high_byte() -> None:
    image = Image.fromarray(np.array([[0, 256, 65_535]], dtype=np.int32))

    assert [0, 1, 255] == from_pil(image).pixels()[0, :, 0].tolist()


def test_floats_of_8_bits_equal_pillows_conversion() -> None:
    image = Image.fromarray(np.array([[0, 0.9, 127.6, 255]], dtype=np.float32))

    assert np.array_equal(np.asarray(image.convert("RGB")), from_pil(image).pixels())


@pytest.mark.parametrize(
    "values",
    [
        np.array([[-1, 5]], dtype=np.int32),
        np.array([[0, 65_536]], dtype=np.int32),
        np.array([[0, 0.5, 1]], dtype=np.float32),
        np.array([[0, 256]], dtype=np.float32),
        np.array([[5, np.nan]], dtype=np.float32),
        np.array([[-np.inf, 5]], dtype=np.float32),
    ],
    ids=["negative", "over 16 bits", "0 to 1", "over 255", "nan", "infinite"],
)
def test_values_that_leave_the_brightness_open_are_refused(
    values: np.ndarray[tuple[int, ...], np.dtype[np.generic]],
) -> None:
    error = catch(ImageValuesNotSupportedError, from_pil, Image.fromarray(values))

    assert str(error).startswith("Failed to load image: ")


@given(st.binary(min_size=24, max_size=24))
def test_any_rgba_pixels_equal_transformers(pixels: bytes) -> None:
    image = Image.frombytes("RGBA", (3, 2), pixels)

    assert np.array_equal(np.asarray(on_white(image)), from_pil(image).pixels())


def test_every_result_is_plain_rgb() -> None:
    for mode in (*OPAQUE_MODES, *DEEP_GREYS, "LAB", "RGBA", "RGBa", "LA", "La", "PA", "I", "F"):
        image = from_pil(Image.new(mode, (3, 2)))

        assert "RGB" == image.image.mode
        assert (2, 3, 3) == image.pixels().shape
