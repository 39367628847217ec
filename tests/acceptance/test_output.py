"""A job's files: one line for each line of the input, in its order, whatever keeps the blobs."""

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from bench.queue import Client, wait_for_end
from bench.service import Service, open_service
from storage import files
from storage.blobs import Blobs, FolderBlobs
from storage.ids import FileId
from storage.states import JobState
from storage.tables import Job
from tasks.config import load_config
from tasks.finish import finish
from tasks.stores import Stores, open_blobs
from tests.tasks.fakes import MODEL, build_request

pytestmark = pytest.mark.services

NUM_LINES = 400  # so that many chunks of both workers end in no order
WORDS = (
    "plain",
    "Größe",
    "写真",
    "🦆 🧨",
    'a "quote" \\ slash',
    "tab\tnew\nline",
    "\u2028",
    "x" * 3000,
)


def write_input(file: Path) -> list[tuple[str | None, str | None]]:
    """Good lines and bad ones of all kinds; returns the `custom_id` and the answer or None of each."""
    chance = random.Random(20261127)
    lines: list[bytes] = []
    expected: list[tuple[str | None, str | None]] = []
    for number in range(NUM_LINES):
        name, words = f"line-{number}", f"{chance.choice(WORDS)} {number}"
        request = build_request(name, words, num_images=chance.randrange(3))
        kind = chance.choice(
            ["good"] * 12 + ["refused", "no JSON", "doubled", "images", "nameless"]
        )
        if kind == "refused":
            request = build_request(name, f"bad picture {number}")
        elif kind == "doubled":
            request["custom_id"] = "line-0"
        elif kind == "images":
            request = build_request(name, words, num_images=3)
        elif kind == "nameless":
            del request["custom_id"]
        if number == 0:
            kind, request = "good", build_request(name, words)
        end = b"\r\n" if number % 7 == 0 else b"\n"
        lines.append(b'{"custom_id": "line' if kind == "no JSON" else json.dumps(request).encode())
        lines[-1] += end
        has_name = kind in ("good", "refused", "images")
        expected.append((name if has_name else None, f"> {words}" if kind == "good" else None))
    file.write_bytes(b"".join(lines))
    return expected


@contextmanager
def two_workers(database: str, **settings: str) -> Iterator[Service]:
    models = json.dumps({MODEL: {"image": 2}})
    with open_service(
        database, max_lines=NUM_LINES, MODELS=models, CHUNK_ITEMS="16", **settings
    ) as service:
        for _ in range(2):
            service.start("gpu", "tests.quickly", "tests.tasks.worker", "gpu", "0.002")
        yield service


def run(service: Service, file: Path) -> Job:
    client = Client(service)
    batch = client.create(client.upload(file), on_invalid="skip")
    job = wait_for_end(service, batch)
    assert JobState.COMPLETED is job.state
    return job


def read_files(service: Service, job: Job) -> tuple[bytes, bytes]:
    """Output and errors, as a client gets them."""
    client = Client(service)
    batch = client.retrieve(f"batch_{job.id.hex}")
    output, errors = (
        b"".join(client.read_lines(batch[name])) for name in ("output_file_id", "error_file_id")
    )
    return output, errors


def export_again(service: Service, job: Job, blobs: Blobs) -> tuple[bytes, bytes]:
    """Write the files of a job that has ended once more, elsewhere."""
    again = text(
        "UPDATE jobs SET state = 'finalizing', output_file_id = NULL, error_file_id = NULL, "
        "completed_at = NULL WHERE id = :job"
    )
    with service.database.write() as session:
        session.execute(again, {"job": job.id.hex})
    assert JobState.COMPLETED is finish(Stores(service.database, blobs), job.id)
    ended = wait_for_end(service, f"batch_{job.id.hex}")
    assert ended.output_file_id
    assert ended.error_file_id
    with service.database.read() as session:
        keys = [
            files.get(session, job.tenant_id, FileId(file)).blob_key
            for file in (ended.output_file_id, ended.error_file_id)
        ]
    output, errors = (blobs.read(key) for key in keys)
    return output, errors


def strip(lines: bytes, job: Job) -> list[Any]:
    """The lines without what no two jobs share: the job's number and the time."""
    found = [json.loads(line) for line in lines.replace(job.id.hex.encode(), b"").splitlines()]
    for line in found:
        line["response"]["body"].pop("created", None)
    return found


def check(expected: list[tuple[str | None, str | None]], files: tuple[bytes, bytes]) -> None:
    output, errors = ([json.loads(line) for line in content.splitlines()] for content in files)
    number = {True: iter(output), False: iter(errors)}
    for line, (custom_id, answer) in enumerate(expected, 1):
        found = next(number[answer is not None])
        assert custom_id == found["custom_id"]
        assert found["id"].endswith(f"{line:08x}")
        body = found["response"]["body"]
        if answer is None:
            assert 400 == found["response"]["status_code"], found
            assert body["error"]["code"]
        else:
            assert answer == body["choices"][0]["message"]["content"]
    assert len(expected) == len(output) + len(errors)


def test_each_line_has_its_line_in_order_and_the_same_bytes_from_a_folder_and_from_s3(
    tmp_path: Path, s3_settings: dict[str, str]
) -> None:
    expected = write_input(tmp_path / "in.jsonl")
    s3 = {name.removeprefix("DARKROOM_"): value for name, value in s3_settings.items()}
    places = {name: s3[name] for name in ("BLOBS", "S3_ENDPOINT_URL", "S3_REGION")}
    with two_workers("postgresql", **places) as service:
        job = run(service, tmp_path / "in.jsonl")
        from_s3 = read_files(service, job)
        from_folder = export_again(service, job, FolderBlobs(tmp_path / "again"))
        check(expected, from_s3)
        assert not (service.folder / "blobs").exists()
        assert from_s3 == from_folder
    with two_workers("sqlite") as service:
        other = run(service, tmp_path / "in.jsonl")
        other_folder = read_files(service, other)
        other_s3 = export_again(service, other, open_blobs(load_config()))
        check(expected, other_folder)
        assert other_folder == other_s3

    for ours, theirs in zip(from_s3, other_folder, strict=True):
        assert strip(ours, job) == strip(theirs, other)
