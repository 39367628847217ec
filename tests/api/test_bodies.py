"""Bodies as they come in: what is held, what never comes, what has two lengths, and what is no clean JSON."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from urllib.parse import urlsplit

import httpx2
import pytest
from fastapi import FastAPI

from api import bodies
from api.app import create_app
from api.bodies import MAX_KEYS, MAX_VALUES, parse
from api.config import ApiConfig
from api.errors import InvalidRequestError
from storage.blobs import FolderBlobs
from storage.db import Database
from tests.api.conftest import Service
from tests.api.inputs import ENDPOINT, build_line

BODY = json.dumps(
    {"requests": [build_line(1)], "endpoint": ENDPOINT, "completion_window": "24h"}
).encode()
FORM = "multipart/form-data; boundary=b"


@pytest.fixture
def build_app(sqlite_template: bytes, tmp_path: Path) -> Callable[..., FastAPI]:
    (tmp_path / "db").write_bytes(sqlite_template)
    database = Database(f"sqlite:///{tmp_path / 'db'}")

    def build(**limits: float) -> FastAPI:
        config = ApiConfig(pepper=b"", is_open=True, **limits)  # type: ignore[arg-type]
        return create_app(config, database, FolderBlobs(tmp_path / "blobs"))

    return build


def ask(app: FastAPI) -> httpx2.AsyncClient:
    return httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://127.0.0.1")


@pytest.mark.parametrize("path", ["/v1/batches", "/v1/chat/completions", "/v1/files"])
def test_body_that_stalls_is_given_up(
    build_app: Callable[..., FastAPI], tmp_path: Path, path: str
) -> None:
    async def stall() -> AsyncIterator[bytes]:
        yield b'--b\r\nContent-Disposition: form-data; name="file"\r\n\r\nabc'
        await asyncio.Event().wait()

    async def send() -> httpx2.Response:
        async with ask(build_app(body_timeout_s=0.05)) as client:
            return await client.post(path, content=stall(), headers={"content-type": FORM})

    answer = asyncio.run(send())

    assert (408, "stalled") == (answer.status_code, answer.json()["error"]["code"])
    assert "close" == answer.headers["connection"]
    assert [] == list((tmp_path / "blobs" / ".unfinished").iterdir())


def test_form_that_goes_on_behind_its_end_is_not_read_forever(
    build_app: Callable[..., FastAPI],
) -> None:
    form = (
        b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
        b'--b\r\nContent-Disposition: form-data; name="file"\r\n\r\n{}\r\n--b--\r\n'
    )

    async def go_on() -> AsyncIterator[bytes]:
        yield form
        while True:
            yield b"\r\n" * 8192

    async def send() -> httpx2.Response:
        async with ask(build_app(max_file_bytes=100_000)) as client:
            return await client.post("/v1/files", content=go_on(), headers={"content-type": FORM})

    answer = asyncio.run(send())

    assert (413, "too_large") == (answer.status_code, answer.json()["error"]["code"])


def test_more_bodies_than_there_is_memory_for_are_told_to_come_again(
    build_app: Callable[..., FastAPI],
) -> None:
    async def send() -> tuple[httpx2.Response, ...]:
        begun, is_time = asyncio.Event(), asyncio.Event()

        async def linger() -> AsyncIterator[bytes]:
            yield BODY[:-1]
            begun.set()  # asked for the next piece: this one is held
            await is_time.wait()
            yield BODY[-1:]

        async with ask(build_app(max_held_bytes=len(BODY) + 10)) as client:
            slow = asyncio.create_task(client.post("/v1/batches", content=linger()))
            await begun.wait()
            refused = await client.post("/v1/batches", content=BODY)
            is_time.set()
            return await slow, refused, await client.post("/v1/batches", content=BODY)

    slow, refused, later = asyncio.run(send())

    assert (503, "too_busy") == (refused.status_code, refused.json()["error"]["code"])
    assert "1" == refused.headers["retry-after"]
    assert (200, 200) == (slow.status_code, later.status_code)


def test_body_of_two_lengths_is_refused(service: Service) -> None:
    place = urlsplit(service.url)
    request = (
        f"POST /v1/batches HTTP/1.1\r\nHost: {place.netloc}\r\nContent-Length: 4\r\n"
        "Transfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
    )
    with socket.create_connection((str(place.hostname), place.port or 0)) as connection:
        connection.sendall(request.encode())
        answer = b"".join(iter(lambda: connection.recv(65536), b""))

    assert answer.startswith(b"HTTP/1.1 400 ")
    assert 1 == answer.count(b"HTTP/1.1")
    assert b'"type":"invalid_request_error"' in answer


@pytest.mark.parametrize(
    ("body", "words"),
    [
        pytest.param(b'{"a":[' + b"0," * MAX_VALUES + b"0]}", "values", id="values"),
        pytest.param(b'{"a":[' + b"[]," * MAX_VALUES + b"0]}", "values", id="arrays"),
        pytest.param(b'{"a":[' + b"[[]]," * MAX_VALUES + b"0]}", "values", id="arrays within"),
        pytest.param(
            json.dumps(dict.fromkeys(map(str, range(MAX_KEYS + 1)))).encode(), "keys", id="keys"
        ),
        pytest.param(b'{"a":1e999}', "too large", id="1e999"),
        pytest.param(b'{"a":[-1e400]}', "too large", id="-1e400"),
        pytest.param(b'{"a":NaN}', "NaN", id="NaN"),
        pytest.param(b'{"a":-Infinity}', "NaN", id="-Infinity"),
    ],
)
def test_body_that_is_not_clean_is_refused(body: bytes, words: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        parse(body)

    assert "invalid_json" == caught.value.shown_code
    assert words in caught.value.message


def test_swarm_of_values_is_refused_before_it_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(bodies, "json")

    with pytest.raises(InvalidRequestError):
        parse(b'{"a":[' + b"[]," * 2 * MAX_VALUES + b"0]}")


def test_commas_and_brackets_within_text_are_no_values() -> None:
    text = ',[{"\\' * MAX_VALUES

    assert {"a": text} == parse(json.dumps({"a": text}).encode())
    assert {"a": [0] * (MAX_VALUES - 2)} == parse(b'{"a":[' + b"0," * (MAX_VALUES - 3) + b"0]}")
