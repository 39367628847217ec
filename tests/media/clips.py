"""Clips encoded on the spot. Needs PyAV: import it behind `pytest.importorskip`."""

import os
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from io import BytesIO

import av
import numpy as np
from av.video.stream import VideoStream

from tests.media.files import Pixels

MILLISECOND = Fraction(1, 1000)


def shade(place: int) -> int:
    """The grey of frame `place`, far enough from its neighbours' to survive a codec."""
    return 16 + place * 5


def shades(num_frames: int, width: int = 64, height: int = 48) -> list[Pixels]:
    return [np.full((height, width, 3), shade(place), np.uint8) for place in range(num_frames)]


BITS = 12
BLOCK_PX = 16


def numbered(num_frames: int) -> list[Pixels]:
    """Pictures of 192 x 64 px that say their own number: a column of a bit, its complement below it."""
    pictures = []
    for place in range(num_frames):
        bits = np.array([place >> bit & 1 for bit in range(BITS)], np.uint8)
        rows = np.stack([bits, 1 - bits]) * 192 + 32
        pixels = rows.repeat(2 * BLOCK_PX, axis=0).repeat(BLOCK_PX, axis=1)
        pictures.append(np.repeat(pixels[:, :, None], 3, axis=2))
    return pictures


def read_number(picture: Pixels) -> int:
    """The number that a picture of `numbered` says, whatever its size; fails where it is unreadable."""
    height, width = picture.shape[:2]
    middles = (np.arange(BITS) + 0.5) * width / BITS
    upper, lower = (
        picture[height * row // 4, middles.astype(int), 1].astype(int) for row in (1, 3)
    )
    assert np.abs(upper - lower).min() > 80, "the blocks cannot be told apart"
    return int(sum(1 << bit for bit in range(BITS) if upper[bit] > lower[bit]))


@contextmanager
def scheduled_as_before() -> Iterator[None]:
    """
    Take back what an encoder did to the calling thread.

    SVT-AV1 makes it a real-time one where it may, as root. Whatever that thread does or starts from then
    on keeps everybody else from the processor, its own process's other threads first.
    """
    if not hasattr(os, "sched_getscheduler"):
        yield
        return
    policy, parameters = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        yield
    finally:
        os.sched_setscheduler(0, policy, parameters)


def clip(
    pictures: Sequence[Pixels],
    container: str = "mp4",
    codec: str = "libx264",
    fps: int = 10,
    times_ms: Sequence[int] | None = None,
    pixel_format: str = "yuv420p",
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
) -> bytes:
    """Encode pictures of one size, at a constant rate or at the given times."""
    file = BytesIO()
    with (
        scheduled_as_before(),
        av.open(file, "w", format=container, container_options=container_options) as target,
    ):
        stream = target.add_stream(codec, rate=fps, options=options)
        assert isinstance(stream, VideoStream)
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = pixel_format
        if times_ms:
            stream.codec_context.time_base = MILLISECOND
        for place, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            if times_ms:
                frame.pts, frame.time_base = times_ms[place], MILLISECOND
            target.mux(stream.encode(frame))
        target.mux(stream.encode())
    return file.getvalue()


def jpeg_clip(
    jpegs: Sequence[bytes],
    times_ms: Sequence[int],
    size_px: tuple[int, int] = (64, 48),
    options: dict[str, str] | None = None,
) -> bytes:
    """JPEG files in Matroska as they are, whatever their sizes and times, with a header that says this size."""
    file = BytesIO()
    with av.open(file, "w", format="matroska", options=options or {}) as target:
        stream = target.add_stream("mjpeg", rate=10)
        assert isinstance(stream, VideoStream)
        stream.width, stream.height = size_px
        stream.pix_fmt = "yuvj420p"
        for jpeg, time_ms in zip(jpegs, times_ms, strict=True):
            packet = av.Packet(jpeg)
            packet.stream = stream
            packet.pts = packet.dts = time_ms
            packet.time_base = MILLISECOND
            packet.is_keyframe = True
            target.mux(packet)
    return file.getvalue()


def sound() -> bytes:
    file = BytesIO()
    with av.open(file, "w", format="mp4") as target:
        stream = target.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate = 8000
        target.mux(stream.encode(frame))
        target.mux(stream.encode(None))
    return file.getvalue()


def turned(mp4: bytes, a: int, b: int, c: int, d: int) -> bytes:
    """Write a matrix of display into the track header, as telephones do."""
    at = mp4.index(b"tkhd") + 44
    matrix = struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    return mp4[:at] + matrix + mp4[at + 36 :]
