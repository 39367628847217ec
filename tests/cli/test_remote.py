"""submit, status, results and cancel, as processes against a running server."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from PIL import Image

from api.schemas import parse_job_id
from storage.ids import JobId
from tests.api.conftest import (
    Client,
    Service,
    find_port,
    open_client,
    postgresql_template,
    sqlite_service,
    sqlite_template,
)
from tests.api.inputs import build_jsonl, build_line

__all__ = ["postgresql_template", "sqlite_service", "sqlite_template"]

PROGRAM = "import sys; from cli.main import app; app()"


@pytest.fixture
def client(sqlite_service: Service, request: pytest.FixtureRequest) -> Iterator[Client]:
    with open_client(sqlite_service, request.node.name) as client:
        yield client


def run(service: Service, client: Client, *words: str) -> subprocess.CompletedProcess[str]:
    return run_darkroom(*words, DARKROOM_SERVER=service.url, DARKROOM_API_KEY=client.key)


def run_darkroom(*words: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, *words],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def test_file_is_submitted_waited_for_and_read(
    sqlite_service: Service, client: Client, tmp_path: Path
) -> None:
    (tmp_path / "in.jsonl").write_bytes(build_jsonl(build_line(1), build_line(2, "please fail")))

    with sqlite_service.worker.working():
        done = run(sqlite_service, client, "submit", str(tmp_path / "in.jsonl"), "--wait")
    batch = done.stdout.split()[0]
    found = run(sqlite_service, client, "status", batch)
    read = run(sqlite_service, client, "results", batch)
    written = run(sqlite_service, client, "results", batch, "-o", str(tmp_path / "out"))

    assert (1, 1, 1, 1) == (done.returncode, found.returncode, read.returncode, written.returncode)
    assert f"{batch} completed 2/2\n1 failed\n" == found.stdout
    lines = [json.loads(line) for line in read.stdout.splitlines()]
    assert [("r-1", 200), ("r-2", 400)] == [
        (line["custom_id"], line["response"]["status_code"]) for line in lines
    ]
    assert read.stdout == (tmp_path / "out").read_text()


def test_pictures_are_sent_inside_their_lines(
    sqlite_service: Service, client: Client, tmp_path: Path
) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")

    made = run(sqlite_service, client, "submit", str(tmp_path), "--prompt", "Colour?")

    batch = client.api.batches.retrieve(made.stdout.strip())
    (line,) = client.api.files.content(batch.input_file_id).text.splitlines()
    picture, text = json.loads(line)["body"]["messages"][0]["content"]
    assert "1:a.png" == json.loads(line)["custom_id"]
    assert picture["image_url"]["url"].startswith("data:image/png;base64,")
    assert "Colour?" == text["text"]


def test_running_batch_shows_what_there_is_and_is_cancelled(
    sqlite_service: Service, client: Client, tmp_path: Path
) -> None:
    (tmp_path / "in.jsonl").write_bytes(build_jsonl(build_line(1), build_line(2)))
    words = ("submit", str(tmp_path / "in.jsonl"), "--key", "k")
    batch = run(sqlite_service, client, *words).stdout.strip()
    again = httpx2.get(  # the same batch, by its own server
        f"{sqlite_service.url}/v1/batches/{batch}",
        headers={"authorization": f"Bearer {client.key}"},
        trust_env=False,
    ).json()["id"]
    job = client.api.batches.retrieve(batch)
    sqlite_service.worker.expand(_job_of(job.id))
    sqlite_service.worker.run(_job_of(job.id), max_items=1)

    found = run(sqlite_service, client, "status", batch, "--json")
    read = run(sqlite_service, client, "results", batch)
    stopped = run(sqlite_service, client, "cancel", batch)

    assert batch == again
    assert "in_progress" == json.loads(found.stdout)["status"]
    assert [1] == [json.loads(line)["line"] for line in read.stdout.splitlines()]
    assert "still runs" in read.stderr
    assert (0, f"{batch} cancelling\n") == (stopped.returncode, stopped.stdout)


def _job_of(batch: str) -> JobId:
    return parse_job_id(batch)


def test_server_that_is_not_there_is_said_to_be_out_of_reach() -> None:
    asked = run_darkroom("status", "batch_x", DARKROOM_SERVER=f"http://127.0.0.1:{find_port()}")

    assert (3, "") == (asked.returncode, asked.stdout)
    assert "darkroom up" in asked.stderr


def test_refusal_is_told_in_the_servers_words(sqlite_service: Service, client: Client) -> None:
    asked = run(sqlite_service, client, "status", "batch_x")

    assert (1, "") == (asked.returncode, asked.stdout)
    assert "nothing under this id" in asked.stderr
