"""
Which frames of a clip to keep: pure functions on numbers, with no picture in sight.

The one exception, frames that look alike, is asked for here and found in `media.alike`.

Frames are spread evenly over the *frames* of the window, not over its seconds. In a clip of
constant rate that is the same, and it is what vLLM and transformers do; where the rate varies, as
in screen recordings, a still stretch is not sampled over and over, the number of frames is the one
asked for, and no frame comes twice. The exact times of what was kept go along with it.
"""

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from media.errors import BadFrameSamplingError

DEFAULT_NUM_FRAMES = 32
"""vLLM's default, so that a clip costs the same number of tokens here."""

DEFAULT_MIN_CHANGE = 2.0
"""Levels, of 255, that a still scene stays below and a small thing that moves does not: see `media.alike`."""

MAX_MIN_CHANGE = 255.0


@dataclass(frozen=True, slots=True)
class FrameSampling:
    """
    How many frames of a clip to look at, and in which window of time.

    Where both `num_frames` and `fps` are given, the smaller count wins: `fps` says how densely
    to look and `num_frames` what it may cost.

    Attributes:
        num_frames: at most this many; None for no cap of its own.
        fps: at most this many for each second of the window; None for no such rule.
        start_s: where the window starts, in seconds from the clip's first frame.
        end_s: where it ends, inclusive; None for the clip's end.
        keyframes: whether to look at key frames only, which need no other frame to be decoded. They
            stand where the encoder put them, so `num_frames` and `fps` are spread over them unevenly.
        dedupe_frames: whether frames that look like the one kept before them are left out in the
            end; a number is the least change, 0 to 255, that keeps a frame.
    """

    num_frames: int | None = DEFAULT_NUM_FRAMES
    fps: float | None = None
    start_s: float = 0.0
    end_s: float | None = None
    keyframes: bool = False
    dedupe_frames: bool | float = False

    def __post_init__(self) -> None:
        if self.num_frames is not None and self.num_frames < 1:
            raise BadFrameSamplingError(
                "num_frames must be 1 or more. Leave it out for the default."
            )
        if self.fps is not None and not (math.isfinite(self.fps) and self.fps > 0):
            raise BadFrameSamplingError(
                "fps must be a finite number above 0. Leave it out to count frames only."
            )
        if not (math.isfinite(self.start_s) and self.start_s >= 0):
            raise BadFrameSamplingError(
                "start_s must be a finite number of seconds, 0 or more. Leave it out for the start."
            )
        if self.end_s is not None and not self.start_s < self.end_s < math.inf:
            raise BadFrameSamplingError(
                "end_s must be a finite number of seconds above start_s. Leave it out for the end."
            )
        if not isinstance(self.dedupe_frames, bool) and not 0 < self.dedupe_frames < MAX_MIN_CHANGE:
            raise BadFrameSamplingError(
                "dedupe_frames must be true, false, or the least change that keeps a frame, over 0 and "
                f"below {MAX_MIN_CHANGE:g}. Leave it out to keep all."
            )

    @property
    def needs_times(self) -> bool:
        """Whether the choice depends on when frames are shown, and not on their number alone."""
        return self.fps is not None or self.start_s > 0 or self.end_s is not None

    @property
    def min_change(self) -> float | None:
        """The least change that keeps a frame; None where all are kept."""
        if isinstance(self.dedupe_frames, bool):
            return DEFAULT_MIN_CHANGE if self.dedupe_frames else None
        return self.dedupe_frames


def build_sampling(options: Mapping[str, Any]) -> FrameSampling:
    """
    The sampling that options ask for, by `FrameSampling`'s names: what is left out is the default,
    but `fps` alone is no longer capped by the default number of frames.

    Raises:
        BadFrameSamplingError: they cannot be, or not together.
    """
    if "fps" in options:
        options = {"num_frames": None, **options}
    return FrameSampling(**options)


def choose_indices(
    times_s: Sequence[float], sampling: FrameSampling, is_key: Sequence[bool] | None = None
) -> tuple[int, ...]:
    """
    Choose frames of a clip by the times at which they are shown.

    Args:
        times_s: ascending, in seconds, one for each frame of the clip, the first of them 0.
        is_key: for each frame whether it is a key frame; None where every frame stands alone.

    Returns:
        Ascending indices into `times_s`, no two the same; empty if the window misses the clip.
    """
    window = find_window(times_s, sampling)
    if not window:
        return ()
    candidates: Sequence[int] = window
    if sampling.keyframes and is_key is not None:
        candidates = _find_key_frames(window, is_key)
    num_kept = count_frames(len(candidates), _find_span_s(times_s, window), sampling)
    return tuple(candidates[index] for index in spread_evenly(len(candidates), num_kept))


def count_indices(times_s: Sequence[float], sampling: FrameSampling) -> int:
    """How many indices are chosen where every frame stands alone; as cheap for an hour as for a second."""
    window = find_window(times_s, sampling)
    return count_frames(len(window), _find_span_s(times_s, window), sampling) if window else 0


def _find_span_s(times_s: Sequence[float], window: range) -> float:
    return estimate_span_s([times_s[window[0]], times_s[window[-1]]], len(window))


def _find_key_frames(window: range, is_key: Sequence[bool]) -> Sequence[int]:
    """The key frames of a window; one without any sees the last one before it, or the next."""
    inside = [index for index in window if is_key[index]]
    if inside:
        return inside
    before = [index for index in range(window.start) if is_key[index]][-1:]
    return before or [index for index in range(window.stop, len(is_key)) if is_key[index]][:1]


def choose_untimed(num_source_frames: int, sampling: FrameSampling) -> tuple[int, ...]:
    """
    Choose frames of a list that has no times, each of which stands alone.

    Raises:
        BadFrameSamplingError: `sampling` asks by seconds.
    """
    if sampling.needs_times:
        raise BadFrameSamplingError(
            "A list of frames has no times, so fps, start_s and end_s cannot be applied. Use "
            "num_frames."
        )
    return spread_evenly(num_source_frames, count_frames(num_source_frames, 0.0, sampling))


def find_window(times_s: Sequence[float], sampling: FrameSampling) -> range:
    """
    Return the frames that are on the screen between `start_s` and `end_s`.

    The first of them is the one already shown at `start_s`: a window that falls between two
    frames still sees one. A window that starts after the last frame is empty.
    """
    if not times_s or sampling.start_s > times_s[-1]:
        return range(0)
    first = max(bisect_right(times_s, sampling.start_s) - 1, 0)
    end = len(times_s) if sampling.end_s is None else bisect_right(times_s, sampling.end_s)
    return range(first, max(end, first + 1))


def estimate_span_s(ends_s: Sequence[float], num_frames: int) -> float:
    """Return how long frames are shown from the first to the end of the last, in seconds."""
    if num_frames < 2:
        return 0.0
    return (ends_s[-1] - ends_s[0]) * num_frames / (num_frames - 1)


def count_frames(num_source_frames: int, span_s: float, sampling: FrameSampling) -> int:
    """Return how many of `num_source_frames`, shown for `span_s` seconds, to keep: at least 1."""
    num_kept = num_source_frames
    if sampling.num_frames is not None:
        num_kept = min(num_kept, sampling.num_frames)
    if sampling.fps is not None:
        by_rate = min(span_s * sampling.fps + 1e-6, num_kept)  # 10 s at 1 fps are 10, not 9.999
        num_kept = min(num_kept, math.floor(by_rate))
    return max(num_kept, 1)


def spread_evenly(num_source_frames: int, num_kept: int) -> tuple[int, ...]:
    """
    Return `num_kept` indices below `num_source_frames`, or all of them if there are fewer.

    Two or more include the first and the last frame. A single one is the middle frame, since
    clips begin and end in black.
    """
    if num_kept >= num_source_frames:
        return tuple(range(num_source_frames))
    if num_kept == 1:
        return ((num_source_frames - 1) // 2,)
    last, steps = num_source_frames - 1, num_kept - 1
    return tuple(step * last // steps for step in range(num_kept))
