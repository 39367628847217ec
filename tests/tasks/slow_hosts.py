"""
A job whose pictures lie on many hosts, some of which drip: what does the rest of it lose?

    python -m tests.tasks.slow_hosts --items 3000 --hosts 100 --timeout-s 5

The real preparer, runner, database and fetcher, and real servers on loopback under many names; only
the engine is one that answers at a set rate. Prints the rate of the good items without and with
dripping hosts.
"""

import argparse
import asyncio
import json
import shutil
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import ip_network
from pathlib import Path
from typing import Any

from engine.request import Result
from media.addresses import AddressRules
from media.fetch import FetchConfig
from media.sources import Sources, SourcesThread
from migrations.upgrade import upgrade
from storage import jobs
from storage.ids import JobId
from storage.states import ItemState
from tasks.config import load_config
from tasks.engines import Prompt
from tasks.expand import expand
from tasks.prefetch import Preparer
from tasks.run import Runner
from tasks.stores import open_stores
from tasks.submit import parse_submission, submit
from tasks.worker import FETCH_THREADS
from tests.tasks.fakes import MODEL, InstantEngine, RecordingDispatcher, build_request

PICTURE = b"\xff\xd8\xff" + bytes(20_000)
SLOW = 0.2


@dataclass(frozen=True)
class Campaign:
    """
    Args:
        num_hosts: a fifth of them drips in the second half.
        timeout_s: of one picture.
        items_per_s: what the engine answers.
    """

    num_items: int = 3000
    num_hosts: int = 100
    timeout_s: float = 5.0
    items_per_s: float = 100.0


class PacedEngine(InstantEngine):
    """Answers so many prompts a second, whichever chunk they come from."""

    def __init__(self, items_per_s: float) -> None:
        super().__init__()
        self._pause_s = 1 / items_per_s
        self._next = 0.0
        self.begun_at: float | None = None
        self._lock = threading.Lock()

    def stream(self, prompts: Iterable[Prompt]) -> Iterator[Result]:
        for prompt in prompts:
            with self._lock:
                self._next = max(self._next, time.monotonic()) + self._pause_s
                until = self._next
                self.begun_at = self.begun_at or time.monotonic()
            time.sleep(max(0.0, until - time.monotonic()))
            yield self.answer(prompt)


@contextmanager
def serve_hosts(is_dripping: bool) -> Iterator[int]:
    """One server for all hosts; those named slow-… send a byte a second for ever. Yields its port."""
    loop = asyncio.new_event_loop()
    ready: list[int] = []
    servers: list[asyncio.Server] = []
    started = threading.Event()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(PICTURE))
                if is_dripping and b"Host: slow-" in head:
                    while True:
                        writer.write(b"x")
                        await writer.drain()
                        await asyncio.sleep(1)
                await asyncio.sleep(0.01)
                writer.write(PICTURE)
                await writer.drain()
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            writer.transport.abort()

    async def start() -> None:
        server = await asyncio.start_server(answer, "127.0.0.1", 0, backlog=1024)
        servers.append(server)
        ready.append(server.sockets[0].getsockname()[1])
        started.set()

    def run() -> None:
        loop.run_until_complete(start())
        loop.run_forever()

    async def stop() -> None:
        servers[0].close()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(0.05)  # lets the connections end before the loop does
        loop.stop()

    thread = threading.Thread(target=run)
    thread.start()
    assert started.wait(60)
    try:
        yield ready[0]
    finally:
        asyncio.run_coroutine_threadsafe(stop(), loop)
        thread.join()
        loop.close()


async def find_here(host: str) -> Sequence[str]:
    return ["127.0.0.1"]


def measure(campaign: Campaign, folder: Path, *, is_dripping: bool) -> float:
    """The good items a second, from the first prompt in the engine to the commit of the last one."""
    config = load_config(home=folder, max_open_items=None)
    folder.mkdir()
    stores = open_stores(config)
    upgrade(stores.database)
    dispatcher = RecordingDispatcher(config, "redis://127.0.0.1:1/0")
    engine = PacedEngine(campaign.items_per_s)
    num_slow = round(campaign.num_hosts * SLOW)
    hosts = [
        f"{'slow' if number < num_slow else 'good'}-{number}.test"
        for number in range(campaign.num_hosts)
    ]
    with serve_hosts(is_dripping) as port:
        requests = [
            build_request(
                f"r-{number}", messages=_show(hosts[number * 7 % len(hosts)], port, number)
            )
            for number in range(campaign.num_items)
        ]
        num_good = sum(not (is_dripping and "//slow-" in json.dumps(one)) for one in requests)
        job = submit(stores, dispatcher, parse_submission({"requests": requests})).job.id
        expand(stores, dispatcher, config, job)
        fetching = FetchConfig(
            image_fetch_timeout_s=campaign.timeout_s,
            rules=AddressRules(allowed_networks=(ip_network("127.0.0.1/32"),)),
            ports=frozenset({port}),
        )
        with (
            ThreadPoolExecutor(FETCH_THREADS) as pool,
            SourcesThread(Sources(fetching, find_here)) as sources,
        ):
            preparer = Preparer(
                stores,
                MODEL,
                engine.limits,
                engine.defaults,
                sources.fetch_all,
                pool,
                engine.measure_clip,
            )
            runner = Runner(stores, dispatcher, config, engine, preparer, worker="w")
            runner.start()
            started = time.monotonic()
            threads = [
                threading.Thread(target=_work, args=(runner,))
                for _ in range(config.chunks_in_flight)
            ]
            for thread in threads:
                thread.start()
            while runner.num_completed < num_good and time.monotonic() < started + 600:
                time.sleep(0.01)
            seconds = time.monotonic() - (engine.begun_at or started)
            assert num_good == _count(stores.database, job, ItemState.COMPLETED)
            runner.drain()
            runner.abandon()
            for thread in threads:
                thread.join()
            runner.stop()
    dispatcher.close()
    stores.close()
    return num_good / seconds


def _work(runner: Runner) -> None:
    while not runner.is_draining.is_set():
        if not runner.run_chunk():
            time.sleep(0.05)


def _show(host: str, port: int, number: int) -> list[dict[str, Any]]:
    url = f"http://{host}:{port}/{number}.jpg"
    return [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]


def _count(database: Any, job: JobId, state: ItemState) -> int:
    with database.read() as session:
        return jobs.count_items(session, job)[state]


def run(campaign: Campaign) -> tuple[float, float]:
    """The rate of the good items when all hosts are good, and when a fifth drips."""
    folder = Path(tempfile.mkdtemp(prefix="darkroom-slow-"))
    try:
        return (
            measure(campaign, folder / "good", is_dripping=False),
            measure(campaign, folder / "slow", is_dripping=True),
        )
    finally:
        shutil.rmtree(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--items", type=int, default=Campaign.num_items)
    parser.add_argument("--hosts", type=int, default=Campaign.num_hosts)
    parser.add_argument("--timeout-s", type=float, default=Campaign.timeout_s)
    parser.add_argument("--items-per-s", type=float, default=Campaign.items_per_s)
    given = parser.parse_args()
    campaign = Campaign(given.items, given.hosts, given.timeout_s, given.items_per_s)
    good, slow = run(campaign)
    print(f"{campaign}")  # noqa: T201
    print(  # noqa: T201
        f"good items a second: {good:.1f} when all hosts are good, {slow:.1f} when "
        f"{SLOW:.0%} of them drip: {slow / good:.1%}"
    )


if __name__ == "__main__":
    main()
