"""Clips that are damaged, lie, or would open files and addresses (V1 to V17), and odd ones that are good."""

import struct
from collections.abc import Callable
from functools import cache, partial
from io import BytesIO
from typing import Any

import av
import numpy as np
from av.video.stream import VideoStream
from PIL import Image

from tests.corpus.cases import (
    MOVES,
    OK,
    PLANTED,
    Asked,
    Case,
    Place,
    build_body,
    build_line,
    data_url,
    sample,
    video_part,
)
from tests.media.clips import clip, jpeg_clip, shades, sound, turned
from tests.media.files import Pixels, encode, jpeg_that_says
from tests.media.servers import answering

CUT = "video_truncated"
DAMAGED = "video_unreadable"
TOO_LARGE = "video_too_large"
NOT_READ = "video_format_not_supported"
NO_FRAMES = "video_has_no_frames"
NO_ADDRESS = "invalid_media_url"

QUESTION = "Describe the video."


def sample_frames() -> list[Pixels]:
    """The frames of the clip of which the model says `MOVES`."""
    with av.open(BytesIO(sample("clip.mp4")), "r") as source:
        frames = source.decode(video=0)
        return [np.asarray(frame.to_image()) for frame in frames]  # type: ignore[no-untyped-call]


def ask_about(content: bytes, **options: Any) -> Asked:
    part = video_part(data_url(content, "video/mp4"), **options)
    return Asked(build_line(build_body(part, question=QUESTION)))


def clip_case(
    id: str, what: str, build: Callable[[], bytes], expected: str, *, says: str | None = None
) -> Case:
    return Case(id, what, lambda place: ask_about(build()), expected, says)


def ask_by_address(url: str, place: Place) -> Asked:
    return Asked(build_line(build_body(video_part(url), question=QUESTION)))


# Scripts


def ask_as_upload(place: Place) -> Asked:
    """A script by the name of a clip; a clip of the name that it reads lies in the worker's folder."""
    file = place.upload(b"ffconcat version 1.0\nfile 'clip.mp4'\n", "clip.mp4")
    return Asked(build_line(build_body(video_part(file), question=QUESTION)))


def ask_with_canary(script: str, place: Place) -> Asked:
    """A playlist whose parts are files and pages of ours."""
    canary = place.serve(answering(sample("clip.mp4")))
    page = f"http://127.0.0.1:{canary.port}/{PLANTED}.ts"
    asked = ask_about(script.replace("PAGE", page).encode())
    network = {"allowed": ["127.0.0.1/32"], "ports": [canary.port]}
    return Asked(asked.line, network, canaries=(canary,))


PLAYLIST = "#EXTM3U\n#EXTINF:1,\nfile:///etc/hostname\n#EXTINF:1,\nPAGE\n#EXT-X-ENDLIST\n"
MANIFEST = (
    '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011"><Period><BaseURL>PAGE</BaseURL>'
    "</Period></MPD>"
)
SESSION = "v=0\no=- 0 0 IN IP4 127.0.0.1\nc=IN IP4 127.0.0.1\nm=video 5004 RTP/AVP 96\n"
NAMES = ("concat:clip.mp4|clip.mp4", "subfile,,start,0,end,9,,:clip.mp4", "crypto:clip.mp4")
"""What FFmpeg would take for addresses."""

SCRIPT = b"ffconcat version 1.0\nfile 'clip.mp4'\n"


# Containers


def without_index() -> bytes:
    """All but `moov`, as when a recording broke off."""
    encoded = sample("clip.mp4")
    at = encoded.index(b"moov") - 4
    (size,) = struct.unpack(">I", encoded[at : at + 4])
    return encoded[:at] + encoded[at + size :]


def with_its_index_first() -> bytes:
    """The sample, `moov` moved ahead of the pictures, as for a page that plays while it loads."""
    encoded = sample("clip.mp4")
    moov, mdat = encoded.index(b"moov") - 4, encoded.index(b"mdat") - 4
    assert mdat < moov
    index = bytearray(encoded[moov:])
    table = index.index(b"stco") + 8
    (num_chunks,) = struct.unpack(">I", index[table : table + 4])
    for at in range(table + 4, table + 4 + 4 * num_chunks, 4):
        (offset,) = struct.unpack(">I", index[at : at + 4])
        index[at : at + 4] = struct.pack(">I", offset + len(index))
    return encoded[:mdat] + bytes(index) + encoded[mdat:moov]


def cut_mp4(share: int) -> bytes:
    whole = with_its_index_first()
    return whole[: len(whole) * share // 100]


def of_no_clusters() -> bytes:
    """A Matroska head, and nothing behind it."""
    file = BytesIO()
    with av.open(file, "w", format="matroska") as target:
        stream = target.add_stream("mpeg4", rate=10)
        assert isinstance(stream, VideoStream)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        target.start_encoding()
    return file.getvalue()


COUNTS = {b"stts": 8, b"ctts": 8, b"stss": 8, b"stsc": 8, b"stco": 8, b"stsz": 12}
"""Where, behind its name, a table of an MP4 says how long it is."""


def of_no_samples() -> bytes:
    """An MP4 whose tables count nothing."""
    encoded = bytearray(sample("clip.mp4"))
    for name, place in COUNTS.items():
        at = encoded.find(name)
        if at >= 0:
            encoded[at + place : at + place + 4] = bytes(4)
    return bytes(encoded)


def sample_jpegs() -> list[bytes]:
    return [encode(Image.fromarray(frame), "JPEG", quality=95) for frame in sample_frames()]


def sample_size() -> tuple[int, int]:
    height, width = sample_frames()[0].shape[:2]
    return width, height


def of_jpegs(times_ms: Callable[[int], int], **words: Any) -> bytes:
    """The sample's frames, each at the time that `times_ms` gives its place."""
    jpegs = sample_jpegs()
    return jpeg_clip(
        jpegs, [times_ms(place) for place in range(len(jpegs))], sample_size(), **words
    )


def with_a_length_of_nan() -> bytes:
    encoded = of_jpegs(lambda place: place * 100)
    at = encoded.index(b"\x44\x89\x88") + 3
    return encoded[:at] + struct.pack(">d", float("nan")) + encoded[at + 8 :]


def of_changing_sizes() -> bytes:
    """The sample, every other frame at half its size."""
    width, height = sample_size()
    images = [Image.fromarray(frame) for frame in sample_frames()]
    smaller = [image.resize((width // 2, height // 2)) for image in images]
    mixed = [
        small if n % 2 else image
        for n, (image, small) in enumerate(zip(images, smaller, strict=True))
    ]
    jpegs = [encode(image, "JPEG", quality=95) for image in mixed]
    return jpeg_clip(jpegs, [place * 100 for place in range(len(jpegs))], (width, height))


def of_a_size_that_lies() -> bytes:
    """Frames of 64 x 48; what is around them says otherwise."""
    said, true = struct.pack(">2H", 16_384, 16_384), struct.pack(">2H", 64, 48)
    return clip(shades(4)).replace(true, said)


def grey_jpeg(side_px: int) -> bytes:
    """A whole JPEG in one grey: each of its blocks takes 6 bits."""
    encoded = encode(Image.new("L", (8, 8), 128), "JPEG")
    scan = encoded.index(b"\xff\xda")
    pixels = scan + 2 + int.from_bytes(encoded[scan + 2 : scan + 4], "big")
    size = encoded.index(b"\xff\xc0\0\x0b\x08") + 5
    header = encoded[:size] + struct.pack(">HH", side_px, side_px) + encoded[size + 4 : pixels]
    return header + b"\x28\xa2\x8a" * ((side_px // 8) ** 2 // 4) + b"\xff\xd9"


def lying_sideways() -> bytes:
    """The sample as a telephone on its side stores it: turned back by a matrix."""
    frames = [np.ascontiguousarray(np.rot90(frame)) for frame in sample_frames()]
    return turned(clip(frames), 0, 1, -1, 0)


@cache
def of_many_frames() -> bytes:
    """A minute at 240 frames a second, the sample's ones held for long."""
    frames = [np.asarray(Image.fromarray(frame).resize((112, 84))) for frame in sample_frames()]
    held = [frames[place * len(frames) // 14_400] for place in range(14_400)]
    return clip(held, fps=240, options={"preset": "ultrafast"})


def ask_about_too_many_frames(place: Place) -> Asked:
    """An hour and a minute at 60 a second: each of one byte, which says that it is a key frame."""
    file = place.upload(jpeg_clip([b"\xff"] * 219_600, range(219_600)))
    return Asked(build_line(build_body(video_part(file), question=QUESTION)))


CASES: tuple[Case, ...] = (
    clip_case("V1a", "a concat script", lambda: SCRIPT, NOT_READ),
    Case("V1b", "a concat script called clip.mp4", ask_as_upload, NOT_READ),
    clip_case(
        "V1c",
        "a concat script behind Matroska's mark",
        lambda: b"\x1a\x45\xdf\xa3" + SCRIPT,
        DAMAGED,
    ),
    clip_case(
        "V1d",
        "a concat script behind AVI's mark",
        lambda: b"RIFF\xff\0\0\0AVI " + SCRIPT,
        NO_FRAMES,
    ),
    Case(
        "V2",
        "a playlist of files and pages",
        lambda place: ask_with_canary(PLAYLIST, place),
        NOT_READ,
    ),
    Case("V3", "a DASH manifest", lambda place: ask_with_canary(MANIFEST, place), NOT_READ),
    clip_case("V4", "a session description", lambda: SESSION.encode(), NOT_READ),
    *(
        clip_case(f"V5{letter}", f"the bytes {text[:7]}…", partial(str.encode, text), NOT_READ)
        for letter, text in zip("abc", NAMES, strict=True)
    ),
    *(
        Case(f"V5{letter}", f"the address {url[:7]}…", partial(ask_by_address, url), NO_ADDRESS)
        for letter, url in zip("def", NAMES, strict=True)
    ),
    clip_case("V6a", "an MP4 without its index", without_index, CUT),
    clip_case(
        "V6b", "an MP4 with its index at the end", lambda: sample("clip.mp4"), OK, says=MOVES
    ),
    clip_case("V6c", "an MP4 with its index first", with_its_index_first, OK, says=MOVES),
    *(
        clip_case(f"V7{letter}", f"an MP4 cut at {share}%", partial(cut_mp4, share), CUT)
        for letter, share in (("a", 10), ("b", 50), ("c", 99))
    ),
    clip_case("V8a", "an MP4 of no frames", of_no_samples, NO_FRAMES),
    clip_case("V8b", "a Matroska head alone", of_no_clusters, DAMAGED),
    clip_case("V9", "sound alone", sound, NO_FRAMES),
    clip_case("V10", "one frame", lambda: clip(sample_frames()[:1]), OK),
    clip_case(
        "V11a",
        "frames at changing distances",
        lambda: of_jpegs(lambda place: place * place * 10),
        OK,
        says=MOVES,
    ),
    clip_case(
        "V11b",
        "times below zero",
        lambda: of_jpegs(
            lambda place: place * 100 - 1000, options={"avoid_negative_ts": "disabled"}
        ),
        OK,
        says=MOVES,
    ),
    clip_case("V11c", "a length that is no number", with_a_length_of_nan, OK, says=MOVES),
    clip_case("V12", "another size in every other frame", of_changing_sizes, OK, says=MOVES),
    clip_case(
        "V13a",
        "a frame whose header says 16,384 x 16,384",
        lambda: jpeg_clip([jpeg_that_says(16_384, 16_384)], [0]),
        DAMAGED,
    ),
    clip_case(
        "V13b",
        "a whole frame of 16,384 x 16,384",
        lambda: jpeg_clip([grey_jpeg(16_384)], [0]),
        DAMAGED,
    ),
    clip_case("V13c", "a container that says 16,384 x 16,384", of_a_size_that_lies, OK),
    clip_case(
        "V14",
        "10 hours in two frames",
        lambda: jpeg_clip(sample_jpegs()[:2], [0, 36_000_000], sample_size()),
        TOO_LARGE,
    ),
    clip_case(
        "V15a",
        "a MagicYUV clip",
        lambda: clip(shades(4), "avi", "magicyuv", pixel_format="gbrp"),
        NOT_READ,
    ),
    clip_case(
        "V15b", "an unknown codec", lambda: clip(shades(2)).replace(b"avc1", b"xxxx"), NOT_READ
    ),
    clip_case("V16", "a clip that lies on its side", lying_sideways, OK, says=MOVES),
    clip_case("V17a", "a minute at 240 frames a second", of_many_frames, OK),
    Case(
        "V17b",
        "769 frames of it",
        lambda place: ask_about(of_many_frames(), num_frames=769),
        TOO_LARGE,
    ),
    Case("V17c", "219,600 frames", ask_about_too_many_frames, TOO_LARGE),
)
