"""
Polls at a steady rate, whether or not the answers come: what many clients do to a status page.

The load is open: each poll has a time at which it is due, and its latency counts from then on, also
where all connections were busy. A client that waits for one answer before it asks again would ask
less often just when the server is slow, and so report the good times only.
"""

import asyncio
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Self

NUM_CONNECTIONS: Final = 32


@dataclass(frozen=True, slots=True)
class Poll:
    """
    Args:
        due_s: on the clock of `time.time`.
        latency_s: from then to the last byte of the answer.
        status: of HTTP; 0 where the connection broke.
    """

    due_s: float
    latency_s: float
    status: int


class Polls:
    """Asks for one path, from a thread of its own, between entering and leaving the block."""

    def __init__(self, port: int, path: str, *, api_key: str | None, rate: float) -> None:
        key = f"Authorization: Bearer {api_key}\r\n" if api_key else ""
        self._port = port
        self._request = f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n{key}\r\n".encode()
        self._rate = rate
        self._is_over = threading.Event()
        self._done: list[Poll] = []
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), name="polls")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._is_over.set()
        self._thread.join()

    def between(self, start_s: float, end_s: float) -> list[Poll]:
        """The polls that were due in this time, on the clock of `time.time`."""
        return [poll for poll in self._done if start_s <= poll.due_s < end_s]

    async def _run(self) -> None:
        due: asyncio.Queue[float | None] = asyncio.Queue()
        connections = [asyncio.create_task(self._ask(due)) for _ in range(NUM_CONNECTIONS)]
        started = time.time()
        number = 0
        while not self._is_over.is_set():
            at = started + number / self._rate
            number += 1
            await asyncio.sleep(at - time.time())
            due.put_nowait(at)
        for _ in connections:
            due.put_nowait(None)
        await asyncio.gather(*connections)

    async def _ask(self, due: "asyncio.Queue[float | None]") -> None:
        streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        while (at := await due.get()) is not None:
            try:
                if streams is None:
                    streams = await asyncio.open_connection("127.0.0.1", self._port)
                streams[1].write(self._request)
                status = await _read_answer(streams[0])
            except (OSError, EOFError, ValueError):
                if streams is not None:
                    streams[1].close()
                streams, status = None, 0
            self._done.append(Poll(at, time.time() - at, status))
        if streams is not None:
            streams[1].close()


async def _read_answer(reader: asyncio.StreamReader) -> int:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
    _, _, length = head.partition("\r\ncontent-length:")
    await reader.readexactly(int(length.partition("\r\n")[0]))
    return int(head.split(" ", 2)[1])


def summarize(polls: Sequence[Poll]) -> dict[str, float]:
    """Counts, and latencies in milliseconds."""
    latencies = sorted(poll.latency_s * 1000 for poll in polls)
    if not latencies:
        return {"num": 0}
    return {
        "num": len(polls),
        "num_bad": sum(poll.status != 200 for poll in polls),
        "p50_ms": round(pick(latencies, 0.50), 1),
        "p99_ms": round(pick(latencies, 0.99), 1),
        "max_ms": round(latencies[-1], 1),
    }


def pick(ordered: Sequence[float], share: float) -> float:
    """The smallest value that so many of them do not exceed."""
    return ordered[min(len(ordered) - 1, max(0, -int(-share * len(ordered) // 1) - 1))]
