"""
Requests that are odd or mean harm (A8 to A19), against the API's own process.

Each ends in its status and code, costs little, says nothing of us, and the good request after it is
answered as ever.
"""

import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.client import HTTPResponse
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx2
import pytest

from storage import tenants
from tests import asking
from tests.api.conftest import Client, Service, open_client, start_service
from tests.api.inputs import build_jsonl, build_line, submit, upload
from tests.api.server import PEPPER
from tests.corpus import memory
from tests.corpus.cases import PLANTED, ROOT
from tests.corpus.front import MAX_S, Row
from tests.corpus.report import PROPERTY
from tests.corpus.texts import find_leaks
from tests.storage.conftest import sqlite_template

__all__ = ["sqlite_template"]

MAX_GROWTH_MB = 64.0
CRLF = b"\r\n"
KEY = "Idempotency-Key"
BATCHES, FILES = "/v1/batches", "/v1/files"
CURSOR = f"batch_{uuid4().hex}"


@dataclass(frozen=True)
class Api:
    service: Service
    client: Client
    stranger: Client

    @property
    def http(self) -> httpx2.Client:
        return self.client.http


Answer = tuple[int, str]
"""A status, and the text of the answer."""


@dataclass(frozen=True)
class WireCase:
    """
    Args:
        send: makes the request and waits for its end.
        expected: status and code of the error; `200 ok` where it is served.
    """

    id: str
    what: str
    send: Callable[[Api], Answer]
    expected: str
    note: str = ""


def answer_of(response: httpx2.Response) -> Answer:
    return response.status_code, response.text


def send(method: str, path: str, **words: Any) -> Callable[[Api], Answer]:
    return lambda api: answer_of(api.http.request(method, path, **words))


def send_form(
    content: bytes, kind: str = "multipart/form-data; boundary=b"
) -> Callable[[Api], Answer]:
    return send("POST", FILES, content=content, headers={"content-type": kind})


def part(name: str, content: bytes, more: str = "") -> bytes:
    head = f'--b\r\nContent-Disposition: form-data; name="{name}"{more}\r\n\r\n'
    return head.encode() + content + CRLF


def keyed(key: str, number: int = 1) -> dict[str, Any]:
    body = {
        "requests": [build_line(number)],
        "endpoint": "/v1/chat/completions",
        "completion_window": "24h",
    }
    return {"json": body, "headers": {KEY: key}}


def send_other_body_again(api: Api) -> Answer:
    first = api.http.post(BATCHES, **keyed("again"))
    assert 200 == first.status_code
    return answer_of(api.http.post(BATCHES, **keyed("again", 2)))


def upload_with_a_path(api: Api) -> Answer:
    """The name is shown, without its way, and the content comes back as bytes and nothing else."""
    content = b"<script>" + PLANTED.encode()
    form = (
        part("purpose", b"vision")
        + part("file", content, '; filename="../../x.html"')
        + b"--b--\r\n"
    )
    made = api.http.post(
        FILES, content=form, headers={"content-type": "multipart/form-data; boundary=b"}
    )
    assert "x.html" == made.json()["filename"].removeprefix("../../")
    back = api.http.get(f"{FILES}/{made.json()['id']}/content")
    assert content == back.content
    assert "application/octet-stream" == back.headers["content-type"]
    assert "nosniff" == back.headers["x-content-type-options"]
    return made.status_code, ""


def ask_for_ranges(api: Api) -> Answer:
    content = build_jsonl(build_line(1))
    file = upload(api.client, content).id
    ranges = "bytes=" + ",".join(["0-"] * 1000)
    headers = {"range": ranges, "if-range": '"x"', "if-none-match": ",".join(['"x"'] * 100)}
    answer = api.http.get(f"{FILES}/{file}/content", headers=headers)
    assert content == answer.content
    return answer.status_code, ""


def ask_with_tags(api: Api) -> Answer:
    batch = submit(api.client, build_line(1)).id
    tags = ",".join(f'W/"x{n}"' for n in range(1000))
    return answer_of(api.http.get(f"{BATCHES}/{batch}", headers={"if-none-match": tags}))


def ask_for_a_strangers(api: Api) -> Answer:
    batch = submit(api.stranger, build_line(1)).id
    foreign, none = (api.http.get(f"{BATCHES}/{id}") for id in (batch, f"batch_{uuid4().hex}"))
    assert (none.status_code, none.json()) == (foreign.status_code, foreign.json())
    return answer_of(foreign)


def ask_with_key(key: str) -> Callable[[Api], Answer]:
    headers = {"authorization": f"Bearer {key}"}
    return lambda api: answer_of(asking.get(api.service.url + BATCHES, headers=headers))


def ask_with_key_in_the_query(api: Api) -> Answer:
    url = f"{api.service.url}{BATCHES}?api_key={api.client.key}"
    return answer_of(asking.get(url))


def ask_with_an_expired_key(api: Api) -> Answer:
    with api.service.database.write() as session:
        tenant = tenants.get_or_create(session, "expired")
        key = tenants.create_key(session, tenant.id, name="x", pepper=PEPPER, lifetime_s=-1.0)[1]
    return ask_with_key(key)(api)


def say(api: Api, *pieces: bytes, timeout_s: float = asking.ANSWER_S) -> Answer:
    """Write these on a connection, and read one answer; status 0 where there is none."""
    port = int(api.service.url.rsplit(":", 1)[1])
    with socket.create_connection(("127.0.0.1", port), timeout=timeout_s) as connection:
        for piece in pieces:
            connection.sendall(piece)
        answer = HTTPResponse(connection)
        try:
            answer.begin()
            return answer.status, answer.read().decode()
        except TimeoutError:
            return 0, ""


def head_of(api: Api, method: str, path: str, *headers: str, version: str = "1.1") -> bytes:
    lines = [
        f"{method} {path} HTTP/{version}",
        "Host: 127.0.0.1",
        f"Authorization: Bearer {api.client.key}",
        *headers,
    ]
    return "\r\n".join([*lines, "", ""]).encode()


def smuggle(*headers: str) -> Callable[[Api], Answer]:
    hidden = b"0\r\n\r\nGET /v1/files HTTP/1.1\r\nHost: x\r\n\r\n"
    return lambda api: say(api, head_of(api, "POST", BATCHES, *headers) + hidden)


def hang_up_in_an_upload(api: Api) -> Answer:
    head = head_of(
        api, "POST", FILES, "Content-Type: multipart/form-data; boundary=b", "Content-Length: 99999"
    )
    port = int(api.service.url.rsplit(":", 1)[1])
    with socket.create_connection(("127.0.0.1", port), timeout=asking.ANSWER_S) as connection:
        connection.sendall(head + part("purpose", b"batch") + b"--b\r\nContent-Disp")
    return 0, ""


def hang_up_in_a_stream(api: Api) -> Answer:
    batch = submit(api.client, build_line(1)).id
    port = int(api.service.url.rsplit(":", 1)[1])
    with socket.create_connection(("127.0.0.1", port), timeout=asking.ANSWER_S) as connection:
        connection.sendall(head_of(api, "GET", f"{BATCHES}/{batch}?wait=60"))
    return 0, ""


def wait_to_be_told(api: Api) -> Answer:
    """Say `Expect: 100-continue`, and never go on."""
    head = head_of(api, "POST", BATCHES, "Content-Length: 99999", "Expect: 100-continue")
    say(api, head, timeout_s=0.5)
    return 0, ""


NO_FORM, NO_JSON, NO_VALUE = "400 invalid_form", "400 invalid_json", "400 invalid_value"
NO_KEY, NOTHING, GONE = "401 invalid_api_key", "404 not_found", "0 ok"

CASES: tuple[WireCase, ...] = (
    WireCase("A8a", "a form without a boundary", send_form(b"x", "multipart/form-data"), NO_FORM),
    WireCase("A8b", "a filename that is a path", upload_with_a_path, "200 ok"),
    WireCase(
        "A8c",
        "a form of 20,000 parts",
        send_form(part("a", b"x") * 20_000 + b"--b--\r\n"),
        "400 unknown_parameter",
        note="in place of a million: the first ends it",
    ),
    WireCase(
        "A10a",
        "an idempotency key of 10 KB",
        send("POST", BATCHES, **keyed("k" * 10_000)),
        NO_VALUE,
    ),
    WireCase("A10b", "a key with another body", send_other_body_again, "409 idempotency_conflict"),
    WireCase(
        "A11a",
        "a length and chunks",
        smuggle("Content-Length: 4", "Transfer-Encoding: chunked"),
        NO_VALUE,
    ),
    WireCase("A11b", "two lengths", smuggle("Content-Length: 4", "Content-Length: 40"), "400 "),
    WireCase("A12a", "1,000 ranges", ask_for_ranges, "200 ok"),
    WireCase("A12b", "1,000 tags", ask_with_tags, "200 ok"),
    WireCase("A13b", "SQL in a batch's id", send("GET", f"{BATCHES}/batch_'%20OR%201=1"), NOTHING),
    WireCase("A13c", "SQL in a file's id", send("GET", f"{FILES}/file-'%20OR%201=1"), NOTHING),
    WireCase("A14", "another tenant's batch", ask_for_a_strangers, NOTHING),
    WireCase("A15a", "a key that is none", ask_with_key("sk-123"), NO_KEY),
    WireCase("A15b", "a key that nobody made", ask_with_key(f"dk_{'0' * 16}_{'0' * 64}"), NO_KEY),
    WireCase("A15c", "a key of 10 KB", ask_with_key("x" * 10_000), NO_KEY),
    WireCase("A15d", "a key in the query", ask_with_key_in_the_query, NO_KEY),
    WireCase("A15e", "a key that has expired", ask_with_an_expired_key, NO_KEY),
    WireCase("A17a", "a forged cursor", send("GET", f"{BATCHES}?after={CURSOR}"), NO_VALUE),
    WireCase("A17b", "a cursor that is a number", send("GET", f"{BATCHES}?after=7"), NO_VALUE),
    WireCase(
        "A18a",
        "HTTP/1.0",
        lambda api: say(api, head_of(api, "GET", BATCHES, version="1.0")),
        "200 ok",
    ),
    WireCase("A18b", "a body that waits to be told", wait_to_be_told, GONE),
    WireCase("A18c", "hanging up in an upload", hang_up_in_an_upload, GONE),
    WireCase("A18d", "hanging up in a wait", hang_up_in_a_stream, GONE),
    WireCase(
        "A19a",
        "a pickle",
        send(
            "POST",
            BATCHES,
            content=b"\x80\x04K\x01.",
            headers={"content-type": "application/x-pickle"},
        ),
        NO_JSON,
    ),
    WireCase(
        "A19b",
        "MessagePack",
        send(
            "POST",
            BATCHES,
            content=b"\x81\xa1a\x01",
            headers={"content-type": "application/msgpack"},
        ),
        NO_JSON,
    ),
)


@pytest.fixture(scope="module")
def api(sqlite_template: bytes, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    folder = tmp_path_factory.mktemp("corpus-api")
    (folder / "darkroom.sqlite3").write_bytes(sqlite_template)
    with (
        start_service(f"sqlite:///{folder / 'darkroom.sqlite3'}", folder) as service,
        open_client(service, "corpus") as client,
        open_client(service, "stranger") as stranger,
    ):
        submit(client, build_line(1))  # what a first request loads
        yield Api(service, client, stranger)


@pytest.mark.parametrize("case", CASES, ids=[case.id for case in CASES])
def test_request_ends_as_it_must_and_disturbs_nobody(
    case: WireCase, api: Api, record_property: Callable[[str, object], None], tmp_path: Path
) -> None:
    pid = api.service.process.pid
    before = memory.read_rss(pid)
    memory.forget_peaks(pid)
    started = time.perf_counter()
    status, text = case.send(api)
    ms = round((time.perf_counter() - started) * 1000)
    growth_mb = round((memory.read_peak(pid) - before) / memory.MEBIBYTE, 1)
    code, message = read_error(text) if status >= 400 else ("ok", "")
    row = Row(
        case.id, case.what, case.expected, f"{status} {code}", ms, growth_mb, message, case.note
    )
    record_property(PROPERTY, row.as_json())

    assert row.expected == row.got
    assert row.ms < MAX_S * 1000
    assert row.growth_mb < MAX_GROWTH_MB
    # By its name a client is told which of its own headers is wrong.
    said = message.replace("Content-Length", "").replace("Transfer-Encoding", "")
    assert [] == find_leaks(said, (PLANTED, str(ROOT), api.client.key, "sqlite"))
    content = build_jsonl(build_line(1))
    file = upload(api.client, content).id
    assert content == api.client.api.files.content(file).content
    assert api.service.process.poll() is None


def read_error(text: str) -> tuple[str, str]:
    """Code and message; of what never became a request, the server's own words."""
    try:
        error = httpx2.Response(400, text=text).json()["error"]
    except ValueError:
        return "", text
    return str(error["code"]), str(error["message"])
