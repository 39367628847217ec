"""What workers share of the hosts they fetch from: real processes, and a real broker that may be away."""

import asyncio
import json
import os
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from ipaddress import ip_network
from pathlib import Path

import pytest
from sqlalchemy import select

from media.addresses import AddressRules
from media.errors import FetchFailedError, HostPausedError
from media.fetch import FetchConfig, Fetcher
from media.limits import FETCH_LIMITS, IMAGE_LIMITS
from storage.states import ItemState
from storage.tables import Item
from tasks import hosts
from tasks.broker import build_client
from tasks.config import Config
from tasks.dispatch import Dispatcher
from tasks.expand import expand
from tasks.hosts import RedisLimits
from tasks.stores import Stores
from tasks.submit import parse_submission, submit
from tasks.worker import ExitCode
from tests.media.servers import Answer, Server, answering, serve
from tests.services import freeze
from tests.tasks.fakes import build_request
from tests.tasks.host_client import PATIENCE_S
from tests.tasks.processes import open_fleet

PICTURE = answering(b"\xff\xd8\xff")
TIMEOUT_S = hosts.TIMEOUT_S


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A broker that answers late counts as away only in tests that take it away."""
    monkeypatch.setattr(hosts, "TIMEOUT_S", PATIENCE_S)


async def fetch_in(
    num_processes: int, broker: str, server: Server, *, num: int, connections: int, rate: int
) -> list[list[str]]:
    """What became of the fetches of each process; all run at the same time."""
    words = map(str, (server.port, num, connections, rate))
    command = [sys.executable, "-m", "tests.tasks.host_client", broker, *words]
    processes = [
        await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
        for _ in range(num_processes)
    ]
    outputs = await asyncio.gather(*(process.communicate() for process in processes))
    return [json.loads(output) for output, _ in outputs]


def noting(moments: list[float], answer: Answer) -> Answer:
    async def note(head: str, writer: asyncio.StreamWriter) -> None:
        moments.append(time.time())
        await answer(head, writer)

    return note


def test_workers_together_keep_to_the_connections_and_the_rate_of_a_host(broker: str) -> None:
    most, now = 0, 0
    moments: list[float] = []

    async def answer(head: str, writer: asyncio.StreamWriter) -> None:
        nonlocal most, now
        now += 1
        most = max(most, now)
        await asyncio.sleep(0.02)
        now -= 1
        await PICTURE(head, writer)

    async def scenario() -> list[list[str]]:
        async with serve(noting(moments, answer)) as server:
            return await fetch_in(2, broker, server, num=16, connections=3, rate=15)

    assert [["fetched"] * 16] * 2 == asyncio.run(scenario())
    assert most <= 3  # each alone would have had 8
    assert moments[-1] - moments[0] > 1.0  # 32 are in three seconds at least
    # Counted when they are begun, and seen a moment later, on a busy machine perhaps in the next second.
    assert max(Counter(map(int, moments)).values()) < 2 * 15


def test_pause_that_one_worker_was_asked_for_is_kept_by_all(broker: str) -> None:
    heads: list[float] = []
    busy = noting(heads, answering(status="429 X", headers=["Retry-After: 60"]))

    async def scenario() -> list[str]:
        async with serve(busy) as server:
            first = await fetch_alone(broker, server, num=1)
            ((second,),) = await fetch_in(1, broker, server, num=1, connections=8, rate=100)
            return [first, second]

    assert ["image_fetch_failed", "host_paused"] == asyncio.run(scenario())
    assert 1 == len(heads)


def test_pause_is_no_longer_than_is_sensible_and_no_host_stands_in_redis(broker: str) -> None:
    async def scenario() -> float | None:
        limits = RedisLimits(broker, max_connections=1, max_rate=1)
        await limits.pause("pictures.test", 1e9)
        with pytest.raises(HostPausedError) as caught:
            async with limits.turn("pictures.test"):
                pass
        async with limits.turn("others.test"):
            pass
        await limits.aclose()
        return caught.value.retry_after_s

    left_s = asyncio.run(scenario())

    assert left_s is not None
    assert hosts.MAX_PAUSE_S - 60 < left_s <= hosts.MAX_PAUSE_S
    with build_client(broker) as client:
        keys = list(client.scan_iter())
        assert keys
        assert not [key for key in keys if "test" in key]
        assert all(0 < client.ttl(key) <= hosts.MAX_PAUSE_S for key in keys)


def test_turn_of_a_worker_that_died_is_free_in_the_end(broker: str) -> None:
    async def scenario() -> float:
        dead = RedisLimits(broker, max_connections=1, max_rate=100, held_s=1.0)
        alive = RedisLimits(broker, max_connections=1, max_rate=100, held_s=1.0)
        held = dead.turn("pictures.test")
        started = time.monotonic()
        await held.__aenter__()
        async with alive.turn("pictures.test"):
            waited_s = time.monotonic() - started
        await dead.aclose()
        await alive.aclose()
        return waited_s

    assert 0.9 < asyncio.run(scenario()) < 30


def test_fast_lane_waits_for_no_turn_that_bulk_work_holds(broker: str) -> None:
    async def scenario() -> None:
        bulk = RedisLimits(broker, max_connections=2, max_rate=4)
        chat = RedisLimits(broker, max_connections=2, max_rate=4)
        async with asyncio.timeout(60):
            async with bulk.turn("pictures.test"):
                waiting = [asyncio.create_task(take(bulk)) for _ in range(8)]
                await asyncio.sleep(0.2)
                assert not any(one.done() for one in waiting)
                async with chat.turn("pictures.test", is_fast=True):
                    pass
            await asyncio.gather(*waiting)
        await bulk.aclose()
        await chat.aclose()

    async def take(limits: RedisLimits) -> None:
        async with limits.turn("pictures.test"):
            pass

    asyncio.run(scenario())


@contextmanager
def frozen(broker: str) -> Iterator[None]:
    with build_client(broker) as client:
        pid = int(client.info("server")["process_id"])
    freeze(pid)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


async def fetch_alone(broker: str, server: Server, *, num: int) -> str:
    config = FetchConfig(
        rules=AddressRules(allowed_networks=(ip_network("127.0.0.1/32"),)),
        ports=frozenset({server.port}),
        limits=replace(FETCH_LIMITS, retry_wait_s=0.01),
    )

    async def find_here(host: str) -> list[str]:
        return ["127.0.0.1"]

    shared = RedisLimits(broker, max_connections=1, max_rate=1)
    async with Fetcher(config, find_here, shared=shared) as fetcher:
        urls = [f"http://pictures.test:{server.port}/{number}" for number in range(num)]
        try:
            await asyncio.gather(*(fetcher.fetch(url, IMAGE_LIMITS) for url in urls))
        except FetchFailedError as error:
            return error.code
    return "fetched"


@pytest.mark.parametrize("how", ["gone", "frozen"])
def test_fetching_never_waits_for_a_broker_that_is_away(
    broker: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hosts, "TIMEOUT_S", TIMEOUT_S)

    async def scenario(url: str) -> str:
        async with serve(PICTURE) as server:
            return await fetch_alone(url, server, num=60)

    started = time.monotonic()
    if how == "gone":
        end = asyncio.run(scenario("redis://127.0.0.1:1/0"))
    else:
        with frozen(broker):
            end = asyncio.run(scenario(broker))

    assert "fetched" == end
    assert time.monotonic() - started < 30  # at one a second it would be 60


def test_turn_that_ended_while_the_broker_was_away_is_free_when_it_is_back(
    broker: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hosts, "AWAY_S", 2.0)
    monkeypatch.setattr(hosts, "TIMEOUT_S", 2.0)

    async def scenario() -> float:
        ours = RedisLimits(broker, max_connections=1, max_rate=100)
        others = RedisLimits(broker, max_connections=1, max_rate=100)
        async with ours.turn("pictures.test"):
            with frozen(broker):
                await ours.pause("others.test", 60)  # so it knows that nobody answers
        started = time.monotonic()
        await asyncio.sleep(2 * hosts.AWAY_S)
        async with ours.turn("elsewhere.test"), others.turn("pictures.test"):
            waited_s = time.monotonic() - started
        await ours.aclose()
        await others.aclose()
        return waited_s

    assert asyncio.run(scenario()) < 30  # whoever held it and died would keep it for 60


def test_fetch_that_is_given_up_while_turns_are_taken_back_loses_none(broker: str) -> None:
    async def scenario() -> float:
        ours = RedisLimits(broker, max_connections=1, max_rate=100)
        others = RedisLimits(broker, max_connections=1, max_rate=100)
        is_begun, is_over = asyncio.Event(), asyncio.Event()

        async def fetch() -> None:
            async with ours.turn("pictures.test"):
                is_begun.set()
                await is_over.wait()

        fetching = asyncio.create_task(fetch())
        await is_begun.wait()
        await ours._client.connection_pool.disconnect()  # or the broker would hear of it later
        with frozen(broker):
            is_over.set()
            await asyncio.sleep(0.2)  # it waits for a connection, to tell the broker of its end
            fetching.cancel()
            await asyncio.wait([fetching])
        started = time.monotonic()
        async with ours.turn("elsewhere.test"), others.turn("pictures.test"):
            waited_s = time.monotonic() - started
        await ours.aclose()
        await others.aclose()
        return waited_s

    assert asyncio.run(scenario()) < 30


def test_broker_that_forbids_scripts_is_enough(broker: str) -> None:
    with build_client(broker) as client:
        client.execute_command(
            *("ACL", "SETUSER", "fetcher", "on", ">hush", "~darkroom:*", "-@all"),
            *("+multi", "+exec", "+pttl", "+zremrangebyscore", "+zadd", "+zcard", "+expire"),
            *("+zrem", "+incr", "+set", "+hello", "+client|setinfo"),
        )
        try:
            url = broker.replace("redis://", "redis://fetcher:hush@", 1)

            async def scenario() -> bool:
                limits = RedisLimits(url, max_connections=1, max_rate=1)
                async with limits.turn("pictures.test"):
                    await limits.pause("pictures.test", 60)
                is_shared = not limits._away_until
                with pytest.raises(HostPausedError):
                    async with limits.turn("pictures.test"):
                        pass
                await limits.aclose()
                return is_shared

            assert asyncio.run(scenario())
        finally:
            client.execute_command("ACL", "DELUSER", "fetcher")


@pytest.mark.services
@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_worker_that_is_told_to_stop_gives_up_what_it_fetches(
    tmp_path: Path, stores: Stores, config: Config, broker: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        settings = {
            "HOME": str(config.home),
            "DATABASE_URL": config.database_url,
            "REDIS_URL": broker,
            "DRAIN_S": "1",
            "IMAGE_FETCH_TIMEOUT": "600",
            "MEDIA_ALLOWED_NETWORKS": "127.0.0.1/32",
            "MEDIA_PORTS": str(port),
        }
        part = {"type": "image_url", "image_url": {"url": f"http://127.0.0.1:{port}/a.jpg"}}
        request = build_request("a", messages=[{"role": "user", "content": [part]}])
        with open_fleet(tmp_path, **settings) as fleet:
            worker = fleet.start("gpu")
            dispatcher = Dispatcher(config, broker)
            job = submit(stores, dispatcher, parse_submission({"requests": [request]})).job.id
            expand(stores, dispatcher, config, job)
            dispatcher.close()
            silent.settimeout(120)
            connection, _ = silent.accept()  # it is on its way, and never comes
            worker.send_signal(signal.SIGTERM)
            code = worker.wait(120)  # the fetch alone would take 600
            connection.close()

    assert code in (ExitCode.DRAINED, ExitCode.DEADLINE)
    with stores.database.read() as session:
        (item,) = session.scalars(select(Item).where(Item.job_id == job))
        assert (ItemState.PENDING, 0) == (item.state, item.charged)
