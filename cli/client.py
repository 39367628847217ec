"""
Calls a server's /v1, with nothing but the standard library: what only asks must install in seconds.

Errors of the wire become `ServerError`, with the server's own words; a server that does not answer
is `UnreachableError`. Answers that wait are asked for again until something changed.
"""

import json
import secrets
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from typing import IO, Any, Final
from urllib.parse import quote, urlsplit

DEFAULT_SERVER: Final = "http://127.0.0.1:8000"
CONNECT_TIMEOUT_S: Final = 10.0
TIMEOUT_S: Final = 120.0
WAIT_S: Final = 30
PIECE_BYTES: Final = 1024 * 1024
FILES_A_PAGE: Final = 1000

ENDED: Final = frozenset({"failed", "completed", "expired", "cancelled"})


class UnreachableError(Exception):
    """The server does not answer, or stopped in the middle of its answer."""

    def __init__(self, server: str, reason: Exception) -> None:
        cause = getattr(reason, "strerror", None) or str(reason) or type(reason).__name__
        super().__init__(
            f"{server} does not answer: {cause}. "
            "Start a server with `darkroom up`, or name another one with --server."
        )


class ServerError(Exception):
    """The server refused. The text is its own."""

    def __init__(self, status: int, message: str, code: str | None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code


@dataclass(frozen=True, slots=True)
class Polled:
    """A batch as it was found, and the version to ask after next time."""

    batch: dict[str, Any]
    etag: str

    @property
    def has_ended(self) -> bool:
        return self.batch["status"] in ENDED


@dataclass(frozen=True, slots=True)
class Client:
    server: str = DEFAULT_SERVER
    api_key: str | None = None

    def upload(
        self,
        file: IO[bytes],
        num_bytes: int,
        filename: str,
        *,
        purpose: str = "batch",
        lifetime_s: int | None = None,
    ) -> dict[str, Any]:
        """Hand in a file of any size; it is read as it is sent."""
        boundary = secrets.token_hex(16)
        fields = {"purpose": purpose}
        if lifetime_s is not None:
            fields |= {
                "expires_after[anchor]": "created_at",
                "expires_after[seconds]": str(lifetime_s),
            }
        head = "".join(
            f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'
            for name, value in fields.items()
        ).encode()
        head += (
            f'--{boundary}\r\nContent-Disposition: form-data; name="file"; '
            f'filename="{quote(filename, safe=" ._-")}"\r\n\r\n'
        ).encode()
        tail = f"\r\n--{boundary}--\r\n".encode()

        def pieces() -> Iterator[bytes]:
            yield head
            while piece := file.read(PIECE_BYTES):
                yield piece
            yield tail

        return self._ask(
            "POST",
            "/v1/files",
            body=pieces(),
            headers={
                "content-type": f"multipart/form-data; boundary={boundary}",
                "content-length": str(len(head) + num_bytes + len(tail)),
            },
        )

    def list_models(self) -> list[str]:
        """What the server is set up to run; empty where it does not say."""
        return [model["id"] for model in self._ask("GET", "/v1/models")["data"]]

    def list_files(self, purpose: str) -> Iterator[dict[str, Any]]:
        """The files of a purpose, the oldest first."""
        after = ""
        while True:
            query = f"purpose={purpose}&order=asc&limit={FILES_A_PAGE}{after}"
            page = self._ask("GET", f"/v1/files?{query}")
            yield from page["data"]
            if not page["has_more"]:
                return
            after = f"&after={page['last_id']}"

    def delete_file(self, file: str) -> None:
        self._ask("DELETE", f"/v1/files/{quote(file, safe='')}")

    def submit(self, file: str, *, key: str | None = None, **options: Any) -> dict[str, Any]:
        body = {"input_file_id": file, "endpoint": "/v1/chat/completions", **options}
        headers = {"content-type": "application/json"}
        if key is not None:
            headers["idempotency-key"] = key
        return self._ask("POST", "/v1/batches", body=json.dumps(body).encode(), headers=headers)

    def poll(self, batch: str, *, after: Polled | None = None) -> Polled:
        """The state of a batch: now, or, after one that is known, at the next change."""
        path = f"/v1/batches/{quote(batch, safe='')}"
        found = None
        while found is None:  # 304: nothing has changed, ask again
            if after is None:
                found = self._poll(path, {})
            else:
                found = self._poll(f"{path}?wait={WAIT_S}", {"if-none-match": after.etag})
        return found

    def cancel(self, batch: str) -> dict[str, Any]:
        return self._ask("POST", f"/v1/batches/{quote(batch, safe='')}/cancel")

    def read_file(self, file: str) -> Iterator[bytes]:
        with self._open("GET", f"/v1/files/{quote(file, safe='')}/content") as answer:
            while piece := self._read(answer, PIECE_BYTES):
                yield piece

    def read_results(self, batch: str, *, after: int = 0) -> Iterator[bytes]:
        """Results so far, in the order in which they came; `after` is the `seq` of a known line."""
        while True:
            path = f"/v1/batches/{quote(batch, safe='')}/results?after={after}"
            with self._open("GET", path) as answer:
                content, last = self._read(answer), int(answer.headers["x-last-line"])
            if not content:
                return
            yield content
            after = last

    def is_ready(self) -> bool:
        """Whether the server and all that it stands on answer."""
        try:
            with self._open("GET", "/readyz"):
                return True
        except (UnreachableError, ServerError):
            return False

    def _poll(self, path: str, headers: Mapping[str, str]) -> Polled | None:
        with self._open("GET", path, headers=headers) as answer:
            if answer.status == 304:
                return None
            return Polled(self._parse(answer), answer.headers["etag"])

    def _ask(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        with self._open(method, path, **options) as answer:
            return self._parse(answer)

    def _parse(self, answer: HTTPResponse) -> dict[str, Any]:
        try:
            found: dict[str, Any] = json.loads(self._read(answer))
        except ValueError as error:
            raise ServerError(
                answer.status, f"{self.server} does not answer as Darkroom does.", None
            ) from error
        return found

    def _read(self, answer: HTTPResponse, num_bytes: int | None = None) -> bytes:
        try:
            piece = answer.read(num_bytes)
            if not piece and answer.length:  # http.client itself says nothing here
                raise ConnectionError("the answer broke off")
        except (OSError, HTTPException) as error:
            raise UnreachableError(self.server, error) from error
        return piece

    @contextmanager
    def _open(
        self,
        method: str,
        path: str,
        *,
        body: bytes | Iterator[bytes] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Iterator[HTTPResponse]:
        kind, host, port, prefix = self._find_place()
        sent = dict(headers or {})
        if self.api_key:
            sent["authorization"] = f"Bearer {self.api_key}"
        with ExitStack() as open_things:
            try:
                connection = kind(host, port, timeout=CONNECT_TIMEOUT_S)
                open_things.callback(connection.close)
                connection.connect()
                connection.sock.settimeout(TIMEOUT_S)
                with suppress(BrokenPipeError, ConnectionResetError):
                    # Who is refused is told so before all is sent: the answer is there all the same.
                    connection.request(method, prefix + path, body=body, headers=sent)
                answer = connection.getresponse()
            except (OSError, HTTPException, ValueError) as error:
                raise UnreachableError(self.server, error) from error
            if answer.status >= 400:
                raise _read_error(answer)
            yield answer

    def _find_place(self) -> tuple[type[HTTPConnection], str, int | None, str]:
        """How and where to connect, and what comes before the path; the wire's /v1 may stand there."""
        try:
            place = urlsplit(self.server)
            host, port = place.hostname, place.port
        except ValueError as error:
            raise UnreachableError(self.server, error) from error
        if place.scheme not in ("http", "https") or not host:
            raise UnreachableError(self.server, ValueError("give http://HOST:PORT"))
        kind = HTTPSConnection if place.scheme == "https" else HTTPConnection
        return kind, host, port, place.path.rstrip("/").removesuffix("/v1")


def _read_error(answer: HTTPResponse) -> ServerError:
    with answer:
        content = answer.read(64 * 1024)
    try:
        error = json.loads(content)["error"]
        return ServerError(answer.status, str(error["message"]), error.get("code"))
    except (ValueError, LookupError, TypeError):
        return ServerError(answer.status, f"The server answered {answer.status}.", None)
