"""
No way leads to a denied address: drawn from all ranges and all that hides them, by every way there is.

The network is one of ours, which notes who is connected to; the fetcher above it is whole. A second
test asks the operating system's own resolver, with a name server of ours behind it.
"""

import asyncio
import functools
import json
import os
import shutil
import ssl
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import httpcore2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from media.addresses import Address
from media.errors import FetchFailedError, HostNotAllowedError
from media.fetch import Fetcher
from media.fetched import Fetched
from media.limits import ImageLimits
from tests.media.name_server import ANSWERS
from tests.media.test_addresses import (
    DENIED_IPV4,
    DENIED_IPV6,
    EMBEDDINGS,
    addresses_of,
    denied_ipv4,
    denied_ipv6,
)

GOOD = "93.184.216.34"
LIMITS = ImageLimits(max_bytes=1000)
PICTURE = b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nConnection: close\r\n\r\n\xff\xd8\xff"

hidden = st.builds(
    lambda embed, inner: embed(int(inner)), st.sampled_from([*EMBEDDINGS.values()]), denied_ipv4
)
denied = denied_ipv4 | denied_ipv6 | hidden
public = (
    st.ip_addresses(v=4)
    | st.ip_addresses(network="2400::/12")
    | st.ip_addresses(network="2600::/12")
    | st.ip_addresses(network="2a00::/12")
).filter(
    lambda address: (
        not any(address in ip_network(text) for text in (*DENIED_IPV4, *DENIED_IPV6))
        and int(address) >> 32 & 0xFDFF_FFFF != 0x5EFE  # ISATAP
    )
)


class Replay(httpcore2.AsyncNetworkStream):
    """A connection on which one answer comes, whatever is asked."""

    def __init__(self, address: str, port: int, answer: bytes) -> None:
        self._peer = (address, port)
        self._left = answer

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        piece, self._left = self._left[:max_bytes], self._left[max_bytes:]
        return piece

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        pass

    async def aclose(self) -> None:
        pass

    def get_extra_info(self, info: str) -> Any:
        return self._peer if info == "server_addr" else None


@dataclass
class Network(httpcore2.AsyncNetworkBackend):
    """Lets everybody connect to everything, notes to what, and gives each connection an answer."""

    answers: list[bytes]
    connected: list[str] = field(default_factory=list)

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Any = None,
    ) -> httpcore2.AsyncNetworkStream:
        self.connected.append(host)
        return Replay(host, port, self.answers.pop(0) if self.answers else PICTURE)


@functools.cache
def make_tls() -> ssl.SSLContext:
    return ssl.create_default_context()


def fetch(
    url: str, look_ups: Sequence[Sequence[str]] = (), answers: Sequence[bytes] = (), times: int = 1
) -> tuple[list[Fetched | FetchFailedError], list[str]]:
    """What became of fetching this so often, and to which addresses that led."""
    left = list(look_ups)

    async def resolve(host: str) -> Sequence[str]:
        return left.pop(0) if len(left) > 1 else left[0]

    async def scenario() -> tuple[list[Fetched | FetchFailedError], list[str]]:
        network = Network(list(answers))
        ends: list[Fetched | FetchFailedError] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(httpcore2, "AnyIOBackend", lambda: network)
            fetcher = Fetcher(resolve=resolve, tls=make_tls())
        async with fetcher:
            for number in range(times):
                try:
                    ends.append(await fetcher.fetch(f"{url}?{number}", LIMITS))
                except FetchFailedError as error:
                    ends.append(error)
        return ends, network.connected

    return asyncio.run(scenario())


def write_host(address: Address) -> str:
    return f"[{address}]" if address.version == 6 else str(address)


def redirect_to(location: str) -> bytes:
    return f"HTTP/1.1 302 Found\r\nLocation: {location}\r\nConnection: close\r\n\r\n".encode()


@given(denied)
def test_denied_address_is_never_connected_to_when_a_url_names_it(address: Address) -> None:
    (end,), connected = fetch(f"http://{write_host(address)}/")

    assert isinstance(end, HostNotAllowedError)
    assert [] == connected


@given(denied, st.lists(public.map(str), max_size=4), st.integers(0, 4))
def test_denied_address_is_never_connected_to_among_the_answers_for_a_name(
    address: Address, others: list[str], place: int
) -> None:
    answers = [*others[:place], str(address), *others[place:]]
    (end,), connected = fetch("http://name.test/", [answers])

    assert isinstance(end, HostNotAllowedError)
    assert [] == connected


@given(denied, st.lists(st.booleans(), min_size=1, max_size=4))
def test_denied_address_is_never_connected_to_when_answers_change(
    address: Address, are_denied: list[bool]
) -> None:
    look_ups = [[str(address)] if is_denied else [GOOD] for is_denied in are_denied]
    ends, connected = fetch("http://name.test/", look_ups, times=len(look_ups))

    assert are_denied == [isinstance(end, HostNotAllowedError) for end in ends]
    assert [GOOD] * are_denied.count(False) == connected


@given(denied, st.integers(0, 2), st.booleans())
def test_denied_address_is_never_connected_to_by_a_redirect(
    address: Address, num_hops_before: int, is_by_name: bool
) -> None:
    where = "inside.test" if is_by_name else write_host(address)
    hops = [redirect_to("http://name.test/again")] * num_hops_before
    look_ups = [[GOOD]] * (num_hops_before + 1) + [[str(address)]]
    (end,), connected = fetch(
        "http://name.test/", look_ups, [*hops, redirect_to(f"http://{where}/")]
    )

    assert isinstance(end, HostNotAllowedError)
    assert [GOOD] * (num_hops_before + 1) == connected


@given(public, st.booleans())
def test_public_address_is_connected_to_as_it_is(address: Address, is_by_name: bool) -> None:
    host = "name.test" if is_by_name else write_host(address)
    (end,), connected = fetch(f"http://{host}/", [[str(address)]])

    assert isinstance(end, Fetched), end
    assert [str(address)] == connected


def test_sample_of_what_is_drawn_reaches_every_range() -> None:
    """The strategies above are worth nothing if they draw from an empty list."""
    for texts in (DENIED_IPV4, DENIED_IPV6):
        addresses_of(texts).validate()
        assert len(texts) > 10


# The system's own resolver


def open_namespace() -> list[str] | None:
    """How a program gets a network and a resolv.conf of its own; None where it may not."""
    if shutil.which("unshare") is None or shutil.which("mount") is None:
        return None
    words = ["unshare", "--mount", "--net"]
    if os.geteuid() != 0:
        words += ["--user", "--map-root-user"]
    tried = subprocess.run(
        [*words, "mount", "--bind", "/dev/null", "/etc/resolv.conf"], check=False
    )
    return words if tried.returncode == 0 else None


def test_answers_of_a_real_name_server_are_judged_through_the_system_s_resolver(
    tmp_path: Path,
) -> None:
    words = open_namespace()
    if words is None:
        pytest.skip("no namespaces here")
    command = [*words, sys.executable, "-m", "tests.media.name_server", str(tmp_path)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, timeout=120)
    found = json.loads(done.stdout)

    expected = {name: ["host_not_allowed"] * 3 for name in ANSWERS}
    expected |= {
        "plain.test": ["fetched"] * 2,
        "alias-of-good.test": ["fetched"] * 2,
        "rebinding.test": ["fetched", "host_not_allowed", "host_not_allowed"],
        # The second is for a port where nobody listens.
        "back.test": ["host_not_allowed", "image_fetch_failed again", "fetched"],
        # Nobody is there in the namespace: it was let through, and may work later.
        "public.test": ["image_fetch_failed again"] * 3,
        "nobody.test": ["image_fetch_failed"] * 3,
        "broken.test": ["image_fetch_failed again"] * 3,
        "silent.test": ["image_fetch_failed again"],
    }
    assert expected == found["ends"]
    assert 6 == found["num_good"]
    assert 0 == found["num_canary"]
