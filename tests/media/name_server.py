"""
A name server of ours that the operating system's own resolver asks, in a namespace of its own.

    unshare --mount --net python -m tests.media.name_server FOLDER

Inside, /etc/resolv.conf names 127.0.0.1, where a real server answers by UDP as it is told, and the
fetcher looks names up as it does in earnest. Prints what became of each fetch, as JSON.
"""

import asyncio
import fcntl
import json
import socket
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from ipaddress import IPv4Address, ip_address, ip_network
from pathlib import Path
from threading import Thread
from typing import Any

from media.addresses import AddressRules
from media.errors import FetchFailedError
from media.fetch import FetchConfig, Fetcher
from media.limits import FetchLimits, ImageLimits
from tests.media.servers import answering, serve

A, CNAME, AAAA = 1, 5, 28
SERVER_FAILURE, NO_SUCH_NAME = 2, 3
SILENCE = -1

PUBLIC = ["93.184.216.34", "2606:2800:220:1:248:1893:25c8:1946"]
"""Nobody is there in the namespace, so that a connection to them fails at once."""

ANSWERS: dict[str, Sequence[Sequence[str] | int]] = {
    # Each time the next ones, and the last ones for ever. What is no address is another name.
    "plain.test": [["127.0.0.1"]],
    "six.test": [["::1"]],
    "families.test": [["127.0.0.1", "::1"]],
    "mixed.test": [["127.0.0.1", "10.0.0.1"]],
    "turned.test": [["10.0.0.1", "127.0.0.1"]],
    "many.test": [[*(f"93.184.216.{number}" for number in range(8)), "169.254.169.254"]],
    "mapped.test": [["::ffff:169.254.169.254"]],
    "nat64.test": [["64:ff9b::a9fe:a9fe"]],
    "public-and-6to4.test": [[PUBLIC[0], "2002:a00:1::1"]],
    "carrier.test": [["100.64.0.1"]],
    "broadcast.test": [["255.255.255.255"]],
    "alias.test": [["inner.cluster.test"]],
    "alias-of-good.test": [["plain.test"]],
    "inner.cluster.test": [["10.96.0.10"]],
    "rebinding.test": [["127.0.0.1"], ["127.0.0.1"], ["::1"]],  # one answer each for A and AAAA
    "back.test": [["10.0.0.1"], ["10.0.0.1"], ["127.0.0.1"]],
    "public.test": [PUBLIC],
    "nobody.test": [NO_SUCH_NAME],
    "broken.test": [SERVER_FAILURE],
    "silent.test": [SILENCE],
}


class NameServer:
    """Answers one question after the other, in a thread."""

    def __init__(self) -> None:
        self.asked: Counter[str] = Counter()
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind(("127.0.0.1", 53))
        Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            message, sender = self._socket.recvfrom(512)
            reply = self._answer(message)
            if reply is not None:
                self._socket.sendto(reply, sender)

    def _answer(self, message: bytes) -> bytes | None:
        name, end = _read_name(message)
        (kind,) = struct.unpack_from(">H", message, end)
        turns = ANSWERS.get(name, [NO_SUCH_NAME])
        found = turns[min(self.asked[name], len(turns) - 1)]
        self.asked[name] += 1
        if found == SILENCE:
            return None
        records = b""
        if isinstance(found, int):
            return self._message(message, end, found, 0, b"")
        num_records, owner = 0, name
        for text in found:
            if text.endswith(".test"):
                records += _record(owner, CNAME, _write_name(text))
                num_records += 1
                owner, inner = text, ANSWERS[text][-1]
                assert not isinstance(inner, int)
                found_here: Sequence[str] = inner
            else:
                found_here = [text]
            for address in map(ip_address, found_here):
                if kind == (A if isinstance(address, IPv4Address) else AAAA):
                    records += _record(owner, kind, address.packed)
                    num_records += 1
        return self._message(message, end, 0, num_records, records)

    def _message(
        self, question: bytes, end: int, code: int, num_records: int, records: bytes
    ) -> bytes:
        head = question[:2] + struct.pack(">HHHHH", 0x8180 | code, 1, num_records, 0, 0)
        return head + question[12 : end + 4] + records


def _read_name(message: bytes) -> tuple[str, int]:
    labels, place = [], 12
    while length := message[place]:
        labels.append(message[place + 1 : place + 1 + length].decode("ascii").lower())
        place += 1 + length
    return ".".join(labels), place + 1


def _write_name(name: str) -> bytes:
    labels = name.encode("ascii").split(b".")
    return b"".join(bytes([len(label)]) + label for label in labels) + b"\0"


def _record(owner: str, kind: int, content: bytes) -> bytes:
    lifetime_s = 0
    return _write_name(owner) + struct.pack(">HHIH", kind, 1, lifetime_s, len(content)) + content


def enter(folder: Path) -> None:
    """Make this namespace's loopback work, and its resolver ask us."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        up = struct.pack("16sH14x", b"lo", 0x1 | 0x40)
        fcntl.ioctl(any_socket, 0x8914, up)  # SIOCSIFFLAGS: IFF_UP, IFF_RUNNING
    settings = folder / "resolv.conf"
    settings.write_text("nameserver 127.0.0.1\noptions timeout:4 attempts:1\n")
    subprocess.run(["mount", "--bind", str(settings), "/etc/resolv.conf"], check=True)  # noqa: S607


async def fetch_all() -> dict[str, Any]:
    NameServer()
    picture = answering(b"\xff\xd8\xff", headers=["Connection: close"])
    limits = FetchLimits(max_tries=1, remember_failures_s=0.0, connect_timeout_s=30.0)
    ends: dict[str, list[str]] = {}
    async with serve(picture) as good, serve(picture, "::1") as canary:
        config = FetchConfig(
            image_fetch_timeout_s=60.0,
            rules=AddressRules(allowed_networks=(ip_network("127.0.0.1/32"),)),
            ports=frozenset({good.port, canary.port}),
            limits=limits,
        )
        async with Fetcher(config) as fetcher:
            for name in ANSWERS:
                for port in (good.port, canary.port, good.port):
                    if port == canary.port and name in ("plain.test", "alias-of-good.test"):
                        continue
                    if name == "silent.test" and name in ends:
                        continue  # each costs four seconds
                    url = f"http://{name}:{port}/{len(ends)}"
                    try:
                        await fetcher.fetch(url, ImageLimits())
                    except FetchFailedError as error:
                        end = f"{error.code}{' again' if error.retryable else ''}"
                    else:
                        end = "fetched"
                    ends.setdefault(name, []).append(end)
        return {
            "ends": ends,
            "num_good": good.num_connections,
            "num_canary": canary.num_connections,
        }


if __name__ == "__main__":
    enter(Path(sys.argv[1]))
    print(json.dumps(asyncio.run(fetch_all())))  # noqa: T201
