"""
A long clip costs what its sample costs: how much is decoded and read, counted and not timed.

`python -m bench.video` takes the times, of an hour.
"""

from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import pytest

pytest.importorskip("av", reason="the extra `video` is not installed")

from av.packet import Packet

from bench.video import repeat
from media import video
from media.decoded import Frames
from media.frames import FrameSampling
from media.video import decode_video
from tests.media.clips import clip, numbered, read_number

NUM_FRAMES, FPS, GROUP, TIMES = 300, 10, 50, 40
DELAY = 8  # packets that a decoder wants to see before it shows a frame
MINUTES = clip(
    numbered(NUM_FRAMES), fps=FPS, options={"g": str(GROUP), "bf": "2", "sc_threshold": "0"}
)


class Work:
    """Counts the packets that decoders are given, and the frames that they make of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.num_packets = self.num_frames = self.num_scans = 0
        decode_run, scan = video._decode_run, video._Scanner.__call__

        def counted(stream: Any, packets: "Iterator[Packet[Any]]") -> Iterator[Any]:
            for frame in decode_run(stream, self._count(packets)):
                self.num_frames += 1
                yield frame

        def counted_scan(scanner: Any, start: Any) -> Any:
            self.num_scans += 1
            return scan(scanner, start)

        monkeypatch.setattr(video, "_decode_run", counted)
        monkeypatch.setattr(video._Scanner, "__call__", counted_scan)

    def _count(self, packets: "Iterator[Packet[Any]]") -> "Iterator[Packet[Any]]":
        for packet in packets:
            self.num_packets += 1
            yield packet


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Work:
    return Work(monkeypatch)


@pytest.fixture(scope="module", params=["mp4", "matroska", "mpegts"])
def long_clip(request: pytest.FixtureRequest) -> bytes:
    return repeat(MINUTES, TIMES, Fraction(NUM_FRAMES, FPS), request.param)


def assert_numbers(frames: Frames) -> None:
    assert frames.indices is not None
    assert frames.times_s is not None
    assert frames.source_num_frames == NUM_FRAMES * TIMES
    for image, index, time_s in zip(frames.images, frames.indices, frames.times_s, strict=True):
        assert index % NUM_FRAMES == read_number(image.pixels())
        assert abs(time_s - index / FPS) <= 1 / (2 * FPS)


def test_no_more_is_decoded_than_leads_from_a_key_frame_to_each_frame(
    long_clip: bytes, work: Work
) -> None:
    frames = decode_video(long_clip, FrameSampling(num_frames=16))

    assert_numbers(frames)
    assert frames.indices is not None
    least = sum(index % GROUP + 1 for index in frames.indices)
    assert least <= work.num_packets <= least + DELAY * 16
    assert work.num_frames < 0.7 * work.num_packets  # those to which no other refers are left out
    assert 0 == work.num_scans


def test_of_key_frames_each_is_decoded_alone(long_clip: bytes, work: Work) -> None:
    frames = decode_video(long_clip, FrameSampling(num_frames=16, keyframes=True))

    assert_numbers(frames)
    assert (16, 16, 0) == (work.num_packets, work.num_frames, work.num_scans)


def test_seconds_of_a_long_clip_cost_what_they_would_by_themselves(
    long_clip: bytes, work: Work
) -> None:
    sampling = FrameSampling(num_frames=None, start_s=907.0, end_s=909.9)

    frames = decode_video(long_clip, sampling)

    assert_numbers(frames)
    assert tuple(range(9070, 9100)) == frames.indices
    assert work.num_packets <= 2 * GROUP + DELAY


def test_clip_without_times_costs_little_where_each_frame_stands_alone(work: Work) -> None:
    encoded = clip(numbered(NUM_FRAMES), "avi", "mjpeg", fps=FPS, pixel_format="yuvj420p")

    frames = decode_video(encoded, FrameSampling(num_frames=7))

    assert frames.indices is not None
    assert list(frames.indices) == [read_number(image.pixels()) for image in frames.images]
    assert (7, 7) == (work.num_packets, work.num_frames)


def test_clip_that_cannot_be_sought_in_is_read_from_its_start(
    monkeypatch: pytest.MonkeyPatch, work: Work, long_clip: bytes
) -> None:
    sought = decode_video(long_clip, FrameSampling(num_frames=5))

    def lose(*_: object) -> None:
        raise video._SeekLostError

    monkeypatch.setattr(video._Seeker, "__call__", lose)
    scanned = decode_video(long_clip, FrameSampling(num_frames=5))

    assert_numbers(scanned)
    assert (sought.times_s, 5) == (scanned.times_s, work.num_scans)
