"""
The limits of a host that all workers keep together, over the broker.

How many fetches are under way, how many were begun in this second, and whether the host has asked
for a pause. Of the first two an eighth is kept for the fast lane. Plain commands in transactions, no
scripts: an operator may forbid those. Where the broker does not answer at once nothing is shared for a
while, and each worker keeps its own limits: fetching never waits for Redis.
"""

import asyncio
import hashlib
import math
import random
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final

import redis.asyncio
import structlog

from media.hosts import count_kept, say_paused
from media.limits import FETCH_LIMITS
from tasks.broker import as_client_url

logger = structlog.get_logger(__name__)

PREFIX: Final = "darkroom:host:"
TIMEOUT_S: Final = 0.2
AWAY_S: Final = 5.0
"""How long a broker that did not answer is not asked again."""

HELD_S: Final = 60.0

MAX_PAUSE_S: Final = FETCH_LIMITS.max_pause_s
LOOK_S: Final = 0.05


class RedisLimits:
    """
    Fills `media.hosts.SharedLimits`; used on one event loop.

    Args:
        max_connections: fetches from one host at a time, of all workers.
        max_rate: fetches from one host that are begun in a second, of all workers.
        held_s: what a worker that died held is free after that; longer than any fetch lasts.
    """

    def __init__(
        self, broker_url: str, *, max_connections: int, max_rate: int, held_s: float = HELD_S
    ) -> None:
        self._held_s = held_s
        self._max_connections = max_connections
        self._max_rate = max_rate
        self._client: Any = redis.asyncio.Redis.from_url(
            as_client_url(broker_url),
            socket_timeout=TIMEOUT_S,
            socket_connect_timeout=TIMEOUT_S,
            decode_responses=True,
        )
        self._away_until = 0.0
        self._ended: list[tuple[float, str, str]] = []  # turns that still count, and until when

    @asynccontextmanager
    async def turn(self, host: str, *, is_fast: bool = False) -> AsyncIterator[None]:
        key, token = _key(host), secrets.token_hex(8)
        await self._take_back()
        try:
            await self._wait_for_place(key, token, is_fast)
            await self._wait_for_second(key, is_fast)
            yield
        finally:
            self._ended.append((time.time() + self._held_s, key, token))
            await self._take_back()

    async def pause(self, host: str, seconds: float) -> None:
        pause_ms = int(1000 * min(seconds, MAX_PAUSE_S))
        if pause_ms > 0:
            await self._ask(["set", f"{_key(host)}:pause", "1", "px", pause_ms])

    async def aclose(self) -> None:
        await self._client.aclose()

    async def _take_back(self) -> None:
        """
        End turns that are over, also those that ended while the broker was away.

        Else each would count for as long as one that is held: a broker that was slow once would have
        every worker wait for hosts from which nobody fetches.
        """
        ended = [turn for turn in self._ended if turn[0] > time.time()]
        self._ended = []
        if not ended:
            return
        tokens: dict[str, list[str]] = {}
        for _, key, token in ended:
            tokens.setdefault(key, []).append(token)
        answers = None
        try:
            answers = await self._ask(*(["zrem", f"{k}:open", *t] for k, t in tokens.items()))
        finally:  # a fetch that is given up meanwhile must not forget those of others
            if answers is None:
                self._ended += ended

    async def _wait_for_place(self, key: str, token: str, is_fast: bool) -> None:
        kept = 0 if is_fast else count_kept(self._max_connections)
        while True:
            now = time.time()
            found = await self._ask(
                ["pttl", f"{key}:pause"],
                ["zremrangebyscore", f"{key}:open", "-inf", now],
                ["zadd", f"{key}:open", now + self._held_s, token],
                ["zcard", f"{key}:open"],
                ["expire", f"{key}:open", math.ceil(self._held_s)],
            )
            if found is None:
                return
            left_ms, _, _, num_open, _ = found
            if left_ms > 0:
                raise say_paused(left_ms / 1000)
            if num_open <= self._max_connections - kept:
                return
            await self._ask(["zrem", f"{key}:open", token])
            await asyncio.sleep(LOOK_S * random.uniform(0.5, 1.5))  # noqa: S311 - spreads load

    async def _wait_for_second(self, key: str, is_fast: bool) -> None:
        """Wait for a second in which not so many were begun that this one would be too much."""
        kept = count_kept(self._max_rate)
        is_apart = is_fast and kept > 0
        most = kept if is_apart else self._max_rate - kept
        while True:
            second = int(time.time())
            # Whoever must wait has counted too, so those of the fast lane are counted apart.
            counter = f"{key}:{second}:fast" if is_apart else f"{key}:{second}"
            found = await self._ask(["incr", counter], ["expire", counter, 5])
            if found is None or found[0] <= most:
                return
            await asyncio.sleep(max(0.0, second + 1 - time.time()))

    async def _ask(self, *commands: list[Any]) -> list[Any] | None:
        """The answers to a transaction; None where the broker is away."""
        if time.monotonic() < self._away_until:
            return None
        try:
            async with self._client.pipeline(transaction=True) as pipeline:
                for command in commands:
                    pipeline.execute_command(*command)
                answers: list[Any] = await pipeline.execute()
                return answers
        except (redis.RedisError, OSError) as error:
            self._away_until = time.monotonic() + AWAY_S
            logger.warning("host_limits_not_shared", error=type(error).__name__, for_s=AWAY_S)
            return None


def _key(host: str) -> str:
    """A client's word never stands in a key as it is."""
    return PREFIX + hashlib.sha256(host.encode()).hexdigest()[:32]
