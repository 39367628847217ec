"""Clips decoded in processes: the same frames as in threads."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields
from fractions import Fraction
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from media.decoded import Fit, Frames, Header
from media.decoder import Threads
from media.errors import MediaError, VideoUnreadableError
from media.frames import FrameSampling
from media.pool import DecoderPool
from media.video import decode_video
from tests.media.files import animation, encode, picture

pytest.importorskip("av")

from bench.video import repeat
from tests.media.clips import clip, shades, turned


@pytest.fixture(scope="module")
def pool() -> Iterator[DecoderPool]:
    with DecoderPool(1) as pool:
        yield pool


def half(header: Header) -> Fit:
    return Fit(header.width_px // 2, header.height_px // 2)


CLIPS: dict[str, bytes] = {
    "GIF": animation("GIF", [(255, 0, 0), (0, 255, 0), (0, 0, 255)], duration=[100, 300, 200]),
    "WEBP": animation("WEBP", [(255, 0, 0), (0, 255, 0)], duration=100, lossless=True),
    "MP4": clip(shades(12)),
    "MP4 turned": turned(clip(shades(3)), 0, 1, -1, 0),
    "AVI": clip(shades(5), "avi", "mjpeg", pixel_format="yuvj420p"),
    "WebM": clip(shades(5), "webm", "libvpx-vp9"),
    "AV1": clip(shades(5), "matroska", "libsvtav1"),
    "HEVC": clip(shades(5), "mpegts", "libx265"),
}


@pytest.mark.skipif(not hasattr(os, "sched_getscheduler"), reason="asks Linux")
def test_making_a_clip_leaves_the_thread_no_real_time_one() -> None:
    clip(shades(2), "matroska", "libsvtav1")

    assert os.sched_getscheduler(0) not in (os.SCHED_FIFO, os.SCHED_RR)


_WITH_LITTLE_MEMORY = """
import resource, sys
from pathlib import Path
from media.errors import DecodeMemoryError
from media.video import decode_video
small, large, num_bytes = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
decode_video(small.read_bytes())
num_pages = int(Path("/proc/self/statm").read_text().split()[0])
limit = num_pages * resource.getpagesize() + num_bytes
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    decode_video(large.read_bytes())
except (DecodeMemoryError, MemoryError):
    print("no memory")
"""


@cache
def build_small_and_large(codec: str) -> tuple[bytes, bytes]:
    return clip(shades(3), codec=codec), clip(
        [np.zeros((2160, 3840, 3), np.uint8)] * 2, codec=codec
    )


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc")
@pytest.mark.parametrize("mebibytes", [4, 20, 60])
@pytest.mark.parametrize("codec", ["libx264", "libx265", "mpeg4"])
def test_clip_for_which_memory_runs_out_is_not_called_damaged(
    tmp_path: Path, codec: str, mebibytes: int
) -> None:
    """Of Python's own error a decoder process makes the other: `media_needs_too_much_memory`."""
    names = [str(tmp_path / name) for name in ("small", "large")]
    for name, encoded in zip(names, build_small_and_large(codec), strict=True):
        Path(name).write_bytes(encoded)
    command = [sys.executable, "-c", _WITH_LITTLE_MEMORY, *names, str(mebibytes << 20)]

    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)

    assert ("no memory\n", "") == (done.stdout, done.stderr)


@pytest.mark.parametrize("ask", [None, half])
@pytest.mark.parametrize("name", CLIPS)
def test_processes_give_the_frames_that_threads_give(
    pool: DecoderPool, name: str, ask: Callable[[Header], Fit] | None
) -> None:
    sampling = FrameSampling(num_frames=4, dedupe_frames=True)
    expected = Threads().decode_video(CLIPS[name], sampling, ask=ask)

    found = pool.decode_video(CLIPS[name], sampling, ask=ask)

    assert np.array_equal(expected.pixels(), found.pixels())
    facts = [field.name for field in fields(Frames) if field.name != "images"]
    assert [getattr(expected, fact) for fact in facts] == [getattr(found, fact) for fact in facts]


@pytest.mark.parametrize("name", CLIPS)
def test_clip_is_measured_in_a_process_as_in_a_thread(pool: DecoderPool, name: str) -> None:
    times_s = Threads().measure_clip(CLIPS[name])

    assert times_s == pool.measure_clip(CLIPS[name])
    assert times_s == decode_video(CLIPS[name], FrameSampling(num_frames=None)).times_s


def test_long_clip_of_many_frames_fits_into_what_one_may_have(pool: DecoderPool) -> None:
    """The index of all packets, a codec, and the frames that are kept: no more grows with them."""
    still = [np.full((720, 1280, 3), 99, np.uint8)] * 60
    encoded = repeat(clip(still, fps=10, options={"g": "15"}), 300, Fraction(6))

    frames = pool.decode_video(encoded, FrameSampling(num_frames=32))

    assert (32, 18_000) == (frames.num_frames, frames.source_num_frames)


def test_longest_clip_is_measured_to_its_last_frame(pool: DecoderPool) -> None:
    """An hour at 60 a second: its times are more than one message may hold."""
    encoded = repeat(clip(shades(40) * 6, fps=60), 900, Fraction(4))

    times_s = pool.measure_clip(encoded)

    assert (216_000, 0.0) == (len(times_s), times_s[0])
    assert 3600 - 1 / 60 == pytest.approx(times_s[-1])
    assert times_s == Threads().measure_clip(encoded)


def test_bad_clips_are_refused_in_the_same_words(pool: DecoderPool) -> None:
    pids = pool.pids
    for encoded in (
        b"",
        b"no clip",
        CLIPS["MP4"][:-200],
        CLIPS["GIF"][:30],
        encode(picture(), "JPEG"),
    ):
        with pytest.raises(MediaError) as in_thread:
            decode_video(encoded)
        with pytest.raises(MediaError) as in_process:
            pool.decode_video(encoded)
        assert type(in_thread.value) is type(in_process.value)
        assert str(in_thread.value) == str(in_process.value)
        with pytest.raises(type(in_thread.value)) as measured:
            pool.measure_clip(encoded)
        assert str(in_thread.value) == str(measured.value)
    assert pids == pool.pids


def test_clip_whose_header_says_no_size_costs_no_process(pool: DecoderPool) -> None:
    pids = pool.pids
    sequence_header, unknown = b"\0\0\1\x42\1", b"\0\0\1\x7e\1"

    with pytest.raises(VideoUnreadableError):
        pool.decode_video(CLIPS["HEVC"].replace(sequence_header, unknown))

    assert pids == pool.pids


def test_what_is_asked_of_a_clip_knows_its_frames_and_their_times(pool: DecoderPool) -> None:
    asked: list[Header] = []

    def note(header: Header) -> None:
        asked.append(header)

    frames = pool.decode_video(CLIPS["GIF"], ask=note)

    assert [Header(8, 6, 0, 3, frames.times_s, frames.frame_s, frames.duration_s)] == asked
