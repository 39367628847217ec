"""
Which frames of a clip to keep: pure functions on numbers, with no picture in sight.

Frames are spread evenly over the *frames* of the window, not over its seconds. In a clip of
constant rate that is the same, and it is what vLLM and transformers do; where the rate varies, as
in screen recordings, a still stretch is not sampled over and over, the number of frames is the one
asked for, and no frame comes twice. The exact times of what was kept go along with it.
"""

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from media.errors import BadFrameSamplingError

DEFAULT_NUM_FRAMES = 32
"""vLLM's default, so that a clip costs the same number of tokens here."""


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
    """

    num_frames: int | None = DEFAULT_NUM_FRAMES
    fps: float | None = None
    start_s: float = 0.0
    end_s: float | None = None

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

    @property
    def needs_times(self) -> bool:
        """Whether the choice depends on when frames are shown, and not on their number alone."""
        return self.fps is not None or self.start_s > 0 or self.end_s is not None


def choose_indices(times_s: Sequence[float], sampling: FrameSampling) -> tuple[int, ...]:
    """
    Choose frames of a clip by the times at which they are shown.

    Args:
        times_s: ascending, in seconds, one for each frame of the clip, the first of them 0.

    Returns:
        Ascending indices into `times_s`, no two the same; empty if the window misses the clip.
    """
    window = find_window(times_s, sampling)
    if not window:
        return ()
    span_s = estimate_span_s([times_s[window[0]], times_s[window[-1]]], len(window))
    num_kept = count_frames(len(window), span_s, sampling)
    return tuple(window[index] for index in spread_evenly(len(window), num_kept))


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
