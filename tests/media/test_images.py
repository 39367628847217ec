"""Good images, by pixel: formats, orientation, colours, animations, arrays."""

from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps, features

from media.decoded import Header
from media.errors import ImageEmptyError, ImageTooLargeError, ImageValuesNotSupportedError
from media.images import decode_image, from_array, from_pil, guess_header, read_image
from media.limits import ImageLimits
from tests.media.files import (
    Pixels,
    animation,
    catch,
    encode,
    exif,
    jpeg_segment,
    picture,
    png,
    png_chunk,
)

needs_avif = pytest.mark.skipif(
    "avif" not in features.modules or not features.check("avif"), reason="this Pillow has no AVIF"
)


@pytest.mark.parametrize(
    "name", ["JPEG", "PNG", "WEBP", "GIF", "BMP", pytest.param("AVIF", marks=needs_avif)]
)
def test_each_format_gives_the_pixels_that_pillow_gives(name: str) -> None:
    encoded = encode(picture(), name)

    image = decode_image(encoded)

    expected = np.asarray(Image.open(BytesIO(encoded)).convert("RGB"))
    assert (60, 40) == (image.width_px, image.height_px)
    assert np.array_equal(expected, image.pixels())


def test_tiff_is_read_where_it_is_asked_for() -> None:
    image = decode_image(encode(picture(), "TIFF"), ImageLimits(formats=("PNG", "TIFF")))

    assert np.array_equal(np.asarray(picture()), image.pixels())


def find_header(encoded: bytes) -> Header:
    headers: list[Header] = []
    decode_image(encoded, ask=headers.append)
    return headers[0]


@pytest.mark.parametrize(
    "encoded",
    [
        encode(picture(), "JPEG"),
        encode(picture(900, 1300), "JPEG", progressive=True),
        encode(picture().convert("L"), "JPEG"),
        encode(picture().convert("CMYK"), "JPEG"),
        encode(picture(), "JPEG", exif=exif(1), comment=b"\xff\xc0\0\x11\x08\0\x09\0\x09"),
    ],
)
def test_header_of_a_plain_jpeg_is_guessed_right(encoded: bytes) -> None:
    assert find_header(encoded) == guess_header(encoded)


@pytest.mark.parametrize("name", ["PNG", "WEBP", "GIF", "BMP"])
def test_header_of_another_format_is_not_guessed(name: str) -> None:
    assert guess_header(encode(picture(), name)) is None


def test_guessing_takes_few_steps_however_many_there_are() -> None:
    encoded = encode(picture(), "JPEG")
    noted = encoded[:2] + 10_000 * jpeg_segment(0xFE, b"") + encoded[2:]

    assert find_header(noted) == find_header(encoded)
    assert guess_header(noted) is None


@given(st.binary(max_size=40))
def test_guessing_takes_any_bytes(behind: bytes) -> None:
    for start in (b"", b"\xff\xd8", b"\xff\xd8\xff\xc0", b"\xff\xd8\xff\xfe\0\2"):
        header = guess_header(start + behind)

        assert header is None or max(header.width_px, header.height_px) <= 65_535


TURNS: dict[int, Callable[[Pixels], Pixels]] = {
    1: lambda rows: rows,
    2: lambda rows: rows[:, ::-1],
    3: lambda rows: rows[::-1, ::-1],
    4: lambda rows: rows[::-1],
    5: lambda rows: rows.transpose(1, 0, 2),
    6: lambda rows: np.rot90(rows, -1),
    7: lambda rows: rows.transpose(1, 0, 2)[::-1, ::-1],
    8: lambda rows: np.rot90(rows, 1),
    0: lambda rows: rows,
    9: lambda rows: rows,
}


@pytest.mark.parametrize("orientation", TURNS)
def test_exif_orientation_turns_the_picture_upright(orientation: int) -> None:
    stored = picture()

    image = decode_image(encode(stored, "PNG", exif=exif(orientation)))

    assert np.array_equal(TURNS[orientation](np.asarray(stored)), image.pixels())


@pytest.mark.parametrize("name", ["JPEG", "WEBP", pytest.param("AVIF", marks=needs_avif)])
def test_lossy_formats_are_turned_as_pillow_turns_them(name: str) -> None:
    encoded = encode(picture(), name, exif=exif(6))

    image = decode_image(encoded)

    expected = ImageOps.exif_transpose(Image.open(BytesIO(encoded))).convert("RGB")
    assert (40, 60) == (image.width_px, image.height_px)
    assert np.array_equal(np.asarray(expected), image.pixels())


@pytest.mark.parametrize(
    "damage",
    [
        b"Exif\0\0" + b"\xff" * 60_000,
        b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06",  # cut inside the entry
        b"Exif\0\0II*\0\x08\0\0\0\0\0\x08\0\0\0",  # the next directory is this one
        b"Exif\0\0XX*\0",
    ],
    ids=["garbage", "cut", "loop", "byte order"],
)
def test_unreadable_exif_leaves_the_picture_as_it_is_stored(damage: bytes) -> None:
    stored = picture()

    image = decode_image(encode(stored, "PNG", exif=damage))

    assert np.array_equal(np.asarray(stored), image.pixels())


def test_decoding_drops_metadata() -> None:
    image = decode_image(encode(picture(), "JPEG", exif=exif(3), comment=b"private"))

    assert {} == image.image.info
    assert {} == dict(image.image.getexif())


def test_invalid_colour_profile_is_ignored() -> None:
    encoded = encode(picture(), "JPEG", icc_profile=b"no profile at all" * 1000)

    image = decode_image(encoded)

    expected = np.asarray(Image.open(BytesIO(encoded)).convert("RGB"))
    assert np.array_equal(expected, image.pixels())


def test_one_pixel_is_a_picture() -> None:
    image = decode_image(encode(Image.new("RGB", (1, 1), (9, 8, 7)), "PNG"))

    assert [[[9, 8, 7]]] == image.pixels().tolist()


def test_cmyk_jpeg_keeps_its_colours() -> None:
    red = Image.new("CMYK", (16, 16), (0, 255, 255, 0))

    pixels = decode_image(encode(red, "JPEG", quality=100)).pixels()

    assert np.abs(pixels.astype(int) - [255, 0, 0]).max() <= 3


def test_ycck_jpeg_is_told_apart_from_cmyk() -> None:
    # Pillow stores inks inverted: Y = 55, Cb = Cr = 128 (neutral), K = 255 (no black). Adobe's
    # inks are inverted as well, so that a luma of 55 stands for a light of 200.
    cmyk = encode(Image.new("CMYK", (16, 16), (200, 127, 127, 0)), "JPEG", quality=100)
    adobe = cmyk.index(b"Adobe")
    ycck = cmyk[: adobe + 11] + b"\x02" + cmyk[adobe + 12 :]

    pixels = decode_image(ycck).pixels()

    assert np.abs(pixels.astype(int) - 200).max() <= 3


def test_progressive_jpeg_equals_pillow() -> None:
    encoded = encode(picture(), "JPEG", progressive=True)

    image = decode_image(encoded)

    expected = np.asarray(Image.open(BytesIO(encoded)).convert("RGB"))
    assert np.array_equal(expected, image.pixels())


@pytest.mark.parametrize("name", ["GIF", "WEBP", "PNG"])
def test_animation_gives_its_first_frame(name: str) -> None:
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    options = {"lossless": True} if name == "WEBP" else {}

    image = decode_image(animation(name, colours, duration=100, **options))

    assert (8, 6) == (image.width_px, image.height_px)
    assert [255, 0, 0] == image.pixels()[3, 4].tolist()


def test_bytes_behind_the_picture_are_ignored() -> None:
    stored = picture()
    archive = b"PK\x03\x04" + b"\xff\xda" * 1000

    image = decode_image(encode(stored, "PNG") + archive)
    jpeg = decode_image(encode(stored, "JPEG") + archive)

    assert np.array_equal(np.asarray(stored), image.pixels())
    assert (60, 40) == (jpeg.width_px, jpeg.height_px)


def test_gif_that_is_also_a_script_is_a_gif() -> None:
    gif = encode(Image.new("P", (3, 2)), "GIF")

    image = decode_image(gif + b"/*\n*/alert(1)")

    assert (3, 2) == (image.width_px, image.height_px)


def test_16_bit_grey_png_keeps_its_high_byte() -> None:
    values = np.array([[0x0000, 0x00FF, 0x0100, 0x7F01, 0xFFFF]], dtype=np.uint16)

    image = decode_image(encode(Image.fromarray(values), "PNG"))

    assert [0, 0, 1, 127, 255] == image.pixels()[0, :, 1].tolist()


def test_16_bit_grey_png_lays_its_colour_key_on_white() -> None:
    values = np.array([[300, 301]], dtype=np.uint16)

    image = decode_image(encode(Image.fromarray(values), "PNG", transparency=300))

    assert [255, 1] == image.pixels()[0, :, 0].tolist()


def test_16_bit_colour_png_keeps_its_high_bytes() -> None:
    row = b"\0" + bytes([0x12, 0x99, 0x34, 0x99, 0x56, 0x99])

    image = decode_image(png(1, 1, row, bits=16, colour_type=2))

    assert [0x12, 0x34, 0x56] == image.pixels()[0, 0].tolist()


def test_palette_transparency_is_laid_on_white() -> None:
    palette = png_chunk(b"PLTE", bytes([10, 20, 30, 200, 100, 0]))
    alpha = png_chunk(b"tRNS", bytes([0, 128]))

    image = decode_image(png(2, 1, b"\0\0\1", colour_type=3, before=palette + alpha))

    assert [[255, 255, 255], [227, 177, 127]] == image.pixels()[0].tolist()


def test_fully_transparent_picture_is_white() -> None:
    image = decode_image(encode(Image.new("RGBA", (4, 3), (1, 2, 3, 0)), "PNG"))

    assert 255 == image.pixels().min()


def test_from_pil_copies_and_leaves_the_original_alone() -> None:
    original = picture()

    image = from_pil(original)
    original.putpixel((0, 0), (1, 2, 3))

    assert (1, 2, 3) != image.image.getpixel((0, 0))
    assert original.size == (60, 40)


def test_from_pil_turns_an_open_file_without_changing_it() -> None:
    with Image.open(BytesIO(encode(picture(), "JPEG", exif=exif(6)))) as opened:
        image = from_pil(opened)

        assert (60, 40) == opened.size
    assert (40, 60) == (image.width_px, image.height_px)


def test_from_pil_refuses_what_is_no_image() -> None:
    with pytest.raises(TypeError):
        from_pil(b"bytes")  # type: ignore[arg-type]


def test_from_pil_refuses_an_image_without_pixels() -> None:
    error = catch(ImageEmptyError, from_pil, Image.new("RGB", (0, 5)))

    assert "image_empty" == error.code


def test_arrays_with_channels_last_and_first_give_the_same_picture() -> None:
    rows = np.asarray(picture())

    last, first = from_array(rows), from_array(np.moveaxis(rows, -1, 0))

    assert np.array_equal(rows, last.pixels())
    assert np.array_equal(rows, first.pixels())


def test_channels_last_win_where_both_ends_could_be_channels() -> None:
    rows = np.arange(3 * 5 * 4, dtype=np.uint8).reshape(3, 5, 4)

    image = from_array(rows)

    assert (5, 3) == (image.width_px, image.height_px)


def test_one_channel_is_grey_and_four_are_laid_on_white() -> None:
    grey = from_array(np.full((2, 3, 1), 77, dtype=np.uint8))
    clear = from_array(np.zeros((2, 3, 4), dtype=np.uint8))
    masks = from_array(np.array([[[True], [False]]]))

    assert [77, 77, 77] == grey.pixels()[0, 0].tolist()
    assert [255, 255, 255] == clear.pixels()[0, 0].tolist()
    assert [255, 0] == masks.pixels()[0, :, 0].tolist()


def test_changing_the_array_later_changes_no_picture() -> None:
    rows = np.zeros((2, 3, 3), dtype=np.uint8)

    image = from_array(rows)
    rows[:] = 9

    assert 0 == image.pixels().max()


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((4, 5), dtype=np.uint8),
        np.zeros((2, 4, 5, 3), dtype=np.uint8),
        np.zeros((5, 6, 2), dtype=np.uint8),
        np.zeros((4, 5, 3), dtype=np.float32),
        np.zeros((4, 5, 3), dtype=np.uint16),
        np.zeros((4, 5, 3), dtype=np.int64),
    ],
    ids=["2 axes", "4 axes", "2 channels", "float32", "uint16", "int64"],
)
def test_arrays_that_leave_the_picture_open_are_refused(array: Pixels) -> None:
    error = catch(ImageValuesNotSupportedError, from_array, array)

    assert "image_values_not_supported" == error.code


def test_array_without_pixels_is_empty() -> None:
    catch(ImageEmptyError, from_array, np.zeros((0, 5, 3), dtype=np.uint8))


def test_pixels_are_the_callers_to_change() -> None:
    image = from_pil(picture())

    image.pixels()[:] = 0

    assert image.pixels().max() > 0


def test_image_file_is_read_for_the_command_line(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes(encode(picture(), "PNG"))

    image = read_image(path)

    assert (60, 40) == (image.width_px, image.height_px)


def test_large_file_is_refused_without_naming_it(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes(encode(picture(), "PNG"))

    error = catch(ImageTooLargeError, read_image, path, ImageLimits(max_bytes=100))

    assert "picture.png" not in str(error)


def test_limits_take_only_formats_that_are_known() -> None:
    with pytest.raises(ValueError, match="TIFF"):
        ImageLimits(formats=("EPS",))
