"""Which frames are kept: numbers only."""

import math
from itertools import accumulate, pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from media.errors import BadFrameSamplingError
from media.frames import (
    DEFAULT_MIN_CHANGE,
    FrameSampling,
    build_sampling,
    choose_indices,
    choose_untimed,
    count_frames,
    count_indices,
    find_window,
    spread_evenly,
)
from tests.media.files import catch


def at_rate(num_frames: int, fps: float) -> list[float]:
    return [place / fps for place in range(num_frames)]


gaps = st.lists(st.floats(0.001, 5), max_size=200)
times = gaps.map(lambda steps: list(accumulate(steps, initial=0.0)))
samplings = st.builds(
    FrameSampling,
    num_frames=st.none() | st.integers(1, 300),
    fps=st.none() | st.floats(0.01, 240),
    start_s=st.floats(0, 100),
)


@given(st.integers(1, 5000), st.integers(1, 400))
def test_spread_is_sorted_in_range_of_the_right_count_and_without_doubles(
    num_source: int, num_kept: int
) -> None:
    indices = spread_evenly(num_source, num_kept)

    assert min(num_source, num_kept) == len(indices)
    assert sorted(set(indices)) == list(indices)
    assert 0 <= indices[0]
    assert indices[-1] < num_source


@given(st.integers(2, 5000), st.integers(2, 400))
def test_spread_holds_both_ends_and_even_steps(num_source: int, num_kept: int) -> None:
    indices = spread_evenly(num_source, num_kept)

    steps = [after - before for before, after in pairwise(indices)]
    assert (0, num_source - 1) == (indices[0], indices[-1])
    assert max(steps) - min(steps) <= 1


def test_spread_equals_the_floor_of_an_exact_line() -> None:
    assert (0, 33, 66, 99, 132, 166, 199, 232, 265, 299) == spread_evenly(300, 10)


def test_a_single_frame_is_the_middle_one() -> None:
    assert (2,) == spread_evenly(5, 1)
    assert (0,) == spread_evenly(1, 1)


@given(times, samplings)
def test_choice_is_sorted_in_range_and_without_doubles(
    times_s: list[float], sampling: FrameSampling
) -> None:
    indices = choose_indices(times_s, sampling)

    assert count_indices(times_s, sampling) == len(indices)
    assert sorted(set(indices)) == list(indices)
    assert all(0 <= index < len(times_s) for index in indices)
    assert sampling.num_frames is None or len(indices) <= sampling.num_frames
    assert bool(indices) == (sampling.start_s <= times_s[-1])


@given(times, samplings, st.floats(0.001, 100))
def test_choice_stays_within_the_window(
    times_s: list[float], sampling: FrameSampling, length_s: float
) -> None:
    end_s = sampling.start_s + length_s
    window = FrameSampling(sampling.num_frames, sampling.fps, sampling.start_s, end_s)

    indices = choose_indices(times_s, window)

    assert all(times_s[index] <= end_s for index in indices)
    assert all(times_s[index] >= sampling.start_s for index in indices[1:])


@given(st.integers(1, 500), st.none() | st.integers(1, 300), st.none() | st.floats(0.01, 240))
def test_the_smaller_count_wins(num_source: int, num_frames: int | None, fps: float | None) -> None:
    span_s = num_source / 25

    both = count_frames(num_source, span_s, FrameSampling(num_frames, fps))

    by_number = count_frames(num_source, span_s, FrameSampling(num_frames))
    by_rate = count_frames(num_source, span_s, FrameSampling(None, fps))
    assert min(by_number, by_rate) == both


@pytest.mark.parametrize(
    ("num_source", "source_fps", "fps", "expected"),
    [(300, 30, 1, 10), (300, 30, 2, 20), (299, 30, 1, 9), (10, 30, 1, 1), (300, 30, 60, 300)],
)
def test_fps_counts_the_seconds_of_the_clip(
    num_source: int, source_fps: float, fps: float, expected: int
) -> None:
    indices = choose_indices(at_rate(num_source, source_fps), FrameSampling(None, fps))

    assert expected == len(indices)


def test_default_is_32_frames() -> None:
    assert 32 == len(choose_indices(at_rate(300, 30), FrameSampling()))


def test_no_cap_keeps_every_frame() -> None:
    assert tuple(range(300)) == choose_indices(at_rate(300, 30), FrameSampling(num_frames=None))


def test_window_starts_with_the_frame_on_the_screen() -> None:
    slides = [0.0, 10.0, 20.0]

    assert range(0, 1) == find_window(slides, FrameSampling(start_s=3, end_s=5))
    assert range(0, 2) == find_window(slides, FrameSampling(start_s=3, end_s=10))
    assert range(1, 3) == find_window(slides, FrameSampling(start_s=10))


def test_only_key_frames_of_the_window_are_taken() -> None:
    times_s, are_keys = at_rate(100, 10), [place % 20 == 0 for place in range(100)]

    def choose(**options: Any) -> tuple[int, ...]:
        return choose_indices(times_s, build_sampling({"keyframes": True, **options}), are_keys)

    assert (0, 20, 40, 60, 80) == choose()
    assert (0, 40, 80) == choose(num_frames=3)
    assert (20, 40, 60) == choose(start_s=1.5, end_s=7.9)
    assert (20, 60) == choose(start_s=1.5, end_s=7.9, fps=0.35)  # of 6.4 s


def test_window_without_a_key_frame_sees_the_one_before_or_the_next() -> None:
    times_s, are_keys = at_rate(30, 10), [place in (10, 20) for place in range(30)]

    def choose(**options: Any) -> tuple[int, ...]:
        return choose_indices(times_s, build_sampling({"keyframes": True, **options}), are_keys)

    assert (10,) == choose(start_s=1.2, end_s=1.8)
    assert (10,) == choose(end_s=0.5)
    assert () == choose_indices(times_s, FrameSampling(keyframes=True), [False] * 30)


def test_each_frame_of_a_list_is_a_key_frame() -> None:
    assert (0, 2, 4) == choose_untimed(5, FrameSampling(num_frames=3, keyframes=True))


def test_rate_alone_is_not_capped_by_the_default_number() -> None:
    assert FrameSampling(num_frames=None, fps=2) == build_sampling({"fps": 2})
    assert FrameSampling(num_frames=4, fps=2) == build_sampling({"fps": 2, "num_frames": 4})
    assert FrameSampling(start_s=5) == build_sampling({"start_s": 5})


def test_least_change_is_the_default_or_a_number() -> None:
    changes = [FrameSampling(dedupe_frames=asked).min_change for asked in (False, True, 1, 0.5)]

    assert [None, DEFAULT_MIN_CHANGE, 1, 0.5] == changes


def test_window_behind_the_clip_is_empty() -> None:
    assert () == choose_indices([0.0, 1.0], FrameSampling(start_s=1.5))
    assert 0 == count_indices([0.0, 1.0], FrameSampling(start_s=1.5))
    assert () == choose_indices([], FrameSampling())


def test_still_stretches_are_not_sampled_over_and_over() -> None:
    recording = [0.0, 0.1, 0.2, 60.0, 60.1]

    assert (0, 2, 4) == choose_indices(recording, FrameSampling(num_frames=3))


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("num_frames", 0),
        ("num_frames", -1),
        ("fps", 0),
        ("fps", math.nan),
        ("fps", math.inf),
        ("start_s", -1),
        ("start_s", math.nan),
        ("end_s", 0),
        ("end_s", math.inf),
        ("end_s", math.nan),
        ("dedupe_frames", 0),
        ("dedupe_frames", -1.0),
        ("dedupe_frames", 255),
        ("dedupe_frames", math.nan),
    ],
)
def test_senseless_choices_are_refused_by_name(word: str, value: Any) -> None:
    error = catch(BadFrameSamplingError, lambda: FrameSampling(**{word: value}))

    assert str(error).startswith(word)
