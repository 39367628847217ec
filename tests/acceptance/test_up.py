"""
`darkroom serve` as users of vLLM start it: one command, then pictures in and sentences out.

`darkroom up` is the same for the bundled model; test_demo.py runs it.
"""

import base64
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import openai
import pytest
from typer.testing import CliRunner

from cli.main import app
from tests.acceptance.service import ROOT, START_S, Service, wait_until
from tests.docs.pages import find_blocks, read_page

SAMPLES = ROOT / "samples"
EXPECTED: dict[str, str] = json.loads((SAMPLES / "expected.json").read_text(encoding="utf-8"))

SERVE = (
    "serve",
    str(ROOT / "models" / "darkroom-tiny"),
    *("--served-model-name", "darkroom-tiny"),
    *("--limit-mm-per-prompt", "image=2"),
    *("--max-model-len", "2048"),
    *("--workers", "2"),
)

README = find_blocks(read_page("README.md"))

pytestmark = pytest.mark.services


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    service = Service(tmp_path_factory.mktemp("up"), *SERVE)
    try:
        service.wait_for_workers(3)
        yield service
    finally:
        service.end()


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


def test_pictures_that_are_uploaded_are_seen_as_those_inside_lines(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cli.remote.INLINE_BYTES", 0)
    words = ["submit", str(SAMPLES / "one.png"), str(SAMPLES / "clip.mp4"), "--wait"]
    run = CliRunner().invoke(
        app, words, env={"DARKROOM_SERVER": f"http://127.0.0.1:{service.port}"}
    )

    batch = service.client.batches.retrieve(run.stdout.split()[0])
    assert batch.output_file_id is not None
    lines = service.client.files.content(batch.output_file_id).text.splitlines()
    texts = [
        json.loads(line)["response"]["body"]["choices"][0]["message"]["content"] for line in lines
    ]
    assert 0 == run.exit_code, run.stderr
    assert [EXPECTED["one.png"], EXPECTED["clip.mp4"]] == texts


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
    wait_until(lambda: service.says("job_ended") >= 2, 60)

    assert EXPECTED["one.png"] == answer.choices[0].message.content
    assert before == len(service.client.files.list(purpose="batch_output").data)


def test_model_is_served_as_it_was_asked_for(service: Service) -> None:
    encoded = base64.b64encode((SAMPLES / "one.png").read_bytes()).decode()
    image: Any = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encoded}"}}

    def ask(*parts: Any) -> int:
        answer = service.client.chat.completions.create(
            model="darkroom-tiny", messages=[{"role": "user", "content": parts}], max_tokens=8
        )
        assert answer.usage is not None
        return answer.usage.prompt_tokens

    with pytest.raises(openai.BadRequestError, match="At most 2 image"):
        ask(image, image, image)
    with pytest.raises(openai.BadRequestError, match="2048"):
        ask({"type": "text", "text": "word " * 3000})
    assert ["darkroom-tiny"] == [model.id for model in service.client.models.list()]
    assert ask(image) < ask(image, image)
    assert 2 == service.says("max_model_len=2048")


def test_port_that_is_taken_is_said_at_once(service: Service, tmp_path: Path) -> None:
    run = service.darkroom("up", "--port", str(service.port), DARKROOM_HOME=str(tmp_path))

    assert (2, "") == (run.returncode, run.stdout)
    assert f"error: Port {service.port} on 127.0.0.1 is taken." in run.stderr
    assert not any(tmp_path.iterdir())


def find_commands(service: Service, code: str) -> list[str]:
    """The commands of a block of the README, for this service."""
    code = code.replace("http://127.0.0.1:8000", f"http://127.0.0.1:{service.port}")
    code = re.sub(r"^darkroom\b", f"{sys.executable} -m cli", code, flags=re.MULTILINE)
    return re.split(r"\n(?=\S)(?!\})", code.strip())


def has_completed(service: Service, batch: str) -> bool:
    return service.client.batches.retrieve(batch).status == "completed"


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl here")
@pytest.mark.parametrize("number", [3, 4])
def test_commands_of_the_readme_hand_in_and_fetch(
    service: Service, tmp_path: Path, number: int
) -> None:
    (tmp_path / "samples").symlink_to(SAMPLES)
    batch, outputs = "", []
    for command in find_commands(service, README[number].code):
        run = subprocess.run(
            ["/bin/sh", "-c", command.replace("BATCH_ID", batch)],
            env=service.env,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert 0 == run.returncode, run.stderr
        batch = batch or re.findall(r"batch_[0-9a-f]{32}", run.stdout)[0]
        outputs.append(run.stdout)
        wait_until(partial(has_completed, service, batch), 120)

    fetched = tmp_path / "results.jsonl"
    lines = (fetched.read_text() if fetched.exists() else outputs[-1]).splitlines()
    assert batch in outputs[1]
    assert "completed" in outputs[1]
    assert {200} == {json.loads(line)["response"]["status_code"] for line in lines}


def test_lines_of_the_readme_for_openai_s_client_hand_in_and_fetch(
    service: Service, tmp_path: Path
) -> None:
    message = {"role": "user", "content": "Hello."}
    line = {
        "custom_id": "a",
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {"model": "darkroom-tiny", "messages": [message], "max_tokens": 8},
    }
    (tmp_path / "captions.jsonl").write_text(json.dumps(line) + "\n")
    code = README[5].code.replace(":8000", f":{service.port}")

    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )

    assert 0 == run.returncode, run.stderr
    assert "a" == json.loads(run.stdout)["custom_id"]


def test_worker_that_was_killed_is_started_again(service: Service) -> None:
    ready = service.says('"event": "worker_ready"')
    victim = service.children()[-1]
    os.kill(victim, signal.SIGKILL)

    wait_until(lambda: service.says('"event": "worker_ready"') > ready, START_S)
    run = service.darkroom("submit", str(SAMPLES / "two.jpg"), "--wait")

    assert 0 == run.returncode, run.stderr


def test_ctrl_c_ends_everything(service: Service) -> None:
    children = service.children()

    assert 4 <= len(children)
    assert 0 == service.stop()
    assert not any(Path(f"/proc/{pid}").exists() for pid in children)
