"""
Who waits for a place, and whose turn it is.

Loads no torch. The lowest priority goes first and, of one priority, whoever may write the longest
answer: begun last, it would run on alone when all others have ended, and a step for one sequence
takes nearly as long as one for many. So that nobody waits for ever, later ones get ahead of one with so
many prompt tokens in all and no more; then whoever came first has the turn. Answers of about one
length go in the order in which they came.
"""

from __future__ import annotations

import heapq
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection

    from engine.sequence import Sequence

LENGTH_BITS = 3  # leading bits of a length that count: lengths within a quarter may be equal


def round_length(max_tokens: int) -> int:
    """The length of an answer as far as it decides whose turn it is: rounded down by a fifth at most."""
    num_dropped = max(0, max_tokens.bit_length() - LENGTH_BITS)
    return max_tokens >> num_dropped << num_dropped


@dataclass(frozen=True, slots=True)
class _Place:
    """
    One that waits.

    Attributes:
        num_tokens: what it counts as where it gets ahead of others.
        num_tokens_before: of those of its priority that had come before it.
    """

    sequence: Sequence
    num_tokens: int
    num_tokens_before: int


@dataclass(slots=True)
class _Level:
    """
    All that wait with one priority.

    Attributes:
        by_length: those with answers of a length, as they came; no queue is empty.
        num_tokens_come, num_tokens_gone: of those that ever waited here, and of those that wait no
            more.
    """

    by_length: dict[int, deque[_Place]] = field(default_factory=dict)
    num_tokens_come: int = 0
    num_tokens_gone: int = 0

    def add(self, sequence: Sequence, num_tokens: int) -> None:
        queue = self.by_length.setdefault(round_length(sequence.max_tokens), deque())
        queue.append(_Place(sequence, num_tokens, self.num_tokens_come))
        self.num_tokens_come += num_tokens

    @property
    def oldest(self) -> _Place:
        heads = (queue[0] for queue in self.by_length.values())
        return min(heads, key=lambda place: place.num_tokens_before)

    def find_turn(self, max_tokens_ahead: int) -> _Place:
        oldest, longest = self.oldest, self.by_length[max(self.by_length)][0]
        # All that came before the oldest are gone; whoever else is gone came later, and got ahead.
        num_ahead = self.num_tokens_gone - oldest.num_tokens_before
        return longest if num_ahead + longest.num_tokens <= max_tokens_ahead else oldest

    def take(self, sequence: Sequence) -> None:
        """Take out one before whom no other of its length came."""
        length = round_length(sequence.max_tokens)
        place = self.by_length[length].popleft()
        assert place.sequence is sequence
        if not self.by_length[length]:
            del self.by_length[length]
        self.num_tokens_gone += place.num_tokens

    def remove(self, leaving: Collection[Sequence]) -> list[Sequence]:
        """Take these out, in one pass; those of them that waited here."""
        removed: list[_Place] = []
        for length, queue in list(self.by_length.items()):
            staying = deque(place for place in queue if place.sequence not in leaving)
            if len(staying) < len(queue):
                removed += [place for place in queue if place.sequence in leaving]
                self.by_length[length] = staying
                if not staying:
                    del self.by_length[length]
        self.num_tokens_gone += sum(place.num_tokens for place in removed)
        return [place.sequence for place in removed]


class Waiting:
    """
    Args:
        max_tokens_ahead: prompt tokens of later ones, of the same priority, that may be admitted
            while one waits; 0 is first come, first served.
        min_tokens_each: what each of them counts as at least. However short their prompts, they take
            places, for as long as their answers are.
    """

    def __init__(self, max_tokens_ahead: int, min_tokens_each: int = 0) -> None:
        self._max_tokens_ahead = max_tokens_ahead
        self._min_tokens_each = min_tokens_each
        self._levels: dict[int, _Level] = {}
        self._priorities: list[int] = []  # a heap: of all levels, some of which may be empty
        self._num = 0
        self.num_tokens = 0  # of their prompts

    def __len__(self) -> int:
        return self._num

    def add(self, sequence: Sequence) -> None:
        if sequence.priority not in self._levels:
            self._levels[sequence.priority] = _Level()
            heapq.heappush(self._priorities, sequence.priority)
        num_tokens = max(sequence.num_prompt_tokens, self._min_tokens_each)
        self._levels[sequence.priority].add(sequence, num_tokens)
        self._num += 1
        self.num_tokens += sequence.num_prompt_tokens

    @property
    def first(self) -> Sequence:
        """Whose turn it is; the same one until somebody comes or goes."""
        return self._find_level().find_turn(self._max_tokens_ahead).sequence

    @property
    def oldest(self) -> Sequence:
        """Who came first of the priority whose turn it is."""
        return self._find_level().oldest.sequence

    def take(self, sequence: Sequence) -> None:
        """Take out the `first` or the `oldest`."""
        self._levels[sequence.priority].take(sequence)
        self._forget([sequence])

    def remove(self, leaving: Collection[Sequence]) -> None:
        """Take out those of these that wait, in one pass over those of their priorities."""
        for priority in {sequence.priority for sequence in leaving} & self._levels.keys():
            self._forget(self._levels[priority].remove(leaving))

    def _find_level(self) -> _Level:
        """The lowest priority with which anybody waits."""
        while not (level := self._levels[self._priorities[0]]).by_length:
            del self._levels[heapq.heappop(self._priorities)]
        return level

    def _forget(self, gone: Collection[Sequence]) -> None:
        self._num -= len(gone)
        self.num_tokens -= sum(sequence.num_prompt_tokens for sequence in gone)
