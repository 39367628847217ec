"""Whose turn it is: pure logic on sequences that are nothing but numbers."""

import time
from dataclasses import dataclass
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from engine.scheduler import Scheduler
from engine.slabs import SlabAllocator


@dataclass(slots=True, eq=False)
class Numbers:
    """What the scheduler reads and writes of a sequence."""

    num_prompt_tokens: int
    max_tokens: int = 10
    priority: int = 0
    both_ways: tuple[tuple[int, int], ...] = ()
    prefix_keys: tuple[tuple[int, bytes], ...] = ()
    start: int | None = None
    slot: int | None = None
    num_computed: int = 0
    num_scheduled: int = 0
    num_cached: int = 0
    copied_from: int | None = None

    @property
    def num_read(self) -> int:
        return self.num_computed + self.num_scheduled

    @property
    def is_read(self) -> bool:
        return self.num_read == self.num_prompt_tokens

    @property
    def num_rows_at_most(self) -> int:
        return self.num_prompt_tokens + self.max_tokens


def build(num_rows: int = 10_000, max_num_seqs: int = 100, max_prefill_tokens: int = 100) -> Any:
    """A scheduler whose sequences may be `Numbers`."""
    return Scheduler(SlabAllocator(num_rows), max_num_seqs, max_prefill_tokens)


def add(scheduler: Any, *sequences: Numbers) -> None:
    for sequence in sequences:
        scheduler.add(sequence)


def test_nothing_to_do_is_an_empty_batch() -> None:
    scheduler = build()

    assert not scheduler.has_work
    assert [] == scheduler.schedule().sequences


def test_prompts_are_read_first_and_then_all_decode() -> None:
    scheduler = build()
    first, second, third = Numbers(10), Numbers(20), Numbers(30)
    add(scheduler, first, second)
    batches = [scheduler.schedule(), scheduler.schedule()]
    add(scheduler, third)
    batches += [scheduler.schedule(), scheduler.schedule()]

    assert [True, False, True, False] == [batch.is_prefill for batch in batches]
    assert [[first, second], [first, second], [third], [first, second, third]] == [
        batch.sequences for batch in batches
    ]
    assert (0, 3) == (scheduler.num_waiting, scheduler.num_running)


def test_lower_priority_comes_first_and_equals_as_they_came() -> None:
    scheduler = build(max_num_seqs=1)
    sequences = [Numbers(5, priority=p) for p in (2, 0, 1, 0, -3, 2)]
    add(scheduler, *sequences)
    order = []
    while scheduler.has_work:
        (sequence,) = scheduler.schedule().sequences
        order.append(sequences.index(sequence))
        scheduler.finish([sequence])

    assert [4, 1, 3, 2, 0, 5] == order


def count_steps(scheduler: Any, sequences: list[Numbers]) -> int:
    """Decode steps until all have written their `max_tokens`, the first of which a prefill brings."""
    add(scheduler, *sequences)
    num_left = {sequence: sequence.max_tokens for sequence in sequences}
    num_steps = 0
    while scheduler.has_work:
        batch = scheduler.schedule()
        num_steps += not batch.is_prefill
        for sequence in batch.sequences:
            num_left[sequence] -= 1
        scheduler.finish([sequence for sequence in batch.sequences if not num_left[sequence]])
    return num_steps


def test_long_answers_among_short_ones_take_hardly_more_steps_than_the_longest() -> None:
    shorts, longs = [Numbers(10, 16) for _ in range(152)], [Numbers(10, 512) for _ in range(8)]
    mixed = [*shorts[:80], *longs, *shorts[80:]]

    # First come, first served would be 75 steps for the short ones before them, and then theirs.
    assert 511 == count_steps(build(100_000, 16, 2000), mixed)


def test_length_of_an_answer_does_not_let_it_wait_for_more_than_a_prefill() -> None:
    scheduler = build(max_num_seqs=5, max_prefill_tokens=100)
    short = Numbers(20, 1)
    add(scheduler, short, *(Numbers(20, 500) for _ in range(20)))
    long = scheduler.schedule().sequences
    scheduler.finish(long)

    assert short not in long
    assert short is scheduler.schedule().sequences[0]


def test_long_answers_pass_a_short_one_at_most_once_a_place() -> None:
    scheduler = build(max_num_seqs=1, max_prefill_tokens=8192)
    holder, short = Numbers(50, 300), Numbers(50, 16)
    add(scheduler, holder)
    scheduler.schedule()
    add(scheduler, short, *(Numbers(50, 300) for _ in range(400)))
    scheduler.finish([holder])
    scheduler.finish(scheduler.schedule().sequences)

    assert [short] == scheduler.schedule().sequences


def test_prefill_stays_within_its_tokens() -> None:
    scheduler = build(max_prefill_tokens=100)
    sizes = [40, 60, 1, 99, 30]
    add(scheduler, *(Numbers(size) for size in sizes))
    batches = [scheduler.schedule() for _ in range(4)]

    assert [[40, 60], [1, 99], [30]] == [
        [s.num_prompt_tokens for s in batch.sequences] for batch in batches[:3]
    ]
    assert [True, True, True, False] == [batch.is_prefill for batch in batches]


def test_prompts_may_be_read_alone() -> None:
    scheduler: Any = Scheduler(SlabAllocator(10_000), 100, 100, prefills_alone=True)
    long, short, other = Numbers(130), Numbers(10), Numbers(10)
    add(scheduler, long, short, other)

    assert [long] == scheduler.schedule().sequences
    assert [long] == scheduler.schedule().sequences  # the rest of it, with room for more
    assert [short] == scheduler.schedule().sequences
    assert [other] == scheduler.schedule().sequences
    assert [long, short, other] == scheduler.schedule().sequences


def test_prompt_longer_than_a_prefill_is_read_in_pieces_between_steps() -> None:
    scheduler = build(max_prefill_tokens=100)
    first, long, last = Numbers(10), Numbers(250), Numbers(20)
    add(scheduler, first, long, last)
    seen = []
    for _ in range(7):
        batch = scheduler.schedule()
        seen.append([(s, s.num_computed, s.num_read) for s in batch.sequences if batch.is_prefill])

    assert [
        [(first, 0, 10)],
        [(long, 0, 100)],
        [],  # the first one's step
        [(long, 100, 200)],
        [],
        [(long, 200, 250), (last, 0, 20)],
        [],
    ] == seen
    assert [first, long, last] == batch.sequences


def test_where_nobody_decodes_pieces_follow_each_other() -> None:
    scheduler = build(max_prefill_tokens=100)
    add(scheduler, Numbers(250))

    assert [100, 100, 50] == [scheduler.schedule().sequences[0].num_scheduled for _ in range(3)]
    assert not scheduler.schedule().is_prefill


def test_cuts_go_around_what_must_be_read_in_one() -> None:
    scheduler = build(max_prefill_tokens=100)
    add(scheduler, Numbers(1000, both_ways=((50, 90), (90, 130), (130, 400), (500, 600))))
    ends = []
    while not (batch := scheduler.schedule()).sequences[0].is_read:
        ends.append(batch.sequences[0].num_read)

    assert [90, 130, 400, 500, 600, 700, 800, 900] == ends


def test_one_whose_prompt_is_half_read_can_be_taken_out() -> None:
    slabs = SlabAllocator(10_000)
    scheduler: Any = Scheduler(slabs, 1, 100)
    long, other = Numbers(250), Numbers(5)
    add(scheduler, long, other)
    scheduler.schedule()

    assert (1, 1) == (scheduler.num_waiting, scheduler.num_running)
    scheduler.finish([long])
    assert [other] == scheduler.schedule().sequences
    scheduler.finish([other])
    assert slabs.largest_slab == slabs.num_free_rows


def test_places_are_limited_and_one_that_ends_makes_room() -> None:
    scheduler = build(max_num_seqs=2)
    first, second, third = (Numbers(5) for _ in range(3))
    add(scheduler, first, second, third)

    assert [first, second] == scheduler.schedule().sequences
    assert not scheduler.schedule().is_prefill
    scheduler.finish([first])
    assert [third] == scheduler.schedule().sequences
    assert [second, third] == scheduler.schedule().sequences


def test_sequence_waits_for_rows_and_is_not_passed_by_smaller_ones() -> None:
    scheduler = build(num_rows=16 + 64)
    holder, large, small = Numbers(30, 18), Numbers(30, 30), Numbers(1, 1)
    add(scheduler, holder)

    assert [holder] == scheduler.schedule().sequences
    add(scheduler, large, small)
    assert [holder] == scheduler.schedule().sequences
    assert 2 == scheduler.num_waiting
    scheduler.finish([holder])
    assert [large] == scheduler.schedule().sequences
    scheduler.finish([large])
    assert [small] == scheduler.schedule().sequences


def test_long_one_that_finds_no_rows_holds_only_later_ones_back() -> None:
    scheduler = build(num_rows=16 + 64 + 48, max_prefill_tokens=100)
    holder, small, other, long, last = (
        Numbers(*sizes) for sizes in ((30, 18), (10, 3), (20, 6), (72, 40), (1, 1))
    )
    add(scheduler, holder)
    scheduler.schedule()
    add(scheduler, small, other, long, last)

    assert [small, other] == scheduler.schedule().sequences
    assert [holder, small, other] == scheduler.schedule().sequences
    scheduler.finish([small, other])
    assert [holder] == scheduler.schedule().sequences
    scheduler.finish([holder])
    assert long is scheduler.schedule().sequences[0]


def test_one_that_waits_can_be_taken_out() -> None:
    scheduler = build(max_num_seqs=1)
    sequences = [Numbers(5) for _ in range(4)]
    add(scheduler, *sequences)
    scheduler.schedule()
    scheduler.finish([sequences[2]])
    scheduler.finish([sequences[0]])

    assert None is sequences[0].start
    assert [sequences[1]] == scheduler.schedule().sequences
    scheduler.finish([sequences[1]])
    assert [sequences[3]] == scheduler.schedule().sequences


@given(
    sizes=st.lists(
        st.builds(Numbers, st.integers(1, 150), st.integers(1, 60), st.integers(-2, 2)),
        max_size=30,
    ),
    choices=st.lists(st.integers(0, 1000), min_size=200, max_size=200),
    max_num_seqs=st.integers(1, 8),
)
def test_everyone_runs_once_and_all_rows_come_back(
    sizes: list[Numbers], choices: list[int], max_num_seqs: int
) -> None:
    slabs = SlabAllocator(16 + 512)
    scheduler: Any = Scheduler(slabs, max_num_seqs, 100)
    add(scheduler, *sizes)
    was_read: list[Numbers] = []
    for choice in choices:
        batch = scheduler.schedule()
        if not batch.sequences:
            break
        assert len(batch.sequences) <= max_num_seqs
        if batch.is_prefill:
            was_read += [s for s in batch.sequences if s.is_read]
            assert sum(s.num_scheduled for s in batch.sequences) <= 100
            assert all(s.start is not None for s in batch.sequences)
        else:
            scheduler.finish([batch.sequences[choice % len(batch.sequences)]])

    assert not scheduler.has_work
    assert {id(s) for s in sizes} == {id(s) for s in was_read}
    assert len(sizes) == len(was_read)
    assert slabs.largest_slab == slabs.num_free_rows


def test_many_waiting_sequences_leave_in_one_pass() -> None:
    scheduler = build(max_num_seqs=4)
    many, others = [Numbers(1) for _ in range(20_000)], [Numbers(1) for _ in range(9)]
    add(scheduler, *others[:4], *many[:9_000], *others[4:], *many[9_000:])
    scheduler.schedule()
    started = time.process_time()
    scheduler.finish(many)
    took_s = time.process_time() - started
    scheduler.finish(others[:4])

    assert others[4:8] == scheduler.schedule().sequences
    assert took_s < 1  # of this process; one at a time, 16,384 took 8.7 s (2026, two cores)
