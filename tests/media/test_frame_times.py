"""
The times of frames, read from the pixels: each frame says its own number in blocks of black and white.

Twelve clips, each of another kind, sampled in several ways. What was really kept is compared with the
time that is reported for it; `pytest -s` prints by how much they differ.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from io import BytesIO
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

pytest.importorskip("av", reason="the extra `video` is not installed")

import av
from av.audio.stream import AudioStream
from av.video.stream import VideoStream

from media.decoded import Frames
from media.frames import FrameSampling, choose_indices
from media.video import decode_video
from tests.media.clips import clip, numbered, read_number, turned
from tests.media.files import Pixels

NUM_FRAMES = 90
TICK = Fraction(1, 90_000)  # of a transport stream
B_FRAMES = {"g": "24", "bf": "3", "x264-params": "b-pyramid=normal:b-adapt=0:scenecut=0"}
VARIABLE_MS = [40 * place + 15 * (place % 3) + 500 * (place // 20) for place in range(NUM_FRAMES)]


@dataclass(frozen=True, slots=True)
class Truth:
    """
    A clip and when its frames are shown.

    Attributes:
        times_s: for each number that a frame may say, from the first frame that is shown.
        turn: how the pixels must be turned back to be read.
    """

    encoded: bytes
    times_s: Sequence[float]
    turn: Callable[[Pixels], Pixels] = lambda pixels: pixels


def at_rate(container: str, codec: str, fps: int, **options: Any) -> Truth:
    pictures = numbered(NUM_FRAMES)
    encoded = clip(pictures, container, codec, fps=fps, **options)
    return Truth(encoded, [place / fps for place in range(NUM_FRAMES)])


def variable() -> Truth:
    encoded = clip(numbered(NUM_FRAMES), "mp4", times_ms=VARIABLE_MS, options=B_FRAMES)
    return Truth(encoded, [time_ms / 1000 for time_ms in VARIABLE_MS])


def rotated() -> Truth:
    truth = at_rate("mp4", "libx264", 25, options={"g": "12"})
    return Truth(turned(truth.encoded, 0, 1, -1, 0), truth.times_s, lambda pixels: np.rot90(pixels))


FRAGMENTED = {"movflags": "frag_keyframe+empty_moov+default_base_moof"}
FAST_AV1 = {"preset": "12", "g": "30", "svtav1-params": "scd=0"}
KINDS: dict[str, Callable[[], Truth]] = {
    "constant rate": lambda: at_rate("mp4", "libx264", 30, options={"g": "15", "bf": "0"}),
    "variable rate": variable,
    "rotated": rotated,
    "B-frames": lambda: at_rate("mp4", "libx264", 24, options=B_FRAMES),
    "one long group": lambda: at_rate("mp4", "libx264", 30, options={"g": "999", "bf": "2"}),
    "AV1": lambda: at_rate("mp4", "libsvtav1", 30, options=FAST_AV1),
    "VP9": lambda: at_rate("matroska", "libvpx-vp9", 30, options={"g": "20", "cpu-used": "8"}),
    "MPEG-4": lambda: at_rate("mp4", "mpeg4", 25, options={"g": "12", "bf": "2"}),
    "WebM": lambda: at_rate("webm", "libvpx", 30, options={"g": "20", "cpu-used": "8"}),
    "MOV": lambda: at_rate("mov", "libx264", 60, options=B_FRAMES),
    "TS": lambda: at_rate("mpegts", "libx264", 25, options=B_FRAMES),
    "fragmented MP4": lambda: at_rate(
        "mp4", "libx264", 30, options=B_FRAMES, container_options=FRAGMENTED
    ),
}
SAMPLINGS = {
    "every": FrameSampling(num_frames=None),
    "11": FrameSampling(num_frames=11),
    "4 a second": FrameSampling(num_frames=None, fps=4),
    "window": FrameSampling(num_frames=7, start_s=0.71, end_s=2.2),
    "key frames": FrameSampling(keyframes=True),
}
FOUND: dict[str, list[str]] = {}


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> tuple[str, Truth]:
    return request.param, KINDS[request.param]()


@pytest.fixture(scope="module", autouse=True)
def table() -> Any:
    yield
    names = "".join(f"{name:>22}" for name in SAMPLINGS)
    print(f"\n{'':16}{names}   frames kept, largest error in ms of what is allowed")  # noqa: T201
    for name, cells in FOUND.items():
        print(f"{name:16}" + "".join(f"{cell:>22}" for cell in cells))  # noqa: T201


def read_numbers(frames: Frames, truth: Truth) -> list[int]:
    return [read_number(truth.turn(image.pixels())) for image in frames.images]


def test_each_frame_is_the_one_that_is_shown_at_its_time(kind: tuple[str, Truth]) -> None:
    name, truth = kind
    half_s = min(after - before for before, after in pairwise(truth.times_s)) / 2
    for sampling in SAMPLINGS.values():
        frames = decode_video(truth.encoded, sampling)

        numbers = read_numbers(frames, truth)
        assert frames.times_s is not None
        errors_s = [
            abs(time_s - truth.times_s[number])
            for time_s, number in zip(frames.times_s, numbers, strict=True)
        ]
        assert max(errors_s) <= half_s
        assert frames.indices == tuple(numbers)
        if not sampling.keyframes:
            assert frames.indices == choose_indices(truth.times_s, sampling)
        cell = f"{len(numbers)}: {1000 * max(errors_s):.2f} of {1000 * half_s:.1f}"
        FOUND.setdefault(name, []).append(cell)


# Odd clips


def remux(encoded: bytes, container: str, change: Callable[[Any], None], **options: Any) -> bytes:
    """The same packets in a container, each changed on the way."""
    file = BytesIO()
    with (
        av.open(BytesIO(encoded), "r") as source,
        av.open(file, "w", format=container, **options) as target,
    ):
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                change(packet)
                packet.stream = stream
                target.mux(packet)
    return file.getvalue()


def test_clip_without_a_duration_has_its_times() -> None:
    encoded = clip(numbered(30), "mp4", fps=10)
    # Without a way back to the header, as in a live recording, no duration is written there.
    live = remux(encoded, "matroska", lambda packet: None, container_options={"live": "1"})
    with av.open(BytesIO(live), "r") as source:
        assert source.duration is None
        assert source.streams.video[0].duration is None

    frames = decode_video(live, FrameSampling(4))

    assert (0.0, 0.9, 1.9, 2.9) == frames.times_s
    assert [0, 9, 19, 29] == [read_number(image.pixels()) for image in frames.images]


def test_one_frame_is_found_in_every_container() -> None:
    for container, codec in (("mp4", "libx264"), ("webm", "libvpx"), ("mpegts", "libx264")):
        frames = decode_video(clip(numbered(6)[5:], container, codec), FrameSampling(4, fps=2))

        assert (0.0,) == frames.times_s
        assert 5 == read_number(frames.images[0].pixels())


@pytest.mark.parametrize("container", ["matroska", "mp4", "mov"])
def test_times_below_zero_count_from_the_first_frame_that_is_shown(container: str) -> None:
    def earlier(packet: Any) -> None:
        packet.pts -= round(Fraction(1, 2) / packet.time_base)
        packet.dts -= round(Fraction(1, 2) / packet.time_base)

    encoded = clip(numbered(30), "mp4", fps=10, options=B_FRAMES)
    moved = remux(encoded, container, earlier, container_options={"avoid_negative_ts": "disabled"})

    frames = decode_video(moved, FrameSampling(num_frames=None))

    numbers = [read_number(image.pixels()) for image in frames.images]
    first = numbers[0]
    assert numbers == list(range(first, 30))
    assert frames.times_s == pytest.approx([(number - first) / 10 for number in numbers], abs=0.001)


def test_resolution_that_changes_on_the_way_changes_no_time() -> None:
    small = numbered(20)
    large = [picture.repeat(2, axis=0).repeat(2, axis=1) for picture in numbered(40)[20:]]
    early = clip(small, "mpegts", fps=10, options=B_FRAMES)
    late = remux(
        clip(large, "mpegts", fps=10, options=B_FRAMES),
        "mpegts",
        lambda packet: _shift(packet, 2),
        container_options={"mpegts_copyts": "1"},
    )

    frames = decode_video(early + late, FrameSampling(8))

    numbers = [read_number(image.pixels()) for image in frames.images]
    assert {(192, 64)} == {(image.width_px, image.height_px) for image in frames.images}
    assert [0, 5, 11, 16, 22, 27, 33, 39] == numbers
    assert frames.times_s == pytest.approx([number / 10 for number in numbers], abs=0.05)


def _shift(packet: Any, by_s: int) -> None:
    packet.pts += round(by_s / packet.time_base)
    packet.dts += round(by_s / packet.time_base)


def test_stream_whose_sound_begins_on_the_way_is_read_to_its_end() -> None:
    silent = clip(numbered(120), "mpegts", fps=10)  # longer than is looked at to find streams
    nothing = (b"G\x1f\xff\x10" + b"\xff" * 184) * 8_000
    end = remux(  # which is looked at as well
        clip(numbered(180)[160:], "mpegts", fps=10),
        "mpegts",
        lambda packet: _shift(packet, 16),
        container_options={"mpegts_copyts": "1"},
    )
    with av.open(BytesIO(silent), "r") as source:
        stream = source.streams.video[0]
        assert stream.start_time is not None
        assert stream.time_base is not None
        start_s = stream.start_time * stream.time_base
    middle = sounding(numbered(160)[120:], start_s + 12)
    encoded = silent + 4 * nothing + middle + nothing + end
    with av.open(BytesIO(encoded), "r") as source:
        assert 1 == len(source.streams)

    frames = decode_video(encoded, FrameSampling(4))

    assert [0, 59, 119, 179] == [read_number(image.pixels()) for image in frames.images]
    assert frames.times_s == pytest.approx((0.0, 5.9, 11.9, 17.9), abs=0.05)


def sounding(pictures: list[Pixels], start_s: Fraction) -> bytes:
    """Ten frames a second, with a moment of silence that is sound."""
    file = BytesIO()
    with av.open(file, "w", format="mpegts", container_options={"mpegts_copyts": "1"}) as target:
        picture_stream = target.add_stream("libx264", rate=10)
        assert isinstance(picture_stream, VideoStream)
        picture_stream.width, picture_stream.height, picture_stream.pix_fmt = 192, 64, "yuv420p"
        picture_stream.codec_context.time_base = TICK
        sound_stream = target.add_stream("aac", rate=8000)
        assert isinstance(sound_stream, AudioStream)
        for place, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = round((start_s + Fraction(place, 10)) / TICK), TICK
            target.mux(picture_stream.encode(frame))
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        silence.sample_rate, silence.pts = 8000, round(start_s * 8000)
        silence.time_base = Fraction(1, 8000)
        target.mux(sound_stream.encode(silence))
        target.mux(sound_stream.encode(None))
        target.mux(picture_stream.encode())
    return file.getvalue()


def test_240_frames_a_second_are_told_apart() -> None:
    truth = at_rate("mp4", "libx264", 240, options=B_FRAMES)

    frames = decode_video(truth.encoded, FrameSampling(9, start_s=0.1))

    numbers = read_numbers(frames, truth)
    assert frames.times_s is not None
    for time_s, number in zip(frames.times_s, numbers, strict=True):
        assert abs(time_s - truth.times_s[number]) <= 1 / 480


def test_times_in_another_unit_are_the_same() -> None:
    truth = variable()
    moved = remux(truth.encoded, "matroska", lambda packet: None)

    both = [decode_video(encoded, FrameSampling(12)) for encoded in (truth.encoded, moved)]

    assert both[0].times_s == pytest.approx(both[1].times_s, abs=0.001)
