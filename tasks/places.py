"""
How many fetches items have under way in a worker, over all its chunks, and how many of them one host has.

A host that is slow keeps its items for long, so that in the end all that is under way is its own. So
each host may have a quarter of what is free: a lone one has a fifth of all places, twenty slow ones leave
a sixth to the others, and a host that has nothing under way always gets one while there is one. Nobody
waits here: an item without a place is put aside by its chunk.
"""

import re
import threading
from collections import Counter
from collections.abc import Mapping
from typing import Final

from media.limits import FETCH_LIMITS

SHARE: Final = 4
"""A host may have one part in so many of the places that are free."""


_HOST_END: Final = re.compile(r"[/?#]")
_PORT: Final = re.compile(r":\d*$")


def find_host(url: str) -> str:
    """Under which host a URL counts, whatever its port: none is parsed before it is fetched."""
    authority = _HOST_END.split(url.partition("://")[2], 1)[0].lower()
    return _PORT.sub("", authority).rstrip(".")


class Places:
    """
    Args:
        num_places: for fetches; an item takes one for each that it has under way at a time.
        max_each: fetches that an item has under way at a time.
    """

    def __init__(
        self, num_places: int, *, max_each: int = FETCH_LIMITS.max_connections_per_item
    ) -> None:
        self._num_free = num_places
        self._max_each = max_each
        self._taken: Counter[str] = Counter()
        self._lock = threading.Lock()

    def try_take(self, wanted: Mapping[str, int]) -> bool:
        """
        Take places with all of these hosts, or none.

        Args:
            wanted: fetches from each host, those that come later too: one slow host among many holds
                all that its item has. An item gets all that it wants where there is any, or items with
                many pictures would never be begun beside those with one.
        """
        with self._lock:
            most = max(self._num_free // SHARE, 1)
            if self._num_free < 1 or any(self._taken[host] >= most for host in wanted):
                return False
            self._taken += self._bound(wanted)
            self._num_free -= self._count(wanted)
            return True

    def give_back(self, wanted: Mapping[str, int]) -> None:
        with self._lock:
            self._taken -= self._bound(wanted)  # which also forgets a host without any
            self._num_free += self._count(wanted)

    def _bound(self, wanted: Mapping[str, int]) -> Counter[str]:
        return Counter({host: min(num, self._max_each) for host, num in wanted.items()})

    def _count(self, wanted: Mapping[str, int]) -> int:
        return min(sum(wanted.values()), self._max_each)
