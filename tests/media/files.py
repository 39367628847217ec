"""Media files made on the spot: good ones, odd ones, and ones built to do harm."""

import re
import struct
import zlib
from io import BytesIO
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from media.errors import MediaError

Pixels = npt.NDArray[np.uint8]

_ADDRESS = re.compile(r"\b0x[0-9a-f]|BytesIO|Errno|object at")
_PATH = re.compile(r"(?:^|[\s'\"(])(?:/\w|[A-Za-z]:\\|file:)")


def assert_fit_for_clients(error: MediaError) -> None:
    """Fail if the text holds an address, a path or a decoder's words, or leaves the reader alone."""
    text = str(error)
    assert not _ADDRESS.search(text)
    assert not _PATH.search(text)
    assert text.endswith(".")
    assert len(text.split(". ")) >= 2, "the text says what to do"


def catch(error_type: type[MediaError], call: Any, *args: Any) -> MediaError:
    with pytest.raises(error_type) as caught:
        call(*args)
    assert_fit_for_clients(caught.value)
    assert not caught.value.retryable
    return caught.value


def picture(width: int = 60, height: int = 40, seed: int = 0) -> Image.Image:
    """A smooth RGB picture with no symmetry."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


def encode(image: Image.Image, name: str, **options: Any) -> bytes:
    file = BytesIO()
    image.save(file, name, **options)
    return file.getvalue()


def animation(name: str, colours: list[tuple[int, int, int]], **options: Any) -> bytes:
    """Full frames of 8 x 6 px, one colour each; `duration` in ms goes to Pillow."""
    frames = [Image.new("RGB", (8, 6), colour) for colour in colours]
    return encode(frames[0], name, save_all=True, append_images=frames[1:], **options)


def png_chunk(name: bytes, body: bytes) -> bytes:
    checksum = zlib.crc32(name + body)
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", checksum)


def png(
    width: int,
    height: int,
    rows: bytes,
    bits: int = 8,
    colour_type: int = 0,
    before: bytes = b"",
) -> bytes:
    """A PNG by hand: `rows` with their filter bytes, `before` are chunks ahead of the pixels."""
    header = struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0)
    pixels = png_chunk(b"IDAT", zlib.compress(rows))
    chunks = png_chunk(b"IHDR", header) + before + pixels + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def bomb(num_bytes: int) -> bytes:
    """Zeros, packed a thousand times smaller."""
    return zlib.compress(bytes(num_bytes))


def png_with_bad_checksum(image: Image.Image) -> bytes:
    encoded = bytearray(encode(image, "PNG"))
    encoded[encoded.index(b"IDAT") + 20] ^= 1
    return bytes(encoded)


def jpeg_that_says(width: int, height: int) -> bytes:
    """A JPEG whose header says so, whatever follows."""
    encoded = encode(picture(), "JPEG")
    at = encoded.index(b"\xff\xc0\0\x11\x08") + 5
    return encoded[:at] + struct.pack(">HH", height, width) + encoded[at + 4 :]


def jpeg_with_scans(image: Image.Image, num_scans: int) -> bytes:
    """A progressive JPEG whose last scan comes again and again."""
    encoded = encode(image, "JPEG", progressive=True)
    last_scan = encoded[encoded.rindex(b"\xff\xda") : -2]
    return encoded[:-2] + last_scan * num_scans + b"\xff\xd9"


def webp_whose_canvas_lies() -> bytes:
    """An animation whose frames are larger than what they are drawn on."""
    encoded = bytearray(animation("WEBP", [(255, 0, 0), (0, 255, 0)], lossless=True))
    canvas = encoded.index(b"VP8X") + 12
    encoded[canvas : canvas + 6] = struct.pack("<I", 3)[:3] + struct.pack("<I", 1)[:3]
    return bytes(encoded)


def jpeg_segment(marker: int, content: bytes) -> bytes:
    return bytes((0xFF, marker)) + struct.pack(">H", len(content) + 2) + content


def webp_with_profile(image: Image.Image, profile: bytes) -> bytes:
    """A WebP by hand around its pixels: with a canvas, and a colour profile before them."""
    still = encode(image, "WEBP", lossless=True)
    canvas = b"".join(struct.pack("<I", side - 1)[:3] for side in image.size)
    extended = b"VP8X" + struct.pack("<I", 10) + b"\x20\0\0\0" + canvas
    body = b"WEBP" + extended + b"ICCP" + struct.pack("<I", len(profile)) + profile + still[12:]
    return b"RIFF" + struct.pack("<I", len(body)) + body


def gif(width: int, height: int, frames: list[tuple[int, int, int, int]]) -> bytes:
    """A GIF by hand, black and white; each frame is (left, top, width, height), one pixel long."""
    blocks = [
        b"\x21\xf9\x04\x00\x0a\0\0\0\x2c" + struct.pack("<4H", *frame) + b"\0\x02\x02\x44\x01\0"
        for frame in frames
    ]
    screen = struct.pack("<2H", width, height) + b"\x80\0\0" + b"\0\0\0\xff\xff\xff"
    return b"GIF89a" + screen + b"".join(blocks) + b";"


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags
