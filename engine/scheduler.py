"""
Who runs next: waiting sequences are admitted when a slab and a place are free; all others decode.

Loads no torch. Prefill goes first, since a full decode batch is worth more than an early token. A
prompt too long for one call is read in pieces, with a decode step of the others between them. Whose
turn it is among those that wait is `engine/waiting.py`'s to say.
"""

from __future__ import annotations

import heapq
from bisect import bisect_right
from collections.abc import Collection
from dataclasses import dataclass
from operator import itemgetter
from typing import TYPE_CHECKING

from engine.prefixes import Key, Prefixes
from engine.slabs import SlabAllocator
from engine.waiting import Waiting

if TYPE_CHECKING:
    from engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Batch:
    """What one step runs: prompts or a piece of one, or one token of every running sequence."""

    sequences: list[Sequence]
    is_prefill: bool


class Scheduler:
    """
    Args:
        slabs: the rows to hand out.
        max_num_seqs: sequences that decode together.
        max_prefill_tokens: prompt tokens of one prefill; a longer prompt is read in pieces of so many.
        patience: decode steps for which a prefill may wait to be a full one. On a GPU a small call
            takes almost as long as a large one; 0 admits whoever can be at once.
        prefills_alone: whether no two prompts are read in one call, so that how one is read does not
            depend on the others.
    """

    def __init__(
        self,
        slabs: SlabAllocator,
        max_num_seqs: int,
        max_prefill_tokens: int,
        patience: int = 0,
        *,
        prefills_alone: bool = False,
    ) -> None:
        self._slabs = slabs
        self._prefixes = Prefixes()
        self._patience = patience
        self._prefills_alone = prefills_alone
        self._num_steps_waited = 0
        self._free_slots = list(range(max_num_seqs))  # a heap: low ones first
        self._max_num_seqs = max_num_seqs
        self._max_prefill_tokens = max_prefill_tokens
        self._waiting = Waiting(max_prefill_tokens, max_prefill_tokens // max_num_seqs)
        self._running: list[Sequence] = []
        self._reading: Sequence | None = None  # has a slab, and a prompt of which more is to come
        self._owes_step = False  # a decode step, before the next piece

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_waiting_tokens(self) -> int:
        """Prompt tokens of those that wait."""
        return self._waiting.num_tokens

    @property
    def num_running(self) -> int:
        return len(self._running) + (self._reading is not None)

    @property
    def num_kept_rows(self) -> int:
        """Rows of prompts that were read, kept until somebody needs the place."""
        return self._prefixes.num_kept_rows

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self._running or self._reading)

    def add(self, sequence: Sequence) -> None:
        self._waiting.add(sequence)

    def schedule(self, *, may_come: bool = False) -> Batch:
        """
        The next batch; empty only where there is no work.

        Args:
            may_come: whether more sequences are on their way, so that it may pay to wait for them.
        """
        if self._reading is None:
            is_next = self._is_worth_it(may_come)
        else:
            is_next = not (self._owes_step and self._running)
        self._owes_step = False
        admitted = self._admit() if is_next else []
        if admitted:
            self._num_steps_waited = 0
            self._owes_step = self._reading is not None
            self._running += [sequence for sequence in admitted if sequence.is_read]
            return Batch(admitted, is_prefill=True)
        self._num_steps_waited += bool(self._waiting)
        return Batch(list(self._running), is_prefill=False)

    def _is_worth_it(self, may_come: bool) -> bool:
        """Whether to admit now, or to go on with those that run until more can be admitted."""
        if not self._running or self._num_steps_waited >= self._patience:
            return True
        num_free = self._max_num_seqs - len(self._running)
        if num_free >= len(self._waiting):
            return not may_come or self._waiting.num_tokens >= self._max_prefill_tokens
        average = self._waiting.num_tokens / len(self._waiting)
        return num_free * average >= self._max_prefill_tokens

    def _admit(self) -> list[Sequence]:
        """The sequences of the next prefill: what is left of a prompt first, then those that wait."""
        admitted: list[Sequence] = []
        coming: set[Key] = set()  # prefixes that this prefill writes
        num_left = self._max_prefill_tokens
        is_stuck = False  # whether there is no slab for whose turn it is
        if self._reading is not None:
            admitted.append(self._reading)
            coming.update(self._reading.prefix_keys)
            num_left -= self._read_on(self._reading)
        while (
            self._reading is None
            and self._waiting
            and len(self._running) + len(admitted) < self._max_num_seqs
        ):
            sequence = self._waiting.oldest if is_stuck else self._waiting.first
            usable = _usable(sequence)
            source, num_cached = self._prefixes.find(usable)
            num_wanted = sequence.num_prompt_tokens - num_cached
            if admitted and (self._prefills_alone or num_wanted > num_left):
                break
            if _goes_on(usable, num_cached, coming):
                break  # a step later there is more of it to copy
            sequence.start = self._find_slab(sequence.num_rows_at_most)
            if sequence.start is None:
                if is_stuck or sequence is self._waiting.oldest:
                    break
                # NOTE: those that came earlier may go before it, and no later one that fits: it holds
                # none of them back, and is not passed over for ever.
                is_stuck = True
                continue
            # NOTE: its source may be evicted from here on, and even given to one of this batch: the
            # rows are copied before any of the batch are written.
            sequence.num_computed = sequence.num_cached = num_cached
            sequence.copied_from = source if num_cached else None
            coming.update(sequence.prefix_keys)
            self._waiting.take(sequence)
            sequence.slot = heapq.heappop(self._free_slots)
            admitted.append(sequence)
            num_left -= self._read_on(sequence)
        return admitted

    def _find_slab(self, num_rows: int) -> int | None:
        """A slab, if need be where rows are kept for nobody."""
        start = self._slabs.find(num_rows)
        if start is None and self._slabs.num_free_rows + self.num_kept_rows < num_rows:
            return None  # they would be forgotten in vain
        while start is None and (evicted := self._prefixes.evict()) is not None:
            self._slabs.free(evicted)
            start = self._slabs.find(num_rows)
        return start

    def _read_on(self, sequence: Sequence) -> int:
        """
        Let the next prefill read a prompt's next piece; its tokens.

        As many as a call holds, or fewer, so that it ends in front of a picture that must not be cut.
        Where it begins with a larger one, all of that.
        """
        begin = sequence.num_read
        end = min(begin + self._max_prefill_tokens, sequence.num_prompt_tokens)
        for first, last in sequence.both_ways:
            if first < end < last:
                end = first if first > begin else last
        sequence.num_computed, sequence.num_scheduled = begin, end - begin
        self._reading = None if sequence.is_read else sequence
        return sequence.num_scheduled

    def keep_prefixes(self, sequences: Collection[Sequence]) -> None:
        """All of their prompts' rows were written: others may begin with copies of them."""
        for sequence in sequences:
            if sequence.start is not None and sequence.prefix_keys:
                self._prefixes.add(sequence.start, sequence.prefix_keys)

    def forget_prefixes(self) -> None:
        for start in self._prefixes.clear():
            self._slabs.free(start)

    def finish(self, sequences: Collection[Sequence]) -> None:
        """
        Take sequences out, wherever they are, in one pass, and give their rows and slots back.

        Of the rows, those stay for now that a prompt to come might begin with.

        Steps that were launched with them may still run: what is launched later comes after those.
        """
        leaving = set(sequences)
        if self._reading in leaving:
            self._reading = None
        self._running = [sequence for sequence in self._running if sequence not in leaving]
        if any(sequence.start is None for sequence in leaving):  # those that run have a slab
            self._waiting.remove(leaving)
        for sequence in sequences:
            if sequence.start is not None:
                num_kept = self._prefixes.keep(sequence.start)
                if num_kept:
                    self._slabs.shrink(sequence.start, num_kept)
                else:
                    self._slabs.free(sequence.start)
                sequence.start = None
            if sequence.slot is not None:
                heapq.heappush(self._free_slots, sequence.slot)
                sequence.slot = None


def _usable(sequence: Sequence) -> tuple[Key, ...]:
    """The prefixes that a prompt may copy: one token at least must be read, to go on from."""
    keys = sequence.prefix_keys
    return keys[:-1] if keys and keys[-1][0] == sequence.num_prompt_tokens else keys


def _goes_on(keys: tuple[Key, ...], num_cached: int, coming: Collection[Key]) -> bool:
    """Whether more of a prompt than can be copied now is among what is coming."""
    longer = bisect_right(keys, num_cached, key=itemgetter(0))
    return longer < len(keys) and keys[longer] in coming
