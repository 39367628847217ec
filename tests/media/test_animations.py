"""Clips that need no PyAV: animated GIF, WebP and PNG, and lists of JPEG frames."""

import sys

import numpy as np
import pytest
from PIL import Image

from media.errors import (
    BadFrameSamplingError,
    Fault,
    ImageFormatNotSupportedError,
    ImageTruncatedError,
    VideoFormatNotSupportedError,
    VideoHasNoFramesError,
    VideoSupportMissingError,
    VideoTooLargeError,
    VideoTruncatedError,
    VideoUnreadableError,
)
from media.frames import FrameSampling
from media.limits import VideoLimits
from media.video import decode_jpeg_frames, decode_video
from tests.media.files import animation, catch, encode, gif, picture

COLOURS = [(20 * place, 255 - 20 * place, 7) for place in range(10)]
ALL = FrameSampling(num_frames=None)


def animated(name: str, duration: int | list[int] = 100) -> bytes:
    options = {"lossless": True} if name == "WEBP" else {}
    return animation(name, COLOURS, duration=duration, **options)


@pytest.mark.parametrize("name", ["GIF", "WEBP", "PNG"])
def test_animation_is_a_clip_with_times(name: str) -> None:
    durations = [100, 200, 50, 100, 100, 100, 100, 100, 100, 100]

    frames = decode_video(animated(name, durations), FrameSampling(num_frames=4))

    assert (0, 3, 6, 9) == frames.indices
    assert (0.0, 0.35, 0.65, 0.95) == frames.times_s
    assert 10 == frames.source_num_frames
    expected = [COLOURS[index] for index in frames.indices]
    assert expected == [tuple(image.pixels()[3, 4].tolist()) for image in frames.images]


@pytest.mark.parametrize("name", ["GIF", "WEBP", "PNG"])
def test_window_and_rate_choose_by_time_in_an_animation(name: str) -> None:
    frames = decode_video(animated(name), FrameSampling(fps=5, start_s=0.2, end_s=0.7))

    assert (2, 4, 7) == frames.indices
    assert (0.2, 0.4, 0.7) == frames.times_s
    assert 10.0 == frames.fps


def test_frame_without_a_duration_lasts_as_in_a_browser() -> None:
    frames = decode_video(
        gif(1, 1, [(0, 0, 1, 1)] * 3).replace(b"\x00\x0a\0\0\0\x2c", b"\0\0\0\0\0\x2c")
    )

    assert (0.0, 0.1, 0.2) == frames.times_s


def test_still_picture_is_a_clip_of_one_frame() -> None:
    frames = decode_video(encode(picture(), "PNG"))

    assert (1, (0.0,), (0,)) == (frames.num_frames, frames.times_s, frames.indices)
    assert np.array_equal(np.asarray(picture()), frames.images[0].pixels())


def test_transparent_animation_is_laid_on_white() -> None:
    clear = Image.new("RGBA", (8, 6), (0, 0, 0, 0))
    red = Image.new("RGBA", (8, 6), (255, 0, 0, 255))
    encoded = encode(red, "WEBP", save_all=True, append_images=[clear], lossless=True)

    frames = decode_video(encoded, ALL)

    assert [255, 0, 0] == frames.images[0].pixels()[3, 4].tolist()
    assert [255, 255, 255] == frames.images[1].pixels()[3, 4].tolist()


def test_frame_that_overflows_the_canvas_is_cut_to_it() -> None:
    frames = decode_video(gif(4, 4, [(0, 0, 1, 1), (6, 6, 1, 1)]), ALL)

    assert (4, 4) == (frames.width_px, frames.height_px)


def test_frame_far_outside_the_canvas_is_refused() -> None:
    encoded = gif(1, 1, [(0, 0, 1, 1), (65_000, 65_000, 1, 1)])

    catch(VideoTooLargeError, decode_video, encoded, ALL)


def test_frames_of_an_animation_are_counted_before_they_are_drawn() -> None:
    encoded = gif(1, 1, [(0, 0, 1, 1)] * 1000)

    few, small = VideoLimits(max_source_frames=999), VideoLimits(max_animation_pixels=999)

    catch(VideoTooLargeError, decode_video, encoded, FrameSampling(), few)
    catch(VideoTooLargeError, decode_video, encoded, FrameSampling(), small)


def test_hundred_thousand_tiny_frames_are_a_clip() -> None:
    encoded = gif(1, 1, [(0, 0, 1, 1)] * 100_000)

    frames = decode_video(encoded, FrameSampling(num_frames=1))

    assert (49_999,) == frames.indices


@pytest.mark.parametrize("name", ["GIF", "WEBP", "PNG"])
def test_cut_animation_is_truncated(name: str) -> None:
    encoded = animated(name)

    catch(VideoTruncatedError, decode_video, encoded[: len(encoded) // 2], ALL)


def test_damaged_animation_is_unreadable() -> None:
    encoded = bytearray(animated("PNG"))
    encoded[encoded.rindex(b"fdAT") + 12] ^= 0xFF

    catch(VideoUnreadableError, decode_video, bytes(encoded), ALL)


def test_window_behind_an_animation_has_no_frames() -> None:
    catch(VideoHasNoFramesError, decode_video, animated("GIF"), FrameSampling(start_s=5))


def test_jpeg_frames_are_a_clip_without_times() -> None:
    jpegs = [encode(picture(seed=seed), "JPEG") for seed in range(5)]

    frames = decode_jpeg_frames(jpegs, FrameSampling(num_frames=3))

    assert (3, (0, 2, 4), 5) == (frames.num_frames, frames.indices, frames.source_num_frames)
    assert (None, None) == (frames.times_s, frames.fps)


def test_jpeg_frames_of_two_sizes_are_refused() -> None:
    jpegs = [encode(picture(60, 40), "JPEG"), encode(picture(40, 60), "JPEG")]

    catch(VideoUnreadableError, decode_jpeg_frames, jpegs)


def test_jpeg_frames_cannot_be_chosen_by_time() -> None:
    jpegs = [encode(picture(), "JPEG")]

    catch(BadFrameSamplingError, decode_jpeg_frames, jpegs, FrameSampling(fps=1))


def test_no_jpeg_frames_are_no_clip() -> None:
    catch(VideoHasNoFramesError, decode_jpeg_frames, [])


def test_too_many_jpeg_frames_are_refused() -> None:
    jpegs = [encode(picture(), "JPEG")] * 10

    catch(VideoTooLargeError, decode_jpeg_frames, jpegs, ALL, VideoLimits(max_frames=9))
    catch(VideoTooLargeError, decode_jpeg_frames, jpegs, ALL, VideoLimits(max_kept_pixels=9 * 2400))


def test_bad_jpeg_frame_is_named_for_what_it_is() -> None:
    good = encode(picture(), "JPEG")

    catch(ImageTruncatedError, decode_jpeg_frames, [good, good[:-200]])
    catch(ImageFormatNotSupportedError, decode_jpeg_frames, [good, encode(picture(), "PNG")])


def test_missing_pyav_is_named_with_its_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)

    error = catch(VideoSupportMissingError, decode_video, b"\x1a\x45\xdf\xa3" + bytes(50))

    # Never by the bare name: on public indexes that is another project.
    assert "pip install -e '.[video]'" in str(error)
    assert Fault.OPERATOR is error.fault


def test_formats_are_told_apart_without_pyav(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)

    catch(VideoFormatNotSupportedError, decode_video, b"#EXTM3U\n")
    assert 10 == decode_video(animated("GIF"), ALL).num_frames
