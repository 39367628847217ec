"""Where a clip is cut: numbers only."""

from collections.abc import Sequence
from itertools import accumulate, chain, pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from media.errors import BadSegmentsError, MediaError, TooManySegmentsError
from media.frames import FrameSampling, choose_indices
from media.segments import MAX_SEGMENTS, Cut, Look, Segment, plan_groups, plan_segments, plan_window


def plan(duration_s: float, num_frames: int = 1000, **cut: Any) -> list[tuple[float, float]]:
    segments = plan_segments(duration_s, num_frames, Cut(**cut))
    return [(segment.start_s, segment.end_s) for segment in segments]


def test_five_minutes_in_steps_of_ten_seconds_are_thirty_segments() -> None:
    segments = plan(300.0, seconds=10)

    assert 30 == len(segments)
    assert [(10.0 * n, 10.0 * (n + 1)) for n in range(30)] == segments


@pytest.mark.parametrize(
    ("duration_s", "cut", "expected"),
    [
        (25.0, {"seconds": 10}, [(0, 10), (10, 20), (20, 25)]),
        (20.9, {"seconds": 10}, [(0, 10), (10, 20.9)]),  # less than a tenth is left
        (20.9, {"seconds": 10, "min_s": 0.5}, [(0, 10), (10, 20), (20, 20.9)]),
        (20.9, {"seconds": 10, "min_s": 0}, [(0, 10), (10, 20), (20, 20.9)]),
        (24.0, {"seconds": 10, "min_s": 5}, [(0, 10), (10, 24)]),
        (25.0, {"seconds": 10, "min_s": 5}, [(0, 10), (10, 20), (20, 25)]),
        (7.0, {"seconds": 10}, [(0, 7)]),
        (10.0, {"seconds": 10}, [(0, 10)]),
        (0.0, {"seconds": 10}, [(0, 0)]),
        (0.9, {"seconds": 0.3}, [(0, 0.3), (0.3, 0.6), (0.6, 0.9)]),
        (20.0, {"seconds": 10, "overlap_s": 5}, [(0, 10), (5, 15), (10, 20)]),
        (21.0, {"seconds": 10, "overlap_s": 5}, [(0, 10), (5, 15), (10, 20), (15, 21)]),
        (20.4, {"seconds": 10, "overlap_s": 5}, [(0, 10), (5, 15), (10, 20.4)]),
        (30.0, {"count": 3}, [(0, 10), (10, 20), (20, 30)]),
        (10.0, {"count": 3}, [(0, 3.333333), (3.333333, 6.666667), (6.666667, 10)]),
        (20.0, {"count": 3, "overlap_s": 5}, [(0, 10), (5, 15), (10, 20)]),
        (9.0, {"count": 1, "overlap_s": 20}, [(0, 9)]),
        (0.0, {"count": 4}, [(0, 0)]),
    ],
)
def test_clip_is_cut_in_order_and_to_its_end(
    duration_s: float, cut: dict[str, Any], expected: list[tuple[float, float]]
) -> None:
    assert expected == plan(duration_s, **cut)


def test_clip_has_no_more_segments_than_frames() -> None:
    assert [(0, 1), (1, 2)] == plan(2.0, num_frames=2, count=30)


@given(
    duration_s=st.floats(0, 3600),
    seconds=st.floats(4, 600),
    share=st.floats(0, 0.9),
    least=st.none() | st.floats(0, 5),
)
def test_segments_cover_the_clip_and_overlap_as_asked(
    duration_s: float, seconds: float, share: float, least: float | None
) -> None:
    cut = Cut(seconds=seconds, overlap_s=share * seconds, min_s=least)
    try:
        segments = plan_segments(duration_s, 10_000, cut)
    except TooManySegmentsError:
        assert duration_s / (seconds - cut.overlap_s) > MAX_SEGMENTS - 1
        return

    assert 0 == segments[0].start_s
    assert segments[-1].end_s == pytest.approx(duration_s, abs=1e-5)
    for before, after in pairwise(segments):
        assert after.start_s == pytest.approx(before.end_s - cut.overlap_s, abs=1e-4)
        assert before.end_s < after.end_s
    for segment in segments[:-1]:
        assert segment.end_s - segment.start_s == pytest.approx(seconds, abs=1e-4)
    assert segments[-1].end_s - segments[-1].start_s < 2 * seconds + (least or 0)


@given(duration_s=st.floats(0.5, 3600), count=st.integers(1, MAX_SEGMENTS))
def test_so_many_segments_are_of_equal_length(duration_s: float, count: int) -> None:
    segments = plan_segments(duration_s, 10_000, Cut(count=count))

    assert count == len(segments)
    lengths = [segment.end_s - segment.start_s for segment in segments]
    assert duration_s / count == pytest.approx(min(lengths), abs=1e-5)
    assert duration_s / count == pytest.approx(max(lengths), abs=1e-5)
    assert all(before.end_s == after.start_s for before, after in pairwise(segments))


@pytest.mark.parametrize(
    ("cut", "words"),
    [
        ({}, "either seconds or count"),
        ({"seconds": 10, "count": 3}, "either seconds or count"),
        ({"seconds": 0}, "segments.seconds"),
        ({"seconds": float("inf")}, "segments.seconds"),
        ({"seconds": float("nan")}, "segments.seconds"),
        ({"count": 0}, "segments.count"),
        ({"count": MAX_SEGMENTS + 1}, "segments.count"),
        ({"seconds": 10, "overlap_s": 10}, "smaller than segments.seconds"),
        ({"seconds": 10, "overlap_s": -1}, "segments.overlap"),
        ({"count": 3, "min_s": 1}, "min_seconds"),
        ({"seconds": 10, "min_s": -1}, "min_seconds"),
    ],
)
def test_what_cannot_be_is_refused_by_name(cut: dict[str, Any], words: str) -> None:
    with pytest.raises(BadSegmentsError, match=words):
        Cut(**cut)


@pytest.mark.parametrize(
    ("duration_s", "cut", "kind"),
    [
        (3600.0, {"seconds": 3.5}, TooManySegmentsError),
        (1e9, {"seconds": 0.001}, TooManySegmentsError),
        (4.0, {"count": 3, "overlap_s": 4}, BadSegmentsError),
    ],
)
def test_clip_that_cannot_be_cut_so_is_refused(
    duration_s: float, cut: dict[str, Any], kind: type[MediaError]
) -> None:
    with pytest.raises(kind, match=r"(The|the) clip has"):
        plan(duration_s, **cut)


def look(times_s: Sequence[float], cut: Cut, **window: float) -> list[tuple[int, ...]]:
    """Which frames each segment sees of those that it may."""
    return see(times_s, plan_window(times_s, cut, **window))


def see(times_s: Sequence[float], looks: Sequence[Look]) -> list[tuple[int, ...]]:
    return [
        choose_indices(times_s, FrameSampling(None, None, look.first_s, look.last_s))
        for look in looks
    ]


@pytest.mark.parametrize(
    ("times_s", "cut", "expected"),
    [
        ([0, 1, 2], Cut(seconds=0.5), [(0,), (0,), (1,), (1,), (2,), (2,)]),
        ([0, 5, 10], Cut(seconds=4), [(0,), (0, 1), (1, 2), (2,)]),
        ([0.0, 0.1, 0.2, 9.8], Cut(seconds=5), [(0, 1, 2), (2, 3), (3,)]),
        ([0.0], Cut(seconds=5), [(0,)]),
    ],
)
def test_segment_sees_the_frame_that_is_shown_at_its_start(
    times_s: list[float], cut: Cut, expected: list[tuple[int, ...]]
) -> None:
    """The last one too, which is shown until the clip's end."""
    assert expected == look(times_s, cut)


@given(num_frames=st.integers(1, 400), fps=st.integers(1, 60))
def test_rounding_gives_no_frame_to_a_segment_that_it_does_not_belong_to(
    num_frames: int, fps: int
) -> None:
    times_s = [place / fps for place in range(num_frames)]

    assert [(place,) for place in range(num_frames)] == look(times_s, Cut(count=num_frames))


@given(
    gaps_ms=st.lists(st.integers(1, 9000), max_size=200),
    start_ms=st.integers(0, 9000),
    length_ms=st.none() | st.integers(1, 90_000),
    data=st.data(),
)
def test_groups_share_out_the_frames_of_a_window(
    gaps_ms: list[int], start_ms: int, length_ms: int | None, data: st.DataObject
) -> None:
    times_s = [time_ms / 1000 for time_ms in accumulate(gaps_ms, initial=0)]
    start_s = min(start_ms / 1000, times_s[-1])
    end_s = None if length_ms is None else start_s + length_ms / 1000
    window = choose_indices(times_s, FrameSampling(None, None, start_s, end_s))
    count = data.draw(st.integers(1, len(window)))

    groups = plan_groups(times_s, count, start_s=start_s, end_s=end_s)
    seen = see(times_s, groups)

    assert window == tuple(chain(*seen))
    sizes = [len(group) for group in seen]
    assert max(sizes) - min(sizes) <= 1
    assert start_s == groups[0].start_s
    assert all(before.end_s == after.start_s for before, after in pairwise(groups))


def test_segments_of_a_window_end_with_its_last_frame() -> None:
    times_s = [float(second) for second in range(10)]

    assert [(2, 3), (4, 5)] == look(times_s, Cut(seconds=2), start_s=2, end_s=5.5)
    assert [(2, 3), (4, 5, 6)] == look(times_s, Cut(seconds=2), start_s=2, end_s=6)
    assert [(9,)] == look(times_s, Cut(seconds=2), start_s=9.5)


def test_window_of_many_frames_may_have_as_many_segments() -> None:
    """And one of few no more: its share of the clip's seconds says nothing of them."""
    times_s = [*(n / 50 for n in range(50)), *(float(second) for second in range(1, 11))]

    assert 40 == len(look(times_s, Cut(count=40), end_s=0.99))
    assert 9 == len(look(times_s, Cut(count=40), start_s=2))


def test_as_many_segments_as_there_may_be() -> None:
    assert MAX_SEGMENTS == len(plan(3600.0, seconds=3.6))
    assert Segment(3596.4, 3600.0) == plan_segments(3600.0, 10_000, Cut(seconds=3.6))[-1]
