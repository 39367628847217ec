"""submit, status, results and cancel, as processes against a running server."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from api.schemas import parse_job_id
from cli.main import app
from storage.ids import JobId
from tests import asking
from tests.api.conftest import (
    Client,
    Service,
    open_client,
    postgresql_template,
    sqlite_service,
    sqlite_template,
)
from tests.api.inputs import build_jsonl, build_line
from tests.services import find_free_ports

__all__ = ["postgresql_template", "sqlite_service", "sqlite_template"]

SAMPLES = Path(__file__).parents[2] / "samples"
PROGRAM = """
import sys
from cli.main import main
try:
    main()
finally:
    assert not {"torch", "transformers", "celery", "sqlalchemy"}.intersection(sys.modules)
"""


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
        timeout=120,
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
    again = asking.get(  # the same batch, by its own server
        f"{sqlite_service.url}/v1/batches/{batch}",
        headers={"authorization": f"Bearer {client.key}"},
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
    server = f"http://127.0.0.1:{find_free_ports(1)[0]}"
    asked = run_darkroom("status", "batch_x", DARKROOM_SERVER=server)

    assert (3, "") == (asked.returncode, asked.stdout)
    assert f"error: {server} does not answer: Connection refused." in asked.stderr
    assert "darkroom up" in asked.stderr


def test_refusal_is_told_in_the_servers_words(sqlite_service: Service, client: Client) -> None:
    asked = run(sqlite_service, client, "status", "batch_x")

    assert (1, "") == (asked.returncode, asked.stdout)
    assert "nothing under this id" in asked.stderr


def test_ctrl_c_leaves_the_batch_and_says_how_to_go_on(
    sqlite_service: Service, client: Client, tmp_path: Path
) -> None:
    (tmp_path / "in.jsonl").write_bytes(build_jsonl(build_line(1)))
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, "submit", str(tmp_path / "in.jsonl"), "--wait"],
        env={
            **os.environ,
            "DARKROOM_SERVER": sqlite_service.url,
            "DARKROOM_API_KEY": client.key,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as waiting:
        assert waiting.stdout is not None
        assert waiting.stderr is not None
        batch = waiting.stdout.readline().strip()
        assert "validating 0/0\n" == waiting.stderr.readline()
        waiting.send_signal(signal.SIGINT)
        _, told = waiting.communicate(timeout=120)

    assert 130 == waiting.returncode
    assert "validating" == client.api.batches.retrieve(batch).status
    assert [
        f"The batch goes on. To watch it again: darkroom status {batch} --watch",
        f"To stop it: darkroom cancel {batch}",
    ] == told.splitlines()


# In this process, which is quicker


Invoke = Callable[..., Result]


@pytest.fixture
def darkroom(sqlite_service: Service, client: Client) -> Invoke:
    def invoke(*words: str, **env: str) -> Result:
        usual = {"DARKROOM_SERVER": sqlite_service.url, "DARKROOM_API_KEY": client.key}
        return CliRunner().invoke(app, words, env={**usual, **env}, catch_exceptions=False)

    return invoke


def test_same_key_and_input_again_is_the_same_batch(
    darkroom: Invoke, client: Client, tmp_path: Path
) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")

    first = darkroom("submit", str(tmp_path), "--key", "k")
    again = darkroom("submit", str(tmp_path), "--key", "k")
    other = darkroom("submit", str(tmp_path), "--key", "k", "--prompt", "Another question")

    assert (0, 0, 1) == (first.exit_code, again.exit_code, other.exit_code)
    assert first.stdout == again.stdout
    assert ("", "This was handed in before.\n") == (first.stderr, again.stderr)
    assert "error: " in other.stderr
    assert {client.api.batches.retrieve(first.stdout.strip()).input_file_id} <= {
        file.id for file in client.api.files.list().data
    }
    assert 2 == len(client.api.files.list().data)  # of the first, and of the conflict


def test_server_may_be_named_as_for_other_clients(
    darkroom: Invoke, sqlite_service: Service
) -> None:
    listed = darkroom("status", "batch_x", "--server", f"{sqlite_service.url}/v1/")

    assert "nothing under this id" in listed.stderr


def test_without_a_key_the_same_input_is_another_batch(darkroom: Invoke, tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")

    batches = {darkroom("submit", str(tmp_path)).stdout for _ in range(2)}

    assert 2 == len(batches)


def test_picture_that_cannot_be_read_costs_no_other(
    darkroom: Invoke, client: Client, tmp_path: Path
) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "b.heic").touch()
    (tmp_path / "c.strange").touch()

    words = [str(tmp_path / name) for name in ("", "c.strange", "none.png")]
    made = darkroom("submit", *words)

    batch = client.api.batches.retrieve(made.stdout.strip())
    assert 1 == made.exit_code
    assert f"error: {tmp_path}/none.png: There is no such file or folder.\n" in made.stderr
    assert "1 .heic left out" in made.stderr
    lines = client.api.files.content(batch.input_file_id).text.splitlines()
    assert ["1:a.png", "2:c.strange"] == [json.loads(line)["custom_id"] for line in lines]
    assert "data:image/jpeg;base64," in lines[1]


def test_nothing_to_hand_in_is_no_batch(darkroom: Invoke, client: Client, tmp_path: Path) -> None:
    run = darkroom("submit", str(tmp_path))

    assert (2, "") == (run.exit_code, run.stdout)
    assert "There are no pictures in this folder." in run.stderr
    assert [] == client.api.batches.list().data


@pytest.mark.parametrize(("option", "segments"), [("2.5s", {"seconds": 2.5}), ("3", {"count": 3})])
def test_clip_goes_with_the_segments_that_were_asked_for(
    darkroom: Invoke, client: Client, option: str, segments: dict[str, float]
) -> None:
    made = darkroom("submit", str(SAMPLES / "clip.mp4"), "--segments", option)
    wrong = darkroom("submit", str(SAMPLES / "clip.mp4"), "--segments", "2 minutes")

    batch = client.api.batches.retrieve(made.stdout.strip())
    (line,) = client.api.files.content(batch.input_file_id).text.splitlines()
    clip, _ = json.loads(line)["body"]["messages"][0]["content"]
    assert segments == clip["segments"]
    assert (2, "") == (wrong.exit_code, wrong.stdout)


def test_named_clip_goes_as_a_clip(darkroom: Invoke, client: Client) -> None:
    made = darkroom("submit", str(SAMPLES / "clip.mp4"))

    batch = client.api.batches.retrieve(made.stdout.strip())
    (line,) = client.api.files.content(batch.input_file_id).text.splitlines()
    clip, text = json.loads(line)["body"]["messages"][0]["content"]
    assert clip["video_url"]["url"].startswith("data:video/mp4;base64,")
    assert (8, "What happens?") == (clip["num_frames"], text["text"])


def test_clip_is_looked_at_in_as_many_frames_as_were_asked_for(
    darkroom: Invoke, client: Client
) -> None:
    made = darkroom("submit", str(SAMPLES / "clip.mp4"), "--frames", "20")
    wrong = darkroom("submit", str(SAMPLES / "clip.mp4"), "--frames", "0")

    batch = client.api.batches.retrieve(made.stdout.strip())
    (line,) = client.api.files.content(batch.input_file_id).text.splitlines()
    assert 20 == json.loads(line)["body"]["messages"][0]["content"][0]["num_frames"]
    assert (2, "") == (wrong.exit_code, wrong.stdout)


def test_many_pictures_are_uploaded_once_and_named_in_their_lines(
    darkroom: Invoke, client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cli.remote.INLINE_BYTES", 100)
    for name, colour in (("a", "red"), ("b", "blue"), ("c", "red")):
        Image.new("RGB", (8, 8), colour).save(tmp_path / f"{name}.png")

    first = darkroom("submit", str(tmp_path), "--key", "k")
    Image.new("RGB", (8, 8), "green").save(tmp_path / "d.png")
    second = darkroom("submit", str(tmp_path), str(tmp_path / "none.png"))
    (tmp_path / "d.png").unlink()
    again = darkroom("submit", str(tmp_path), "--key", "k")

    def read_sources(made: Result) -> list[str]:
        batch = client.api.batches.retrieve(made.stdout.strip())
        lines = client.api.files.content(batch.input_file_id).text.splitlines()
        contents = [json.loads(line)["body"]["messages"][0]["content"] for line in lines]
        return [content[0]["image_url"]["url"] for content in contents]

    red, blue, also_red = read_sources(first)
    uploads = {file.id: file for file in client.api.files.list(purpose="vision").data}
    assert (0, 1, 0) == (first.exit_code, second.exit_code, again.exit_code)
    assert first.stdout == again.stdout
    assert red == also_red != blue
    assert [red, blue, red] == read_sources(second)[:3]
    assert {*read_sources(second)} == set(uploads)
    assert client.api.files.content(blue).content == (tmp_path / "b.png").read_bytes()
    assert None is not uploads[red].expires_at


def test_wrong_key_is_told_before_anything_is_sent(darkroom: Invoke, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(b"x" * 4_000_000)

    run = darkroom("submit", str(tmp_path / "in.jsonl"), DARKROOM_API_KEY="dk_wrong_key")

    assert (1, "") == (run.exit_code, run.stdout)
    assert "--api-key" in run.stderr


def test_model_that_nobody_runs_is_refused(darkroom: Invoke) -> None:
    run = darkroom("submit", str(SAMPLES / "one.png"), "--model", "other")

    assert (2, "") == (run.exit_code, run.stdout)
    assert "error: This server does not run other. It runs darkroom-tiny.\n" == run.stderr


def test_bad_lines_are_told_with_their_numbers(
    darkroom: Invoke, sqlite_service: Service, tmp_path: Path
) -> None:
    (tmp_path / "in.jsonl").write_bytes(build_jsonl(build_line(1), *["no JSON"] * 30))
    batch = darkroom("submit", str(tmp_path / "in.jsonl")).stdout.strip()
    sqlite_service.worker.expand(_job_of(batch))

    found = darkroom("status", batch)

    told = found.stderr.splitlines()
    assert (1, f"{batch} failed 0/0\n") == (found.exit_code, found.stdout)
    assert told[0].startswith("error: line 2: ")
    assert "... and 10 more; --json has all of them." == told[-1]
    assert 21 == len(told)


# Servers that break off


class BreakingServer(ThreadingHTTPServer):
    """
    Speaks as much of the wire as `submit` and `results` need.

    Attributes:
        num_breaks: wishes for a batch whose connection is cut before the answer.
        keys: of all wishes for a batch.
    """

    num_breaks = 0

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), BreakingHandler)
        self.keys: list[str] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class BreakingHandler(BaseHTTPRequestHandler):
    server: BreakingServer

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            self._answer({"data": []})
        elif self.path.startswith("/v1/batches"):
            self._answer(BATCH)
        else:  # a file, of which half is missing
            self.send_response(200)
            self.send_header("content-length", "100")
            self.end_headers()
            self.wfile.write(b"x" * 50)

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        if self.path == "/v1/files":
            self._answer({"id": "file-1"})
            return
        self.server.keys.append(self.headers["idempotency-key"])
        if len(self.server.keys) > self.server.num_breaks:
            self._answer(BATCH)

    def _answer(self, content: dict[str, Any]) -> None:
        encoded = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(encoded)))
        self.send_header("etag", "1")
        self.end_headers()
        self.wfile.write(encoded)

    def log_message(self, format: str, *args: Any) -> None:
        pass


COUNTS = {"total": 1, "completed": 1, "failed": 0, "expired": 0, "cancelled": 0}
BATCH = {
    "id": "batch_1",
    "input_file_id": "file-1",
    "status": "completed",
    "request_counts": COUNTS,
    "output_file_id": "file-2",
    "error_file_id": None,
    "errors": None,
}


@pytest.fixture
def breaking_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[BreakingServer]:
    monkeypatch.setattr("cli.remote.RETRY_WAITS_S", (0.0, 0.0))
    with BreakingServer() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_wish_whose_answer_is_lost_is_sent_again_under_its_key(
    breaking_server: BreakingServer,
) -> None:
    breaking_server.num_breaks = 2
    words = ["submit", str(SAMPLES / "one.png"), "--server", breaking_server.url]

    run = CliRunner().invoke(app, words)

    assert (0, "batch_1\n", "") == (run.exit_code, run.stdout, run.stderr)
    assert 3 == len(breaking_server.keys)
    assert 1 == len(set(breaking_server.keys))


def test_upload_that_is_cut_off_says_that_it_goes_on(
    breaking_server: BreakingServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cli.remote.INLINE_BYTES", 0)
    words = ["submit", str(SAMPLES / "one.png"), "--server", breaking_server.url]

    run = CliRunner().invoke(app, words)

    assert (3, "") == (run.exit_code, run.stdout)
    assert run.stderr.startswith("Nothing was handed in. Again, only what is missing is uploaded.")


def test_submit_that_is_cut_off_says_how_to_make_no_second_batch(
    breaking_server: BreakingServer,
) -> None:
    breaking_server.num_breaks = 99
    words = ["submit", str(SAMPLES / "one.png"), "--server", breaking_server.url]

    run = CliRunner().invoke(app, words)

    assert (3, "") == (run.exit_code, run.stdout)
    assert f"The same command with --key {breaking_server.keys[0]} finds it" in run.stderr


def test_results_that_break_off_leave_the_file_as_it_was(
    breaking_server: BreakingServer, tmp_path: Path
) -> None:
    (tmp_path / "out").write_text("old")
    words = ["results", "batch_1", "-o", str(tmp_path / "out"), "--server", breaking_server.url]

    run = CliRunner().invoke(app, words)

    assert (3, "") == (run.exit_code, run.stdout)
    assert "the answer broke off" in run.stderr
    assert ["out"] == [path.name for path in tmp_path.iterdir()]
    assert "old" == (tmp_path / "out").read_text()
