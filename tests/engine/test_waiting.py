"""Whose turn it is among those that wait: longest first, and nobody for ever."""

import time
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from engine.waiting import Waiting, round_length
from tests.engine.test_scheduler import Numbers


def build(max_tokens_ahead: int, *sequences: Numbers, min_tokens_each: int = 0) -> Any:
    waiting: Any = Waiting(max_tokens_ahead, min_tokens_each)
    for sequence in sequences:
        waiting.add(sequence)
    return waiting


def take(waiting: Any) -> Numbers:
    """Take out whose turn it is."""
    first: Numbers = waiting.first
    waiting.take(first)
    return first


def empty(waiting: Any) -> list[Numbers]:
    return [take(waiting) for _ in range(len(waiting))]


@given(st.integers(1, 1 << 20))
def test_lengths_count_to_about_a_fifth(max_tokens: int) -> None:
    rounded = round_length(max_tokens)

    assert 0.8 * max_tokens < rounded <= max_tokens
    assert rounded == round_length(rounded)
    assert rounded <= round_length(max_tokens + 1)


def test_longest_goes_first_and_equals_as_they_came() -> None:
    short, long, longer, other, another = (Numbers(1, length) for length in (16, 500, 900, 17, 510))
    waiting = build(100, short, long, longer, other, another)

    assert (5, 5) == (len(waiting), waiting.num_tokens)
    assert longer is waiting.first
    assert [longer, long, another, short, other] == empty(waiting)
    assert (0, 0) == (len(waiting), waiting.num_tokens)


def test_priority_counts_before_length() -> None:
    long, urgent, last = Numbers(1, 500), Numbers(1, 2, priority=-1), Numbers(1, 900, priority=3)

    assert [urgent, long, last] == empty(build(100, last, long, urgent))


def test_with_nothing_allowed_ahead_all_go_as_they_came() -> None:
    sequences = [Numbers(1, length) for length in (3, 500, 2, 900, 16)]

    assert sequences == empty(build(0, *sequences))


def test_later_ones_get_ahead_with_so_many_prompt_tokens_and_no_more() -> None:
    short = Numbers(10, 1)
    longs = [Numbers(40, 500) for _ in range(4)]

    assert [*longs[:2], short, *longs[2:]] == empty(build(100, short, *longs))


def test_those_that_come_all_the_time_hold_nobody_back_for_ever() -> None:
    shorts = [Numbers(10, 1) for _ in range(3)]
    waiting = build(100, *shorts)
    order = []
    for _ in range(20):
        waiting.add(Numbers(40, 500))
        order.append(take(waiting))

    assert [2, 3, 4] == [order.index(short) for short in shorts]


def test_prompt_longer_than_what_may_get_ahead_waits_for_its_turn() -> None:
    short, long, middle = Numbers(10, 1), Numbers(101, 500), Numbers(10, 30)

    assert [short, long, middle] == empty(build(100, short, long, middle))
    assert [long, middle, short] == empty(build(100, long, short, middle))


def test_who_leaves_holds_nobody_back() -> None:
    short, long, other = Numbers(10, 1), Numbers(90, 500), Numbers(20, 400)
    waiting = build(100, short, long, other)
    waiting.remove({long, Numbers(5)})

    assert (2, 30) == (len(waiting), waiting.num_tokens)
    assert [short, other] == empty(waiting)  # what has left counts as if it had gone ahead


def test_short_prompts_count_as_more_than_their_tokens() -> None:
    short, long = Numbers(1, 1), Numbers(60, 500)
    brief = [Numbers(1, 400) for _ in range(4)]

    waiting = build(100, short, long, *brief, min_tokens_each=20)

    assert 65 == waiting.num_tokens
    assert [long, *brief[:2], short, *brief[2:]] == empty(waiting)
    waiting = build(100, short, long, *brief, min_tokens_each=20)
    waiting.remove(brief[:1])
    assert [long, brief[1], short, *brief[2:]] == empty(waiting)


def test_oldest_may_be_taken_before_its_turn() -> None:
    short, long, other, last = (Numbers(50, length) for length in (1, 500, 2, 400))
    waiting = build(100, short, long, other, last, Numbers(5, 900, priority=1))
    waiting.take(waiting.oldest)

    assert long is waiting.oldest
    assert long is waiting.first
    waiting.take(long)
    assert (other, last) == (waiting.oldest, waiting.first)
    assert (3, 105) == (len(waiting), waiting.num_tokens)


def test_every_request_may_have_a_priority_of_its_own() -> None:
    sequences = [Numbers(1, priority=priority) for priority in range(20_000)]
    waiting = build(100, *sequences[::-1])
    started = time.process_time()
    for sequence in sequences[:5_000]:
        waiting.remove({sequence})
    order = [take(waiting) for _ in range(5_000)]
    took_s = time.process_time() - started
    waiting.add(sequences[3])

    assert sequences[5_000:10_000] == order
    assert [sequences[3], *sequences[10_000:]] == empty(waiting)
    assert took_s < 1


@given(
    acts=st.lists(
        st.builds(Numbers, st.integers(1, 60), st.integers(1, 40), st.integers(-1, 1))
        | st.integers(0, 9),
        max_size=80,
    ),
    max_tokens_ahead=st.integers(0, 150),
)
def test_nobody_is_passed_by_more_than_is_allowed(
    acts: list[Numbers | int], max_tokens_ahead: int
) -> None:
    """Numbers come; 0 takes out one that waits, and other numbers take whose turn it is."""
    waiting = build(max_tokens_ahead)
    line: list[Numbers] = []  # as they came
    num_ahead: dict[Numbers, int] = {}

    def leave(sequence: Numbers) -> list[Numbers]:
        """Those of its priority that came before it and still wait."""
        passed = [s for s in line[: line.index(sequence)] if s.priority == sequence.priority]
        line.remove(sequence)
        return passed

    for act in acts:
        if isinstance(act, Numbers):
            waiting.add(act)
            line.append(act)
            num_ahead[act] = 0
        elif act == 0 and line:
            leaving = line[len(line) // 2]
            waiting.remove([leaving])
            leave(leaving)
        elif line:
            first = waiting.first
            assert first is take(waiting)
            assert first.priority == min(sequence.priority for sequence in line)
            for sequence in leave(first):
                assert round_length(sequence.max_tokens) < round_length(first.max_tokens)
                num_ahead[sequence] += first.num_prompt_tokens
                assert num_ahead[sequence] <= max_tokens_ahead
        assert len(line) == len(waiting)
        assert sum(sequence.num_prompt_tokens for sequence in line) == waiting.num_tokens
    while line:
        leave(take(waiting))
    assert 0 == len(waiting)
