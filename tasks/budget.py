"""
How many bytes of media a worker holds at a time, over all its chunks.

An item is begun when there is room for all that it may bring, so that items never wait for each other
with half of their pictures in hand; what it turns out to need less is free at once, and the rest when
the engine has answered.

There are three lines, first come first served within each. The fast lane goes first, and an eighth of
all is kept for it. The large ones of bulk work have half of all at most: while they wait for their own
kind the small ones pass them, and where only small ones are in their way these wait until there is
room. So neither can hold up the other for long.
"""

import threading
from collections import deque
from dataclasses import dataclass
from enum import Enum, auto
from typing import Final

from storage.ids import ItemId

LOOK_S: Final = 0.5
"""How often one that waits looks whether its chunk is over."""

LARGE_BYTES: Final = 32 * 1024 * 1024
"""From there on an item is a large one: a clip, or a few pictures that have not come."""


class Line(Enum):
    FAST = auto()
    LARGE = auto()
    SMALL = auto()


@dataclass(frozen=True, slots=True, eq=False)
class Share:
    """What one item has taken, or waits for."""

    num_bytes: int
    line: Line


class Budget:
    """
    Args:
        max_bytes: held together; an item that alone may bring more waits until it is alone, or of bulk
            work the only one.
        large_bytes: what makes a large item.
    """

    def __init__(self, max_bytes: int, *, large_bytes: int = LARGE_BYTES) -> None:
        self._max_bytes = max_bytes
        self._large_bytes = large_bytes
        self._num_bytes = dict.fromkeys(Line, 0)
        self._waiting: dict[Line, deque[Share]] = {line: deque() for line in Line}
        self._changed = threading.Condition()

    @property
    def max_bytes(self) -> int:
        return self._max_bytes

    @property
    def num_bytes(self) -> int:
        """Taken now."""
        return sum(self._num_bytes.values())

    def build_share(self, num_bytes: int, *, is_fast: bool) -> Share:
        if is_fast:
            return Share(num_bytes, Line.FAST)
        return Share(num_bytes, Line.LARGE if num_bytes >= self._large_bytes else Line.SMALL)

    def try_take(self, share: Share) -> bool:
        """Take so much if there is room, and nobody waits for it who goes before."""
        with self._changed:
            return self._take(share)

    def take(self, share: Share, hold: "Hold") -> bool:
        """Wait for one's turn and for room; False where `hold` was closed meanwhile."""
        line = self._waiting[share.line]
        with self._changed:
            line.append(share)
            try:
                while not self._take(share):
                    if hold.is_closed:
                        return False
                    self._changed.wait(LOOK_S)
                return True
            finally:
                line.remove(share)
                self._changed.notify_all()

    def give_back(self, num_bytes: int, line: Line) -> None:
        with self._changed:
            self._num_bytes[line] -= num_bytes
            self._changed.notify_all()

    def _take(self, share: Share) -> bool:
        if not (self._is_next(share) and self._has_room(share)):
            return False
        self._num_bytes[share.line] += share.num_bytes
        return True

    def _is_next(self, share: Share) -> bool:
        if self._find_first(share.line) not in (None, share):
            return False
        if share.line is Line.FAST:
            return True
        if self._find_first(Line.FAST) is not None:
            return False
        if share.line is Line.LARGE:
            return self._may_be_large(share)
        large = self._find_first(Line.LARGE)
        return large is None or not self._may_be_large(large)

    def _find_first(self, line: Line) -> Share | None:
        return self._waiting[line][0] if self._waiting[line] else None

    def _may_be_large(self, share: Share) -> bool:
        num_large = self._num_bytes[Line.LARGE]
        return num_large == 0 or num_large + share.num_bytes <= self._max_bytes // 2

    def _has_room(self, share: Share) -> bool:
        most, held = self._max_bytes, self.num_bytes
        in_its_way = held
        if share.line is not Line.FAST:
            most -= self._max_bytes // 8
            # Or chats could keep out for ever what is above the budget.
            in_its_way -= self._num_bytes[Line.FAST]
        return in_its_way == 0 or held + share.num_bytes <= most


class Hold:
    """What one chunk has taken, by item. When the chunk is over, all of it is given back."""

    def __init__(self, budget: Budget) -> None:
        self.is_closed = False
        self._budget = budget
        self._taken: dict[ItemId, Share] = {}
        self._lock = threading.Lock()

    @property
    def most_bytes(self) -> int:
        """That all chunks may hold together."""
        return self._budget.max_bytes

    def take(self, item: ItemId, num_bytes: int, *, wait: bool, is_fast: bool = False) -> bool:
        """Whether the item may be begun; without `wait`, whether it may be now."""
        share = self._budget.build_share(num_bytes, is_fast=is_fast)
        is_taken = self._budget.take(share, self) if wait else self._budget.try_take(share)
        if is_taken:
            with self._lock:
                if not self.is_closed:
                    self._taken[item] = share
                    return True
            self._budget.give_back(num_bytes, share.line)
        return False

    def shrink(self, item: ItemId, num_bytes: int) -> None:
        """It has come, and is so large."""
        with self._lock:
            share = self._taken.get(item)
            if share is None:
                return
            self._taken[item] = Share(num_bytes, share.line)
        self._budget.give_back(share.num_bytes - num_bytes, share.line)

    def release(self, item: ItemId) -> None:
        with self._lock:
            share = self._taken.pop(item, None)
        if share is not None:
            self._budget.give_back(share.num_bytes, share.line)

    def close(self) -> None:
        with self._lock:
            self.is_closed = True
            taken = list(self._taken.values())
            self._taken.clear()
        for share in taken:
            self._budget.give_back(share.num_bytes, share.line)
