"""
The only way out: a URL of http or https in, the bytes behind it and a report out.

No user's URL is fetched by anything else. A name is resolved here, every answer is judged
(`media.addresses`), the connection goes to a judged address, and name and certificate are checked
against the URL as before, so that a second answer of the resolver has no say. Each hop of a
redirect goes the same way again. There is nothing to carry between requests: no cookies, no
credentials, no proxies, no decompression. The environment is not read here.

HTTP/1.1 only. It leaves one fetch on a connection: one that is given up harms no neighbour, and
the bytes of a head can be counted as they come off the wire.
"""

import asyncio
import email.utils
import hashlib
import math
import random
import re
import socket
import ssl
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from io import BytesIO
from ipaddress import ip_address
from types import TracebackType
from typing import Any, Self
from weakref import WeakValueDictionary

import httpcore2
import stamina

from media.addresses import PUBLIC_ONLY, Address, AddressRules, judge
from media.errors import (
    BadUrlError,
    BucketNotAllowedError,
    FetchFailedError,
    FetchTimeoutError,
    FetchTooLargeError,
    HostNotAllowedError,
    HostPausedError,
)
from media.fetched import UNKNOWN_MEDIA_TYPE, Fetched, FetchReport
from media.hosts import SharedLimits, Unshared, count_kept, say_paused
from media.limits import FETCH_LIMITS, FetchLimits, ImageLimits, VideoLimits
from media.urls import WebUrl, join_url, parse_url

Resolve = Callable[[str], Awaitable[Iterable[str]]]
"""A host name in, its addresses as text out, best first. Raises OSError where there is none."""

_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_RETRYABLE_STATUSES = frozenset({408, 429})  # and all from 500 on
_MEDIA_TYPE = re.compile(rb"[a-z0-9!#$&^_.+-]{1,64}/[a-z0-9!#$&^_.+-]{1,64}")
_MAX_ADDRESSES_TRIED = 4


@dataclass(frozen=True, slots=True)
class FetchConfig:
    """
    What an operator decides about fetching.

    Attributes:
        image_fetch_timeout_s: one whole try for an image: look-up, connection, TLS, head, body.
        video_fetch_timeout_s: the same for a video.
        rules: addresses and hosts opened or closed beside the built-in tables.
        ports: that a URL may name.
        user_agent: sent with each request; some servers refuse clients that hide.
        limits: the rest.
    """

    image_fetch_timeout_s: float = 5.0
    video_fetch_timeout_s: float = 30.0
    rules: AddressRules = PUBLIC_ONLY
    ports: frozenset[int] = frozenset({80, 443})
    user_agent: str = "Darkroom"
    limits: FetchLimits = FETCH_LIMITS

    def try_timeout_s(self, limits: ImageLimits | VideoLimits) -> float:
        """What one try for this may take."""
        is_video = isinstance(limits, VideoLimits)
        return self.video_fetch_timeout_s if is_video else self.image_fetch_timeout_s

    def whole_timeout_s(self, limits: ImageLimits | VideoLimits) -> float:
        """What a fetch of it may take with all its tries."""
        return max(self.limits.whole_timeout_s, self.try_timeout_s(limits))

    def __post_init__(self) -> None:
        for timeout_s in (self.image_fetch_timeout_s, self.video_fetch_timeout_s):
            if not 0 < timeout_s < math.inf:
                raise ValueError("FetchConfig takes timeouts of more than 0 seconds.")
        if not (self.user_agent.isascii() and self.user_agent.isprintable()):
            raise ValueError("FetchConfig.user_agent goes into a header: printable ASCII only.")


def fetch_timeout_from(env: Mapping[str, str]) -> float:
    """
    Return the seconds that one try for an image may take; 5 where nothing is said.

    DARKROOM_IMAGE_FETCH_TIMEOUT goes before VLLM_IMAGE_FETCH_TIMEOUT; an empty one is unset.

    Raises:
        ValueError: the value that counts is no number above 0. The text names its variable.
    """
    return _timeout_from(env, "IMAGE_FETCH_TIMEOUT", FetchConfig().image_fetch_timeout_s)


def video_fetch_timeout_from(env: Mapping[str, str]) -> float:
    """Return the same for a video, from `DARKROOM_` or `VLLM_VIDEO_FETCH_TIMEOUT`; or 30."""
    return _timeout_from(env, "VIDEO_FETCH_TIMEOUT", FetchConfig().video_fetch_timeout_s)


def _timeout_from(env: Mapping[str, str], name: str, default_s: float) -> float:
    for variable in (f"DARKROOM_{name}", f"VLLM_{name}"):
        text = env.get(variable, "").strip()
        if not text:
            continue
        if not re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", text) or float(text) <= 0:
            raise ValueError(f"{variable} takes seconds, such as 5 or 2.5, and more than 0.")
        return float(text)
    return default_s


@dataclass(frozen=True, slots=True)
class Errand:
    """
    What is to be fetched, and under which name.

    Attributes:
        scheme, host: for the report; the slots of a host are counted by its name.
        key: by which a failure is remembered.
        find_url: asked before each try.
        is_fast: of the fast lane.
    """

    scheme: str
    host: str
    key: str
    find_url: Callable[[], Awaitable[WebUrl]]
    is_fast: bool = False


class Fetcher:
    """
    Fetches many URLs at once; one for each process, used on one event loop.

    The slots of a host are counted by the name that was typed; where a redirect leads takes none.
    Some of all, and of each host, are kept for the fast lane.
    """

    def __init__(
        self,
        config: FetchConfig | None = None,
        resolve: Resolve | None = None,
        tls: ssl.SSLContext | None = None,
        shared: SharedLimits | None = None,
    ) -> None:
        """
        Args:
            shared: what other processes know of the hosts; None: nothing.
            resolve: in the place of the system's resolver.
            tls: which authorities are trusted; by default those of the system, or of SSL_CERT_FILE,
                which the TLS library reads by itself.
        """
        self._config = config or FetchConfig()
        self._limits = self._config.limits
        self._system = SystemResolver(self._limits.max_connections)  # no threads before its use
        tls = tls or httpcore2.default_ssl_context()
        tls.minimum_version = ssl.TLSVersion.TLSv1_2
        self._pool = httpcore2.AsyncConnectionPool(
            ssl_context=tls,
            max_connections=self._limits.max_connections,
            keepalive_expiry=self._limits.keep_alive_s,
            network_backend=_VettingBackend(self._config, resolve or self._system),
        )
        self._slots = _Slots(self._limits.max_connections)
        self._slots_by_host: WeakValueDictionary[str, _Slots] = WeakValueDictionary()
        self._failures = _Failures(self._limits)
        self._silences = _Silences(self._limits)
        self._shared: SharedLimits = shared or Unshared()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the connections that wait for more work, and end the threads that look names up."""
        await self._pool.aclose()
        await self._shared.aclose()
        self._system.close()

    async def fetch(
        self, url: str, limits: ImageLimits | VideoLimits, *, is_fast: bool = False
    ) -> Fetched:
        """
        Return what stands behind one URL, after up to `max_tries` tries.

        Args:
            url: http or https; see `media.sources` for the others.
            limits: `max_bytes` counts, and whether it is an image or a video chooses the timeout.
            is_fast: of the fast lane: it waits for no slot that others hold.

        Raises:
            BadUrlError: the URL, or one that it redirects to, is not one that is fetched.
            HostNotAllowedError: a host resolves to any address that may not be reached.
            FetchTimeoutError: one of the clocks ran out, or the bytes came too slowly.
            FetchTooLargeError: more than `limits.max_bytes`.
            FetchFailedError: the base of these, and any other way to fail. Each carries `facts`,
                and says with `retryable` whether the same URL may work later.
        """
        try:
            parsed = parse_url(url, self._config.ports)
        except BadUrlError as error:
            error.facts = asdict(report_of_refusal(error))
            raise

        async def find_url() -> WebUrl:
            return parsed

        errand = Errand(parsed.scheme, parsed.host, str(parsed), find_url, is_fast)
        return await self.run(errand, limits)

    async def run(self, errand: Errand, limits: ImageLimits | VideoLimits) -> Fetched:
        """Return what one errand brings. Raises as `fetch` does, and what its `find_url` raises."""
        progress = _Progress(errand.scheme, errand.host, answering=errand.host)
        # Hashed, as a name may be long, and many that failed are kept.
        named = hashlib.sha256(errand.key.encode("utf-8", "surrogatepass")).digest()
        key = (named, limits.max_bytes, isinstance(limits, VideoLimits))
        try:
            self._failures.raise_if_remembered(key)
            self._silences.raise_if_paused(errand.host)
            host_slots = self._slots_by_host.setdefault(
                errand.host, _Slots(self._limits.max_connections_per_host)
            )
            async with (
                host_slots.hold(errand.is_fast),
                self._shared.turn(errand.host, is_fast=errand.is_fast),
                self._slots.hold(errand.is_fast),
            ):
                # What is found may have changed while this one waited.
                self._failures.raise_if_remembered(key)
                self._silences.raise_if_paused(errand.host)
                self._silences.raise_if_silent(errand.host)
                progress.started_at = time.monotonic()
                try:
                    fetched = await self._fetch_in_time(errand, limits, progress)
                except FetchFailedError as error:
                    if progress.is_asked:
                        is_silent = progress.is_silent or isinstance(error, FetchTimeoutError)
                        self._silences.note(progress.answering, is_silent=is_silent)
                        self._failures.remember(key, error)
                    raise
                self._silences.note(progress.answering, is_silent=False)
                return fetched
        except FetchFailedError as error:
            error.facts = asdict(progress.report(error.code))
            raise

    async def _fetch_in_time(
        self, errand: Errand, limits: ImageLimits | VideoLimits, progress: "_Progress"
    ) -> Fetched:
        whole_s = self._config.whole_timeout_s(limits)
        try:
            async with asyncio.timeout(whole_s):
                content, media_type = await self._try_until_it_works(errand, limits, progress)
        except TimeoutError as error:
            raise FetchTimeoutError(
                "Failed to fetch media from URL: with all its tries it took more than the "
                f"{whole_s:g} s that it may. Send the item again later, or "
                "upload the file.",
                retryable=True,
            ) from error
        progress.media_type = media_type
        return Fetched(content, media_type, progress.report(None))

    async def _try_until_it_works(
        self, errand: Errand, limits: ImageLimits | VideoLimits, progress: "_Progress"
    ) -> tuple[bytes, str]:
        def wait_after(error: Exception) -> bool | float:
            """Return whether to try again, or the seconds that the server asks to wait before."""
            if not isinstance(error, FetchFailedError) or not error.retryable:
                return False
            if isinstance(error, FetchTimeoutError | HostPausedError):
                return False
            if error.retry_after_s is None:
                return True
            wait_s = error.retry_after_s + random.uniform(0, self._limits.retry_wait_s)  # noqa: S311 - spreads load, no secret
            left_s = self._config.whole_timeout_s(limits) - progress.seconds
            return wait_s if wait_s <= min(self._limits.max_retry_after_s, left_s) else False

        async for attempt in stamina.retry_context(
            on=wait_after,
            attempts=self._limits.max_tries,
            timeout=None,  # the clock around all tries also stops one that hangs
            wait_initial=self._limits.retry_wait_s,
            wait_max=4 * self._limits.retry_wait_s,
            wait_jitter=self._limits.retry_wait_s,
        ):
            with attempt:
                progress.start_try(errand.host)
                try:
                    return await self._try(errand, limits, progress)
                except FetchFailedError as error:
                    if error.retry_after_s and progress.is_asked:
                        self._silences.pause(progress.answering, error.retry_after_s)
                        await self._shared.pause(progress.answering, error.retry_after_s)
                    raise
        raise AssertionError("stamina ends with a result or an error")

    async def _try(
        self, errand: Errand, limits: ImageLimits | VideoLimits, progress: "_Progress"
    ) -> tuple[bytes, str]:
        """Try once, and turn what the network may raise into errors of this room."""
        timeout_s = self._config.try_timeout_s(limits)
        try:
            async with asyncio.timeout(timeout_s):
                return await self._follow(errand, limits, progress)
        except (TimeoutError, httpcore2.TimeoutException) as error:
            raise FetchTimeoutError(
                "Failed to fetch media from URL: no complete answer within the "
                f"{timeout_s:g} s of one try. Send the item again, or ask the operator to raise "
                f"DARKROOM_{'VIDEO' if isinstance(limits, VideoLimits) else 'IMAGE'}_FETCH_TIMEOUT.",
                retryable=True,
            ) from error
        except (httpcore2.NetworkError, httpcore2.ProtocolError, OSError) as error:
            progress.is_silent = isinstance(error, httpcore2.ConnectError)
            raise FetchFailedError(
                "Failed to fetch media from URL: the server could not be reached or broke off. "
                "Send the item again later.",
                retryable=True,
            ) from error

    async def _follow(
        self, errand: Errand, limits: ImageLimits | VideoLimits, progress: "_Progress"
    ) -> tuple[bytes, str]:
        url = await errand.find_url()
        while True:
            async with self._pool.stream(
                "GET", _as_core_url(url), headers=self._headers_for(url), extensions=self._timeouts
            ) as response:
                response.extensions["network_stream"].end_head()
                headers = _joined(response.headers)
                is_redirect = response.status in _REDIRECTS and b"location" in headers
                if not is_redirect or not self._limits.max_redirects:
                    if response.status != 200:
                        raise await self._failed_with(errand, response, headers)
                    _check_head(headers, limits)
                    content = await self._read_body(response, limits, progress)
                    return content, _media_type_of(headers)
            url = self._next_url(url, headers[b"location"], progress)
            # Whoever redirects has answered; what follows is the word of another host.
            self._silences.note(progress.answering, is_silent=False)
            progress.answering, progress.is_asked = url.host, False
            self._silences.raise_if_paused(url.host)
            self._silences.raise_if_silent(url.host)
            progress.is_asked = True

    async def _failed_with(
        self, errand: Errand, response: httpcore2.Response, headers: Mapping[bytes, bytes]
    ) -> FetchFailedError:
        """What a status other than 200 means; nothing of the body has been read."""
        return failed_with(response.status, headers)

    def _headers_for(self, url: WebUrl) -> list[tuple[bytes, bytes]]:
        return [
            (b"Host", url.host_header.encode("ascii")),
            (b"User-Agent", self._config.user_agent.encode("ascii")),
            (b"Accept", b"image/*, video/*, */*;q=0.5"),
            (b"Accept-Encoding", b"identity"),
        ]

    @property
    def _timeouts(self) -> dict[str, Any]:
        # Only the TLS handshake needs one here: the others stand around the whole try.
        return {"timeout": {"connect": self._limits.connect_timeout_s}}

    def _next_url(self, url: WebUrl, location: bytes, progress: "_Progress") -> WebUrl:
        progress.num_redirects += 1
        if progress.num_redirects > self._limits.max_redirects:
            raise FetchFailedError(
                "Failed to fetch media from URL: it redirects more than the "
                f"{self._limits.max_redirects} times that it may. Give the final URL."
            )
        try:
            following = join_url(url, location.decode("utf-8"), self._config.ports)
        except UnicodeDecodeError as error:
            raise BadUrlError from error
        if (url.scheme, following.scheme) == ("https", "http"):
            raise FetchFailedError(
                "Failed to fetch media from URL: it redirects from https to http, which is not "
                "followed. Give the final URL."
            )
        return following

    async def _read_body(
        self,
        response: httpcore2.Response,
        limits: ImageLimits | VideoLimits,
        progress: "_Progress",
    ) -> bytes:
        clock = asyncio.get_running_loop().time
        window_s = self._limits.min_rate_window_s
        num_wanted = math.ceil(self._limits.min_bytes_per_s * window_s)
        num_counted = 0
        body = BytesIO()  # hands its bytes on without a copy of them
        try:
            async with asyncio.timeout(window_s) as window:
                async for chunk in response.aiter_stream():
                    body.write(chunk)
                    progress.add(chunk)
                    num_bytes = body.tell()
                    if num_bytes > limits.max_bytes:
                        raise _too_many_bytes(limits)
                    if num_bytes - num_counted >= num_wanted:
                        num_counted = num_bytes
                        window.reschedule(clock() + window_s)
        except TimeoutError as error:
            raise FetchTimeoutError(
                "Failed to fetch media from URL: its bytes come more slowly than the "
                f"{self._limits.min_bytes_per_s} a second that are waited for. Send the item "
                "again later, or upload the file.",
                retryable=True,
            ) from error
        progress.is_complete = True
        return body.getvalue()


class SystemResolver:
    """
    The operating system's look-up, in threads of its own: a slow name server starves no one else.

    Args:
        num_threads: as many as there are fetches, or names whose servers are silent hold up the others.
    """

    def __init__(self, num_threads: int = FETCH_LIMITS.max_connections) -> None:
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="darkroom-resolve")

    async def __call__(self, host: str) -> list[str]:
        answers = await asyncio.get_running_loop().run_in_executor(
            self._threads, lambda: socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
        )
        return [str(answer[4][0]) for answer in answers]

    def close(self) -> None:
        """End the threads; one that asks a name server ends when that has answered, and not before."""
        self._threads.shutdown(wait=False, cancel_futures=True)


class _VettingBackend(httpcore2.AsyncNetworkBackend):
    """How the pool connects: look up, judge every answer, connect to one of them, look who is there."""

    def __init__(self, config: FetchConfig, resolve: Resolve) -> None:
        self._rules = config.rules
        self._limits = config.limits
        self._resolve = resolve
        self._network = httpcore2.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> "_CountingStream":
        try:
            async with asyncio.timeout(self._limits.connect_timeout_s):
                addresses = self._vet(host, await self._look_up(host))
                return await self._connect(addresses, port)
        except TimeoutError as error:
            raise FetchTimeoutError(
                "Failed to fetch media from URL: its host did not answer within the "
                f"{self._limits.connect_timeout_s:g} s that connecting may take. Send the item "
                "again later.",
                retryable=True,
            ) from error

    async def _look_up(self, host: str) -> list[Address]:
        try:
            return [ip_address(host)]
        except ValueError:
            pass  # a name
        try:
            answers = dict.fromkeys(await self._resolve(host))  # each once, in their order
        except socket.gaierror as error:
            raise FetchFailedError(
                "Failed to fetch media from URL: its host is not known. Check the name.",
                retryable=error.errno == socket.EAI_AGAIN,
            ) from error
        try:
            return [ip_address(answer) for answer in answers]
        except ValueError as error:  # what is no address cannot be judged
            raise HostNotAllowedError from error

    def _vet(self, host: str, addresses: list[Address]) -> list[Address]:
        """Raise unless each address may be reached: a mixed answer is an attack, not a choice."""
        if not addresses:
            raise FetchFailedError(
                "Failed to fetch media from URL: its host has no address. Check the name."
            )
        if any(judge(address, self._rules, host) for address in addresses):
            raise HostNotAllowedError
        return addresses

    async def _connect(self, addresses: list[Address], port: int) -> "_CountingStream":
        """Connect to the first that answers; each gets an equal share of the time."""
        addresses = addresses[:_MAX_ADDRESSES_TRIED]
        for num_left in range(len(addresses), 0, -1):
            address = addresses[-num_left]
            try:
                stream = await self._network.connect_tcp(
                    str(address), port, timeout=self._limits.connect_timeout_s / len(addresses)
                )
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout):
                if num_left == 1:
                    raise
                continue
            peer = stream.get_extra_info("server_addr")
            if peer is None or ip_address(peer[0]) != address:
                await stream.aclose()
                raise HostNotAllowedError
            return _CountingStream(stream, self._limits.max_header_bytes)
        raise AssertionError("there is at least one address")

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


class _CountingStream(httpcore2.AsyncNetworkStream):
    """
    One connection that reads no more of a head than it may; all else goes through.

    From a request being written until `end_head` every byte counts, so that a million small
    headers, one large one and an endless row of 1xx answers all end at the same limit.
    """

    def __init__(self, stream: httpcore2.AsyncNetworkStream, max_header_bytes: int) -> None:
        self._stream = stream
        self._max_header_bytes = max_header_bytes
        self._num_left: int | None = max_header_bytes

    def end_head(self) -> None:
        self._num_left = None

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        if self._num_left is None:
            return await self._stream.read(max_bytes, timeout)
        if self._num_left <= 0:
            raise FetchFailedError(
                "Failed to fetch media from URL: the server's answer has more than the "
                f"{self._max_header_bytes} bytes of headers that it may. Upload the file instead."
            )
        chunk = await self._stream.read(min(max_bytes, self._num_left), timeout)
        self._num_left -= len(chunk)
        return chunk

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._num_left = self._max_header_bytes
        await self._stream.write(buffer, timeout)

    async def aclose(self) -> None:
        await self._stream.aclose()

    async def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,
    ) -> "_CountingStream":
        try:
            stream = await self._stream.start_tls(ssl_context, server_hostname, timeout)
        except httpcore2.ConnectError as error:
            if isinstance(error.__cause__, ssl.SSLCertVerificationError):
                raise FetchFailedError(
                    "Failed to fetch media from URL: the server's certificate is expired, for "
                    "another name, or from nobody trusted here. Use a host with a valid one."
                ) from error
            if isinstance(error.__cause__, ssl.SSLError) and not isinstance(
                error.__cause__, ssl.SSLEOFError
            ):
                raise FetchFailedError(
                    "Failed to fetch media from URL: the server speaks no TLS that is accepted "
                    "here, 1.2 or later. Use another host, or upload the file."
                ) from error
            raise  # broken off: it may work later
        return _CountingStream(stream, self._max_header_bytes)

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


@dataclass(slots=True)
class _Progress:
    """How far one fetch has come; becomes its report."""

    scheme: str | None = None
    host: str | None = None
    media_type: str | None = None
    started_at: float = field(default_factory=time.monotonic)
    num_tries: int = 0
    num_redirects: int = 0
    num_bytes: int = 0
    sha256: Any = field(default_factory=hashlib.sha256)
    is_complete: bool = False
    is_silent: bool = False  # the last try: nobody was there, or its time ran out
    answering: str = ""  # the host that is asked just now, which may be behind a redirect
    is_asked: bool = True  # it is, and not left alone

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started_at

    def start_try(self, host: str) -> None:
        self.answering, self.is_asked = host, True
        self.num_tries += 1
        self.num_redirects = self.num_bytes = 0
        self.is_silent = False
        self.sha256 = hashlib.sha256()

    def add(self, chunk: bytes) -> None:
        self.num_bytes += len(chunk)
        self.sha256.update(chunk)

    def report(self, error_code: str | None) -> FetchReport:
        is_refused = error_code in _REFUSED
        return FetchReport(
            scheme=None if is_refused else self.scheme,
            host=None if is_refused else self.host,
            media_type=self.media_type,
            num_bytes=self.num_bytes,
            sha256=self.sha256.hexdigest() if self.is_complete else None,
            fetch_ms=round(self.seconds * 1000, 1),
            num_redirects=self.num_redirects,
            num_tries=self.num_tries,
            error_code=error_code,
        )


_REFUSED = frozenset({BadUrlError.code, HostNotAllowedError.code, BucketNotAllowedError.code})


def report_of_refusal(error: FetchFailedError) -> FetchReport:
    """The report of a fetch that was never begun."""
    return replace(_Progress().report(error.code), fetch_ms=0.0)


class _Slots:
    """So many at once; bulk work leaves free what is kept for the fast lane."""

    def __init__(self, num_slots: int) -> None:
        self._all = asyncio.Semaphore(num_slots)
        self._bulk = asyncio.Semaphore(num_slots - count_kept(num_slots))

    @asynccontextmanager
    async def hold(self, is_fast: bool) -> AsyncIterator[None]:
        async with nullcontext() if is_fast else self._bulk, self._all:
            yield


_FailureKey = tuple[bytes, int, bool]


class _Failures:
    """What failed a moment ago, so that a thousand items with one dead URL ask for it once."""

    def __init__(self, limits: FetchLimits) -> None:
        self._limits = limits
        self._failures: OrderedDict[_FailureKey, tuple[float, FetchFailedError]] = OrderedDict()

    def raise_if_remembered(self, key: _FailureKey) -> None:
        until, error = self._failures.get(key, (0.0, None))
        left_s = until - time.monotonic()
        if error is not None and left_s > 0:
            copy = _copy_of(error)  # an error that is raised twice would collect tracebacks
            if copy.retryable:
                copy.retry_after_s = left_s
            raise copy

    def remember(self, key: _FailureKey, error: FetchFailedError) -> None:
        """What may pass is remembered for less long, and `error` says for how long."""
        if error.retry_after_s:  # its host is left alone by everybody
            return
        remember_s = self._limits.remember_failures_s
        if error.retryable:
            error.retry_after_s = remember_s = self._limits.remember_passing_s
        self._failures[key] = (time.monotonic() + remember_s, _copy_of(error))
        self._failures.move_to_end(key)
        if len(self._failures) > self._limits.max_remembered_failures:
            self._failures.popitem(last=False)


class _Silences:
    """
    Hosts that asked for a pause, and hosts that let us wait, one after the other.

    By the name of who did it, which may stand behind a redirect: else any host could speak for one that
    redirects to it.

    Each fetch from them would hold a connection, and its item's place, until its time is over.
    """

    def __init__(self, limits: FetchLimits) -> None:
        self._limits = limits
        self._hosts: OrderedDict[str, tuple[int, float]] = OrderedDict()  # how often; until when
        self._pauses: OrderedDict[str, float] = OrderedDict()  # until when

    def pause(self, host: str, seconds: float) -> None:
        """It has asked for that, so whoever comes now need not ask it."""
        self._pauses[host] = time.monotonic() + min(seconds, self._limits.max_pause_s)
        self._pauses.move_to_end(host)
        if len(self._pauses) > self._limits.max_remembered_failures:
            self._pauses.popitem(last=False)

    def raise_if_paused(self, host: str) -> None:
        left_s = self._pauses.get(host, 0.0) - time.monotonic()
        if left_s > 0:
            raise say_paused(left_s)

    def raise_if_silent(self, host: str) -> None:
        num_silences, until = self._hosts.get(host, (0, 0.0))
        if num_silences < self._limits.max_silences:
            return
        left_s = until - time.monotonic()
        if left_s <= 0:  # this one asks how it is; the others wait for what it finds
            self._hosts[host] = (num_silences, time.monotonic() + self._limits.host_rest_s)
            return
        error = FetchTimeoutError(
            "Failed to fetch media from URL: its host has not answered others in time, and is left "
            "alone for a moment. Send the item again later, or upload the file.",
            retryable=True,
        )
        error.retry_after_s = left_s
        raise error

    def note(self, host: str, *, is_silent: bool) -> None:
        """How a fetch from this host ended."""
        if not is_silent:
            self._hosts.pop(host, None)
            return
        num_silences = self._hosts.get(host, (0, 0.0))[0] + 1
        self._hosts[host] = (num_silences, time.monotonic() + self._limits.host_rest_s)
        self._hosts.move_to_end(host)
        if len(self._hosts) > self._limits.max_remembered_failures:
            self._hosts.popitem(last=False)


def _copy_of(error: FetchFailedError) -> FetchFailedError:
    copy = type(error)(str(error), retryable=error.retryable)
    copy.retry_after_s = error.retry_after_s
    return copy


def _as_core_url(url: WebUrl) -> httpcore2.URL:
    return httpcore2.URL(
        scheme=url.scheme.encode("ascii"),
        host=url.host.encode("ascii"),
        port=url.port,
        target=url.target.encode("ascii"),
    )


def _joined(headers: Iterable[tuple[bytes, bytes]]) -> dict[bytes, bytes]:
    """Return headers by name in lower case; of a name that comes twice, the values in one row."""
    joined: dict[bytes, bytes] = {}
    for name, value in headers:
        key = name.lower()
        joined[key] = joined[key] + b", " + value if key in joined else value
    return joined


def _check_head(headers: Mapping[bytes, bytes], limits: ImageLimits | VideoLimits) -> None:
    """Raise unless the body that follows is plain and of a size that is taken."""
    if headers.get(b"content-encoding", b"identity").strip().lower() not in (b"", b"identity"):
        raise FetchFailedError(
            "Failed to fetch media from URL: the server compressed the file although it was asked "
            "not to. Serve it as it is, or upload it."
        )
    length = headers.get(b"content-length", b"")
    if length.isdigit() and int(length[:20]) > limits.max_bytes:  # a hint: all bytes are counted
        raise _too_many_bytes(limits)


def failed_with(status: int, headers: Mapping[bytes, bytes]) -> FetchFailedError:
    """What an answer of this status means for whoever sent the URL."""
    retryable = status in _RETRYABLE_STATUSES or status >= 500
    what_to_do = (
        "Send the item again later"
        if retryable
        else "Check that the URL leads to the file itself, without a login"
    )
    error = FetchFailedError(
        f"Failed to fetch media from URL: HTTP {status} error. {what_to_do}.", retryable=retryable
    )
    if retryable:
        error.retry_after_s = _seconds_of(headers.get(b"retry-after", b""))
    return error


def _seconds_of(retry_after: bytes) -> float | None:
    """Return what a Retry-After header asks for, in seconds; None where it makes no sense."""
    text = retry_after.decode("latin-1").strip()
    if re.fullmatch(r"[0-9]{1,10}", text):
        return float(text)
    try:
        date = email.utils.parsedate_to_datetime(text)
    except (ValueError, OverflowError):  # numbers may be of any length
        return None
    date = date if date.tzinfo else date.replace(tzinfo=UTC)
    return max(0.0, (date - datetime.now(UTC)).total_seconds())


def _media_type_of(headers: Mapping[bytes, bytes]) -> str:
    claim = headers.get(b"content-type", b"").split(b";")[0].strip().lower()
    return claim.decode("ascii") if _MEDIA_TYPE.fullmatch(claim) else UNKNOWN_MEDIA_TYPE


def _too_many_bytes(limits: ImageLimits | VideoLimits) -> FetchTooLargeError:
    advice = (
        "Cut the video or scale it down"
        if isinstance(limits, VideoLimits)
        else "Scale the image down, or send it as JPEG"
    )
    return FetchTooLargeError(
        f"Failed to fetch media from URL: it has more than the {limits.max_bytes} bytes that it "
        f"may. {advice}."
    )
