"""Pictures that are damaged, lie, or mean harm (I1 to I34), and odd ones that are good."""

import gzip
import io
import random
import struct
import zipfile
import zlib
from collections.abc import Iterator

import numpy as np
from PIL import Image

from tests.corpus.cases import (
    OK,
    PLANTED,
    STAR,
    WORD,
    Asked,
    Case,
    Place,
    build_body,
    build_line,
    data_url,
    image_case,
    image_part,
    sample,
    video_part,
)
from tests.media.files import (
    bomb,
    encode,
    exif,
    gif,
    jpeg_segment,
    jpeg_that_says,
    jpeg_with_scans,
    png,
    png_chunk,
    png_with_bad_checksum,
    webp_whose_canvas_lies,
    webp_with_profile,
)
from tests.media.servers import answering

CUT = "image_truncated"
DAMAGED = "image_unreadable"
TOO_LARGE = "image_too_large"
NOT_READ = "image_format_not_supported"

WHITE = (
    "A bright, plain photo with low contrast, by day: white at the top, white in the middle and "
    "white at the bottom."
)
STAR_ON_WHITE = "A large purple star at the left on a white background."


def star() -> Image.Image:
    """The picture of which the model says `STAR`."""
    with Image.open(io.BytesIO(sample("small.png"))) as image:
        return image.convert("RGB")


def word() -> Image.Image:
    """The picture of which the model says `WORD`: black on white."""
    with Image.open(io.BytesIO(sample("word.png"))) as image:
        return image.convert("RGB")


def star_jpeg(**options: object) -> bytes:
    return encode(star(), "JPEG", quality=95, subsampling=0, **options)


def star_png() -> bytes:
    return encode(star(), "PNG")


def behind_header(encoded: bytes, chunk: bytes) -> bytes:
    """A PNG with one chunk more, behind IHDR."""
    return encoded[:33] + chunk + encoded[33:]


def star_jpeg_with(*segments: bytes) -> bytes:
    encoded = star_jpeg()
    return encoded[:2] + b"".join(segments) + encoded[2:]


# Animations


def gif_of_large_frames() -> bytes:
    """200 frames of 4 megapixels, the first one a star."""
    large = star().resize((2000, 2000), Image.Resampling.NEAREST).quantize(16)
    encoded = encode(large, "GIF")
    frame = encoded[encoded.index(b"\x2c\0\0\0\0") : -1]
    return encoded[:-1] + (b"\x21\xf9\x04\0\x0a\0\0\0" + frame) * 199 + b";"


def star_gif_on_a_small_canvas() -> bytes:
    encoded = encode(star(), "GIF")
    return encoded[:6] + struct.pack("<2H", 4, 4) + encoded[10:]


def apng(num_frames: int, first_number: int = 1) -> bytes:
    """A star, and then frames of one pixel; `first_number` should be 1."""
    image = star()
    encoded = encode(image, "PNG")
    idat = encoded.index(b"IDAT") - 4
    pixels = zlib.compress(b"\0\xff\xff\xff")

    def control(number: int, width: int, height: int) -> bytes:
        content = struct.pack(">5I2H2B", number, width, height, 0, 0, 1, 10, 0, 0)
        return png_chunk(b"fcTL", content)

    def frames() -> Iterator[bytes]:
        for place in range(num_frames - 1):
            number = first_number + 2 * place
            yield control(number, 1, 1)
            yield png_chunk(b"fdAT", struct.pack(">I", number + 1) + pixels)

    head = png_chunk(b"acTL", struct.pack(">2I", num_frames, 0)) + control(0, *image.size)
    return encoded[:idat] + head + encoded[idat:-12] + b"".join(frames()) + encoded[-12:]


def webp_animation(num_frames: int) -> bytes:
    frames = [Image.new("RGB", (16, 16), (i % 256, i // 256, 9)) for i in range(num_frames)]
    return encode(
        frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True, duration=10
    )


def webp_of(width: int, height: int) -> bytes:
    """A lossless WebP whose header says so."""
    encoded = bytearray(encode(star(), "WEBP", lossless=True))
    at = encoded.index(b"VP8L") + 9
    (bits,) = struct.unpack("<I", encoded[at : at + 4])
    bits = (bits & ~0x0FFF_FFFF) | (width - 1) | (height - 1) << 14
    encoded[at : at + 4] = struct.pack("<I", bits)
    return bytes(encoded)


# Colours


def ycck_jpeg() -> bytes:
    """As Photoshop stores CMYK: inverted, and in YCbCr with a black channel beside it."""
    cyan, magenta, yellow, black = star().convert("CMYK").split()
    colours = Image.merge("RGB", (cyan, magenta, yellow)).convert("YCbCr").split()
    stored = [channel.point(lambda value: 255 - value) for channel in colours]
    encoded = encode(Image.merge("CMYK", (*stored, black)), "JPEG", quality=95, subsampling=0)
    at = encoded.index(b"Adobe") + 11
    return encoded[:at] + b"\2" + encoded[at + 1 :]


def deep_png(*, is_grey: bool) -> bytes:
    """16 bits a channel, the low ones noise."""
    shallow = np.asarray(word().convert("L") if is_grey else star()).astype(np.uint16)
    noise = np.random.default_rng(0).integers(0, 256, shallow.shape, dtype=np.uint16)
    values = (shallow * 256 + noise).astype(">u2")
    height, width = values.shape[:2]
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    return png(width, height, rows, bits=16, colour_type=0 if is_grey else 2)


def clear_paper() -> bytes:
    """The word in black, and what is white in its picture is transparent here."""
    ink = word().convert("L").point(lambda value: 255 - value)
    return encode(Image.merge("LA", (Image.new("L", ink.size), ink)), "PNG")


def palette_png() -> bytes:
    image = star().quantize(4)
    background = image.getpixel((image.width - 1, image.height - 1))
    return encode(image, "PNG", transparency=background)


# EXIF and colour profiles

STORED = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
"""How a camera held that way stores the star, so that orientation N makes it upright."""


def turned_star(orientation: int) -> bytes:
    turn = STORED.get(orientation)
    stored = star() if turn is None else star().transpose(turn)
    return encode(stored, "JPEG", quality=95, subsampling=0, exif=exif(orientation))


def exif_loop() -> bytes:
    """A directory whose only entry, and whose successor, is itself."""
    tiff = b"II*\0\x08\0\0\0" + b"\x01\0" + struct.pack("<HHII", 0x8769, 4, 1, 8) + b"\x08\0\0\0"
    return star_jpeg_with(jpeg_segment(0xE1, b"Exif\0\0" + tiff))


def icc_segments(profile: bytes) -> list[bytes]:
    pieces = [profile[at : at + 65_519] for at in range(0, len(profile), 65_519)]
    return [
        jpeg_segment(0xE2, b"ICC_PROFILE\0" + bytes((number, len(pieces))) + piece)
        for number, piece in enumerate(pieces, 1)
    ]


def icc_header(num_bytes: int, space: bytes) -> bytes:
    """A profile that is a header and nothing else: of this length, for these colours."""
    head = bytearray(128)
    head[0:4] = struct.pack(">I", num_bytes)
    head[12:24] = b"mntr" + space + b"XYZ "
    head[36:40] = b"acsp"
    return bytes(head).ljust(num_bytes, b"\0")


# Other formats


def tiff(*entries: tuple[int, int, int], content: bytes = b"", following: int = 0) -> bytes:
    """A TIFF by hand: entries of one long value each, `content` behind the directory."""
    fields = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, _, value in entries)
    directory = struct.pack("<H", len(entries)) + fields + struct.pack("<I", following)
    return b"II*\0\x08\0\0\0" + directory + content


def tiff_bomb(compression: int, packed: bytes) -> bytes:
    """30,000 x 30,000 pixels in one strip."""
    tags = {
        256: 30_000,
        257: 30_000,
        258: 8,
        259: compression,
        262: 1,
        273: 8 + 2 + 9 * 12 + 4,
        277: 1,
        278: 30_000,
        279: len(packed),
    }
    return tiff(*((tag, 4, value) for tag, value in tags.items()), content=packed)


def mpo_bomb() -> bytes:
    """Two pictures in one file; the second says that it has 4,290 megapixels."""
    encoded = encode(star(), "MPO", save_all=True, append_images=[star()], quality=95)
    at = encoded.rindex(b"\xff\xc0\0\x11\x08") + 5
    return encoded[:at] + struct.pack(">HH", 65_500, 65_500) + encoded[at + 4 :]


def fits_bomb() -> bytes:
    """A compressed image whose packed row grows to 50 MB."""
    cards = [
        "SIMPLE  =                    T",
        "BITPIX  =                    8",
        "NAXIS   =                    2",
        "NAXIS1  =                50000",
        "NAXIS2  =                 1000",
        "ZCMPTYPE= 'GZIP_1  '",
        "END",
    ]
    head = "".join(card.ljust(80) for card in cards).ljust(2880).encode()
    return head + gzip.compress(bytes(50_000_000))


def icon_of_255() -> bytes:
    """255 entries that all point to one PNG, which says 65,535 x 65,535."""
    picture = png(65_535, 65_535, b"")
    start = 6 + 255 * 16
    entry = struct.pack("<4B2H2I", 16, 16, 0, 0, 1, 32, len(picture), start)
    return struct.pack("<3H", 0, 1, 255) + entry * 255 + picture


def bmp_upside_down() -> bytes:
    """Rows from the top, as a negative height says."""
    encoded = bytearray(encode(star().transpose(Image.Transpose.FLIP_TOP_BOTTOM), "BMP"))
    (height,) = struct.unpack("<i", encoded[22:26])
    encoded[22:26] = struct.pack("<i", -height)
    return bytes(encoded)


def bmp_of_a_huge_palette() -> bytes:
    encoded = bytearray(encode(star().quantize(16), "BMP"))
    encoded[46:50] = struct.pack("<I", 2**31)
    return bytes(encoded)


def tga_bomb() -> bytes:
    """Runs of 128 equal pixels each, for 40,000 x 40,000."""
    head = struct.pack("<3B2HB4H2B", 0, 0, 10, 0, 0, 0, 0, 0, 40_000, 40_000, 24, 0)
    return head + b"\xff\1\2\3" * 10_000


def with_archive(encoded: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("index.html", f"<script>{PLANTED}</script>")
    return encoded + file.getvalue()


def ask_svg_that_reads(place: Place) -> Asked:
    """An SVG that asks for a local file, an entity and a page of ours."""
    canary = place.serve(answering(b"<svg/>"))
    svg = (
        '<?xml version="1.0"?><!DOCTYPE svg [<!ENTITY x SYSTEM "file:///etc/hostname">]>'
        '<svg xmlns="http://www.w3.org/2000/svg"><text>&x;</text><image href="file:///etc/hostname"/>'
        f'<image href="http://127.0.0.1:{canary.port}/{PLANTED}"/></svg>'
    )
    url = data_url(svg.encode(), "image/svg+xml")
    line = build_line(build_body(image_part(url), question="Describe the image."))
    network = {"allowed": ["127.0.0.1/32"], "ports": [canary.port]}
    return Asked(line, network, canaries=(canary,))


def ask_as_clip(content: bytes) -> Asked:
    url = data_url(content, "video/mp4")
    return Asked(build_line(build_body(video_part(url), question="Describe the video.")))


JPEG, WEBP, GIF = "image/jpeg", "image/webp", "image/gif"

HALF = "half the size: the file lies in the worker and in the process that decodes it"

CASES: tuple[Case, ...] = (
    image_case("I1a", "no bytes in a data URL", bytes, "bad_data_url"),
    image_case("I1b", "an upload of no bytes", bytes, "image_empty", is_uploaded=True),
    image_case("I2", "one byte", lambda: b"\xff", DAMAGED),
    image_case("I3", "1 MB of noise", lambda: random.Random(0).randbytes(1_000_000), DAMAGED),
    image_case(
        "I4",
        "a web page called JPEG",
        lambda: b"<!DOCTYPE html><html><body>Not found</body></html>",
        DAMAGED,
        kind=JPEG,
    ),
    image_case(
        "I5",
        "an error in JSON called JPEG",
        lambda: b'{"error": {"code": 404, "path": "/srv/' + PLANTED.encode() + b'"}}',
        DAMAGED,
        kind=JPEG,
    ),
    *(
        image_case(
            f"I6{letter}",
            f"a JPEG cut at {share}%",
            lambda share=share: (whole := star_jpeg())[: len(whole) * share // 100],  # type: ignore[misc]
            CUT,
            kind=JPEG,
        )
        for letter, share in (("a", 10), ("b", 50), ("c", 99))
    ),
    image_case(
        "I7",
        "a PNG cut in its pixels",
        lambda: (whole := star_png())[: whole.index(b"IDAT") + 100],
        CUT,
    ),
    image_case("I8", "a PNG with a bad checksum", lambda: png_with_bad_checksum(star()), DAMAGED),
    image_case(
        "I9",
        "a PNG of 13,000 x 13,000 in 1 bit",
        lambda: png(13_000, 13_000, bytes(1626 * 13_000), bits=1),
        TOO_LARGE,
    ),
    image_case(
        "I10", "a PNG header of 65,535 x 65,535", lambda: png(65_535, 65_535, b""), TOO_LARGE
    ),
    image_case(
        "I11", "a PNG of 1 x 200,000", lambda: png(1, 200_000, bytes(400_000)), "image_too_narrow"
    ),
    image_case("I12", "a PNG of 1 x 1", lambda: png(1, 1, b"\0\x80"), OK),
    image_case("I13", "a PNG header of 0 x 0", lambda: png(0, 0, b""), DAMAGED),
    image_case("I14a", "a GIF of 200 frames of 4 MP", gif_of_large_frames, OK, kind=GIF, says=STAR),
    image_case(
        "I15a",
        "a GIF of 100,000 frames of 1 pixel",
        lambda: gif(1, 1, [(0, 0, 1, 1)] * 100_000),
        OK,
        kind=GIF,
    ),
    image_case(
        "I16a",
        "a GIF frame larger than its canvas by far",
        lambda: gif(1, 1, [(0, 0, 65_535, 65_535)]),
        TOO_LARGE,
        kind=GIF,
    ),
    image_case(
        "I16b",
        "a GIF frame far off its canvas",
        lambda: gif(1, 1, [(65_000, 65_000, 1, 1)]),
        TOO_LARGE,
        kind=GIF,
    ),
    image_case(
        "I16c",
        "a GIF frame a little larger than its canvas",
        star_gif_on_a_small_canvas,
        OK,
        kind=GIF,
        says=STAR,
    ),
    image_case("I17a", "an APNG of 10,000 frames", lambda: apng(10_000), OK, says=STAR),
    image_case("I17b", "an APNG whose frames are misnumbered", lambda: apng(3, 7), OK, says=STAR),
    image_case("I18a", "a WebP of 1,000 frames", lambda: webp_animation(1000), OK, kind=WEBP),
    image_case(
        "I18b",
        "a lossless WebP of 6,400 x 6,400 in one colour",
        lambda: encode(Image.new("RGB", (6400, 6400)), "WEBP", lossless=True, quality=0),
        TOO_LARGE,
        kind=WEBP,
        is_slow=True,
    ),
    image_case(
        "I18c",
        "a WebP header of 16,383 x 16,383",
        lambda: webp_of(16_383, 16_383),
        TOO_LARGE,
        kind=WEBP,
    ),
    image_case("I19", "a WebP whose canvas lies", webp_whose_canvas_lies, DAMAGED, kind=WEBP),
    image_case(
        "I20a",
        "a CMYK JPEG, inverted as Adobe does",
        lambda: encode(star().convert("CMYK"), "JPEG", quality=95, subsampling=0),
        OK,
        kind=JPEG,
        says=STAR,
    ),
    image_case("I20b", "a YCCK JPEG", ycck_jpeg, OK, kind=JPEG, says=STAR),
    image_case("I21a", "a PNG of 16-bit grey", lambda: deep_png(is_grey=True), OK, says=WORD),
    image_case("I21b", "a PNG of 16-bit RGB", lambda: deep_png(is_grey=False), OK, says=STAR),
    image_case("I22a", "a palette with a clear colour", palette_png, OK, says=STAR_ON_WHITE),
    image_case("I22b", "grey on clear paper", clear_paper, OK, says=WORD),
    image_case(
        "I22c",
        "RGBA that is all clear",
        lambda: encode(Image.new("RGBA", (200, 200), (90, 0, 90, 0)), "PNG"),
        OK,
        says=WHITE,
    ),
    *(
        image_case(
            f"I23{letter}",
            f"EXIF orientation {orientation}",
            lambda orientation=orientation: turned_star(orientation),  # type: ignore[misc]
            OK,
            kind=JPEG,
            says=STAR,
        )
        for letter, orientation in zip("abcdefghij", range(10), strict=True)
    ),
    image_case(
        "I24a",
        "64 KB of garbage as EXIF",
        lambda: star_jpeg_with(
            jpeg_segment(0xE1, b"Exif\0\0II*\0\x08\0\0\0" + random.Random(1).randbytes(65_000))
        ),
        OK,
        kind=JPEG,
        says=STAR,
    ),
    image_case("I24b", "EXIF that is a loop", exif_loop, OK, kind=JPEG, says=STAR),
    image_case(
        "I25a",
        "a PNG whose colour profile grows to 50 MB",
        lambda: behind_header(star_png(), png_chunk(b"iCCP", b"x\0\0" + bomb(50_000_000))),
        DAMAGED,
    ),
    image_case(
        "I25b",
        "a WebP with a colour profile of 25 MB",
        lambda: webp_with_profile(star(), icc_header(25_000_000, b"RGB ")),
        OK,
        note=HALF,
        is_uploaded=True,
        says=STAR,
    ),
    image_case(
        "I25c",
        "a JPEG with a colour profile of 16 MB",
        lambda: star_jpeg_with(*icc_segments(icc_header(255 * 65_519, b"RGB "))),
        OK,
        is_uploaded=True,
        says=STAR,
    ),
    image_case(
        "I25f",
        "a JPEG with 25 MB of Photoshop's notes",
        lambda: star_jpeg_with(*[jpeg_segment(0xED, bytes(65_000))] * 385),
        OK,
        note=HALF,
        is_uploaded=True,
        says=STAR,
    ),
    image_case(
        "I25d",
        "a colour profile that is none",
        lambda: star_jpeg_with(*icc_segments(b"no profile" * 9)),
        OK,
        kind=JPEG,
        says=STAR,
    ),
    image_case(
        "I25e",
        "a colour profile for other channels",
        lambda: star_jpeg_with(*icc_segments(icc_header(128, b"CMYK"))),
        OK,
        kind=JPEG,
        says=STAR,
    ),
    image_case(
        "I26a",
        "a PNG text that grows to 50 MB",
        lambda: behind_header(star_png(), png_chunk(b"zTXt", b"x\0\0" + bomb(50_000_000))),
        DAMAGED,
    ),
    image_case(
        "I26b",
        "an international PNG text that grows to 50 MB",
        lambda: behind_header(star_png(), png_chunk(b"iTXt", b"x\0\1\0\0\0" + bomb(50_000_000))),
        DAMAGED,
    ),
    image_case(
        "I27",
        "a progressive JPEG of 10,000 scans",
        lambda: jpeg_with_scans(star(), 10_000),
        TOO_LARGE,
        kind=JPEG,
    ),
    image_case(
        "I28a",
        "a JPEG header of 65,500 x 65,500",
        lambda: jpeg_that_says(65_500, 65_500),
        TOO_LARGE,
        kind=JPEG,
    ),
    image_case(
        "I28b",
        "an arithmetic JPEG without its tables",
        lambda: star_jpeg().replace(b"\xff\xc0", b"\xff\xcb"),
        DAMAGED,
        kind=JPEG,
    ),
    image_case(
        "I28c",
        "a JPEG of 12 bits",
        lambda: star_jpeg().replace(b"\xff\xc0\0\x11\x08", b"\xff\xc0\0\x11\x0c"),
        DAMAGED,
        kind=JPEG,
    ),
    Case("I29", "an SVG that reads files and pages", ask_svg_that_reads, NOT_READ),
    image_case("I30a", "a PDF", lambda: b"%PDF-1.7\n" + bytes(100), NOT_READ, kind=JPEG),
    image_case(
        "I30b",
        "an EPS that reads a file",
        lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/hostname) (r) file\n",
        NOT_READ,
        kind=JPEG,
    ),
    image_case(
        "I30c",
        "PostScript behind a binary header",
        lambda: b"\xc5\xd0\xd3\xc6" + bytes(26) + b"%!PS\n",
        NOT_READ,
        kind=JPEG,
    ),
    image_case("I31a", "a TIFF whose directory is a loop", lambda: tiff(following=8), NOT_READ),
    image_case("I31b", "a TIFF with a strip of 2 GB", lambda: tiff((279, 4, 2**31)), NOT_READ),
    image_case("I31c", "a TIFF that is an LZW bomb", lambda: tiff_bomb(5, bytes(1000)), NOT_READ),
    image_case(
        "I31d", "a TIFF that is a zip bomb", lambda: tiff_bomb(8, bomb(90_000_000)), NOT_READ
    ),
    image_case("I31e", "a TIFF with a JPEG inside", lambda: tiff_bomb(7, star_jpeg()), NOT_READ),
    image_case("I32a", "an MPO whose second picture is a bomb", mpo_bomb, OK, kind=JPEG, says=STAR),
    image_case(
        "I32b",
        "a DCX of 1,023 pages",
        lambda: struct.pack("<I", 987654321) + struct.pack("<1023I", *range(4100, 5123)),
        DAMAGED,
    ),
    image_case("I32c", "a FITS that is a gzip bomb", fits_bomb, DAMAGED),
    image_case(
        "I32d",
        "a JPEG 2000 of a million tiles",
        lambda: b"\xff\x4f\xff\x51" + struct.pack(">2H8I", 47, 0, 10**6, 10**6, 0, 0, 1, 1, 0, 0),
        NOT_READ,
    ),
    image_case("I32e", "an icon of 255 pictures that lie", icon_of_255, NOT_READ),
    image_case("I32f", "a BMP of negative height", bmp_upside_down, OK, says=STAR),
    image_case("I32g", "a BMP with a palette of 8 GB", bmp_of_a_huge_palette, DAMAGED),
    image_case("I32h", "a TGA that is a bomb", tga_bomb, DAMAGED),
    image_case(
        "I33a",
        "a GIF that is a script too",
        lambda: encode(star(), "GIF") + f"/*{PLANTED}*/=1;alert(1)//".encode(),
        OK,
        kind=GIF,
        says=STAR,
    ),
    image_case(
        "I33b",
        "a JPEG that is an archive too",
        lambda: with_archive(star_jpeg()),
        OK,
        kind=JPEG,
        says=STAR,
    ),
    image_case(
        "I34a", "HEIC", lambda: b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100), NOT_READ
    ),
    image_case("I34b", "AVIF", lambda: encode(star(), "AVIF", quality=95), OK, says=STAR),
    image_case("I34c", "JPEG XL", lambda: b"\xff\x0a\xfa\x7f" + bytes(100), NOT_READ),
    Case(
        "I14b",
        "the same GIF of 200 frames as a clip",
        lambda place: ask_as_clip(gif_of_large_frames()),
        "video_too_large",
    ),
    Case(
        "I15b",
        "the same GIF of 100,000 frames as a clip",
        lambda place: ask_as_clip(gif(1, 1, [(0, 0, 1, 1)] * 100_000)),
        OK,
    ),
    Case("I17c", "an APNG of 10,000 frames as a clip", lambda place: ask_as_clip(apng(10_000)), OK),
)
