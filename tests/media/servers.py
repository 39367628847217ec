"""Servers on loopback that answer as they are told, well or badly, and a resolver of ours."""

import asyncio
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from media.limits import FetchLimits

QUICK = FetchLimits(
    connect_timeout_s=10.0,
    whole_timeout_s=10.0,
    retry_wait_s=0.01,
    max_retry_after_s=1.0,
    min_rate_window_s=0.3,
)
"""For what ends by a clock: as usual, but sooner."""

Answer = Callable[[str, asyncio.StreamWriter], Awaitable[None]]
"""Gets the head of a request, and writes whatever it likes."""


@dataclass
class Server:
    """One that runs: its port, and the heads of all requests, in order."""

    port: int
    num_connections: int = 0
    heads: list[str] = field(default_factory=list)
    most_at_once: int = 0

    @property
    def paths(self) -> list[str]:
        return [head.split(" ")[1] for head in self.heads]


@asynccontextmanager
async def serve(
    answer: Answer | Mapping[str, Answer],
    address: str = "127.0.0.1",
    tls: ssl.SSLContext | None = None,
) -> AsyncIterator[Server]:
    """Answer requests on a free port, all alike or each path in its own way."""
    served = Server(0)
    tasks: set[asyncio.Task[None]] = set()

    async def converse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        served.num_connections += 1
        with suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                served.heads.append(head)
                path = head.split(" ")[1].split("?")[0]
                served.most_at_once = max(served.most_at_once, len(tasks))
                await (answer if callable(answer) else answer[path])(head, writer)
                await writer.drain()
                if writer.is_closing():
                    break

    async def on_connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.ensure_future(converse(reader, writer))
        tasks.add(task)
        await asyncio.wait({task})
        writer.transport.abort()
        tasks.discard(task)

    server = await asyncio.start_server(on_connection, address, 0, ssl=tls, backlog=64)
    served.port = server.sockets[0].getsockname()[1]
    try:
        yield served
    finally:
        server.close()
        while tasks:  # every conversation ends before the loop does, also one that has just begun
            for task in tasks:
                task.cancel()
            await asyncio.sleep(0)
        await asyncio.sleep(0.01)  # and so do their connections


def answering(
    body: bytes = b"",
    status: str = "200 OK",
    headers: Sequence[str] = (),
    content_length: int | None = None,
) -> Answer:
    """A whole answer at once; `content_length` may lie."""

    async def answer(head: str, writer: asyncio.StreamWriter) -> None:
        length = len(body) if content_length is None else content_length
        lines = [f"HTTP/1.1 {status}", f"Content-Length: {length}", *headers, "", ""]
        writer.write("\r\n".join(lines).encode("latin-1") + body)
        if length != len(body):
            writer.close()

    return answer


def redirecting(location: str, status: str = "302 Found") -> Answer:
    return answering(b"", status, [f"Location: {location}"])


def raw(*pieces: bytes, pause_s: float = 0.0, ends: bool = True) -> Answer:
    """Bytes as they are, with a pause behind each piece; then the end, or silence."""

    async def answer(head: str, writer: asyncio.StreamWriter) -> None:
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(pause_s)
        if not ends:
            await asyncio.sleep(60)
        writer.close()

    return answer


def endless(head_of_answer: bytes, piece: bytes, pause_s: float = 0.0) -> Answer:
    async def answer(head: str, writer: asyncio.StreamWriter) -> None:
        writer.write(head_of_answer)
        while True:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(pause_s)

    return answer


def in_turn(*answers: Answer) -> Answer:
    """One answer after the other, and the last one for ever."""
    left = list(answers)

    async def answer(head: str, writer: asyncio.StreamWriter) -> None:
        await (left.pop(0) if len(left) > 1 else left[0])(head, writer)

    return answer


class Names:
    """A resolver: each name has its answers; a list of lists gives another one each time."""

    def __init__(self, answers: Mapping[str, Sequence[str]] | None = None) -> None:
        self._answers = dict(answers or {})
        self._changing: dict[str, list[Sequence[str]]] = {}
        self.asked: list[str] = []

    def change(self, name: str, *answers: Sequence[str]) -> None:
        """Give these in turn, as a name with a TTL of 0 may; the last one stays."""
        self._changing[name] = list(answers)

    async def __call__(self, host: str) -> Sequence[str]:
        self.asked.append(host)
        if left := self._changing.get(host):
            return left.pop(0) if len(left) > 1 else left[0]
        return self._answers.get(host, ["127.0.0.1"])


def make_tls(folder: Path, name: str, days_left: int = 1) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """
    Return TLS for a server with a fresh certificate for one name, and for a client that trusts it.

    The certificate signs itself, so for a client that does not know it it is self-signed.
    """
    pytest.importorskip("cryptography")
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    end = datetime.now(UTC) + timedelta(days=days_left)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(end - timedelta(days=30))
        .not_valid_after(end)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = folder / f"{name}.pem"
    pem.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        + certificate.public_bytes(serialization.Encoding.PEM)
    )
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(pem)
    client = ssl.create_default_context(cafile=str(pem))
    return server, client
