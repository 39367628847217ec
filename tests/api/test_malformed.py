"""Whatever is wrong with a request, the answer says so: a status, a code and a place, in the envelope."""

import gzip
import json
from collections.abc import Callable, Iterator
from typing import Any
from uuid import uuid4

import httpx2
import pytest

from tests import asking
from tests.api.conftest import Client, Service, open_client
from tests.api.inputs import ENDPOINT, build_jsonl, build_line, submit, upload
from tests.api.server import MAX_BODY_BYTES, MAX_FILE_BYTES, MODEL

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
}
BATCH = {"input_file_id": "file-x", "endpoint": ENDPOINT, "completion_window": "24h"}
INLINE = {"requests": [build_line(1)], "endpoint": ENDPOINT, "completion_window": "24h"}
MESSAGES = [{"role": "user", "content": "Hi"}]
NO_BATCH = f"/v1/batches/batch_{uuid4().hex}"
NO_FILE = f"/v1/files/file-{uuid4().hex}"
KEY = "Idempotency-Key"

Request = tuple[str, str, dict[str, Any]]  # method, path, and what else httpx takes


def get(path: str) -> Request:
    return "GET", path, {}


def body(content: Any, path: str = "/v1/batches") -> Request:
    return "POST", path, {"content": content}


def batch(**changes: Any) -> Request:
    return "POST", "/v1/batches", {"json": {**BATCH, **changes}}


def inline(**changes: Any) -> Request:
    return "POST", "/v1/batches", {"json": {**INLINE, **changes}}


def keyed(name: Any, key: Any) -> Request:
    return "POST", "/v1/batches", {"json": INLINE, "headers": {name: key}}


def chat(**changes: Any) -> Request:
    return "POST", ENDPOINT, {"json": {"model": MODEL, "messages": MESSAGES, **changes}}


def form(**fields: str) -> Request:
    return "POST", "/v1/files", {"data": fields, "files": {"file": b"{}"}}


def lifetime(anchor: str, seconds: str) -> Request:
    fields = {"expires_after[anchor]": anchor, "expires_after[seconds]": seconds}
    return form(purpose="batch", **fields)


def raw_form(content: bytes, kind: str = "multipart/form-data; boundary=b") -> Request:
    return "POST", "/v1/files", {"content": content, "headers": {"content-type": kind}}


def part(name: str, content: bytes) -> bytes:
    return f'--b\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n'.encode() + content + CRLF


CRLF = b"\r\n"
END = b"--b--\r\n"

# What is sent, and the answer's status, code and param.
REQUESTS: dict[str, tuple[Request, int, str, str | None]] = {
    # Bodies that are no JSON, or not a clean one
    "no body": (body(b""), 400, "invalid_json", None),
    "broken JSON": (body(b"{"), 400, "invalid_json", None),
    "JSON with a tail": (body(b"{} {}"), 400, "invalid_json", None),
    "JSON with a comment": (body(b"{} // x"), 400, "invalid_json", None),
    "single quotes": (body(b"{'endpoint':'x'}"), 400, "invalid_json", None),
    "an array": (body(b"[]"), 400, "invalid_json", None),
    "a number": (body(b"7"), 400, "invalid_json", None),
    "null": (body(b"null"), 400, "invalid_json", None),
    "not UTF-8": (body(b'{"endpoint":"\xff"}'), 400, "invalid_json", None),
    "UTF-16": (body('{"endpoint":"x"}'.encode("utf-16")), 400, "invalid_json", None),
    "a byte order mark": (body(b"\xef\xbb\xbf{}"), 400, "invalid_json", None),
    "NUL": (body(b"\0"), 400, "invalid_json", None),
    "a control character": (body(b'{"endpoint":"\n"}'), 400, "invalid_json", None),
    "half a surrogate pair": (body(b'{"endpoint":"\\ud800"}'), 400, "invalid_json", None),
    "NaN": (body(b'{"priority":NaN}'), 400, "invalid_json", None),
    "-Infinity": (body(b'{"priority":-Infinity}'), 400, "invalid_json", None),
    "a number without end": (body(b'{"priority":1e999}'), 400, "invalid_json", None),
    "a huge integer": (body(b'{"priority":' + b"9" * 5000 + b"}"), 400, "invalid_json", None),
    "2^53 + 1": (body(b'{"priority":9007199254740993}'), 400, "invalid_json", None),
    "a key twice": (body(b'{"endpoint":"a","endpoint":"b"}'), 400, "invalid_json", None),
    "1,001 keys": (
        inline(metadata=dict.fromkeys(map(str, range(1001)), "x")),
        400,
        "invalid_json",
        None,
    ),
    "100,000 levels": (body(b'{"requests":' + b"[" * 100_000), 400, "invalid_json", None),
    "40 levels": (body(b'{"a":' + b"[" * 40 + b"]" * 40 + b"}"), 400, "invalid_json", None),
    "pickle": (body(b"\x80\x04K\x01."), 400, "invalid_json", None),
    "gzip": (body(gzip.compress(b"{}")), 400, "invalid_json", None),
    "a body that is too large": (body(b" " * (MAX_BODY_BYTES + 1)), 413, "too_large", None),
    "a body that is too large, in pieces": (
        body([b" " * 65536] * (MAX_BODY_BYTES // 65536 + 1)),
        413,
        "too_large",
        None,
    ),
    # Batches
    "no endpoint": (batch(endpoint=None), 400, "invalid_value", "endpoint"),
    "no endpoint at all": (body(b'{"completion_window":"24h"}'), 400, "invalid_value", "endpoint"),
    "another endpoint": (batch(endpoint="/v1/embeddings"), 400, "invalid_value", "endpoint"),
    "an endpoint with a host": (
        batch(endpoint="https://api.example" + ENDPOINT),
        400,
        "invalid_value",
        "endpoint",
    ),
    "a window in seconds": (batch(completion_window=24), 400, "invalid_value", "completion_window"),
    "no window": (batch(completion_window=None), 400, "invalid_value", "completion_window"),
    "a window of 9m": (batch(completion_window="9m"), 400, "invalid_value", "completion_window"),
    "a window of 721h": (
        batch(completion_window="721h"),
        400,
        "invalid_value",
        "completion_window",
    ),
    "a window of 1e2h": (
        batch(completion_window="1e2h"),
        400,
        "invalid_value",
        "completion_window",
    ),
    "a window in words": (
        batch(completion_window="1 day"),
        400,
        "invalid_value",
        "completion_window",
    ),
    "neither file nor requests": (batch(input_file_id=None), 400, "invalid_value", "input_file_id"),
    "both file and requests": (
        inline(input_file_id="file-x"),
        400,
        "invalid_value",
        "input_file_id",
    ),
    "no requests": (inline(requests=[]), 400, "invalid_value", "requests"),
    "requests that are text": (inline(requests="x"), 400, "invalid_value", "requests"),
    "requests that are one": (inline(requests=build_line(1)), 400, "invalid_value", "requests"),
    "a file id that is a number": (batch(input_file_id=7), 400, "invalid_value", "input_file_id"),
    "a file id that is a list": (batch(input_file_id=["x"]), 400, "invalid_value", "input_file_id"),
    "an empty file id": (batch(input_file_id=""), 400, "file_not_found", "input_file_id"),
    "a file id from nowhere": (
        batch(input_file_id=f"file-{uuid4().hex}"),
        400,
        "file_not_found",
        "input_file_id",
    ),
    "a batch id as a file id": (
        batch(input_file_id=f"batch_{uuid4().hex}"),
        400,
        "file_not_found",
        "input_file_id",
    ),
    "a file id of SQL": (
        batch(input_file_id="file-' OR 1=1 --"),
        400,
        "file_not_found",
        "input_file_id",
    ),
    "metadata that is a list": (batch(metadata=["x"]), 400, "invalid_value", "metadata"),
    "metadata that is text": (batch(metadata="x"), 400, "invalid_value", "metadata"),
    "metadata within metadata": (batch(metadata={"a": {}}), 400, "invalid_value", "metadata"),
    "metadata of 17 pairs": (
        batch(metadata=dict.fromkeys(map(str, range(17)), "x")),
        400,
        "invalid_value",
        "metadata",
    ),
    "a long key of metadata": (batch(metadata={"k" * 65: "v"}), 400, "invalid_value", "metadata"),
    "a long value of metadata": (
        batch(metadata={"k": "v" * 513}),
        400,
        "invalid_value",
        "metadata",
    ),
    "an expiry without anchor": (
        batch(output_expires_after={"seconds": 3600}),
        400,
        "invalid_value",
        "output_expires_after",
    ),
    "an expiry that is too soon": (
        batch(output_expires_after={"anchor": "created_at", "seconds": 3599}),
        400,
        "invalid_value",
        "output_expires_after",
    ),
    "an expiry in text": (
        batch(output_expires_after={"anchor": "created_at", "seconds": "3600"}),
        400,
        "invalid_value",
        "output_expires_after",
    ),
    "an expiry with more": (
        batch(output_expires_after={"anchor": "created_at", "seconds": 3600, "days": 1}),
        400,
        "unknown_parameter",
        "output_expires_after.days",
    ),
    "a priority that is true": (batch(priority=True), 400, "invalid_value", "priority"),
    "a priority that is half": (batch(priority=0.5), 400, "invalid_value", "priority"),
    "a priority of -11": (batch(priority=-11), 400, "invalid_value", "priority"),
    "an unknown image policy": (batch(image_policy="crop"), 400, "invalid_value", "image_policy"),
    "a word for bad lines": (batch(on_invalid="ignore"), 400, "invalid_value", "on_invalid"),
    "an addition that is not built": (batch(canary=3), 400, "unknown_parameter", "canary"),
    "a misspelt name": (batch(meta_data={}), 400, "unknown_parameter", "meta_data"),
    "a long idempotency key": (keyed(KEY, "k" * 256), 400, "invalid_value", KEY),
    "an empty idempotency key": (keyed(KEY, ""), 400, "invalid_value", KEY),
    "an idempotency key of bytes": (keyed(KEY.encode(), b"\xe9"), 400, "invalid_value", KEY),
    "a batch from nowhere": (get(NO_BATCH), 404, "not_found", None),
    "a batch id in capitals": (
        get(NO_BATCH.upper().replace("/V1/BATCHES", "/v1/batches")),
        404,
        "not_found",
        None,
    ),
    "a file id as a batch id": (get(f"/v1/batches/file-{uuid4().hex}"), 404, "not_found", None),
    "a batch id of SQL": (get("/v1/batches/batch_'%20OR%201=1"), 404, "not_found", None),
    "a batch id that is a path": (get("/v1/batches/..%2f..%2fetc"), 404, "unknown_url", None),
    "a batch id with NUL": (get("/v1/batches/batch_%00"), 404, "not_found", None),
    "a batch id of 4 kB": (get("/v1/batches/batch_" + "0" * 4000), 404, "not_found", None),
    "cancelling nothing": (body(b"", f"{NO_BATCH}/cancel"), 404, "not_found", None),
    "a wait in words": (get(f"{NO_BATCH}?wait=long"), 400, "invalid_value", "wait"),
    "a wait of 61": (get(f"{NO_BATCH}?wait=61"), 400, "invalid_value", "wait"),
    "a wait of -1": (get(f"{NO_BATCH}?wait=-1"), 400, "invalid_value", "wait"),
    "a wait of half": (get(f"{NO_BATCH}?wait=0.5"), 400, "invalid_value", "wait"),
    "a wait without end": (get(f"{NO_BATCH}?wait=1e999"), 400, "invalid_value", "wait"),
    "a limit in words": (get("/v1/batches?limit=all"), 400, "invalid_value", "limit"),
    "a limit of 0": (get("/v1/batches?limit=0"), 400, "invalid_value", "limit"),
    "a limit of 101": (get("/v1/batches?limit=101"), 400, "invalid_value", "limit"),
    "an empty limit": (get("/v1/batches?limit="), 400, "invalid_value", "limit"),
    "a forged cursor": (
        get(f"/v1/batches?after=batch_{uuid4().hex}"),
        400,
        "invalid_value",
        "after",
    ),
    "a cursor that is a number": (get("/v1/batches?after=7"), 400, "invalid_value", "after"),
    # Results
    "results of nothing": (get(f"{NO_BATCH}/results"), 404, "not_found", None),
    "results before the first": (
        get(f"{NO_BATCH}/results?after=-1"),
        400,
        "invalid_value",
        "after",
    ),
    "results beyond 2^53": (
        get(f"{NO_BATCH}/results?after={2**53 + 1}"),
        400,
        "invalid_value",
        "after",
    ),
    "too many results": (get(f"{NO_BATCH}/results?limit=1001"), 400, "invalid_value", "limit"),
    "results in a state": (
        get(f"{NO_BATCH}/results?status=leased"),
        400,
        "invalid_value",
        "status",
    ),
    "results of a name with NUL": (
        get(f"{NO_BATCH}/results?custom_id=%00"),
        400,
        "invalid_value",
        "custom_id",
    ),
    "results of a long name": (
        get(f"{NO_BATCH}/results?custom_id=" + "x" * 257),
        400,
        "invalid_value",
        "custom_id",
    ),
    # Files
    "a file that is JSON": (
        ("POST", "/v1/files", {"json": {"purpose": "batch"}}),
        400,
        "invalid_form",
        "file",
    ),
    "a form without boundary": (raw_form(b"x", "multipart/form-data"), 400, "invalid_form", "file"),
    "a form that is none": (raw_form(b"hello"), 400, "invalid_form", None),
    "an empty form": (raw_form(b""), 400, "invalid_form", None),
    "a form that breaks off": (raw_form(part("file", b"abc")), 400, "invalid_form", None),
    "a form with a boundary of 10 kB": (
        raw_form(b"x", "multipart/form-data; boundary=" + "b" * 10_000),
        400,
        "invalid_form",
        None,
    ),
    "a part without a name": (
        raw_form(b"--b\r\nX: y\r\n\r\nabc\r\n" + END),
        400,
        "invalid_form",
        None,
    ),
    "a form of a thousand parts": (
        ("POST", "/v1/files", {"files": [(f"f{n}", (None, b"x")) for n in range(1000)]}),
        400,
        "unknown_parameter",
        "f0",
    ),
    "a field of 1 MB": (form(purpose="b" * 2**20), 400, "invalid_form", "purpose"),
    "a field that is not UTF-8": (
        raw_form(part("purpose", b"\xff") + part("file", b"{}") + END),
        400,
        "invalid_form",
        None,
    ),
    "a field twice": (
        raw_form(part("purpose", b"batch") * 2 + part("file", b"{}") + END),
        400,
        "invalid_form",
        "purpose",
    ),
    "an unknown field": (form(purpose="batch", colour="red"), 400, "unknown_parameter", "colour"),
    "no purpose": (form(), 400, "invalid_value", "purpose"),
    "an empty purpose": (form(purpose=""), 400, "invalid_value", "purpose"),
    "a purpose that is ours": (form(purpose="batch_output"), 400, "invalid_value", "purpose"),
    "no file": (
        ("POST", "/v1/files", {"files": {"purpose": (None, b"batch")}}),
        400,
        "invalid_form",
        "file",
    ),
    "two files": (
        ("POST", "/v1/files", {"data": {"purpose": "batch"}, "files": [("file", b"a")] * 2}),
        400,
        "invalid_form",
        "file",
    ),
    "a lifetime without an anchor": (
        form(purpose="batch", **{"expires_after[seconds]": "3600"}),
        400,
        "invalid_value",
        "expires_after",
    ),
    "a lifetime from another anchor": (
        lifetime("last_active_at", "3600"),
        400,
        "invalid_value",
        "expires_after",
    ),
    "a lifetime of 3599": (lifetime("created_at", "3599"), 400, "invalid_value", "expires_after"),
    "a lifetime below zero": (lifetime("created_at", "-1"), 400, "invalid_value", "expires_after"),
    "a lifetime of 4,000 digits": (
        lifetime("created_at", "9" * 4000),
        400,
        "invalid_value",
        "expires_after",
    ),
    "a lifetime of 5,000 digits": (
        lifetime("created_at", "9" * 5000),
        400,
        "invalid_form",
        "expires_after[seconds]",
    ),
    "a file that is too large": (
        (
            "POST",
            "/v1/files",
            {"data": {"purpose": "batch"}, "files": {"file": b"x" * (MAX_FILE_BYTES + 100_000)}},
        ),
        413,
        "too_large",
        "file",
    ),
    "a file from nowhere": (get(NO_FILE), 404, "not_found", None),
    "content of nothing": (get("/v1/files/file-x/content"), 404, "not_found", None),
    "deleting nothing": (("DELETE", NO_FILE, {}), 404, "not_found", None),
    "an unknown purpose": (get("/v1/files?purpose=%00"), 400, "invalid_value", "purpose"),
    "an unknown order": (get("/v1/files?order=random"), 400, "invalid_value", "order"),
    "too many files at once": (get("/v1/files?limit=10001"), 400, "invalid_value", "limit"),
    "a forged cursor of files": (
        get(f"/v1/files?after=file-{uuid4().hex}"),
        400,
        "invalid_value",
        "after",
    ),
    # Chat and models
    "a chat without messages": (chat(messages=[]), 400, "invalid_value", "messages"),
    "a chat whose messages are text": (chat(messages="Hi"), 400, "invalid_value", "messages"),
    "a chat without a model": (chat(model=None), 400, "invalid_value", "model"),
    "a chat with another model": (chat(model="gpt-9"), 404, "model_not_found", "model"),
    "a chat with a model of NUL": (chat(model="\0"), 400, "invalid_value", "model"),
    "a chat with a long model": (chat(model="m" * 257), 400, "invalid_value", "model"),
    "a chat for a billion answers": (chat(n=10**9), 400, "invalid_value", "n"),
    "a chat for no answer": (chat(n=0), 400, "invalid_value", "n"),
    "a chat that streams maybe": (chat(stream="maybe"), 400, "invalid_value", "stream"),
    "a chat with stream options of text": (
        chat(stream=True, stream_options="usage"),
        400,
        "invalid_value",
        "stream_options",
    ),
    "a chat of broken JSON": (body(b"{", ENDPOINT), 400, "invalid_json", None),
    "a chat at NaN degrees": (
        body(b'{"model":"m","messages":[{}],"temperature":NaN}', ENDPOINT),
        400,
        "invalid_json",
        None,
    ),
    "a model from nowhere": (get("/v1/models/gpt-9"), 404, "model_not_found", "model"),
    # What the framework refuses
    "an unknown path": (get("/v1/nothing"), 404, "unknown_url", None),
    "a slash too many": (get("/v1/batches/"), 404, "unknown_url", None),
    "another version": (get("/v2/batches"), 404, "unknown_url", None),
    "the wrong method": (("DELETE", "/v1/batches", {}), 405, "method_not_allowed", None),
    "PUT for POST": (("PUT", "/v1/files", {}), 405, "method_not_allowed", None),
    "an unknown method": (("BREW", "/v1/files", {}), 405, "method_not_allowed", None),
    "another service": (body(b"{}", "/v1/embeddings"), 404, "unknown_url", None),
}


@pytest.fixture(
    scope="module", params=["sqlite", pytest.param("postgresql", marks=pytest.mark.services)]
)
def shared_service(request: pytest.FixtureRequest) -> Service:
    found: Service = request.getfixturevalue(f"{request.param}_service")
    return found


@pytest.fixture(scope="module")
def shared_client(shared_service: Service) -> Iterator[Client]:
    """One for all requests of the table: making clients would take longer than all of them."""
    with open_client(shared_service, "malformed") as client:
        yield client


def test_there_are_enough_of_them() -> None:
    assert len(REQUESTS) >= 120


@pytest.mark.parametrize("name", REQUESTS)
def test_malformed_request_is_refused_with_its_reason(shared_client: Client, name: str) -> None:
    (method, path, rest), status, code, param = REQUESTS[name]
    answer = shared_client.http.request(method, path, **rest)

    error = check_envelope(answer)
    assert (status, code, param) == (answer.status_code, error["code"], error["param"])
    assert 200 == shared_client.http.get("/v1/batches").status_code


@pytest.fixture(scope="module")
def stranger_client(shared_service: Service) -> Iterator[Client]:
    with open_client(shared_service, "stranger to malformed") as client:
        yield client


FOREIGN: dict[str, Callable[[str, str], Request]] = {
    "a file": lambda file, _: get(f"/v1/files/{file}"),
    "its content": lambda file, _: get(f"/v1/files/{file}/content"),
    "deleting it": lambda file, _: ("DELETE", f"/v1/files/{file}", {}),
    "files behind it": lambda file, _: get(f"/v1/files?after={file}"),
    "a batch of it": lambda file, _: batch(input_file_id=file),
    "a batch": lambda _, batch: get(f"/v1/batches/{batch}"),
    "waiting for it": lambda _, batch: get(f"/v1/batches/{batch}?wait=60"),
    "its results": lambda _, batch: get(f"/v1/batches/{batch}/results"),
    "cancelling it": lambda _, batch: body(b"", f"/v1/batches/{batch}/cancel"),
    "batches behind it": lambda _, batch: get(f"/v1/batches?after={batch}"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_id_is_answered_as_one_that_is_none(
    shared_client: Client, stranger_client: Client, name: str
) -> None:
    client, stranger = shared_client, stranger_client
    made = submit(client, build_line(1))
    none = f"file-{uuid4().hex}", f"batch_{uuid4().hex}"

    foreign, unknown = (
        stranger.http.request(method, path, **rest)
        for method, path, rest in (
            FOREIGN[name](made.input_file_id, made.id),
            FOREIGN[name](*none),
        )
    )

    assert (400 if "behind" in name or "batch of" in name else 404) == foreign.status_code
    assert check_envelope(unknown) == check_envelope(foreign)
    assert unknown.status_code == foreign.status_code
    assert "validating" == client.api.batches.retrieve(made.id).status
    assert made.input_file_id == client.api.files.retrieve(made.input_file_id).id


def check_envelope(answer: httpx2.Response) -> dict[str, Any]:
    error: dict[str, Any] = json.loads(answer.content)["error"]
    assert {"message", "type", "param", "code"} == set(error)
    assert TYPES[answer.status_code] == error["type"]
    assert error["message"]
    assert error["code"]
    assert "Traceback" not in error["message"]
    assert answer.headers["x-request-id"].startswith("req_")
    return error


@pytest.mark.parametrize(
    "header",
    [
        None,
        "Bearer",
        "Basic abc",
        "Bearer sk-123",
        "Bearer dk_0123456789abcdef_" + "0" * 64,
        "Bearer dk_' OR 1=1",
        "Bearer " + "x" * 10_000,
    ],
)
def test_request_without_a_valid_key_is_refused(service: Service, header: str | None) -> None:
    headers = {} if header is None else {"authorization": header}
    for path in ("/v1/batches", "/v1/files", "/v1/models", f"/v1/batches/batch_{uuid4().hex}"):
        answer = asking.get(service.url + path, headers=headers)

        assert 401 == answer.status_code
        check_envelope(answer)


def test_key_in_the_query_string_is_none(service: Service, client: Client) -> None:
    answer = asking.get(f"{service.url}/v1/batches?api_key={client.key}")

    assert 401 == answer.status_code


def test_body_of_a_stranger_is_not_read(service: Service) -> None:
    answer = asking.post(f"{service.url}/v1/batches", content=b" " * (MAX_BODY_BYTES + 1))

    assert 401 == answer.status_code


def test_quota_is_told_with_its_limit_and_its_use(service: Service) -> None:
    with open_client(service, "of few items", max_open_items=5) as client:
        submit(client, *map(build_line, range(3)))
        file = upload(client, build_jsonl(*map(build_line, range(4)))).id
        too_much = client.http.post("/v1/batches", json={**BATCH, "input_file_id": file})
        never = client.http.post(
            "/v1/batches", json={**INLINE, "requests": list(map(build_line, range(6)))}
        )

    assert (429, 429) == (too_much.status_code, never.status_code)
    check_envelope(too_much)
    assert "quota_exceeded" == too_much.json()["error"]["code"]
    assert {"4", "3", "5"} <= set(too_much.json()["error"]["message"].split())
    assert 0 < int(too_much.headers["retry-after"]) <= 120
    assert "x-should-retry" not in too_much.headers
    assert "false" == never.headers["x-should-retry"]


def test_quota_of_bytes_counts_open_input(service: Service) -> None:
    with open_client(service, "of few bytes", max_open_bytes=400) as client:
        batch = submit(client, build_line(1))
        refused = client.http.post(
            "/v1/batches", json={**INLINE, "requests": [build_line(2, "x" * 300)]}
        )
        client.api.batches.cancel(batch.id)

    assert 429 == refused.status_code
    assert "bytes" in refused.json()["error"]["message"]
