"""Inputs as clients hand them in."""

import json
from typing import Any, Literal

import pytest
from openai.types import Batch, FileObject

from api.schemas import parse_job_id
from storage.ids import JobId
from tests.api.conftest import Client
from tests.api.server import MODEL

ENDPOINT: Literal["/v1/chat/completions"] = "/v1/chat/completions"


def build_line(number: int, text: str = "What is this?", **changes: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": text}]
    return {
        "custom_id": f"r-{number}",
        "method": "POST",
        "url": ENDPOINT,
        "body": {"model": MODEL, "messages": messages},
        **changes,
    }


def build_jsonl(*lines: dict[str, Any] | str) -> bytes:
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    return "".join(text + "\n" for text in texts).encode()


def upload(client: Client, content: bytes, purpose: Any = "batch") -> FileObject:
    return client.api.files.create(file=("captions.jsonl", content), purpose=purpose)


def submit(client: Client, *lines: dict[str, Any] | str, **options: Any) -> Batch:
    return create(client, upload(client, build_jsonl(*lines)).id, **options)


def create(client: Client, file: str, **options: Any) -> Batch:
    values: dict[str, Any] = {"endpoint": ENDPOINT, "completion_window": "24h", **options}
    return client.api.batches.create(input_file_id=file, **values)


def job_of(batch: Batch) -> JobId:
    return parse_job_id(batch.id)


def read_lines(client: Client, file: str | None) -> list[dict[str, Any]]:
    assert file is not None
    return [json.loads(line) for line in client.api.files.content(file).text.splitlines()]


def count(batch: Batch) -> tuple[int, int, int]:
    counts = batch.request_counts
    assert counts is not None
    return counts.total, counts.completed, counts.failed


# What is refused. The stand-in worker and the real one must find the same lines.

BAD_LINES = [
    pytest.param([build_line(1), build_line(1), build_line(1)], [2, 3], id="custom_id twice"),
    pytest.param([build_line(1), "{", "[]"], [2, 3], id="no JSON"),
    pytest.param([build_line(1), "", build_line(2)], [2], id="blank line"),
    pytest.param([build_line(1, url="/v1/embeddings"), build_line(2)], [1], id="url"),
    pytest.param([build_line(1, method="GET"), build_line(2)], [1], id="method"),
    pytest.param(
        [build_line(1), build_line(2, body={"model": "other", "messages": []})], [2], id="model"
    ),
]
"""Lines of an input, and the numbers of those that are refused."""

BAD_METADATA = [
    pytest.param({str(n): "x" for n in range(17)}, id="pairs"),
    pytest.param({"x" * 65: "x"}, id="key"),
    pytest.param({"x": "x" * 513}, id="value"),
    pytest.param({"x": 1}, id="number"),
    pytest.param({"x": "\0"}, id="NUL"),
]

UNKNOWN_FILES = ("file-abc123", f"file-{'0' * 32}", "../x")
BAD_LIMITS = (0, -1, 101, 10**30)
