"""Clips: the frames that were asked for, at their times, and what is no clip at all."""

import gc
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image

pytest.importorskip("av", reason="the extra `video` is not installed")

from media.decoded import Frames
from media.errors import (
    MediaError,
    VideoFormatNotSupportedError,
    VideoHasNoFramesError,
    VideoTooLargeError,
    VideoTruncatedError,
    VideoUnreadableError,
)
from media.frames import FrameSampling
from media.limits import VideoLimits
from media.video import decode_video, plan_frames
from tests.media.clips import clip, jpeg_clip, shade, shades, sound, turned
from tests.media.files import Pixels, assert_fit_for_clients, catch, encode
from tests.waiting import wait_until

ALL = FrameSampling(num_frames=None)


def greys(frames: Frames) -> list[int]:
    return [int(image.pixels()[24, 32, 1]) for image in frames.images]


def assert_shades(frames: Frames) -> None:
    """Fail unless each picture is the one that its index names."""
    assert frames.indices is not None
    expected = [shade(index) for index in frames.indices]
    assert np.abs(np.subtract(greys(frames), expected)).max() <= 3


ENCODINGS = {
    "mp4 h264": ("mp4", "libx264", "yuv420p"),
    "mov mpeg4": ("mov", "mpeg4", "yuv420p"),
    "matroska h264": ("matroska", "libx264", "yuv420p"),
    "webm vp8": ("webm", "libvpx", "yuv420p"),
    "webm vp9": ("webm", "libvpx-vp9", "yuv420p"),
    "avi mpeg4": ("avi", "mpeg4", "yuv420p"),
    "avi h264, which stores no times": ("avi", "libx264", "yuv420p"),
    "avi mjpeg": ("avi", "mjpeg", "yuvj420p"),
    "mpegts h264": ("mpegts", "libx264", "yuv420p"),
    "10-bit h264": ("mp4", "libx264", "yuv420p10le"),
}


@pytest.mark.parametrize("name", ENCODINGS)
def test_frames_come_with_their_exact_times(name: str) -> None:
    container, codec, pixel_format = ENCODINGS[name]
    encoded = clip(shades(40), container, codec, pixel_format=pixel_format, options={"g": "7"})

    frames = decode_video(encoded, FrameSampling(num_frames=5))

    assert (0, 9, 19, 29, 39) == frames.indices
    assert (0.0, 0.9, 1.9, 2.9, 3.9) == frames.times_s
    assert (40, 10.0) == (frames.source_num_frames, frames.fps)
    assert (64, 48) == (frames.width_px, frames.height_px)
    assert_shades(frames)


def test_default_is_32_frames_with_both_ends() -> None:
    frames = decode_video(clip(shades(40)))

    assert frames.indices is not None
    assert (32, 0, 39) == (frames.num_frames, frames.indices[0], frames.indices[-1])


def test_window_and_rate_choose_by_time() -> None:
    frames = decode_video(clip(shades(40)), FrameSampling(fps=2, start_s=1, end_s=2.9))

    assert (10, 16, 22, 29) == frames.indices
    assert (1.0, 1.6, 2.2, 2.9) == frames.times_s
    assert_shades(frames)


def test_times_of_a_variable_rate_are_kept() -> None:
    times_ms = [0, 40, 1000, 1010, 5000]

    frames = decode_video(clip(shades(5), "matroska", times_ms=times_ms), ALL)

    assert (0.0, 0.04, 1.0, 1.01, 5.0) == frames.times_s
    assert_shades(frames)


def test_times_count_from_the_first_frame() -> None:
    jpegs = [encode(Image.fromarray(picture), "JPEG") for picture in shades(2)]

    frames = decode_video(jpeg_clip(jpegs, [7000, 7500]), ALL)

    assert (0.0, 0.5) == frames.times_s


def test_one_frame_is_a_clip() -> None:
    frames = decode_video(clip(shades(1)))

    assert (1, (0.0,), (0,), None) == (
        frames.num_frames,
        frames.times_s,
        frames.indices,
        frames.fps,
    )


GROUPED = {
    "closed": clip(shades(40), options={"g": "6", "bf": "2"}),
    "open": clip(shades(40), options={"x264-params": "open-gop=1:keyint=6:min-keyint=6:bframes=3"}),
}
EVERY_FRAME = {name: decode_video(encoded, ALL) for name, encoded in GROUPED.items()}


@settings(max_examples=30)
@given(st.sampled_from(list(GROUPED)), st.integers(1, 40), st.floats(0, 3.9))
def test_leaving_out_stretches_changes_no_pixel(name: str, num_frames: int, start_s: float) -> None:
    every = EVERY_FRAME[name]

    some = decode_video(GROUPED[name], FrameSampling(num_frames, start_s=start_s))

    assert some.indices is not None
    assert every.indices == tuple(range(40))
    for index, image in zip(some.indices, some.images, strict=True):
        assert np.array_equal(every.images[index].pixels(), image.pixels())


@pytest.mark.parametrize("name", ENCODINGS)
def test_key_frames_alone_are_decoded_from_themselves(name: str) -> None:
    container, codec, pixel_format = ENCODINGS[name]
    options = {"g": "8", "sc_threshold": "0", "bf": "0"}
    encoded = clip(shades(40), container, codec, pixel_format=pixel_format, options=options)

    frames = decode_video(encoded, FrameSampling(num_frames=40, keyframes=True))

    assert find_key_frames(encoded) == frames.indices
    assert_shades(frames)
    assert 40 == frames.source_num_frames


def find_key_frames(encoded: bytes) -> tuple[int, ...]:
    """Their places in a clip whose packets come in the order of showing."""
    import av

    with av.open(BytesIO(encoded), "r") as source:
        packets = [packet for packet in source.demux(video=0) if packet.size]
    return tuple(place for place, packet in enumerate(packets) if packet.is_keyframe)


def test_key_frames_are_those_that_decoding_everything_gives() -> None:
    for name, encoded in GROUPED.items():
        keys = decode_video(encoded, FrameSampling(keyframes=True))

        assert keys.indices is not None
        assert 6 <= len(keys.indices) <= 8
        for index, image in zip(keys.indices, keys.images, strict=True):
            assert np.array_equal(EVERY_FRAME[name].images[index].pixels(), image.pixels())


def test_plan_is_what_is_decoded() -> None:
    samplings = [ALL, FrameSampling(5), FrameSampling(fps=2), FrameSampling(keyframes=True)]
    gif = encode(Image.new("RGB", (8, 8)), "GIF")
    for encoded in (*GROUPED.values(), clip(shades(20), "avi", "mpeg4"), gif):
        for sampling in samplings:
            assert plan_frames(encoded, sampling) == decode_video(encoded, sampling).indices


def test_frames_that_look_alike_are_left_out_where_that_is_asked_for() -> None:
    still_then_moving = [shades(12)[max(place - 8, 0)] for place in range(20)]

    frames = decode_video(clip(still_then_moving), FrameSampling(20, dedupe_frames=True))

    assert (0, *range(9, 20)) == frames.indices
    assert (0.0, *(place / 10 for place in range(9, 20))) == frames.times_s
    assert 8 == frames.num_dropped
    assert decode_video(clip(still_then_moving)).num_dropped is None


TURNS: dict[str, tuple[tuple[int, int, int, int], Callable[[Pixels], Pixels]]] = {
    "upright": ((1, 0, 0, 1), lambda rows: rows),
    "quarter clockwise": ((0, 1, -1, 0), lambda rows: np.rot90(rows, -1)),
    "half": ((-1, 0, 0, -1), lambda rows: np.rot90(rows, 2)),
    "quarter back": ((0, -1, 1, 0), lambda rows: np.rot90(rows, 1)),
    "mirrored": ((-1, 0, 0, 1), lambda rows: rows[:, ::-1]),
    "upside down": ((1, 0, 0, -1), lambda rows: rows[::-1]),
    "transposed": ((0, 1, 1, 0), lambda rows: rows.transpose(1, 0, 2)),
    "transverse": ((0, -1, -1, 0), lambda rows: rows.transpose(1, 0, 2)[::-1, ::-1]),
}


@pytest.mark.parametrize("name", TURNS)
def test_rotation_is_applied(name: str) -> None:
    matrix, turn = TURNS[name]
    stored = np.zeros((48, 64, 3), np.uint8)
    stored[:24, :32] = (200, 40, 40)
    encoded = clip([stored])

    frames = decode_video(turned(encoded, *matrix))

    upright = decode_video(encoded).images[0].pixels()
    assert np.array_equal(turn(upright), frames.images[0].pixels())


def test_rotation_of_a_camera_that_writes_jpeg_files_is_applied() -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # a quarter clockwise
    picture = Image.new("RGB", (64, 48), (40, 40, 200))
    picture.paste((200, 40, 40), (0, 0, 32, 24))
    jpegs = [encode(picture, "JPEG", exif=exif)] * 2

    frames = decode_video(jpeg_clip(jpegs, [0, 100]), ALL)

    assert (48, 64) == (frames.width_px, frames.height_px)
    upright = np.rot90(np.asarray(picture), -1).astype(np.int16)
    assert np.abs(upright - frames.images[1].pixels()).mean() < 6


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted in /proc")
def test_decoded_frames_are_let_go_at_once_and_no_thread_stays() -> None:
    """Each had a thread for each core and its pixels, until Python happened to look for circles."""
    import av

    encoded = clip(shades(40))
    gc.collect()
    num_frames = sum(type(found) is av.VideoFrame for found in gc.get_objects())
    threads = list_threads()
    gc.disable()
    try:
        decode_video(encoded, ALL)

        left = sum(type(found) is av.VideoFrame for found in gc.get_objects())
        assert num_frames == left
        wait_until(lambda: list_threads() <= threads)  # the system forgets them a moment later
    finally:
        gc.enable()


def list_threads() -> set[str]:
    return {place.name for place in Path("/proc/self/task").iterdir()}


def test_frames_of_another_size_are_resampled_to_the_first() -> None:
    sizes = [(64, 48), (32, 24), (128, 96)]
    jpegs = [encode(Image.new("RGB", size, (99, 99, 99)), "JPEG") for size in sizes]

    frames = decode_video(jpeg_clip(jpegs, [0, 100, 200]), ALL)

    assert (3, 48, 64, 3) == frames.pixels().shape
    assert_greys_are(frames, 99)


def assert_greys_are(frames: Frames, grey: int) -> None:
    assert np.abs(np.subtract(greys(frames), grey)).max() <= 3


def test_damaged_frame_is_passed_over_and_the_next_one_stands_in() -> None:
    jpegs = [encode(Image.fromarray(picture), "JPEG") for picture in shades(4)]
    jpegs[1] = b"\xff\xd8" + bytes(50)

    frames = decode_video(jpeg_clip(jpegs, [0, 100, 200, 300]), ALL)

    assert (0, 2, 3) == frames.indices
    assert_shades(frames)


def test_clip_of_damaged_frames_is_unreadable() -> None:
    jpegs = [b"\xff\xd8" + bytes(50)] * 3

    catch(VideoUnreadableError, decode_video, jpeg_clip(jpegs, [0, 100, 200]))


@pytest.mark.parametrize(
    "encoded",
    [
        b"ffconcat version 1.0\nfile 'clip.mp4'\n",
        b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\nhttp://127.0.0.1/a.ts\n",
        b'<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011"></MPD>',
        b"v=0\no=- 0 0 IN IP4 127.0.0.1\nm=video 5004 RTP/AVP 96\n",
        b"concat:a.mp4|b.mp4",
        b"subfile,,start,0,end,9,,:/etc/passwd",
        b"\0\0\0\x18ftypheic\0\0\0\0mif1heic",
        b"<html></html>",
        b"OggS\0\x02",
        bytes(1000),
    ],
    ids=["ffconcat", "m3u8", "mpd", "sdp", "concat", "subfile", "heic", "html", "ogg", "zeros"],
)
def test_playlists_and_other_formats_are_refused(encoded: bytes) -> None:
    catch(VideoFormatNotSupportedError, decode_video, encoded)


def test_script_behind_the_first_bytes_of_a_container_opens_nothing() -> None:
    script = b"ffconcat version 1.0\nfile 'clip.mp4'\n"

    for head in (b"\x1a\x45\xdf\xa3", b"RIFF\xff\0\0\0AVI ", (b"G" + bytes(187)) * 3):
        catch(MediaError, decode_video, head + script)


def test_ffmpeg_may_open_nothing_and_guess_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Defence in depth: no clip is known that gets as far as needing it."""
    import av

    opened: list[dict[str, Any]] = []
    av_open: Callable[..., Any] = av.open
    encoded = clip(shades(4), "mp4", "libx264", pixel_format="yuv420p")

    def spy(file: BytesIO, **words: Any) -> Any:
        opened.append(words)
        return av_open(file, **words)

    monkeypatch.setattr("av.open", spy)
    decode_video(encoded, ALL)

    (words,) = opened
    assert words["format"] == words["options"]["format_whitelist"]
    assert "none" == words["options"]["protocol_whitelist"]


def test_no_bytes_are_no_video() -> None:
    catch(VideoUnreadableError, decode_video, b"")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_cut_mp4_is_truncated(share: float) -> None:
    encoded = clip(shades(40))

    catch(VideoTruncatedError, decode_video, encoded[: int(len(encoded) * share)])


def test_cut_mp4_with_its_index_first_is_truncated() -> None:
    encoded = clip(shades(40))
    index = encoded.index(b"moov") - 4
    media = encoded.index(b"mdat") - 4

    cut = encoded[:media] + encoded[index:] + encoded[media : index - 10]

    catch(VideoTruncatedError, decode_video, cut)


def test_sound_has_no_frames() -> None:
    error = catch(VideoHasNoFramesError, decode_video, sound())

    assert "video_has_no_frames" == error.code


def test_window_behind_the_clip_has_no_frames() -> None:
    catch(VideoHasNoFramesError, decode_video, clip(shades(5)), FrameSampling(start_s=60))


def test_codec_outside_the_list_is_refused() -> None:
    for name in (b"M8RG", b"xxxx"):
        encoded = clip(shades(2)).replace(b"avc1", name)

        catch(VideoFormatNotSupportedError, decode_video, encoded)


def test_claimed_hours_are_refused() -> None:
    jpegs = [encode(Image.fromarray(picture), "JPEG") for picture in shades(2)]

    error = catch(VideoTooLargeError, decode_video, jpeg_clip(jpegs, [0, 36_000_000]))

    assert "longer than 3600 seconds" in str(error)


def test_flood_of_frames_is_refused_and_240_a_second_are_not() -> None:
    still = shades(1, 16, 16) * 500
    good, bad = (clip(still, "matroska", "mpeg4", fps=fps) for fps in (240, 330))

    frames = decode_video(good, FrameSampling(3))
    error = catch(VideoTooLargeError, decode_video, bad)

    assert (0.0, 1.038, 2.079) == pytest.approx(frames.times_s, abs=1 / 480)
    assert "more than 240 frames a second" in str(error)


SMALL: dict[str, tuple[dict[str, Any], FrameSampling]] = {
    "bytes": ({"max_bytes": 100}, ALL),
    "source frames": ({"max_source_frames": 39}, ALL),
    "pixels of a frame": ({"max_pixels": 64 * 48 - 1}, ALL),
    "frames kept": ({"max_frames": 5}, FrameSampling(num_frames=6)),
    "pixels kept": ({"max_kept_pixels": 64 * 48 * 4}, FrameSampling(num_frames=5)),
    "seconds": ({"max_duration_s": 3.8}, ALL),
}


@pytest.mark.parametrize("name", SMALL)
def test_clip_over_a_limit_is_refused(name: str) -> None:
    limits, sampling = SMALL[name]

    error = catch(
        VideoTooLargeError, decode_video, clip(shades(40)), sampling, VideoLimits(**limits)
    )

    assert "video_too_large" == error.code


def test_frame_that_grows_past_the_limit_is_refused() -> None:
    sizes = [(64, 48), (640, 480)]
    jpegs = [encode(Image.new("RGB", size), "JPEG") for size in sizes]

    limits = VideoLimits(max_pixels=200 * 1000)
    catch(VideoTooLargeError, decode_video, jpeg_clip(jpegs, [0, 100]), ALL, limits)


SEEDS = [
    clip(shades(6), container, codec, options={"g": "3"})
    for container, codec in (
        ("mp4", "libx264"),
        ("webm", "libvpx"),
        ("avi", "mpeg4"),
        ("mpegts", "libx264"),
    )
]


@given(
    st.sampled_from(SEEDS),
    st.sampled_from([FrameSampling(3), FrameSampling(keyframes=True), FrameSampling(fps=5)]),
    st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=8),
)
def test_any_damage_gives_frames_or_an_error_of_ours(
    seed: bytes, sampling: FrameSampling, changes: list[tuple[int, int]]
) -> None:
    encoded = bytearray(seed)
    for at, value in changes:
        encoded[at % len(encoded)] = value

    try:
        frames = decode_video(bytes(encoded), sampling)
    except MediaError as error:
        assert_fit_for_clients(error)
        return

    assert frames.times_s is not None
    assert frames.indices is not None
    assert frames.source_num_frames is not None
    assert frames.indices[-1] < frames.source_num_frames
    assert sorted(frames.times_s) == list(frames.times_s)
