"""Whatever is wrong with a request, the answer is of the 4xx kind, in the envelope, with an id."""

import json
from typing import Any
from uuid import uuid4

import httpx2
import pytest

from tests.api.conftest import Client, Service, open_client
from tests.api.inputs import ENDPOINT, build_jsonl, build_line, submit, upload
from tests.api.server import MAX_BODY_BYTES, MAX_FILE_BYTES, MODEL

TYPES = {
    "invalid_request_error",
    "authentication_error",
    "permission_error",
    "not_found_error",
    "rate_limit_error",
}
BATCH = {"input_file_id": "file-x", "endpoint": ENDPOINT, "completion_window": "24h"}
INLINE = {"requests": [build_line(1)], "endpoint": ENDPOINT, "completion_window": "24h"}
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}]}
FORM = "multipart/form-data; boundary=b"

# By name: method, path, and what else httpx takes.
REQUESTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    # Bodies that are no JSON, or not a clean one
    "no body": ("POST", "/v1/batches", {}),
    "broken JSON": ("POST", "/v1/batches", {"content": b"{"}),
    "an array": ("POST", "/v1/batches", {"content": b"[]"}),
    "a number": ("POST", "/v1/batches", {"content": b"7"}),
    "not UTF-8": ("POST", "/v1/batches", {"content": b'{"endpoint":"\xff"}'}),
    "UTF-16": ("POST", "/v1/batches", {"content": '{"endpoint":"x"}'.encode("utf-16")}),
    "half a surrogate pair": ("POST", "/v1/batches", {"content": b'{"endpoint":"\\ud800"}'}),
    "NaN": ("POST", "/v1/batches", {"content": b'{"priority":NaN}'}),
    "a key twice": ("POST", "/v1/batches", {"content": b'{"endpoint":"a","endpoint":"b"}'}),
    "a huge integer": ("POST", "/v1/batches", {"content": b'{"priority":' + b"9" * 5000 + b"}"}),
    "an infinite float": ("POST", "/v1/batches", {"json": {**BATCH, "priority": 0.5}}),
    "100,000 levels": ("POST", "/v1/batches", {"content": b'{"requests":' + b"[" * 100_000}),
    "40 levels": (
        "POST",
        "/v1/batches",
        {"content": b'{"requests":' + b"[" * 40 + b"]" * 40 + b"}"},
    ),
    "pickle": ("POST", "/v1/batches", {"content": b"\x80\x04K\x01."}),
    "a body that is too large": ("POST", "/v1/batches", {"content": b" " * (MAX_BODY_BYTES + 1)}),
    "a body that is too large, in pieces": (
        "POST",
        "/v1/batches",
        {"content": [b" " * 65536] * (MAX_BODY_BYTES // 65536 + 1)},
    ),
    # Batches
    "no endpoint": ("POST", "/v1/batches", {"json": {**BATCH, "endpoint": None}}),
    "an endpoint that we do not run": (
        "POST",
        "/v1/batches",
        {"json": {**BATCH, "endpoint": "/v1/embeddings"}},
    ),
    "no window": ("POST", "/v1/batches", {"json": {**BATCH, "completion_window": 24}}),
    "a window that is too short": (
        "POST",
        "/v1/batches",
        {"json": {**BATCH, "completion_window": "9m"}},
    ),
    "a window that is too long": (
        "POST",
        "/v1/batches",
        {"json": {**BATCH, "completion_window": "721h"}},
    ),
    "a window in words": ("POST", "/v1/batches", {"json": {**BATCH, "completion_window": "1 day"}}),
    "neither file nor requests": (
        "POST",
        "/v1/batches",
        {"json": {**BATCH, "input_file_id": None}},
    ),
    "both file and requests": ("POST", "/v1/batches", {"json": {**BATCH, **INLINE}}),
    "no requests": ("POST", "/v1/batches", {"json": {**INLINE, "requests": []}}),
    "requests that are no list": ("POST", "/v1/batches", {"json": {**INLINE, "requests": "x"}}),
    "a file id that is a number": ("POST", "/v1/batches", {"json": {**BATCH, "input_file_id": 7}}),
    "a file id from nowhere": (
        "POST",
        "/v1/batches",
        {"json": {**BATCH, "input_file_id": f"file-{uuid4().hex}"}},
    ),
    "a file id of SQL": (
        "POST",
        "/v1/batches",
        {"json": {**BATCH, "input_file_id": "file-' OR 1=1 --"}},
    ),
    "metadata that is a list": ("POST", "/v1/batches", {"json": {**BATCH, "metadata": ["x"]}}),
    "metadata within metadata": ("POST", "/v1/batches", {"json": {**BATCH, "metadata": {"a": {}}}}),
    "an expiry without anchor": (
        "POST",
        "/v1/batches",
        {"json": {**BATCH, "output_expires_after": {"seconds": 3600}}},
    ),
    "an expiry that is too soon": (
        "POST",
        "/v1/batches",
        {"json": {**BATCH, "output_expires_after": {"anchor": "created_at", "seconds": 3599}}},
    ),
    "a priority that is true": ("POST", "/v1/batches", {"json": {**BATCH, "priority": True}}),
    "a priority out of range": ("POST", "/v1/batches", {"json": {**BATCH, "priority": -11}}),
    "an image policy that is not there": (
        "POST",
        "/v1/batches",
        {"json": {**BATCH, "image_policy": "split"}},
    ),
    "an unknown word for bad lines": (
        "POST",
        "/v1/batches",
        {"json": {**BATCH, "on_invalid": "x"}},
    ),
    "an addition that is not built": ("POST", "/v1/batches", {"json": {**BATCH, "canary": 3}}),
    "a long idempotency key": (
        "POST",
        "/v1/batches",
        {"json": INLINE, "headers": {"Idempotency-Key": "k" * 256}},
    ),
    "an empty idempotency key": (
        "POST",
        "/v1/batches",
        {"json": INLINE, "headers": {"Idempotency-Key": ""}},
    ),
    "an idempotency key of bytes": (
        "POST",
        "/v1/batches",
        {"json": INLINE, "headers": {b"Idempotency-Key": b"\xe9"}},
    ),
    "a batch from nowhere": ("GET", f"/v1/batches/batch_{uuid4().hex}", {}),
    "a batch id that is a path": ("GET", "/v1/batches/..%2f..%2fetc", {}),
    "a batch id with NUL": ("GET", "/v1/batches/batch_%00", {}),
    "cancelling nothing": ("POST", "/v1/batches/batch_x/cancel", {}),
    "a wait in words": ("GET", f"/v1/batches/batch_{uuid4().hex}?wait=long", {}),
    "a wait that is too long": ("GET", f"/v1/batches/batch_{uuid4().hex}?wait=61", {}),
    "a limit in words": ("GET", "/v1/batches?limit=all", {}),
    "a forged cursor": ("GET", f"/v1/batches?after=batch_{uuid4().hex}", {}),
    # Results
    "results of nothing": ("GET", f"/v1/batches/batch_{uuid4().hex}/results", {}),
    "results before the first": ("GET", f"/v1/batches/batch_{uuid4().hex}/results?after=-1", {}),
    "results in an unknown state": (
        "GET",
        f"/v1/batches/batch_{uuid4().hex}/results?status=leased",
        {},
    ),
    "results of a name with NUL": (
        "GET",
        f"/v1/batches/batch_{uuid4().hex}/results?custom_id=%00",
        {},
    ),
    # Files
    "a file that is JSON": ("POST", "/v1/files", {"json": {"purpose": "batch"}}),
    "a form without boundary": (
        "POST",
        "/v1/files",
        {"content": b"x", "headers": {"content-type": "multipart/form-data"}},
    ),
    "a form that is none": (
        "POST",
        "/v1/files",
        {"content": b"hello", "headers": {"content-type": FORM}},
    ),
    "a form that breaks off": (
        "POST",
        "/v1/files",
        {
            "content": b'--b\r\nContent-Disposition: form-data; name="file"\r\n\r\nabc',
            "headers": {"content-type": FORM},
        },
    ),
    "a form with a boundary of 10 kB": (
        "POST",
        "/v1/files",
        {"content": b"x", "headers": {"content-type": FORM + "b" * 10_000}},
    ),
    "a part without a name": (
        "POST",
        "/v1/files",
        {"content": b"--b\r\nX: y\r\n\r\nabc\r\n--b--\r\n", "headers": {"content-type": FORM}},
    ),
    "a form of a thousand parts": (
        "POST",
        "/v1/files",
        {"files": [(f"f{n}", (None, b"x")) for n in range(1000)]},
    ),
    "a field of 1 MB": (
        "POST",
        "/v1/files",
        {"data": {"purpose": "b" * 2**20}, "files": {"file": b"{}"}},
    ),
    "no purpose": ("POST", "/v1/files", {"files": {"file": b"{}"}}),
    "a purpose that is ours": (
        "POST",
        "/v1/files",
        {"data": {"purpose": "batch_output"}, "files": {"file": b"{}"}},
    ),
    "no file": ("POST", "/v1/files", {"files": {"purpose": (None, b"batch")}}),
    "two files": (
        "POST",
        "/v1/files",
        {"data": {"purpose": "batch"}, "files": [("file", b"a"), ("file", b"b")]},
    ),
    "a lifetime without an anchor": (
        "POST",
        "/v1/files",
        {
            "data": {"purpose": "batch", "expires_after[seconds]": "3600"},
            "files": {"file": b"{}"},
        },
    ),
    "a lifetime of 10,000 digits": (
        "POST",
        "/v1/files",
        {
            "data": {
                "purpose": "batch",
                "expires_after[anchor]": "created_at",
                "expires_after[seconds]": "9" * 4000,
            },
            "files": {"file": b"{}"},
        },
    ),
    "a file that is too large": (
        "POST",
        "/v1/files",
        {"data": {"purpose": "batch"}, "files": {"file": b"x" * (MAX_FILE_BYTES + 100_000)}},
    ),
    "a file from nowhere": ("GET", f"/v1/files/file-{uuid4().hex}", {}),
    "content of nothing": ("GET", "/v1/files/file-x/content", {}),
    "deleting nothing": ("DELETE", f"/v1/files/file-{uuid4().hex}", {}),
    "an unknown purpose": ("GET", "/v1/files?purpose=%00", {}),
    "an unknown order": ("GET", "/v1/files?order=random", {}),
    "too many files at once": ("GET", "/v1/files?limit=10001", {}),
    # Chat and models
    "a chat without messages": ("POST", ENDPOINT, {"json": {**CHAT, "messages": []}}),
    "a chat with a model that is not run": ("POST", ENDPOINT, {"json": {**CHAT, "model": "gpt-9"}}),
    "a chat with a model of NUL": ("POST", ENDPOINT, {"json": {**CHAT, "model": "\0"}}),
    "a chat for a billion answers": ("POST", ENDPOINT, {"json": {**CHAT, "n": 10**9}}),
    "a chat that streams maybe": ("POST", ENDPOINT, {"json": {**CHAT, "stream": "maybe"}}),
    "a model from nowhere": ("GET", "/v1/models/gpt-9", {}),
    # What the framework refuses
    "an unknown path": ("GET", "/v1/nothing", {}),
    "a slash too many": ("GET", "/v1/batches/", {}),
    "the wrong method": ("DELETE", "/v1/batches", {}),
    "an unknown method": ("BREW", "/v1/files", {}),
    "an endpoint of another service": ("POST", "/v1/embeddings", {"json": {}}),
}


def test_there_are_enough_of_them() -> None:
    assert len(REQUESTS) >= 60


@pytest.mark.parametrize("name", REQUESTS)
def test_malformed_request_is_the_clients_fault(client: Client, name: str) -> None:
    method, path, rest = REQUESTS[name]
    answer = client.http.request(method, path, **rest)

    assert 400 <= answer.status_code < 500, answer.text
    assert 422 != answer.status_code
    check_envelope(answer)
    assert 200 == client.http.get("/v1/batches").status_code


def check_envelope(answer: httpx2.Response) -> None:
    error = json.loads(answer.content)["error"]
    assert {"message", "type", "param", "code"} == set(error)
    assert error["type"] in TYPES
    assert error["message"]
    assert "Traceback" not in error["message"]
    assert answer.headers["x-request-id"].startswith("req_")


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
        answer = httpx2.get(service.url + path, headers=headers, trust_env=False)

        assert 401 == answer.status_code
        check_envelope(answer)


def test_key_in_the_query_string_is_none(service: Service, client: Client) -> None:
    answer = httpx2.get(f"{service.url}/v1/batches?api_key={client.key}", trust_env=False)

    assert 401 == answer.status_code


def test_body_of_a_stranger_is_not_read(service: Service) -> None:
    answer = httpx2.post(
        f"{service.url}/v1/batches", content=b" " * (MAX_BODY_BYTES + 1), trust_env=False
    )

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
