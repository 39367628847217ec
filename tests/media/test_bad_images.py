"""Images that are damaged, lie, or mean harm: one typed error each, and nothing else happens."""

import random
import struct
import warnings
from collections.abc import Callable
from io import BytesIO
from typing import Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from media.errors import (
    ImageEmptyError,
    ImageFormatNotSupportedError,
    ImageTooLargeError,
    ImageTooNarrowError,
    ImageTruncatedError,
    ImageUnreadableError,
    MediaError,
)
from media.images import decode_image, from_pil
from media.limits import ImageLimits
from tests.media.files import (
    animation,
    assert_fit_for_clients,
    bomb,
    catch,
    encode,
    exif,
    gif,
    jpeg_segment,
    jpeg_that_says,
    jpeg_with_scans,
    picture,
    png,
    png_chunk,
    png_with_bad_checksum,
    webp_whose_canvas_lies,
    webp_with_profile,
)

ALL_FORMATS = ImageLimits(formats=("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"))


def test_no_bytes_are_an_empty_image() -> None:
    error = catch(ImageEmptyError, decode_image, b"")

    assert "image_empty" == error.code


JUNK = {
    "one byte": b"\xff",
    "noise": random.Random(0).randbytes(1_000_000),
    "text": b"not a picture",
    "web page": b"<!DOCTYPE html><html><body>Not found</body></html>",
    "web page with a drawing": b"<html><svg></svg></html>",
    "json": b'{"error": {"code": 404}}',
    "only a magic": b"\x89PNG\r\n\x1a\n",
    "clip": b"\0\0\0\x18ftypisom\0\0\0\0isommp41",
}


@pytest.mark.parametrize("name", JUNK)
def test_what_is_no_image_is_unreadable(name: str) -> None:
    error = catch(ImageUnreadableError, decode_image, JUNK[name])

    assert str(error).startswith("Failed to load image: ")


@pytest.mark.parametrize(
    ("encoded", "word"),
    [
        (b'<?xml version="1.0"?><!DOCTYPE svg [<!ENTITY x SYSTEM "file:///etc/x">]><svg/>', "SVG"),
        (b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/x"/></svg>', "SVG"),
        (b"%PDF-1.7\n", "PDF"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "PostScript"),
        (b"\xc5\xd0\xd3\xc6" + bytes(26), "PostScript"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC"),
        (b"\xff\x0a\xfa\x7f", "JPEG XL"),
        (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG 2000"),
        (b"8BPS\0\x01", "PSD"),
        (b"\0\0\1\0\1\0\x10\x10", "icon"),
        (b"PK\x03\x04", "archive"),
        (encode(picture(), "TIFF"), "TIFF"),
    ],
)
def test_other_formats_are_refused_by_name(encoded: bytes, word: str) -> None:
    error = catch(ImageFormatNotSupportedError, decode_image, encoded)

    assert word in str(error)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
@pytest.mark.parametrize("name", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
def test_cut_file_is_truncated(name: str, share: float) -> None:
    encoded = encode(picture(300, 200), name)

    error = catch(ImageTruncatedError, decode_image, encoded[: int(len(encoded) * share)])

    assert "image_truncated" == error.code


DAMAGED: dict[str, Callable[[], bytes]] = {
    "png with a bad checksum": lambda: png_with_bad_checksum(picture()),
    "png of no size": lambda: png(0, 0, b""),
    "png whose colour profile is a bomb": lambda: png(
        1, 1, b"\0\0", before=png_chunk(b"iCCP", b"x\0\0" + bomb(50_000_000))
    ),
    "png whose text is a bomb": lambda: png(
        1, 1, b"\0\0", before=png_chunk(b"zTXt", b"x\0\0" + bomb(50_000_000))
    ),
    "png whose international text is a bomb": lambda: png(
        1, 1, b"\0\0", before=png_chunk(b"iTXt", b"x\0\1\0\0\0" + bomb(50_000_000))
    ),
    "webp whose canvas lies": webp_whose_canvas_lies,
    "12-bit jpeg": lambda: encode(picture(), "JPEG").replace(
        b"\xff\xc0\0\x11\x08", b"\xff\xc0\0\x11\x0c"
    ),
    "arithmetic jpeg without its tables": lambda: encode(picture(), "JPEG").replace(
        b"\xff\xc0", b"\xff\xcb"
    ),
    "tiff whose directory is a loop": lambda: b"II*\0\x08\0\0\0" + b"\0\0\x08\0\0\0",
    "tiff with a huge strip": lambda: encode(picture(), "TIFF").replace(
        struct.pack("<HHI", 279, 4, 1), struct.pack("<HHI", 279, 4, 2**31)
    ),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_file_is_unreadable(name: str) -> None:
    catch(ImageUnreadableError, decode_image, DAMAGED[name](), ALL_FORMATS)


TOO_LARGE: dict[str, Callable[[], bytes]] = {
    "1-bit png that warns": lambda: png(13_000, 13_000, bytes(1626 * 13_000), bits=1),
    "png of a header only": lambda: png(65_535, 65_535, b""),
    "jpeg of a header only": lambda: jpeg_that_says(65_500, 65_500),
    "gif whose frame overflows its canvas": lambda: gif(1, 1, [(0, 0, 65_535, 65_535)]),
    "gif whose frame lies far off": lambda: gif(1, 1, [(65_000, 65_000, 1, 1)]),
    "bmp": lambda: encode(picture(), "BMP").replace(
        struct.pack("<ii", 60, 40), struct.pack("<ii", 60_000, -40_000)
    ),
}


@pytest.mark.parametrize("name", TOO_LARGE)
@pytest.mark.parametrize("warnings_are", ["error", "ignore"])
def test_bomb_is_refused_by_its_header(name: str, warnings_are: Literal["error", "ignore"]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter(warnings_are)  # an operator may have either

        error = catch(ImageTooLargeError, decode_image, TOO_LARGE[name]())

    assert "image_too_large" == error.code


def test_too_many_pixels_are_counted_in_the_text() -> None:
    error = catch(ImageTooLargeError, decode_image, png(8000, 6000, b""))

    expected = "Image dimensions 8000x6000 (48000000 pixels) exceed the maximum of 40000000 pixels."
    assert str(error).startswith(expected)


def test_too_many_bytes_are_refused_before_anything_is_read() -> None:
    catch(ImageTooLargeError, decode_image, b"not even an image", ImageLimits(max_bytes=16))


def test_long_side_is_refused() -> None:
    catch(ImageTooLargeError, decode_image, png(100, 10, b""), ImageLimits(max_side_px=99))


@pytest.mark.parametrize(("width", "height"), [(1, 200_000), (200_000, 1), (1, 201)])
def test_sliver_is_too_narrow(width: int, height: int) -> None:
    error = catch(ImageTooNarrowError, decode_image, png(width, height, b""))

    assert "image_too_narrow" == error.code


def test_200_to_1_is_not_too_narrow() -> None:
    image = decode_image(encode(Image.new("L", (200, 1)), "PNG"))

    assert 200 == image.width_px


def test_jpeg_of_ten_thousand_scans_is_refused() -> None:
    error = catch(ImageTooLargeError, decode_image, jpeg_with_scans(picture(), 10_000))

    assert "scans" in str(error)


@pytest.mark.parametrize("num_before", [0, 1])
def test_scans_are_counted_wherever_they_lie(num_before: int) -> None:
    encoded = jpeg_with_scans(picture(), 95)  # besides its own ten
    shifted = encoded[:2] + jpeg_segment(0xFE, bytes(num_before)) + encoded[2:]

    assert "scans" in str(catch(ImageTooLargeError, decode_image, shifted))
    assert 60 == decode_image(shifted, ImageLimits(max_jpeg_scans=105)).width_px


def test_fill_bytes_between_markers_cost_no_more_than_their_length() -> None:
    encoded = encode(picture(), "JPEG")
    chance = b"\xff\xfe\x02\x02" + b"\xff\xda" * 256  # a comment that looks like scans
    fill = b"\xff" * 300_000

    image = decode_image(encoded[:2] + chance + fill + encoded[2:])

    assert (60, 40) == (image.width_px, image.height_px)


def test_animation_of_a_hundred_thousand_frames_costs_one_frame() -> None:
    image = decode_image(gif(1, 1, [(0, 0, 1, 1)] * 100_000))

    assert (1, 1) == (image.width_px, image.height_px)


def test_long_webp_animation_costs_one_frame() -> None:
    colours = [(i % 256, i // 256, 9) for i in range(1000)]

    image = decode_image(animation("WEBP", colours, lossless=True, duration=10))

    assert [0, 0, 9] == image.pixels()[0, 0].tolist()


def test_animated_png_with_wrong_frame_numbers_is_one_picture_or_one_error() -> None:
    encoded = animation("PNG", [(255, 0, 0), (0, 255, 0)]).replace(b"fcTL\0\0\0\1", b"fcTL\0\0\0\7")

    outcome = decode_or_catch(encoded)

    assert outcome in ("image_unreadable", "ok")


def test_large_metadata_change_no_pixel_and_hide_no_cut() -> None:
    notes = bytes(1_100_000)
    jpeg = encode(picture(), "JPEG", exif=exif(6))
    pieces = [jpeg_segment(0xED, notes[at : at + 65_000]) for at in range(0, len(notes), 65_000)]
    files = [
        (jpeg, jpeg[:2] + b"".join(pieces) + jpeg[2:]),
        (encode(picture(), "WEBP", lossless=True), webp_with_profile(picture(), notes)),
    ]

    for plain, noted in files:
        expected = decode_image(plain)
        image = decode_image(noted)

        assert np.array_equal(expected.pixels(), image.pixels())
        catch(ImageTruncatedError, decode_image, noted[:-100])


def test_gif_frame_beyond_the_canvas_grows_it_within_the_limits() -> None:
    encoded = encode(picture(8, 6), "GIF")

    image = decode_image(encoded[:6] + struct.pack("<2H", 4, 4) + encoded[10:])

    assert (8, 6) == (image.width_px, image.height_px)


def test_cut_image_from_pillow_is_refused() -> None:
    encoded = encode(picture(300, 200), "JPEG")
    with Image.open(BytesIO(encoded[: len(encoded) // 2])) as opened:
        catch(ImageUnreadableError, from_pil, opened)


def decode_or_catch(encoded: bytes) -> str:
    try:
        decode_image(encoded, ALL_FORMATS)
    except MediaError as error:
        assert_fit_for_clients(error)
        return error.code
    return "ok"


SEEDS = [
    encode(picture(30, 20), "JPEG"),
    encode(picture(30, 20), "JPEG", progressive=True),
    encode(picture(30, 20), "PNG"),
    encode(picture(30, 20), "WEBP"),
    encode(picture(30, 20), "GIF"),
    encode(picture(30, 20), "BMP"),
]


@pytest.mark.filterwarnings("ignore")
@given(
    st.sampled_from(SEEDS),
    st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=8),
)
def test_any_damage_gives_a_picture_or_an_error_of_ours(
    seed: bytes, changes: list[tuple[int, int]]
) -> None:
    encoded = bytearray(seed)
    for at, value in changes:
        encoded[at % len(encoded)] = value

    outcome = decode_or_catch(bytes(encoded))

    assert outcome == "ok" or outcome.startswith("image_")


def test_a_good_image_decodes_after_all_of_that() -> None:
    for build in (*DAMAGED.values(), *TOO_LARGE.values()):
        assert decode_or_catch(build()).startswith("image_")

    image = decode_image(encode(picture(), "PNG"))

    assert picture().size == (image.width_px, image.height_px)
