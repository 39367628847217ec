"""
One still image: encoded bytes, a Pillow image or an array -> `RGBImage`.

The only file that opens images. It takes no path and no file handle for decoding, asks Pillow for
a short list of formats, judges sizes before anything is decompressed, and answers with this
room's errors only: a decoder's own text never leaves it. Pillow's process-wide switches
(`MAX_IMAGE_PIXELS`, `LOAD_TRUNCATED_IMAGES`) are left as the process has them; the limits here do
not depend on the first, and the second must stay off for cut files to be refused.

A picture without transparency has the pixels of `ImageOps.exif_transpose(image).convert("RGB")`,
one with transparency those of `convert_to_rgb` in transformers' image_transforms.py. We differ
where that would not show the picture (Pillow 11.0 to 13.0 do the same, measured 2026):

- 16-bit grey (`I;16` in each byte order) keeps the high byte. `convert` clips at 255, which turns
  99 % of an evenly exposed picture white. 16-bit colour loses its low bytes inside Pillow already.
- 32-bit integers (`I`) are taken as they are up to 255, as 16-bit up to 65,535, else refused.
- Floats (`F`) are taken as they are, cut to whole numbers, within 0 to 255. Outside, or when they
  seem to run from 0 to 1, they are refused: `convert` clips the first and blackens the second.
- `La`, `RGBa` (premultiplied) and palettes with an alpha of their own are laid on white too.
  transformers fails on the first and drops the transparency of the others.
- A colour key in a 16-bit grey PNG is laid on white; Pillow compares it with clipped values.
- Orientation that cannot be read counts as upright instead of failing the picture.

ICC profiles are ignored, as both of them do. Of an animation only the first frame is decoded.
"""

import math
import re
import struct
import sys
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image

from media.decoded import Ask, Fit, Header, RGBImage
from media.errors import (
    ImageEmptyError,
    ImageFormatNotSupportedError,
    ImageTooLargeError,
    ImageTooNarrowError,
    ImageTruncatedError,
    ImageUnreadableError,
    ImageValuesNotSupportedError,
    MediaError,
)
from media.limits import IMAGE_LIMITS, ImageLimits

# Importing a plugin registers its format. Naming the few that are needed keeps Pillow from
# loading all of its forty for the sake of WebP. AVIF is missing before Pillow 11.3.
for _plugin in ("Jpeg", "Png", "WebP", "Gif", "Bmp", "Avif", "Tiff"):
    with suppress(ImportError):
        import_module(f"PIL.{_plugin}ImagePlugin")
with suppress(ImportError):  # the extra `heic`
    import_module("pillow_heif").register_heif_opener()

_PILLOWS_NAMES = {"HEIC": "HEIF"}  # where they are not ours

# What Pillow's decoders were seen to raise on damaged bytes. Python's own errors are among them,
# because its parsers index and unpack what they have not checked. Warning: a process that turns
# warnings into errors gets them from here. MemoryError is not: after the limits it is ours.
DECODER_ERRORS: tuple[type[Exception], ...] = (
    OSError,
    EOFError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    AttributeError,
    AssertionError,
    RuntimeError,
    struct.error,
    zlib.error,
    Warning,
    Image.DecompressionBombError,
)

# Pillow's own cap on pixels, where the process has it below `max_pixels` (or turns its warning
# into an error).
BOMB_ERRORS = (Image.DecompressionBombError, Image.DecompressionBombWarning)

# What decoding holds at its peak, for each pixel: Pillow's RGB has 4 bytes, and there are two pictures
# while one is turned, converted or resampled; a progressive JPEG also keeps all its coefficients.
# Others go through whole pictures of their own: alpha and the white behind it, or a video codec's
# planes. Seen at 4500x3000 with Pillow 13, 2026-11: 8.0; 12.0; and at most 16.7, of WebP.
JPEG_WORK_BYTES_PER_PX = 9
HEAVY_JPEG_WORK_BYTES_PER_PX = 14
WORK_BYTES_PER_PX = 18

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode_image(
    encoded: bytes, limits: ImageLimits = IMAGE_LIMITS, ask: Ask | None = None
) -> RGBImage:
    """
    Decode one image file held in memory.

    Args:
        encoded: a whole file in one of `limits.formats`; of an animation, the first frame counts.
        limits: judged in this order: bytes, pixels and sides, scans of a JPEG.
        ask: what size is wanted; None for the picture's own. Asked again in the rare case that the
            picture turns out to have another size than its header said.

    Returns:
        The picture, upright and opaque, with all metadata dropped.

    Raises:
        ImageEmptyError, ImageTruncatedError, ImageUnreadableError: the bytes are no whole image.
        ImageFormatNotSupportedError: they are something else that we can name.
        ImageTooLargeError, ImageTooNarrowError: over a limit. All are the client's fault.
    """
    if not encoded:
        raise ImageEmptyError
    if len(encoded) > limits.max_bytes:
        raise ImageTooLargeError(
            f"The image has more than the {limits.max_bytes} bytes that one may have. Scale it "
            "down, or send it as JPEG."
        )
    canvas_px = find_canvas(encoded) if "WEBP" in limits.formats else None
    header: Header | None = None
    fit: Fit | None = None
    if canvas_px is not None:
        check_size(canvas_px, limits)
        header = Header(*canvas_px, math.prod(canvas_px) * WORK_BYTES_PER_PX)
        fit = ask(header) if ask else None
    with _saying_why(encoded, limits):
        image = open_lazily(encoded, limits.formats)
    with image:
        with _saying_why(encoded, limits):
            check_size(image.size, limits)
            _check_scans(encoded, image, limits)
        if header is None:
            with _saying_why(encoded, limits):
                header = _outline(image)
            fit = ask(header) if ask else None
        with _saying_why(encoded, limits):
            is_draft = fit is not None and _draft(image, header, fit)
            image.load()
            if not is_draft:
                check_size(image.size, limits)  # a GIF grows to what overflows its canvas
            upright = _turned_upright(image)
        if ask and not is_draft and upright.size != (header.width_px, header.height_px):
            fit = ask(Header(*upright.size, header.work_bytes))
        with _saying_why(encoded, limits):
            return RGBImage(_fitted(upright, fit))


@contextmanager
def _saying_why(encoded: bytes, limits: ImageLimits) -> Iterator[None]:
    """Turn what Pillow raises into an error of this room."""
    try:
        yield
    except MediaError:
        raise
    except BOMB_ERRORS as error:
        raise ImageTooLargeError from error
    except DECODER_ERRORS as error:
        raise _unreadable(encoded, limits) from error


def _outline(image: Image.Image) -> Header:
    """What the header says. Only a JPEG's orientation is surely known before its pixels are."""
    width, height = image.size
    if image.format not in ("JPEG", "MPO"):
        return Header(width, height, width * height * WORK_BYTES_PER_PX)
    return _outline_jpeg(
        width, height, _get_orientation(image), is_progressive=bool(image.info.get("progressive"))
    )


def _outline_jpeg(width: int, height: int, orientation: int, *, is_progressive: bool) -> Header:
    is_heavy = orientation > 1 or is_progressive
    per_px = HEAVY_JPEG_WORK_BYTES_PER_PX if is_heavy else JPEG_WORK_BYTES_PER_PX
    if orientation >= 5:  # a quarter turn, perhaps mirrored
        width, height = height, width
    return Header(width, height, width * height * per_px)


_FRAMES = (0xC0, 0xC1, 0xC2)
"""Marks behind which a JPEG says its size; of the last one, that it is progressive."""

_MAX_GUESSED_SEGMENTS = 64


def guess_header(encoded: bytes) -> Header | None:
    """
    What `decode_image` will ask of, if the file is a JPEG that stands upright; None: another file.

    For whoever keeps Pillow away from the bytes: only lengths and two numbers are read, and nothing
    is believed. What Pillow finds is what counts.
    """
    at = 2 if encoded.startswith(b"\xff\xd8") else len(encoded)
    for _ in range(_MAX_GUESSED_SEGMENTS):
        marker = _MARKER.match(encoded, at)
        if marker is None:
            return None
        code = marker[1][0]
        if code in _FRAMES:
            height, width = (int.from_bytes(encoded[at + i : at + i + 2], "big") for i in (5, 7))
            return _outline_jpeg(width, height, 1, is_progressive=code == _FRAMES[-1])
        at += 2 + int.from_bytes(encoded[at + 2 : at + 4], "big")
    return None


def _draft(image: Image.Image, header: Header, fit: Fit) -> bool:
    """Have a JPEG decoded smaller, where that is allowed and it stays as large as what is wanted."""
    is_large = header.width_px >= 2 * fit.width_px and header.height_px >= 2 * fit.height_px
    if not (fit.may_draft and is_large and image.format in ("JPEG", "MPO")):
        return False
    wanted = fit.width_px, fit.height_px
    is_on_its_side = image.size != (header.width_px, header.height_px)
    image.draft("RGB", wanted[::-1] if is_on_its_side else wanted)
    return True


def _fitted(upright: Image.Image, fit: Fit | None) -> Image.Image:
    """Return a new image in mode RGB, of the size that is wanted."""
    is_resampled = fit is not None and upright.size != (fit.width_px, fit.height_px)
    # What is resampled is new anyhow: a whole picture in RGB is not copied for that.
    is_rgb = upright.mode == "RGB" and not upright.has_transparency_data
    rgb = upright if is_rgb and is_resampled else _as_rgb(upright)
    if fit is not None and is_resampled:
        rgb = rgb.resize((fit.width_px, fit.height_px), fit.resample)
    rgb.info = {}
    return rgb


def read_image(path: Path, limits: ImageLimits = IMAGE_LIMITS) -> RGBImage:
    """
    Read and decode one image file, for the command line.

    Raises:
        OSError: the file cannot be read; its text names the path, so it stays on this machine.
        MediaError: as `decode_image`. A file over `limits.max_bytes` is not read to its end.
    """
    with path.open("rb") as file:
        encoded = file.read(limits.max_bytes + 1)
    return decode_image(encoded, limits)


def from_pil(image: Image.Image) -> RGBImage:
    """
    Copy a Pillow image of any mode into an `RGBImage`: turned by its EXIF, laid on white, RGB.

    Args:
        image: any mode that this file's head does not refuse; left as it is, but loaded.

    Raises:
        ImageEmptyError, ImageTruncatedError, ImageUnreadableError: it holds no whole picture.
        ImageValuesNotSupportedError: integers or floats outside what is described above.
    """
    if not isinstance(image, Image.Image):
        raise TypeError("from_pil takes a Pillow image; use decode_image for bytes.")
    if 0 in image.size:
        raise ImageEmptyError
    try:
        image.load()
        rgb = _as_rgb(_turned_upright(image))
    except MediaError:
        raise
    except DECODER_ERRORS as error:
        raise ImageUnreadableError from error
    rgb.info = {}
    return RGBImage(rgb)


def from_array(array: npt.NDArray[Any]) -> RGBImage:
    """
    Copy one picture from an array; there is no EXIF to turn it by.

    Args:
        array: (height_px, width_px, channels) if the last axis is 1, 3 or 4, else (channels,
            height_px, width_px). 1 channel is grey, 3 are RGB, 4 are RGBA and laid on white.
            uint8, or bool with True as white. No other type says which value is white (1.0, 255,
            4,095 or 65,535), so none is guessed.

    Raises:
        ImageValuesNotSupportedError: another number of axes, channels, or another type.
        ImageEmptyError: a side of 0 pixels.
    """
    if array.ndim != 3:
        raise ImageValuesNotSupportedError(
            f"Failed to load image: an array of {array.ndim} axes is not one picture. "
            "Give (height, width, channels), and a grey picture one channel."
        )
    rows = array if array.shape[-1] in (1, 3, 4) else np.moveaxis(array, 0, -1)
    if rows.shape[-1] not in (1, 3, 4):
        raise ImageValuesNotSupportedError(
            "Failed to load image: neither the first nor the last axis of the array holds 1, 3 "
            "or 4 channels. Give (height, width, channels)."
        )
    if 0 in rows.shape:
        raise ImageEmptyError
    if rows.dtype == np.bool_:
        rows = rows.astype(np.uint8) * 255
    if rows.dtype != np.uint8:
        raise ImageValuesNotSupportedError(
            f"Failed to load image: {rows.dtype} does not say which value is white. Give uint8, "
            'for example (array * 255).round().astype("uint8") if the values run from 0 to 1.'
        )
    rows = rows[..., 0] if rows.shape[-1] == 1 else rows
    return from_pil(Image.fromarray(np.ascontiguousarray(rows)))


def check_size(size_px: tuple[int, int], limits: ImageLimits) -> None:
    """Raise unless an image of (width, height) stays within the limits."""
    width, height = size_px
    longer, shorter = max(size_px), min(size_px)
    if shorter <= 0:
        raise ImageEmptyError
    if width * height > limits.max_pixels:
        raise ImageTooLargeError(
            f"Image dimensions {width}x{height} ({width * height} pixels) exceed the maximum of "
            f"{limits.max_pixels} pixels. Scale the image down before sending it."
        )
    if longer > limits.max_aspect * shorter:
        raise ImageTooNarrowError(
            f"Image dimensions {width}x{height}: one side is more than {limits.max_aspect:g} "
            "times the other. Crop the image or cut it into several."
        )
    if longer > limits.max_side_px:
        raise ImageTooLargeError(
            f"Image dimensions {width}x{height} exceed the longest side of {limits.max_side_px} "
            "pixels. Scale the image down before sending it."
        )


def open_lazily(encoded: bytes, formats: Sequence[str]) -> Image.Image:
    """
    Let Pillow read the headers, as one of these formats only; `load` will decompress the pixels.

    Raises:
        DECODER_ERRORS: whatever Pillow says. The caller turns it into an error of this room.
    """
    read = [_PILLOWS_NAMES.get(name, name) for name in formats if can_read(name)]
    return Image.open(BytesIO(_without_bulk(encoded)), formats=read)


def can_read(name: str) -> bool:
    """Whether what decodes this format is installed."""
    return _PILLOWS_NAMES.get(name, name) in Image.OPEN


_MAX_BULK_BYTES = 1024 * 1024


def _without_bulk(encoded: bytes) -> bytes:
    """
    Return a JPEG or WebP without its metadata where that is large; any other file as it is.

    Nobody looks at it, and Pillow would copy it three times: 50 MB of a colour profile cost 190 MB
    of memory (13.0, 2026). A camera's EXIF stays: it is small, and says how the picture is turned.
    """
    name = find_format(encoded) if len(encoded) > _MAX_BULK_BYTES else None
    if name not in ("JPEG", "WEBP"):
        return encoded
    spans = list(_find_jpeg_bulk(encoded) if name == "JPEG" else _find_webp_bulk(encoded))
    if sum(end - start for start, end in spans) <= _MAX_BULK_BYTES:
        return encoded
    kept, at = bytearray(), 0
    for start, end in spans:
        kept += memoryview(encoded)[at:start]
        at = end
    kept += memoryview(encoded)[at:]
    if name == "WEBP":
        kept[4:8] = (len(kept) - 8).to_bytes(4, "little")
    return bytes(kept)


_APP_0, _APP_1, _APP_14, _APP_15 = 0xE0, 0xE1, 0xEE, 0xEF


def _find_jpeg_bulk(jpeg: bytes) -> Iterator[tuple[int, int]]:
    """Yield where metadata lie ahead of the pixels, but for JFIF, EXIF and Adobe's colour mark."""
    at = 2
    while (marker := _MARKER.match(jpeg, at)) and marker[1][0] != _SCAN[1]:
        code, end = marker[1][0], at + 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big")
        if _APP_0 <= code <= _APP_15 and code not in (_APP_0, _APP_1, _APP_14):
            yield at, end
        at = end


def _find_webp_bulk(webp: bytes) -> Iterator[tuple[int, int]]:
    """Yield where the colour profile and XMP lie, and EXIF of a size that no camera writes."""
    at = 12
    while at + 8 <= len(webp):
        name, size = webp[at : at + 4], int.from_bytes(webp[at + 4 : at + 8], "little")
        end = at + 8 + size + size % 2
        is_bulk = name in (b"ICCP", b"XMP ") or (name == b"EXIF" and size > _MAX_BULK_BYTES)
        if is_bulk and end <= len(webp):
            yield at, end
        at = end


def _unreadable(encoded: bytes, limits: ImageLimits) -> MediaError:
    """Judge by the bytes themselves why they failed: Pillow's texts are not stable."""
    name = find_format(encoded)
    formats = [name for name in limits.formats if can_read(name)]
    accepted = ", ".join(formats)
    if name in formats:
        if is_cut_short(encoded, name):
            return ImageTruncatedError(
                f"Failed to load image: the {name} data ends too early. Send the complete file."
            )
        return ImageUnreadableError(
            f"Failed to load image: the {name} data is damaged. Save the image again and resend it."
        )
    if name in _NO_IMAGES:
        return ImageUnreadableError(
            f"Failed to load image: the bytes are {name}, not an image. Check that the address "
            "leads to the image itself, without a login page."
        )
    if name is not None:
        return ImageFormatNotSupportedError(
            f"Failed to load image: the bytes are {name}, which is not read here. Convert the "
            f"image to one of {accepted}."
        )
    return ImageUnreadableError(
        f"Failed to load image: the bytes are not an image in one of {accepted}. Check the file "
        "and send it again."
    )


A_VIDEO = "a video"
_NO_IMAGES = ("HTML", "JSON", A_VIDEO)

_MAGIC = (
    (re.compile(rb"\xff\xd8\xff"), "JPEG"),
    (re.compile(rb"\x89PNG\r\n\x1a\n"), "PNG"),
    (re.compile(rb"GIF8[79]a"), "GIF"),
    (re.compile(rb"RIFF....WEBP", re.DOTALL), "WEBP"),
    (re.compile(rb"BM.{4}\0\0\0\0", re.DOTALL), "BMP"),
    (re.compile(rb"II[*+]\0|MM\0[*+]"), "TIFF"),
    (re.compile(rb"....ftypavi[fs]", re.DOTALL), "AVIF"),
    (re.compile(rb"....ftyp(?:hei[cmsx]|hev[cmsx]|mif1|msf1)", re.DOTALL), "HEIC"),
    (re.compile(rb"....ftyp|\x1aE\xdf\xa3|RIFF....AVI ", re.DOTALL), A_VIDEO),
    (re.compile(rb"\xff\x0a|\0\0\0\x0cJXL "), "JPEG XL"),
    (re.compile(rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51"), "JPEG 2000"),
    (re.compile(rb"%PDF"), "PDF"),
    (re.compile(rb"%!PS|\xc5\xd0\xd3\xc6"), "PostScript"),
    (re.compile(rb"8BPS"), "PSD"),
    (re.compile(rb"\0\0[\x01\x02]\0[^\0]"), "an icon"),
    (re.compile(rb"PK\x03\x04|\x1f\x8b|7z\xbc\xaf"), "an archive"),
    (re.compile(rb"\s*<(?:!doctype html|html|head|body)", re.IGNORECASE), "HTML"),
    (re.compile(rb"\s*<(?:[^\0]*<)?svg"), "SVG"),
    (re.compile(rb'\s*[{\[]\s*["{\[\]}]'), "JSON"),
)


def find_format(encoded: bytes) -> str | None:
    """Return what the first bytes are, in Pillow's or in plain words, for error texts; or None."""
    head = encoded[:1024].removeprefix(b"\xef\xbb\xbf")
    return next((name for magic, name in _MAGIC if magic.match(head)), None)


_WEBP_CANVAS = re.compile(
    rb"RIFF....WEBP(?:VP8X.{8}(?P<extended>.{6})|VP8L.{4}\x2f(?P<lossless>.{4})"
    rb"|VP8 .{7}\x9d\x01\x2a(?P<lossy>.{4}))",
    re.DOTALL,
)


def find_canvas(encoded: bytes) -> tuple[int, int] | None:
    """
    Read a WebP's width and height, in pixels; None where the bytes are none.

    All else that Pillow opens takes memory when it is loaded. A WebP's decoder takes it for the whole
    canvas when it is opened, so this is asked first.
    """
    found = _WEBP_CANVAS.match(encoded)
    if found is None:
        return None
    if (sides := found["extended"]) is not None:
        return int.from_bytes(sides[:3], "little") + 1, int.from_bytes(sides[3:], "little") + 1
    if (sides := found["lossless"]) is not None:
        bits = int.from_bytes(sides, "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    width, height = struct.unpack("<2H", found["lossy"])
    return width & 0x3FFF, height & 0x3FFF  # the other two bits are for players, that may scale it


def is_cut_short(encoded: bytes, name: str) -> bool:
    """Tell whether a file that failed lacks its end, from its own marks; only for the error word."""
    if name == "JPEG":
        return not encoded.rstrip(b"\0").endswith(b"\xff\xd9")
    if name == "PNG":
        return b"IEND" not in encoded[-64:]
    if name == "GIF":
        return not encoded.rstrip(b"\0").endswith(b";")
    if name == "WEBP":
        return len(encoded) < int.from_bytes(encoded[4:8], "little") + 8
    if name == "BMP":
        return len(encoded) < int.from_bytes(encoded[2:6], "little")
    return False


_SCAN = b"\xff\xda"
_MARKER = re.compile(rb"\xff([^\x00\xd0-\xd7\xff])")  # no repeat: fill bytes may be millions
_END_OF_IMAGE = 0xD9


def _check_scans(encoded: bytes, image: Image.Image, limits: ImageLimits) -> None:
    """Raise if a JPEG has more scans than the limit: each costs a pass over every pixel."""
    if image.format not in ("JPEG", "MPO") or _count_marks(encoded) <= limits.max_jpeg_scans:
        return
    # The two bytes also occur by chance in metadata and behind the image; only now walk it.
    if _count_scans(encoded, limits.max_jpeg_scans + 1) > limits.max_jpeg_scans:
        raise ImageTooLargeError(
            f"The JPEG has more than the {limits.max_jpeg_scans} scans that one may have. Save "
            "it again as an ordinary JPEG."
        )


def _count_marks(jpeg: bytes) -> int:
    """As `jpeg.count(_SCAN)`, in an eighth of the time: that stops at each 0xff, and a JPEG has many."""
    mark = int.from_bytes(_SCAN, sys.byteorder)
    pairs = (np.frombuffer(jpeg, np.uint16, (len(jpeg) - at) // 2, at) for at in (0, 1))
    return sum(int(np.count_nonzero(of_two == mark)) for of_two in pairs)


def _count_scans(jpeg: bytes, stop_at: int) -> int:
    num_scans, at = 0, 2
    while num_scans < stop_at and (marker := _MARKER.search(jpeg, at)):
        code, at = marker[1][0], marker.end()
        if code == _END_OF_IMAGE:
            break
        num_scans += code == _SCAN[1]
        at += int.from_bytes(jpeg[at : at + 2], "big")
    return num_scans


def _turned_upright(image: Image.Image) -> Image.Image:
    turn = _TURNS.get(_get_orientation(image))
    return image if turn is None else image.transpose(turn)


def _get_orientation(image: Image.Image) -> int:
    """Return EXIF's orientation, 1 to 8; upright where it is absent, out of range or unreadable."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except DECODER_ERRORS:
        return 1
    return orientation if isinstance(orientation, int) else 1


def _as_rgb(image: Image.Image) -> Image.Image:
    """Return a new image in mode RGB; the file's head says where it leaves Pillow's way."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _deep_grey_as_rgb(image)
    if not image.has_transparency_data:
        return image.convert("RGB")
    straight = image.convert("LA") if image.mode == "La" else image
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, straight.convert("RGBA")).convert("RGB")


def _deep_grey_as_rgb(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    grey = _as_eight_bits(values)
    colour_key = image.info.get("transparency")
    if isinstance(colour_key, int):
        grey = np.where(values == colour_key, np.uint8(255), grey)
    return Image.fromarray(grey).convert("RGB")


def _as_eight_bits(values: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """Bring 16-bit, 32-bit or float grey, (height_px, width_px), to 0..255."""
    lowest, highest = values.min(), values.max()  # NaN fails each comparison below
    if values.dtype.itemsize == 2:
        return (values >> 8).astype(np.uint8)
    if lowest >= 0 and highest <= 255 and not (values.dtype.kind == "f" and 0 < highest <= 1):
        return values.astype(np.uint8)
    if lowest >= 0 and highest <= 65_535 and values.dtype.kind == "i":
        return (values >> 8).astype(np.uint8)
    raise ImageValuesNotSupportedError(
        "Failed to load image: its 32-bit values do not say which one is white. Scale them to 0 "
        "to 255 and convert the image to 8-bit grey or RGB."
    )
