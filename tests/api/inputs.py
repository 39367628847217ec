"""Inputs as clients hand them in."""

import json
from typing import Any, Literal

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
