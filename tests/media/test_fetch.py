"""
The fetcher against real servers on loopback: what it brings, and what it never lets through.

127.0.0.1 alone is on the allow-list. A canary listens on ::1, which is not: whatever way leads
there, nobody may knock.
"""

import asyncio
import email.utils
import hashlib
import pickle
import socket
import ssl
import threading
import time
import tracemalloc
from collections.abc import Coroutine, Mapping
from concurrent import futures
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from ipaddress import ip_network
from pathlib import Path
from typing import Any, TypeVar

import pytest

from media.addresses import AddressRules
from media.errors import (
    BadUrlError,
    FetchFailedError,
    FetchTimeoutError,
    FetchTooLargeError,
    HostNotAllowedError,
    HostPausedError,
)
from media.fetch import (
    FetchConfig,
    Fetcher,
    Resolve,
    SystemResolver,
    fetch_timeout_from,
    video_fetch_timeout_from,
)
from media.fetched import UNKNOWN_MEDIA_TYPE, Fetched
from media.limits import FetchLimits, ImageLimits, VideoLimits
from media.sources import Sources, SourcesThread
from tests.media.servers import (
    QUICK,
    Answer,
    Names,
    Server,
    answering,
    endless,
    in_turn,
    make_tls,
    raw,
    redirecting,
    serve,
)

LIMITS = ImageLimits(max_bytes=100_000)
RULES = AddressRules(allowed_networks=(ip_network("127.0.0.1/32"),))
PATH = "/private/a.jpg?signature=hush"
JPEG = b"\xff\xd8\xff" + bytes(2000) + b"\xff\xd9"

Outcome = Fetched | FetchFailedError
T = TypeVar("T")


def config_for(
    *servers: Server, limits: FetchLimits = QUICK, timeout_s: float = 10.0
) -> FetchConfig:
    ports = frozenset({80, 443, *(server.port for server in servers)})
    return FetchConfig(image_fetch_timeout_s=timeout_s, rules=RULES, ports=ports, limits=limits)


async def outcome_of(
    fetcher: Fetcher, url: str, limits: ImageLimits | VideoLimits = LIMITS
) -> Outcome:
    try:
        return await fetcher.fetch(url, limits)
    except FetchFailedError as error:
        return error


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(coroutine)


def fetch_from(
    answer: Answer | Mapping[str, Answer],
    path: str = PATH,
    names: Names | None = None,
    limits: FetchLimits = QUICK,
    timeout_s: float = 10.0,
) -> tuple[Outcome, Server]:
    """Serve these answers, fetch one path over http, and return how it ended."""

    async def scenario() -> tuple[Outcome, Server]:
        async with serve(answer) as server:
            config = config_for(server, limits=limits, timeout_s=timeout_s)
            async with Fetcher(config, names or Names()) as fetcher:
                url = f"http://pictures.test:{server.port}{path}"
                return await outcome_of(fetcher, url), server

    return run(scenario())


def assert_failed(
    outcome: Outcome, error_type: type[FetchFailedError], retryable: bool = False
) -> FetchFailedError:
    """Fail unless it is this very error, with a text and facts that give nothing away."""
    assert type(outcome) is error_type, outcome
    assert isinstance(outcome, FetchFailedError)
    assert retryable == outcome.retryable
    text = str(outcome)
    for secret in (
        "127.0.0.1",
        "::1",
        "169.254",
        "pictures",
        "inside",
        "private",
        "hush",
        "passwd",
    ):
        assert secret not in text
    assert "httpcore" not in text
    assert "Errno" not in text
    assert text.endswith(".")
    assert len(text.split(". ")) >= 2, "the text says what to do"
    assert outcome.facts is not None
    assert outcome.code == outcome.facts["error_code"]
    assert not {"hush", PATH} & {str(fact) for fact in outcome.facts.values()}
    return outcome


def assert_fetched(outcome: Outcome, content: bytes = JPEG) -> Fetched:
    assert isinstance(outcome, Fetched), outcome
    assert content == outcome.content
    return outcome


# What it brings


def test_bytes_come_back_with_their_type_and_report() -> None:
    answer = answering(JPEG, headers=["Content-Type: Image/JPEG; q=1"])
    outcome, server = fetch_from(answer)
    fetched = assert_fetched(outcome)

    assert "image/jpeg" == fetched.media_type
    assert ("http", "pictures.test") == (fetched.report.scheme, fetched.report.host)
    assert len(JPEG) == fetched.report.num_bytes
    assert hashlib.sha256(JPEG).hexdigest() == fetched.report.sha256
    assert (1, 0, None) == (
        fetched.report.num_tries,
        fetched.report.num_redirects,
        fetched.report.error_code,
    )
    assert 0 < fetched.report.fetch_ms < 3000
    assert [PATH] == server.paths


@pytest.mark.parametrize("claim", ["", "Content-Type: ", "Content-Type: nonsense", "X: y"])
def test_unknown_media_type_is_called_so(claim: str) -> None:
    outcome, _ = fetch_from(answering(JPEG, headers=[claim] if claim else []))

    assert UNKNOWN_MEDIA_TYPE == assert_fetched(outcome).media_type


def test_request_says_no_more_than_it_must(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("NETRC", "nowhere")
    outcome, server = fetch_from(answering(JPEG))
    names = {line.split(":")[0].lower() for line in server.heads[0].splitlines()[1:] if line}

    assert_fetched(outcome)
    assert {"host", "user-agent", "accept", "accept-encoding"} == names
    assert f"Host: pictures.test:{server.port}\r\n" in server.heads[0]
    assert "Accept-Encoding: identity\r\n" in server.heads[0]


@pytest.mark.parametrize("spelled", ["pictures.test", "PICTURES.Test", "pictures.test."])
def test_one_spelling_is_looked_up_connected_to_and_asked_for(spelled: str) -> None:
    async def scenario() -> tuple[Outcome, Server, Names]:
        names = Names()
        async with serve(answering(JPEG)) as server, Fetcher(config_for(server), names) as fetcher:
            url = f"HTTP://{spelled}:{server.port}/a#b"
            return await outcome_of(fetcher, url), server, names

    outcome, server, names = run(scenario())

    assert "pictures.test" == assert_fetched(outcome).report.host
    assert ["pictures.test"] == names.asked
    assert server.heads[0].startswith(f"GET /a HTTP/1.1\r\nHost: pictures.test:{server.port}\r\n")


def test_cookies_are_not_kept() -> None:
    async def scenario() -> Server:
        answer = answering(JPEG, headers=["Set-Cookie: session=1; Path=/"])
        async with serve(answer) as server, Fetcher(config_for(server), Names()) as fetcher:
            for path in ("/1", "/2"):
                url = f"http://pictures.test:{server.port}{path}"
                assert_fetched(await outcome_of(fetcher, url))
            return server

    server = run(scenario())

    assert 1 == server.num_connections  # kept open between the two
    assert not any("cookie" in head.lower() for head in server.heads)


def test_chunked_body_and_1xx_answers_before_it_are_read() -> None:
    outcome, _ = fetch_from(
        raw(
            b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n",
            b"2;ext=1\r\nde\r\n0\r\n\r\n",
        )
    )

    assert_fetched(outcome, b"abcde")


def test_body_until_the_connection_ends_is_read() -> None:
    outcome, _ = fetch_from(raw(b"HTTP/1.0 200 OK\r\n\r\nabc", b"de"))

    assert_fetched(outcome, b"abcde")


def test_thread_of_its_own_serves_other_threads() -> None:
    async def scenario() -> list[Outcome]:
        async with serve(answering(JPEG)) as server:
            with SourcesThread(Sources(config_for(server), Names())) as sources:
                wanted = {f"http://pictures.test:{server.port}/": LIMITS}
                ended = await asyncio.to_thread(sources.fetch_all, wanted, "anyone")
                return list(ended.values())

    (outcome,) = run(scenario())

    assert_fetched(outcome)


def test_media_of_one_item_are_fetched_several_at_a_time() -> None:
    together = asyncio.Barrier(3)

    async def answer(head: str, writer: asyncio.StreamWriter) -> None:
        await together.wait()  # none is answered before so many were asked for
        await answering(head.split(" ")[1].encode())(head, writer)

    async def scenario() -> tuple[dict[str, Outcome], Server]:
        limits = replace(QUICK, max_connections_per_item=3)
        async with serve(answer) as server:
            sources = Sources(config_for(server, limits=limits, timeout_s=30.0), Names())
            urls = [f"http://pictures.test:{server.port}/{number}" for number in range(6)]
            ended = await sources.fetch_all(dict.fromkeys(urls, LIMITS), "anyone")
            await sources.aclose()
        return ended, server

    ended, server = run(scenario())

    for url, outcome in ended.items():
        assert_fetched(outcome, b"/" + url[-1].encode())
    assert 6 == len(ended)
    assert 3 == server.most_at_once


def test_failure_of_one_gives_up_the_other_media_of_its_item() -> None:
    async def scenario() -> list[Outcome]:
        answers = {"/slow": raw(b"", ends=False), "/gone": answering(status="404 X")}
        async with serve(answers) as server:
            sources = Sources(config_for(server, timeout_s=60.0), Names())
            urls = [f"http://pictures.test:{server.port}{path}" for path in answers]
            async with asyncio.timeout(SOON_S):
                ended = await sources.fetch_all(dict.fromkeys(urls, LIMITS), "anyone")
            await sources.aclose()
        assert [urls[1]] == list(ended)
        return list(ended.values())

    (outcome,) = run(scenario())

    assert_failed(outcome, FetchFailedError)


def test_thread_that_closes_gives_up_what_is_under_way() -> None:
    async def scenario() -> BaseException | None:
        async with serve(raw(b"", ends=False)) as server:
            sources = SourcesThread(Sources(config_for(server, timeout_s=60.0), Names()))
            wanted = {f"http://pictures.test:{server.port}/": LIMITS}
            with futures.ThreadPoolExecutor(1) as pool:
                waiting = pool.submit(sources.fetch_all, wanted, "anyone")
                while not server.heads:
                    await asyncio.sleep(0.01)
                await asyncio.to_thread(sources.close)
                return waiting.exception(SOON_S)

    assert isinstance(run(scenario()), futures.CancelledError)


def test_thread_that_closes_begins_nothing_more() -> None:
    """Whoever comes while it closes, or later, is told so at once, and waits for nobody."""

    async def scenario() -> list[BaseException | None]:
        async with serve(raw(b"", ends=False)) as server:
            sources = SourcesThread(Sources(config_for(server, timeout_s=60.0), Names()))
            wanted = {f"http://pictures.test:{server.port}/": LIMITS}
            with futures.ThreadPoolExecutor(8) as pool:
                waiting = [pool.submit(sources.fetch_all, wanted, "anyone") for _ in range(400)]
                while not server.heads:
                    await asyncio.sleep(0.01)
                await asyncio.to_thread(sources.close)
                return [one.exception(SOON_S) for one in waiting]

    ends = run(scenario())

    assert all(isinstance(end, futures.CancelledError) for end in ends), ends


# What it never lets through


def let_through(
    urls: list[str], names: Names | None = None, rules: AddressRules = RULES
) -> tuple[list[Outcome], Server]:
    """Fetch each URL, with {port} as the canary's, and return the ends and the canary."""

    async def scenario() -> tuple[list[Outcome], Server]:
        async with serve(answering(JPEG), "::1") as canary:
            config = replace(config_for(canary), rules=rules)
            async with Fetcher(config, names or Names()) as fetcher:
                ends = [await outcome_of(fetcher, url.format(port=canary.port)) for url in urls]
            return ends, canary

    return run(scenario())


INSIDE = [
    "http://169.254.169.254/latest/meta-data/",
    "http://127.0.0.2:{port}/",
    "http://10.0.0.1/",
    "http://[::]:{port}/",
    "http://[::1]:{port}/",
    "http://[0:0::1]:{port}/",
    "http://[::ffff:169.254.169.254]/",
    "http://[::ffff:127.0.0.1]:{port}/",
    "http://[64:ff9b::a9fe:a9fe]/",
    "http://[64:ff9b:1::7f00:1]/",
    "http://[2002:a9fe:a9fe::1]/",
    "http://[2002:7f00:1::]:{port}/",
    "http://[::169.254.169.254]/",
    "http://[::127.0.0.1]:{port}/",
    "http://[fd00:ec2::254]/",
    "http://[fe80::1]:{port}/",
    "http://[fec0::1]/",
    "http://[ff02::1]/",
    "http://[2001:0:7f00:1::1]/",
    "http://[2a00:1450::5efe:a00:1]/",
    "http://0.0.0.0:{port}/",
    "http://100.64.0.1/",
    "http://192.0.0.192/",
    "http://168.63.129.16/",
    "http://198.18.0.1/",
    "http://240.0.0.1/",
    "http://255.255.255.255/",
    "http://224.0.0.1/",
]
MISWRITTEN = [
    "http://2852039166/",
    "http://0xA9FEA9FE/",
    "http://0251.0376.0251.0376/",
    "http://169.254.43518/",
    "http://127.1:{port}/",
    "http://0:{port}/",
    "http://[fe80::1%25lo]:{port}/",
    "http://\u2460\u2461\u2466.0.0.1:{port}/",
    "http://127\u30020\u30020\u30021:{port}/",
    "http://good@[::1]:{port}/",
    "http://[::1]:{port}\\@good.test/",
    "http://good.test\r\nHost: x/",
    "http://good.test/\x00",
    "http://good.test:22/",
    "http://good.test:6379/",
    "http://good.test:0/",
    "http://good.test:65536/",
    "file:///etc/passwd",
    "/etc/passwd",
    "\\\\unc\\share",
    "data:image/png;base64,AAAA",
    "ftp://good.test/a",
]


def test_addresses_inside_are_refused_however_they_are_written() -> None:
    ends, canary = let_through(INSIDE)

    assert len(INSIDE) == len(ends)
    for end in ends:
        error = assert_failed(end, HostNotAllowedError)
        assert error.facts is not None
        assert (None, None) == (error.facts["scheme"], error.facts["host"])
    assert 0 == canary.num_connections


def test_urls_that_are_no_plain_urls_are_refused() -> None:
    names = Names()
    ends, canary = let_through(MISWRITTEN, names)

    assert len(MISWRITTEN) == len(ends)
    for end in ends:
        assert_failed(end, BadUrlError)
    assert [] == names.asked
    assert 0 == canary.num_connections


@pytest.mark.parametrize(
    "answers",
    [
        ["::1"],
        ["10.0.0.1"],
        ["127.0.0.1", "::1"],
        ["::1", "127.0.0.1"],
        ["8.8.8.8", "10.0.0.1"],
        ["10.0.0.1", "8.8.8.8"],
        ["8.8.8.8", "2606:4700:4700::1111", "::ffff:10.0.0.1"],
        ["8.8.8.8"] * 50 + ["169.254.169.254"],
        ["fe80::1%lo"],
        ["100.64.0.1"],
        ["no address at all"],
    ],
)
def test_a_name_with_any_denied_answer_is_refused(answers: list[str]) -> None:
    ends, canary = let_through(
        ["http://inside.test:{port}/", "https://inside.test:{port}/"],
        Names({"inside.test": answers}),
    )

    for end in ends:
        assert_failed(end, HostNotAllowedError)
    assert 0 == canary.num_connections


def test_numbers_that_a_resolver_takes_for_addresses_are_judged_as_addresses() -> None:
    class Misled(Names):
        """A name whose answer comes from the system reading a number as an address."""

        async def __call__(self, host: str) -> list[str]:
            return await SystemResolver(1)(host.removesuffix(".inside.test"))

    numbers = ["2852039166", "0xA9FEA9FE", "0251.0376.0251.0376", "127.1", "0", "localhost"]
    ends, canary = let_through(
        [f"http://{number}.inside.test:{{port}}/" for number in numbers],
        Misled(),
        AddressRules(),
    )

    for end in ends:
        assert_failed(end, HostNotAllowedError)
    assert 0 == canary.num_connections


def test_rebinding_gains_nothing_because_one_look_up_serves_check_and_connection() -> None:
    async def scenario() -> tuple[list[Outcome], Server, Server, Names]:
        names = Names()
        names.change("inside.test", ["127.0.0.1"], ["::1"])
        close = answering(JPEG, headers=["Connection: close"])
        async with (
            serve(close) as server,
            serve(close, "::1") as canary,
            Fetcher(config_for(server, canary), names) as fetcher,
        ):
            urls = [f"http://inside.test:{server.port}/{n}" for n in range(3)]
            return [await outcome_of(fetcher, url) for url in urls], server, canary, names

    ends, server, canary, names = run(scenario())

    assert_fetched(ends[0])
    assert_failed(ends[1], HostNotAllowedError)
    assert_failed(ends[2], HostNotAllowedError)
    assert (1, 0) == (server.num_connections, canary.num_connections)
    assert 3 == len(names.asked)


@pytest.mark.parametrize("status", ["301 A", "302 A", "303 A", "307 A", "308 A"])
def test_redirect_into_denied_space_is_refused(status: str) -> None:
    async def scenario() -> tuple[list[Outcome], Server]:
        names = Names({"inside.test": ["::1"], "mixed.test": ["127.0.0.1", "::1"]})
        async with serve(answering(JPEG), "::1") as canary:
            locations = {
                "/literal": f"http://[::1]:{canary.port}/",
                "/name": f"http://inside.test:{canary.port}/",
                "/mixed": f"//mixed.test:{canary.port}/",
                "/metadata": "http://169.254.169.254/latest/",
                "/mapped": f"http://[::ffff:127.0.0.1]:{canary.port}/",
            }
            answers = {path: redirecting(where, status) for path, where in locations.items()}
            answers["/twice"] = redirecting("/literal", status)
            async with (
                serve(answers) as server,
                Fetcher(config_for(server, canary), names) as fetcher,
            ):
                base = f"http://pictures.test:{server.port}"
                ends = [await outcome_of(fetcher, base + path) for path in answers]
            return ends, canary

    ends, canary = run(scenario())

    assert 6 == len(ends)
    for end in ends:
        assert_failed(end, HostNotAllowedError)
    assert 0 == canary.num_connections


@pytest.mark.parametrize(
    "location",
    [
        "file:///etc/passwd",
        "gopher://127.0.0.1:6379/_INFO",
        "ftp://127.0.0.1/a",
        "data:image/png;base64,AAAA",
        "http://good@127.0.0.1/",
        "http://127.1/",
        "http://127.0.0.1:22/",
        "http://127.0.0.1\\@good.test/",
        "//[::1/",
        "\xff\xfe",
    ],
)
def test_redirect_to_what_is_no_plain_url_is_refused(location: str) -> None:
    outcome, server = fetch_from(redirecting(location))

    assert_failed(outcome, BadUrlError)
    assert 1 == len(server.heads)


def test_peer_that_is_not_the_vetted_address_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import httpcore2

    class Elsewhere(httpcore2.AnyIOBackend):
        """Connects to another address than it was told to."""

        async def connect_tcp(self, host: str, *args: Any, **options: Any) -> Any:
            return await super().connect_tcp("127.0.0.1", *args, **options)

    monkeypatch.setattr(httpcore2, "AnyIOBackend", Elsewhere)
    outcome, server = fetch_from(answering(JPEG), names=Names({"pictures.test": ["8.8.8.8"]}))

    assert_failed(outcome, HostNotAllowedError)
    assert [] == server.heads


# Redirects


def test_redirects_are_followed_and_counted() -> None:
    outcome, server = fetch_from(
        {
            "/1": redirecting("/2"),
            "/2": redirecting("3"),
            "/3": redirecting("?x=1"),
            "/4": answering(b"never"),
        },
        path="/1",
    )

    assert_failed(outcome, FetchFailedError)
    assert ["/1", "/2", "/3", "/3?x=1"] == server.paths


def test_three_redirects_are_followed() -> None:
    outcome, server = fetch_from(
        {f"/{n}": redirecting(f"/{n + 1}") for n in (1, 2, 3)} | {"/4": answering(JPEG)},
        path="/1",
    )
    fetched = assert_fetched(outcome)

    assert 3 == fetched.report.num_redirects
    assert 4 == len(server.heads)


def test_redirect_loop_ends() -> None:
    outcome, server = fetch_from(redirecting("/again"), path="/again")

    assert "3 times" in str(assert_failed(outcome, FetchFailedError))
    assert 4 == len(server.heads)


def test_redirect_without_location_is_an_error() -> None:
    outcome, _ = fetch_from(answering(status="302 Found"))

    assert "HTTP 302 error." in str(assert_failed(outcome, FetchFailedError))


# Clocks

# Far less than a server goes on and than the next limit allows, and enough for a busy machine.
SOON_S = 30.0
PATIENT = replace(QUICK, whole_timeout_s=60.0)


def test_stall_before_the_head_ends_in_time() -> None:
    started = time.monotonic()
    outcome, server = fetch_from(raw(b"", ends=False), limits=PATIENT, timeout_s=1.5)
    error = assert_failed(outcome, FetchTimeoutError, retryable=True)

    assert time.monotonic() - started < SOON_S
    assert 1 == len(server.heads)
    assert "1.5 s" in str(error)
    assert "DARKROOM_IMAGE_FETCH_TIMEOUT" in str(error)


@pytest.mark.parametrize(
    "answer",
    [
        raw(b"HTTP/1.1 200 OK\r\nContent-Length: 2000\r\n\r\n" + bytes(9), ends=False),
        raw(b"HTTP/1.1 200 OK\r\n", ends=False),
        raw(*[b"H", b"T", b"T", b"P"] * 20, pause_s=0.05),
        endless(b"HTTP/1.1 200 OK\r\n\r\n", b"x", pause_s=0.02),
        endless(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n", 0.02),
    ],
    ids=["stall in body", "stall in head", "dripping head", "dripping body", "dripping chunks"],
)
def test_stalls_and_drips_end_with_the_try(answer: Answer) -> None:
    started = time.monotonic()
    outcome, _ = fetch_from(answer, limits=PATIENT, timeout_s=0.2)

    assert_failed(outcome, FetchTimeoutError, retryable=True)
    assert time.monotonic() - started < SOON_S


def test_body_below_the_least_rate_is_given_up_before_the_try_ends() -> None:
    answer = endless(b"HTTP/1.1 200 OK\r\n\r\n", b"x", pause_s=0.02)
    started = time.monotonic()
    outcome, _ = fetch_from(answer, limits=replace(PATIENT, max_tries=1), timeout_s=60.0)
    error = assert_failed(outcome, FetchTimeoutError, retryable=True)

    assert "1024 a second" in str(error)
    assert time.monotonic() - started < SOON_S


def test_body_above_the_least_rate_may_take_longer_than_the_window() -> None:
    pieces = [bytes(1500)] * 12
    answer = raw(b"HTTP/1.1 200 OK\r\nContent-Length: 18000\r\n\r\n", *pieces, pause_s=0.15)
    limits = replace(QUICK, min_rate_window_s=1.0)
    outcome, _ = fetch_from(answer, limits=limits, timeout_s=30.0)

    assert_fetched(outcome, bytes(18_000))


def test_all_tries_together_end_in_time() -> None:
    started = time.monotonic()
    limits = replace(QUICK, whole_timeout_s=0.5, max_tries=100, retry_wait_s=0.05)
    outcome, _ = fetch_from(answering(status="503 X"), limits=limits, timeout_s=0.5)

    assert_failed(outcome, FetchTimeoutError, retryable=True)
    assert 0.4 < time.monotonic() - started < SOON_S


def test_slow_look_up_ends_in_time() -> None:
    class Slow(Names):
        async def __call__(self, host: str) -> list[str]:
            await asyncio.sleep(60)
            return []

    limits = replace(QUICK, connect_timeout_s=0.1)
    outcome, server = fetch_from(answering(JPEG), names=Slow(), limits=limits)
    error = assert_failed(outcome, FetchTimeoutError, retryable=True)

    assert "0.1 s that connecting may take" in str(error)
    assert 0 == server.num_connections


def test_video_has_a_timeout_of_its_own() -> None:
    async def scenario() -> list[Outcome]:
        answer = raw(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n", b"abc", pause_s=0.15)
        async with serve(answer) as server:
            limits = replace(QUICK, max_tries=1, min_rate_window_s=10.0)
            config = config_for(server, limits=limits, timeout_s=0.05)
            async with Fetcher(config, Names()) as fetcher:
                url = f"http://pictures.test:{server.port}/"
                return [await outcome_of(fetcher, url, one) for one in (LIMITS, VideoLimits())]

    image, video = run(scenario())

    assert_failed(image, FetchTimeoutError, retryable=True)
    assert_fetched(video, b"abc")


# Sizes and encodings


@pytest.mark.parametrize("num_bytes", [99_999, 100_000])
def test_largest_body_is_exact(num_bytes: int) -> None:
    outcome, _ = fetch_from(answering(bytes(num_bytes)))

    assert_fetched(outcome, bytes(num_bytes))


def test_body_is_held_once() -> None:
    num_pieces, piece = 256, bytes(65_536)
    num_bytes = num_pieces * len(piece)
    head = f"HTTP/1.1 200 OK\r\nContent-Length: {num_bytes}\r\n\r\n".encode()

    async def scenario() -> tuple[Outcome, int]:
        async with (
            serve(raw(head, *[piece] * num_pieces)) as server,
            Fetcher(config_for(server, timeout_s=60.0), Names()) as fetcher,
        ):
            url = f"http://pictures.test:{server.port}/large.jpg"
            tracemalloc.start()
            try:
                outcome = await outcome_of(fetcher, url, ImageLimits())
                return outcome, tracemalloc.get_traced_memory()[1]
            finally:
                tracemalloc.stop()

    outcome, peak_bytes = run(scenario())

    assert isinstance(outcome, Fetched)
    assert num_bytes == len(outcome.content)
    assert peak_bytes < num_bytes * 1.3


def test_one_byte_more_is_refused_by_its_length_alone() -> None:
    outcome, server = fetch_from(answering(b"", content_length=100_001))

    assert "100000 bytes" in str(assert_failed(outcome, FetchTooLargeError))
    assert 1 == len(server.heads)


@pytest.mark.parametrize(
    ("head", "piece"),
    [
        (b"HTTP/1.1 200 OK\r\n\r\n", bytes(65_536)),
        (
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
            b"4000\r\n%b\r\n" % bytes(0x4000),
        ),
    ],
    ids=["until the end", "endless chunks"],
)
def test_endless_bodies_are_counted(head: bytes, piece: bytes) -> None:
    outcome, server = fetch_from(endless(head, piece))
    error = assert_failed(outcome, FetchTooLargeError)

    assert error.facts is not None
    assert 100_000 < int(str(error.facts["num_bytes"])) < 300_000
    assert 1 == len(server.heads)


def test_body_shorter_than_its_length_is_no_file() -> None:
    outcome, server = fetch_from(answering(JPEG, content_length=5000))

    assert_failed(outcome, FetchFailedError, retryable=True)
    assert 3 == len(server.heads)


def test_body_longer_than_its_length_is_cut_there_and_spoils_nothing_else() -> None:
    outcome, _ = fetch_from(answering(JPEG, content_length=100))

    assert_fetched(outcome, JPEG[:100])


@pytest.mark.parametrize("encoding", ["gzip", "br", "zstd", "deflate", "GZIP", "identity, gzip"])
def test_encoded_bodies_are_refused(encoding: str) -> None:
    outcome, server = fetch_from(answering(JPEG, headers=[f"Content-Encoding: {encoding}"]))

    assert_failed(outcome, FetchFailedError)
    assert 1 == len(server.heads)


def test_identity_may_be_said() -> None:
    outcome, _ = fetch_from(answering(JPEG, headers=["Content-Encoding: Identity"]))

    assert_fetched(outcome)


@pytest.mark.parametrize(
    "answer",
    [
        answering(JPEG, headers=[f"X-{n}: y" for n in range(10_000)]),
        answering(JPEG, headers=["X: " + "y" * 1_000_000]),
        endless(b"HTTP/1.1 200 OK\r\n", b"X: " + b"y" * 500 + b"\r\n"),
        endless(b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 50),
        endless(b"", b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" * 50),
    ],
    ids=["many", "long", "endless", "100 flood", "103 flood"],
)
def test_too_much_of_a_head_is_refused(answer: Answer) -> None:
    outcome, server = fetch_from(answer)

    assert "65536 bytes of headers" in str(assert_failed(outcome, FetchFailedError))
    assert 1 == len(server.heads)


def test_a_head_within_the_limit_is_read() -> None:
    outcome, _ = fetch_from(answering(JPEG, headers=["X: " + "y" * 60_000]))

    assert_fetched(outcome)


@pytest.mark.parametrize(
    "answer",
    [
        raw(b"\x00\x01\x02 nonsense\r\n\r\n"),
        raw(b"SSH-2.0-OpenSSH_9.6\r\n", ends=True),
        raw(b"+PONG\r\n\r\n"),
        raw(b""),
        raw(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabcd"),
        raw(b"HTTP/1.1 200 OK\r\nContent-Length: -3\r\n\r\nabcd"),
        raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n"),
        raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n\r\n"),
        raw(b"HTTP/1.1 200 OK\r\nA: b\r\n c: d\x00\r\n\r\n"),
        raw(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n"),
    ],
    ids=[
        "noise",
        "SSH",
        "Redis",
        "nothing",
        "two lengths",
        "negative length",
        "gzip coding",
        "bad chunk",
        "NUL in a header",
        "upgrade",
    ],
)
def test_what_is_no_http_ends_in_our_error(answer: Answer) -> None:
    outcome, _ = fetch_from(answer)

    assert isinstance(outcome, FetchFailedError)
    assert_failed(outcome, FetchFailedError, retryable=outcome.retryable)


# Statuses and tries


@pytest.mark.parametrize("status", [201, 204, 205, 206, 300, 304, 400, 401, 403, 404, 410, 451])
def test_other_statuses_are_final(status: int) -> None:
    outcome, server = fetch_from(answering(status=f"{status} Some Reason"))
    error = assert_failed(outcome, FetchFailedError)

    assert str(error).startswith(f"Failed to fetch media from URL: HTTP {status} error.")
    assert "Reason" not in str(error)
    assert 1 == len(server.heads)


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_statuses_that_may_pass_are_tried_three_times(status: int) -> None:
    outcome, server = fetch_from(answering(status=f"{status} X"))
    error = assert_failed(outcome, FetchFailedError, retryable=True)

    assert 3 == len(server.heads)
    assert error.facts is not None
    assert 3 == error.facts["num_tries"]


def test_second_try_may_work() -> None:
    outcome, _ = fetch_from(in_turn(answering(status="503 X"), raw(b""), answering(JPEG)))
    fetched = assert_fetched(outcome)

    assert 3 == fetched.report.num_tries
    assert len(JPEG) == fetched.report.num_bytes


def test_retry_after_is_honoured() -> None:
    started = time.monotonic()
    busy = answering(status="429 X", headers=["Retry-After: 1"])
    limits = replace(QUICK, max_retry_after_s=2.0)
    outcome, _ = fetch_from(in_turn(busy, answering(JPEG)), limits=limits)

    assert_fetched(outcome)
    assert time.monotonic() - started >= 1


@pytest.mark.parametrize(
    ("retry_after", "seconds"),
    [
        ("1000000000", 1e9),
        ("30", 30),
        ("in an hour, as a date", 3600),
    ],
)
def test_retry_after_beyond_the_cap_ends_the_fetch_at_once(
    retry_after: str, seconds: float
) -> None:
    if retry_after.endswith("date"):  # written now: the tests may have been collected long ago
        retry_after = email.utils.format_datetime(datetime.now(UTC) + timedelta(seconds=seconds))
    started = time.monotonic()
    busy = answering(status="429 X", headers=[f"Retry-After: {retry_after}"])
    outcome, server = fetch_from(busy, limits=PATIENT)
    error = assert_failed(outcome, FetchFailedError, retryable=True)

    assert 1 == len(server.heads)
    assert time.monotonic() - started < SOON_S
    assert seconds == pytest.approx(error.retry_after_s, rel=0.05)


@pytest.mark.parametrize(
    "retry_after",
    ["", "-1", "soon", "1e9", "99999999999999", "\xff", f"Mon, 1 Jan {10**20} 00:00:00 GMT"],
)
def test_retry_after_that_makes_no_sense_is_ignored(retry_after: str) -> None:
    outcome, server = fetch_from(answering(status="503 X", headers=[f"Retry-After: {retry_after}"]))

    error = assert_failed(outcome, FetchFailedError, retryable=True)
    assert QUICK.remember_passing_s == error.retry_after_s  # as if nothing had been said
    assert 3 == len(server.heads)


def test_nobody_listening_is_tried_again() -> None:
    async def scenario() -> Outcome:
        async with serve(answering()) as server:
            port = server.port
        config = replace(config_for(), ports=frozenset({port}))
        async with Fetcher(config, Names()) as fetcher:
            return await outcome_of(fetcher, f"http://pictures.test:{port}/")

    error = assert_failed(run(scenario()), FetchFailedError, retryable=True)

    assert error.facts is not None
    assert 3 == error.facts["num_tries"]


def test_second_address_is_tried_where_the_first_does_not_answer() -> None:
    async def scenario() -> Outcome:
        async with serve(answering(JPEG)) as server:
            rules = AddressRules(allowed_hosts=frozenset({"pictures.test"}))
            config = replace(config_for(server), rules=rules)
            names = Names({"pictures.test": ["::1", "127.0.0.1"]})  # nothing listens on the first
            async with Fetcher(config, names) as fetcher:
                return await outcome_of(fetcher, f"http://pictures.test:{server.port}/")

    assert_fetched(run(scenario()))


@pytest.mark.parametrize(
    ("errno", "retryable"), [(socket.EAI_NONAME, False), (socket.EAI_AGAIN, True)]
)
def test_unknown_name_is_final_and_a_silent_name_server_is_not(errno: int, retryable: bool) -> None:
    class Failing(Names):
        async def __call__(self, host: str) -> list[str]:
            raise socket.gaierror(errno, "words of the system")

    outcome, _ = fetch_from(answering(JPEG), names=Failing())

    assert_failed(outcome, FetchFailedError, retryable)


def test_name_without_addresses_is_final() -> None:
    outcome, _ = fetch_from(answering(JPEG), names=Names({"pictures.test": []}))

    assert_failed(outcome, FetchFailedError)


# Several at once


class Clock:
    """The fetcher's, which goes ahead by itself: what it remembers is over without a wait."""

    def __init__(self) -> None:
        self._ahead_s = 0.0

    def monotonic(self) -> float:
        return time.monotonic() + self._ahead_s

    def go_ahead(self, seconds: float) -> None:
        self._ahead_s += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("media.fetch.time", clock)
    return clock


def test_failure_is_remembered_for_a_while(clock: Clock) -> None:
    async def scenario() -> tuple[list[Outcome], Server]:
        answer = answering(status="404 X")
        limits = replace(QUICK, remember_failures_s=60.0)
        async with (
            serve(answer) as server,
            Fetcher(config_for(server, limits=limits), Names()) as fetcher,
        ):
            url = f"http://pictures.test:{server.port}/"
            ends = [await outcome_of(fetcher, url) for _ in range(3)]
            num_asked = len(server.heads)
            clock.go_ahead(60.0)
            ends.append(await outcome_of(fetcher, url))
        assert (1, 2) == (num_asked, len(server.heads))
        return ends, server

    ends, _ = run(scenario())

    tries = []
    for end in ends:
        error = assert_failed(end, FetchFailedError)
        assert error.facts is not None
        tries.append(error.facts["num_tries"])
    assert [1, 0, 0, 1] == tries
    assert 4 == len({id(end) for end in ends})


def test_failure_that_may_pass_is_remembered_for_less_long_and_says_for_how_long(
    clock: Clock,
) -> None:
    async def scenario() -> list[Outcome]:
        answer = in_turn(*[answering(status="503 X")] * QUICK.max_tries, answering(JPEG))
        limits = replace(QUICK, remember_passing_s=30.0)
        async with (
            serve(answer) as server,
            Fetcher(config_for(server, limits=limits), Names()) as fetcher,
        ):
            url = f"http://pictures.test:{server.port}/"
            ends = [await outcome_of(fetcher, url) for _ in range(2)]
            assert QUICK.max_tries == len(server.heads)
            # Whoever waits as long as it was told to meets the host itself, and not the memory of it.
            clock.go_ahead(assert_failed(ends[1], FetchFailedError, True).retry_after_s or 0)
            return [*ends, await outcome_of(fetcher, url)]

    first, remembered, at_last = run(scenario())

    assert 30.0 == assert_failed(first, FetchFailedError, True).retry_after_s
    assert 0 < (assert_failed(remembered, FetchFailedError, True).retry_after_s or 0) <= 30.0
    assert_fetched(at_last)


def test_try_may_take_as_long_as_its_operator_allows() -> None:
    slow = raw(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + JPEG, b"", pause_s=0.4)
    limits = replace(QUICK, whole_timeout_s=0.2, min_rate_window_s=5.0)

    outcome, _ = fetch_from(slow, limits=limits, timeout_s=5.0)

    assert_fetched(outcome)


def test_a_crowd_with_one_dead_url_asks_for_it_no_more_often_than_there_are_slots() -> None:
    async def scenario() -> tuple[list[Outcome], Server]:
        limits = replace(QUICK, max_connections_per_host=2)
        async with (
            serve(answering(status="404 X")) as server,
            Fetcher(config_for(server, limits=limits), Names()) as fetcher,
        ):
            url = f"http://pictures.test:{server.port}/"
            return await asyncio.gather(*(outcome_of(fetcher, url) for _ in range(20))), server

    ends, server = run(scenario())

    for end in ends:
        assert_failed(end, FetchFailedError)
    assert len(server.heads) <= 2


def test_failures_that_are_remembered_stay_within_their_number() -> None:
    async def scenario() -> Server:
        limits = replace(QUICK, max_remembered_failures=2)
        async with (
            serve(answering(status="404 X")) as server,
            Fetcher(config_for(server, limits=limits), Names()) as fetcher,
        ):
            for path in ("1", "2", "3", "3", "2", "1"):
                await outcome_of(fetcher, f"http://pictures.test:{server.port}/{path}")
        return server

    assert ["/1", "/2", "/3", "/1"] == run(scenario()).paths


class Moods:
    """A host that is silent while `is_silent`, and refuses with what it is told otherwise."""

    def __init__(self) -> None:
        self.is_silent = True
        self.answer: Answer = answering(JPEG)

    async def __call__(self, head: str, writer: asyncio.StreamWriter) -> None:
        await (raw(b"", ends=False) if self.is_silent else self.answer)(head, writer)


def test_host_that_lets_fetches_wait_is_left_alone_and_asked_again_by_one(clock: Clock) -> None:
    async def scenario() -> None:
        host = Moods()
        limits = replace(QUICK, host_rest_s=60.0, remember_passing_s=0.0)
        async with serve(host) as server:
            config = config_for(server, limits=limits, timeout_s=1.0)
            async with Fetcher(config, Names()) as fetcher:

                async def ask(path: str, name: str = "pictures.test") -> Outcome:
                    return await outcome_of(fetcher, f"http://{name}:{server.port}/{path}")

                for number in range(3):
                    assert_failed(await ask(f"{number}"), FetchTimeoutError, retryable=True)
                left_alone = assert_failed(await ask("3"), FetchTimeoutError, retryable=True)
                assert 3 == len(server.heads)
                assert left_alone.facts is not None
                assert 0 == left_alone.facts["num_tries"]
                assert 0 < (left_alone.retry_after_s or 0) <= 60.0
                host.is_silent = False
                assert_fetched(await ask("4", "others.test"))  # another one is not to blame
                clock.go_ahead(60.0)
                host.is_silent = True
                crowd = await asyncio.gather(*(ask(f"{number}") for number in range(5, 10)))
                assert 4 + 1 == len(server.heads)  # one of them has asked
                assert all(isinstance(outcome, FetchTimeoutError) for outcome in crowd)
                clock.go_ahead(60.0)
                host.is_silent = False
                assert_fetched(await ask("10"))
                assert_fetched(await ask("11"))

    run(scenario())


def test_host_that_asked_for_a_pause_is_left_alone_until_it_is_over(clock: Clock) -> None:
    async def scenario() -> None:
        busy = answering(status="503 X", headers=["Retry-After: 500"])
        limits = replace(QUICK, max_retry_after_s=0.0, max_pause_s=60.0)
        async with (
            serve(in_turn(busy, answering(JPEG))) as server,
            Fetcher(config_for(server, limits=limits), Names()) as fetcher,
        ):
            url = f"http://pictures.test:{server.port}/"
            assert_failed(await outcome_of(fetcher, url + "a"), FetchFailedError, True)
            paused = assert_failed(await outcome_of(fetcher, url + "b"), HostPausedError, True)
            assert 0 < (paused.retry_after_s or 0) <= 60.0
            assert 1 == len(server.heads)
            assert_fetched(await outcome_of(fetcher, f"http://others.test:{server.port}/"))
            clock.go_ahead(60.0)
            assert_fetched(await outcome_of(fetcher, url + "c"))

    run(scenario())


def test_fetch_that_is_given_up_says_nothing_about_its_host() -> None:
    async def scenario() -> None:
        host = Moods()
        limits = replace(QUICK, max_silences=2)
        async with serve(host) as server:
            config = config_for(server, limits=limits, timeout_s=1.0)
            async with Fetcher(config, Names()) as fetcher:
                url = f"http://pictures.test:{server.port}/"
                await outcome_of(fetcher, f"{url}1")
                given_up = asyncio.create_task(outcome_of(fetcher, f"{url}2"))
                while len(server.heads) < 2:
                    await asyncio.sleep(0.01)
                given_up.cancel()
                await asyncio.gather(given_up, return_exceptions=True)
                await outcome_of(fetcher, f"{url}3")
                host.is_silent = False
                left_alone = await outcome_of(fetcher, f"{url}4")
        assert_failed(left_alone, FetchTimeoutError, retryable=True)
        assert 3 == len(server.heads)

    run(scenario())


def test_host_behind_a_redirect_speaks_for_itself_alone() -> None:
    async def scenario() -> None:
        busy = answering(status="503 X", headers=["Retry-After: 60"])
        limits = replace(QUICK, max_silences=1)
        async with serve(busy) as other, serve(raw(b"", ends=False)) as silent:
            answers = {
                "/busy": redirecting(f"http://busy.test:{other.port}/"),
                "/silent": redirecting(f"http://silent.test:{silent.port}/"),
                "/good": answering(JPEG),
            }
            async with (
                serve(answers) as server,
                Fetcher(
                    config_for(server, other, silent, limits=limits, timeout_s=1.5), Names()
                ) as fetcher,
            ):
                url = f"http://pictures.test:{server.port}"
                assert_failed(await outcome_of(fetcher, f"{url}/busy"), FetchFailedError, True)
                assert_failed(await outcome_of(fetcher, f"{url}/silent"), FetchTimeoutError, True)
                assert_fetched(await outcome_of(fetcher, f"{url}/good"))
                num_asked = len(other.heads)
                paused = await outcome_of(fetcher, f"{url}/busy?again")
                assert_failed(paused, HostPausedError, retryable=True)
                assert num_asked == len(other.heads)
                for again in (f"http://silent.test:{silent.port}/again", f"{url}/silent?again"):
                    left_alone = await outcome_of(fetcher, again)
                    assert_failed(left_alone, FetchTimeoutError, retryable=True)
                assert 1 == len(silent.heads)
                assert_fetched(await outcome_of(fetcher, f"{url}/good?again"))

    run(scenario())


def test_pause_is_met_before_a_slot_is_waited_for() -> None:
    async def scenario() -> None:
        answers = {
            "/busy": answering(status="503 X", headers=["Retry-After: 60"]),
            "/slow": raw(b"", ends=False),
        }
        limits = replace(QUICK, max_connections_per_host=2)
        async with (
            serve(answers) as server,
            Fetcher(config_for(server, limits=limits, timeout_s=60.0), Names()) as fetcher,
        ):
            url = f"http://pictures.test:{server.port}"
            slow = asyncio.create_task(outcome_of(fetcher, f"{url}/slow"))
            await fetcher_is_at(server, "/slow")
            with pytest.raises(FetchFailedError):
                await fetcher.fetch(f"{url}/busy", LIMITS, is_fast=True)
            async with asyncio.timeout(SOON_S):
                assert_failed(await outcome_of(fetcher, f"{url}/other"), HostPausedError, True)
            slow.cancel()
            await asyncio.gather(slow, return_exceptions=True)

    run(scenario())


async def fetcher_is_at(server: Server, path: str) -> None:
    async with asyncio.timeout(30):
        while path not in server.paths:
            await asyncio.sleep(0.01)


def test_host_that_answers_now_and_then_is_never_left_alone() -> None:
    async def scenario() -> int:
        host = Moods()
        limits = replace(QUICK, remember_passing_s=0.0)
        async with serve(host) as server:
            config = config_for(server, limits=limits, timeout_s=1.0)
            async with Fetcher(config, Names()) as fetcher:
                for number in range(9):
                    host.is_silent = number % 3 != 2
                    # Also a refusal is an answer.
                    host.answer = answering(status="404 X") if number == 5 else answering(JPEG)
                    await outcome_of(fetcher, f"http://pictures.test:{server.port}/{number}")
            return len(server.heads)

    assert 9 == run(scenario())


def test_one_host_gets_only_so_many_connections_at_once() -> None:
    async def scenario() -> Server:
        slow = raw(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\na", b"b", pause_s=0.02)
        limits = replace(QUICK, max_connections_per_host=3, min_rate_window_s=30.0)
        async with (
            serve(slow) as server,
            Fetcher(config_for(server, limits=limits, timeout_s=30.0), Names()) as fetcher,
        ):
            base = f"http://pictures.test:{server.port}/"
            ends = await asyncio.gather(*(outcome_of(fetcher, f"{base}{n}") for n in range(20)))
        for end in ends:
            assert_fetched(end, b"ab")
        return server

    assert run(scenario()).most_at_once <= 3


def test_dripping_hosts_do_not_hold_up_the_others() -> None:
    async def scenario() -> float:
        drip = endless(b"HTTP/1.1 200 OK\r\n\r\n", b"x", pause_s=0.05)
        limits = replace(QUICK, min_rate_window_s=60.0)
        async with (
            serve(drip) as bad,
            serve(answering(JPEG)) as good,
            Fetcher(config_for(bad, good, limits=limits, timeout_s=60.0), Names()) as fetcher,
        ):
            bad_urls = [f"http://slow{n % 2}.test:{bad.port}/{n}" for n in range(20)]
            dripping = [asyncio.create_task(outcome_of(fetcher, url)) for url in bad_urls]
            await fetcher_is_at(bad, "/0")
            started = time.monotonic()
            ends = await asyncio.gather(
                *(outcome_of(fetcher, f"http://pictures.test:{good.port}/{n}") for n in range(40))
            )
            seconds = time.monotonic() - started
            for task in dripping:
                task.cancel()
            await asyncio.gather(*dripping, return_exceptions=True)
        for end in ends:
            assert_fetched(end)
        return seconds

    assert run(scenario()) < SOON_S


@pytest.mark.parametrize("limit", ["max_connections_per_host", "max_connections"])
def test_fast_lane_waits_for_no_slot_that_bulk_work_holds(limit: str) -> None:
    async def scenario() -> tuple[Outcome, Server]:
        answers = {"/slow": raw(b"", ends=False), "/quick": answering(JPEG)}
        limits = FetchLimits(**{limit: 4})
        async with (
            serve(answers) as server,
            Fetcher(config_for(server, limits=limits, timeout_s=60.0), Names()) as fetcher,
        ):
            base = f"http://pictures.test:{server.port}"
            bulk = [asyncio.create_task(outcome_of(fetcher, f"{base}/slow?{n}")) for n in range(9)]
            async with asyncio.timeout(30):
                while server.most_at_once < 3:
                    await asyncio.sleep(0.01)
                end = await fetcher.fetch(f"{base}/quick", LIMITS, is_fast=True)
            for task in bulk:
                task.cancel()
            await asyncio.gather(*bulk, return_exceptions=True)
        return end, server

    end, server = run(scenario())

    assert_fetched(end)
    assert server.most_at_once <= 4
    assert 3 == sum("slow" in path for path in server.paths)


def test_fetch_that_is_cancelled_leaves_its_slots_and_connection() -> None:
    async def scenario() -> Outcome:
        answers = {"/slow": raw(b"", ends=False), "/quick": answering(JPEG)}
        limits = replace(QUICK, max_connections=1, max_connections_per_host=1)
        async with (
            serve(answers) as server,
            Fetcher(config_for(server, limits=limits), Names()) as fetcher,
        ):
            base = f"http://pictures.test:{server.port}"
            slow = asyncio.create_task(outcome_of(fetcher, f"{base}/slow"))
            await fetcher_is_at(server, "/slow")
            slow.cancel()
            return await outcome_of(fetcher, f"{base}/quick")

    assert_fetched(run(scenario()))


# TLS


async def fetch_over_tls(
    server_tls: ssl.SSLContext, client_tls: ssl.SSLContext | None, host: str, answer: Answer
) -> tuple[Outcome, Server]:
    async with (
        serve(answer, tls=server_tls) as server,
        Fetcher(config_for(server), Names(), client_tls) as fetcher,
    ):
        return await outcome_of(fetcher, f"https://{host}:{server.port}{PATH}"), server


def test_name_of_the_url_is_checked_against_the_certificate(tmp_path: Path) -> None:
    server_tls, client_tls = make_tls(tmp_path, "pictures.test")
    outcome, server = run(fetch_over_tls(server_tls, client_tls, "pictures.test", answering(JPEG)))
    fetched = assert_fetched(outcome)

    assert "https" == fetched.report.scheme
    assert f"Host: pictures.test:{server.port}" in server.heads[0]


@pytest.mark.parametrize("case", ["expired", "for another name", "self-signed", "unknown to us"])
def test_bad_certificates_are_final(case: str, tmp_path: Path) -> None:
    name = "other.test" if case == "for another name" else "pictures.test"
    days_left = -1 if case == "expired" else 1
    server_tls, trusting = make_tls(tmp_path, name, days_left)
    if case == "unknown to us":
        (tmp_path / "elsewhere").mkdir()
        trusting = make_tls(tmp_path / "elsewhere", "pictures.test")[1]
    client_tls = None if case == "self-signed" else trusting
    outcome, server = run(fetch_over_tls(server_tls, client_tls, "pictures.test", answering(JPEG)))

    assert "certificate" in str(assert_failed(outcome, FetchFailedError))
    assert [] == server.heads
    assert 1 >= server.num_connections


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion")  # the old versions are the point
def test_old_tls_is_refused(tmp_path: Path) -> None:
    server_tls, client_tls = make_tls(tmp_path, "pictures.test")
    server_tls.minimum_version = ssl.TLSVersion.TLSv1
    server_tls.maximum_version = ssl.TLSVersion.TLSv1_1
    outcome, server = run(fetch_over_tls(server_tls, client_tls, "pictures.test", answering(JPEG)))

    assert isinstance(outcome, FetchFailedError)
    assert_failed(outcome, FetchFailedError, retryable=outcome.retryable)
    assert [] == server.heads


def test_plain_server_under_https_is_refused() -> None:
    async def scenario() -> Outcome:
        limits = replace(
            QUICK, connect_timeout_s=0.5
        )  # the server waits for a head that never comes
        async with (
            serve(raw(b"HTTP/1.1 400 No\r\n\r\n")) as server,
            Fetcher(config_for(server, limits=limits), Names()) as fetcher,
        ):
            return await outcome_of(fetcher, f"https://pictures.test:{server.port}/")

    outcome = run(scenario())

    assert isinstance(outcome, FetchFailedError)
    assert_failed(outcome, type(outcome), retryable=outcome.retryable)


def test_redirect_from_https_to_http_is_refused(tmp_path: Path) -> None:
    server_tls, client_tls = make_tls(tmp_path, "pictures.test")
    outcome, server = run(
        fetch_over_tls(
            server_tls, client_tls, "pictures.test", redirecting("http://pictures.test/a")
        )
    )

    assert "from https to http" in str(assert_failed(outcome, FetchFailedError))
    assert 1 == len(server.heads)


# Settings


@pytest.mark.parametrize(
    ("env", "seconds"),
    [
        ({}, 5.0),
        ({"DARKROOM_IMAGE_FETCH_TIMEOUT": "2.5"}, 2.5),
        ({"DARKROOM_IMAGE_FETCH_TIMEOUT": " 7 "}, 7.0),
        ({"VLLM_IMAGE_FETCH_TIMEOUT": "9"}, 9.0),
        ({"VLLM_IMAGE_FETCH_TIMEOUT": "9", "DARKROOM_IMAGE_FETCH_TIMEOUT": "3"}, 3.0),
        ({"VLLM_IMAGE_FETCH_TIMEOUT": "bad", "DARKROOM_IMAGE_FETCH_TIMEOUT": "3"}, 3.0),
        ({"VLLM_IMAGE_FETCH_TIMEOUT": "9", "DARKROOM_IMAGE_FETCH_TIMEOUT": ""}, 9.0),
        ({"DARKROOM_VIDEO_FETCH_TIMEOUT": "3"}, 5.0),
    ],
)
def test_timeout_comes_from_the_environment(env: dict[str, str], seconds: float) -> None:
    assert seconds == fetch_timeout_from(env)


@pytest.mark.parametrize("variable", ["DARKROOM_IMAGE_FETCH_TIMEOUT", "VLLM_IMAGE_FETCH_TIMEOUT"])
@pytest.mark.parametrize(
    "text", ["0", "0.0", "-1", "5s", "1e3", "nan", "inf", "2,5", "\u0665", "x"]
)
def test_bad_timeout_names_its_variable(variable: str, text: str) -> None:
    with pytest.raises(ValueError, match=variable):
        fetch_timeout_from({variable: text})


def test_video_timeout_has_variables_of_its_own() -> None:
    assert 30.0 == video_fetch_timeout_from({"DARKROOM_IMAGE_FETCH_TIMEOUT": "3"})
    assert 4.0 == video_fetch_timeout_from({"VLLM_VIDEO_FETCH_TIMEOUT": "4"})


@pytest.mark.parametrize("user_agent", ["a\r\nHost: b", "a\x00", "caf\u00e9"])
def test_config_takes_no_user_agent_that_would_break_a_header(user_agent: str) -> None:
    with pytest.raises(ValueError, match="user_agent"):
        FetchConfig(user_agent=user_agent)


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan"), float("inf")])
def test_config_takes_no_timeout_that_is_none(seconds: float) -> None:
    with pytest.raises(ValueError, match="timeouts"):
        FetchConfig(image_fetch_timeout_s=seconds)


def test_fetch_errors_survive_the_way_between_processes() -> None:
    error = FetchTimeoutError("Too late. Send it again.", retryable=True)
    error.retry_after_s = 5.0
    error.facts = {"num_tries": 3}

    copy = pickle.loads(pickle.dumps(error))  # noqa: S301 - our own object

    assert (FetchTimeoutError, str(error)) == (type(copy), str(copy))
    assert (True, 5.0, {"num_tries": 3}) == (copy.retryable, copy.retry_after_s, copy.facts)


def test_system_resolver_reads_numbers_as_addresses() -> None:
    resolve = SystemResolver(1)

    assert ["127.0.0.1"] == list(run(_resolved(resolve, "127.0.0.1")))
    resolve.close()


def test_threads_that_look_names_up_end_with_their_fetcher() -> None:
    async def scenario() -> None:
        async with Fetcher() as fetcher:
            assert_failed(await outcome_of(fetcher, "http://localhost./"), HostNotAllowedError)
            assert list_resolvers()

    def list_resolvers() -> list[threading.Thread]:
        return [one for one in threading.enumerate() if one.name.startswith("darkroom-resolve")]

    run(scenario())

    for thread in list_resolvers():
        thread.join(30)
    assert [] == list_resolvers()


async def _resolved(resolve: Resolve, host: str) -> list[str]:
    return list(await resolve(host))
