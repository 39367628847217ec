"""
Where a clip is cut into segments: pure functions on numbers, with no picture in sight.

A segment holds its start and not its end, so that without overlap every frame belongs to one segment.
What is left over at the end and too short for a segment of its own goes to the one before.
"""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from media.errors import BadSegmentsError, TooManySegmentsError, VideoHasNoFramesError
from media.frames import FrameSampling, estimate_span_s, find_window

MAX_SEGMENTS: Final = 1000
"""Of one clip: each is a prompt of its own. An hour, the longest clip, in steps of 3.6 seconds."""

LEAST_REST: Final = 0.1
"""Of a segment: a rest that is shorter is joined to the segment before, where nothing else is said.
Durations are sums of frames, and so hardly ever the multiple that they look like."""

DIGITS: Final = 6
"""After the point of a second: 3 x 0.1 s is 0.3 s."""

SLACK_S: Final = 10.0**-DIGITS
"""A start that is so near to a frame's is meant to be that frame's: it was rounded."""


@dataclass(frozen=True, slots=True)
class Cut:
    """
    How to cut a clip: into segments of a length, or into so many of equal length.

    Attributes:
        seconds: of each segment; None where `count` is given.
        count: of segments; a clip of fewer frames has as many as it has frames.
        overlap_s: by how much a segment begins before the end of the one before.
        min_s: a last segment that has less of its own is joined to the one before; None for a tenth
            of `seconds`.
    """

    seconds: float | None = None
    count: int | None = None
    overlap_s: float = 0.0
    min_s: float | None = None

    def __post_init__(self) -> None:
        if (self.seconds is None) == (self.count is None):
            raise BadSegmentsError("Give segments either seconds or count.")
        if self.seconds is not None and not 0.001 <= self.seconds < math.inf:
            raise BadSegmentsError("segments.seconds must be a finite number of at least 0.001.")
        if self.count is not None and not 1 <= self.count <= MAX_SEGMENTS:
            raise BadSegmentsError(f"segments.count must be between 1 and {MAX_SEGMENTS}.")
        if not 0 <= self.overlap_s < math.inf:
            raise BadSegmentsError("segments.overlap must be a finite number of 0 or more.")
        if self.seconds is not None and self.overlap_s > self.seconds - 0.001:
            raise BadSegmentsError("segments.overlap must be smaller than segments.seconds.")
        if self.min_s is not None and self.seconds is None:
            raise BadSegmentsError(
                "segments.min_seconds goes with seconds: a count leaves no rest. Leave it out."
            )
        if self.min_s is not None and not 0 <= self.min_s < math.inf:
            raise BadSegmentsError("segments.min_seconds must be a finite number of 0 or more.")


@dataclass(frozen=True, slots=True)
class Segment:
    """
    A stretch of a clip.

    Attributes:
        start_s: in seconds from the clip's first frame; the frame that is shown then belongs to it.
        end_s: in the same seconds; a frame that begins then belongs to the next.
    """

    start_s: float
    end_s: float


@dataclass(frozen=True, slots=True)
class Look(Segment):
    """
    A segment, and the window of time in which a choice of frames finds its own and no other.

    `start_s` and `end_s` are rounded, and a segment may begin while the clip's last frame is shown; a
    window that begins after that frame is empty. So this one begins as its first frame does.

    Attributes:
        first_s: when its first frame begins, the one that is shown at `start_s`.
        last_s: inclusive, the moment before a frame that is not its own; None where there is none.
    """

    first_s: float
    last_s: float | None


def plan_window(
    times_s: Sequence[float],
    cut: Cut,
    *,
    start_s: float = 0.0,
    end_s: float | None = None,
) -> tuple[Look, ...]:
    """
    Cut a window of a clip, as `plan_segments` cuts all of it; the segments are in the clip's seconds.

    Where a frame is shown for longer than a segment, several of them have that one frame.

    Args:
        times_s: of the clip's frames.

    Raises:
        VideoHasNoFramesError: the window begins after the clip's end.
    """
    duration_s = estimate_span_s(times_s, len(times_s))
    if start_s > duration_s:
        raise VideoHasNoFramesError
    stop = len(times_s) if end_s is None else bisect_right(times_s, end_s)
    end_s = duration_s if end_s is None else min(end_s, duration_s)
    num_frames = max(stop - _find_shown(times_s, start_s), 1)
    segments = plan_segments(end_s - start_s, num_frames, cut)
    segments = tuple(Segment(part.start_s + start_s, part.end_s + start_s) for part in segments)
    stops = [_find_next(times_s, segment.end_s) for segment in segments[:-1]] + [stop]
    return tuple(
        _build_look(times_s, segment, _find_shown(times_s, segment.start_s), stop)
        for segment, stop in zip(segments, stops, strict=True)
    )


def plan_groups(
    times_s: Sequence[float], count: int, *, start_s: float = 0.0, end_s: float | None = None
) -> tuple[Look, ...]:
    """
    Cut a window of a clip into `count` segments that have the same number of frames, give or take one.

    Where the rate varies, they are of very different length.

    Args:
        times_s: of the clip's frames.
        count: no more than the window has frames.
    """
    frames = find_window(times_s, FrameSampling(start_s=start_s, end_s=end_s))
    duration_s = estimate_span_s(times_s, len(times_s))
    firsts = [frames.start + len(frames) * place // count for place in range(count)]
    starts = [start_s, *(round(times_s[first], DIGITS) for first in firsts[1:])]
    last_s = duration_s if end_s is None else min(end_s, duration_s)
    segments = map(Segment, starts, [*starts[1:], round(last_s, DIGITS)])
    stops = [*firsts[1:], frames.stop]
    return tuple(
        _build_look(times_s, segment, first, stop)
        for segment, first, stop in zip(segments, firsts, stops, strict=True)
    )


def _find_next(times_s: Sequence[float], moment_s: float) -> int:
    """The first frame that begins at a moment or later; the clip's number of frames if none does."""
    return bisect_left(times_s, moment_s - SLACK_S)


def _find_shown(times_s: Sequence[float], moment_s: float) -> int:
    """The frame that is shown at a moment, the last one for as long as one likes."""
    place = _find_next(times_s, moment_s)
    begins_then = place < len(times_s) and times_s[place] <= moment_s + SLACK_S
    return place if begins_then else max(place - 1, 0)


def _build_look(times_s: Sequence[float], segment: Segment, first: int, stop: int) -> Look:
    """The segment whose frames are those from `first` to before `stop`, and one at least."""
    stop = max(stop, first + 1)
    last_s = math.nextafter(times_s[stop], 0) if stop < len(times_s) else None
    return Look(segment.start_s, segment.end_s, times_s[first], last_s)


def plan_segments(duration_s: float, num_frames: int, cut: Cut) -> tuple[Segment, ...]:
    """
    Cut a clip.

    Args:
        duration_s: until the end of its last frame; 0 for a single frame.
        num_frames: of the clip, 1 or more.

    Returns:
        One segment or more, in order, the first from 0 and the last up to `duration_s`.

    Raises:
        TooManySegmentsError: more than `MAX_SEGMENTS`.
        BadSegmentsError: the clip is too short for so many segments with so much overlap.
    """
    duration_s = round(duration_s, DIGITS)
    if cut.seconds is not None:
        length_s = cut.seconds
        least_s = LEAST_REST * length_s if cut.min_s is None else cut.min_s
        count = _count(duration_s, length_s, cut.overlap_s, least_s)
    else:
        most = min(cut.count or 1, num_frames)
        length_s, count = _share_out(duration_s, most, cut.overlap_s)
    step_s = length_s - cut.overlap_s
    starts = [round(place * step_s, DIGITS) for place in range(count)]
    ends = [round(start_s + cut.overlap_s, DIGITS) for start_s in starts[1:]]
    return tuple(map(Segment, starts, [*ends, duration_s]))


def _share_out(duration_s: float, count: int, overlap_s: float) -> tuple[float, int]:
    """The length of each of `count` segments that overlap, and how many there are."""
    if count == 1 or duration_s == 0:
        return duration_s, 1
    if overlap_s >= duration_s:
        raise BadSegmentsError(
            f"segments.overlap is {overlap_s:g} and the clip has {duration_s:g} seconds. Give a "
            "smaller overlap."
        )
    return (duration_s + (count - 1) * overlap_s) / count, count


def _count(duration_s: float, length_s: float, overlap_s: float, least_s: float) -> int:
    """How many segments of a length, the rest counted where it has at least `least_s` of its own."""
    step_s = length_s - overlap_s
    num_more = max(duration_s - length_s, 0.0) / step_s  # after the first
    if num_more > MAX_SEGMENTS:
        raise TooManySegmentsError(
            f"The clip has {duration_s:g} seconds: segments that begin every {step_s:g} seconds are "
            f"more than the {MAX_SEGMENTS} that it may have. Give longer ones."
        )
    num_whole = math.floor(num_more + 1e-9)
    rest_s = duration_s - length_s - num_whole * step_s
    has_rest = rest_s > 10.0**-DIGITS and rest_s >= least_s
    count = 1 + num_whole + has_rest
    if count > MAX_SEGMENTS:
        raise TooManySegmentsError(
            f"The clip has {duration_s:g} seconds: {count} segments are more than the "
            f"{MAX_SEGMENTS} that it may have. Give longer ones."
        )
    return count
