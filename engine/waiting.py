"""
Who waits for a place, and whose turn it is.

Loads no torch. The lowest priority goes first and, of one priority, whoever may write the longest
answer: begun last, it would run on alone when all others have ended, and a step for one sequence
takes nearly as long as one for many. So that nobody waits for ever, later ones get ahead of one with so
many prompt tokens in all and no more; then whoever came first has the turn. Answers of about one
length go in the order in which they came.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Container

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
        num_tokens_before: of the prompts of its priority that had come before it.
    """

    sequence: Sequence
    num_tokens_before: int


@dataclass(slots=True)
class _Level:
    """
    All that wait with one priority.

    Attributes:
        by_length: those with answers of a length, as they came; no queue is empty.
        num_tokens_come, num_tokens_gone: of the prompts that ever waited here, and of those that
            wait no more.
    """

    by_length: dict[int, deque[_Place]] = field(default_factory=dict)
    num_tokens_come: int = 0
    num_tokens_gone: int = 0

    def add(self, sequence: Sequence) -> None:
        queue = self.by_length.setdefault(round_length(sequence.max_tokens), deque())
        queue.append(_Place(sequence, self.num_tokens_come))
        self.num_tokens_come += sequence.num_prompt_tokens

    def find_turn(self, max_tokens_ahead: int) -> int:
        """The length whose first one has the turn."""
        heads = {length: queue[0] for length, queue in self.by_length.items()}
        oldest = min(heads, key=lambda length: heads[length].num_tokens_before)
        longest = max(heads)
        # All that came before the oldest are gone; whoever else is gone came later, and got ahead.
        num_ahead = self.num_tokens_gone - heads[oldest].num_tokens_before
        num_more = heads[longest].sequence.num_prompt_tokens
        return longest if num_ahead + num_more <= max_tokens_ahead else oldest

    def pop(self, max_tokens_ahead: int) -> Sequence:
        length = self.find_turn(max_tokens_ahead)
        sequence = self.by_length[length].popleft().sequence
        if not self.by_length[length]:
            del self.by_length[length]
        self.num_tokens_gone += sequence.num_prompt_tokens
        return sequence

    def remove(self, leaving: Container[Sequence]) -> list[Sequence]:
        """Take these out, in one pass; those of them that waited here."""
        removed: list[Sequence] = []
        for length, queue in list(self.by_length.items()):
            staying = deque(place for place in queue if place.sequence not in leaving)
            if len(staying) < len(queue):
                removed += [place.sequence for place in queue if place.sequence in leaving]
                self.by_length[length] = staying
                if not staying:
                    del self.by_length[length]
        self.num_tokens_gone += sum(sequence.num_prompt_tokens for sequence in removed)
        return removed


class Waiting:
    """
    Args:
        max_tokens_ahead: prompt tokens of later ones, of the same priority, that may be admitted
            while one waits; 0 is first come, first served.
    """

    def __init__(self, max_tokens_ahead: int) -> None:
        self._max_tokens_ahead = max_tokens_ahead
        self._levels: dict[int, _Level] = {}
        self._num = 0
        self.num_tokens = 0  # of their prompts

    def __len__(self) -> int:
        return self._num

    def add(self, sequence: Sequence) -> None:
        self._levels.setdefault(sequence.priority, _Level()).add(sequence)
        self._num += 1
        self.num_tokens += sequence.num_prompt_tokens

    @property
    def first(self) -> Sequence:
        """Whose turn it is; the same one until somebody comes or goes."""
        level = self._levels[min(self._levels)]
        return level.by_length[level.find_turn(self._max_tokens_ahead)][0].sequence

    def pop(self) -> Sequence:
        """Take out whose turn it is."""
        priority = min(self._levels)
        sequence = self._levels[priority].pop(self._max_tokens_ahead)
        self._forget(priority, [sequence])
        return sequence

    def remove(self, leaving: Container[Sequence]) -> None:
        """Take out those of these that wait, in one pass."""
        for priority, level in list(self._levels.items()):
            self._forget(priority, level.remove(leaving))

    def _forget(self, priority: int, gone: list[Sequence]) -> None:
        self._num -= len(gone)
        self.num_tokens -= sum(sequence.num_prompt_tokens for sequence in gone)
        if not self._levels[priority].by_length:
            del self._levels[priority]
