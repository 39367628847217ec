"""
What processes may know together of the hosts that they fetch from: a port, and who knows nothing.

`media` knows no Redis; `tasks.hosts` fills the port. Each fetcher keeps limits of its own besides.
"""

from contextlib import AbstractAsyncContextManager, nullcontext
from typing import Protocol

from media.errors import HostPausedError


def say_paused(left_s: float) -> HostPausedError:
    """What is said to whoever comes before a pause is over."""
    error = HostPausedError(retryable=True)
    error.retry_after_s = left_s
    return error


def count_kept(num_slots: int) -> int:
    """How many of a limit are kept for the fast lane: an eighth, and one at least where there are two."""
    return min(max(num_slots // 8, 1), num_slots - 1)


class SharedLimits(Protocol):
    """Methods never fail because the others cannot be reached: then nothing is shared."""

    def turn(self, host: str, *, is_fast: bool = False) -> AbstractAsyncContextManager[object]:
        """
        Wait for one's turn with a host; hold the block until the fetch is over.

        Args:
            is_fast: of the fast lane, for which `count_kept` of each limit are kept.

        Raises:
            HostPausedError: the host has asked one of the processes for a pause.
        """

    async def pause(self, host: str, seconds: float) -> None:
        """A host has asked for it; longer pauses than are sensible are cut."""

    async def aclose(self) -> None: ...


class Unshared:
    """Of a process that is alone."""

    def turn(self, host: str, *, is_fast: bool = False) -> AbstractAsyncContextManager[object]:
        return nullcontext()

    async def pause(self, host: str, seconds: float) -> None:
        pass

    async def aclose(self) -> None:
        pass
