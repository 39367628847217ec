"""`darkroom up` as a newcomer uses it: one command, then pictures in and sentences out."""

import base64
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

ROOT = Path(__file__).parents[2]
SAMPLES = ROOT / "samples"
EXPECTED: dict[str, str] = json.loads((SAMPLES / "expected.json").read_text(encoding="utf-8"))
START_S = 90.0

pytestmark = pytest.mark.services


def wait_until(is_true: Callable[[], bool], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_true():
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.1)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
    return port


class Service:
    """`darkroom up` in a home of its own."""

    def __init__(self, home: Path) -> None:
        self.home, self.port = home, free_port()
        self.log = home / "up.log"
        settings = {k: v for k, v in os.environ.items() if not k.startswith("DARKROOM_")}
        self.env = settings | {
            "DARKROOM_HOME": str(home),
            "DARKROOM_SERVER": f"http://127.0.0.1:{self.port}",
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
        }
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "cli", "up", "--port", str(self.port), "--device", "cpu"],
                env=self.env,
                stdout=log,
                stderr=log,
            )
        self.client = openai.OpenAI(
            base_url=f"http://127.0.0.1:{self.port}/v1",
            api_key="EMPTY",
            _strict_response_validation=True,
        )

    def says(self, words: str) -> int:
        return self.log.read_text(encoding="utf-8", errors="replace").count(words)

    def darkroom(self, *args: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [sys.executable, "-m", "cli", *args],
            env=self.env,
            capture_output=True,
            text=True,
            check=False,
        )

    def children(self) -> list[int]:
        found = subprocess.run(
            ["ps", "-o", "pid=", "--ppid", str(self.process.pid)],  # noqa: S607
            capture_output=True,
            text=True,
            check=False,
        )
        return [int(pid) for pid in found.stdout.split()]

    def stop(self) -> int:
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(60)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    service = Service(tmp_path_factory.mktemp("up"))
    try:
        wait_until(lambda: service.says("worker_ready") >= 2, START_S)
        yield service
    finally:
        with contextlib.suppress(ProcessLookupError):
            service.process.kill()


def test_pictures_handed_in_come_back_as_sentences(service: Service) -> None:
    names = [name for name, true in EXPECTED.items() if name.endswith((".png", ".jpg"))]
    run = service.darkroom("submit", *(str(SAMPLES / name) for name in names), "--wait")
    batch = service.client.batches.list().data[0]
    assert batch.output_file_id is not None
    lines = service.client.files.content(batch.output_file_id).text.splitlines()
    texts = [
        json.loads(line)["response"]["body"]["choices"][0]["message"]["content"] for line in lines
    ]

    assert 0 == run.returncode, run.stderr
    assert "completed" == batch.status
    assert len(names) == len(texts)
    for name, text in zip(names, texts, strict=True):
        assert EXPECTED[name] in (text, "photo"), name


def test_chat_is_answered_through_the_queue_and_leaves_no_file(service: Service) -> None:
    before = len(service.client.files.list(purpose="batch_output").data)
    encoded = base64.b64encode((SAMPLES / "one.png").read_bytes()).decode()
    image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encoded}"}}
    content: Any = [image, {"type": "text", "text": "Describe."}]
    answer = service.client.chat.completions.create(
        model="darkroom-tiny",
        messages=[{"role": "user", "content": content}],
        temperature=0,
        max_tokens=64,
    )
    wait_until(lambda: service.says("job_ended") >= 2, 30)

    assert EXPECTED["one.png"] == answer.choices[0].message.content
    assert before == len(service.client.files.list(purpose="batch_output").data)


def test_worker_that_was_killed_is_started_again(service: Service) -> None:
    ready = service.says('"event": "worker_ready"')
    victim = service.children()[-1]
    os.kill(victim, signal.SIGKILL)

    wait_until(lambda: service.says('"event": "worker_ready"') > ready, START_S)
    run = service.darkroom("submit", str(SAMPLES / "two.jpg"), "--wait")

    assert 0 == run.returncode, run.stderr


def test_ctrl_c_ends_everything(service: Service) -> None:
    children = service.children()

    assert 3 <= len(children)
    assert 0 == service.stop()
    assert not any(Path(f"/proc/{pid}").exists() for pid in children)
