"""What `darkroom serve` decides before it starts anything."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cli.client import Client, ServerError
from cli.errors import CannotStartError
from cli.main import app
from cli.server import ServeOptions, describe_models, open_listener, spread_workers, worker_args
from tasks.config import load_config
from tests.services import find_free_ports

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("options", "described"),
    [
        (ServeOptions("m"), {"image": 8, "video": 1, "max_model_len": 99}),
        (
            ServeOptions("m", limits="image=2", max_model_len=7),
            {"image": 2, "video": 1, "max_model_len": 7},
        ),
        (
            ServeOptions("/x", "other", limits='{"video": 0}'),
            {"image": 1, "video": 0, "max_model_len": None},
        ),
        (ServeOptions("other"), {"image": 3, "video": 1, "max_model_len": None}),
    ],
)
def test_options_go_before_settings(
    options: ServeOptions, described: dict[str, int | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DARKROOM_MODELS", '{"m": {"image": 8, "max_model_len": 99}}')
    monkeypatch.setenv("DARKROOM_LIMIT_MM_PER_PROMPT", "image=3")

    known = json.loads(describe_models(load_config(), options))

    assert {**described, "frames": None} == known[options.name]
    assert "m" in known


def test_each_worker_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\nprintf '0\\n1\\n2\\n'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    assert [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in "01"] == spread_workers(2, "auto")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5, GPU-77")
    assert ["5", "GPU-77"] == [env["CUDA_VISIBLE_DEVICES"] for env in spread_workers(2, "cuda")]
    assert [{}] == spread_workers(1, "cuda")
    with pytest.raises(CannotStartError, match="more than the 2 GPUs here"):
        spread_workers(3, "cuda")


def test_workers_without_gpus_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS")

    assert [{"OMP_NUM_THREADS": "2"}] * 4 == spread_workers(4, "cpu")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert [{}] * 4 == spread_workers(4, "cpu")


def test_address_that_cannot_be_listened_on_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(CannotStartError, match=f"Port {port} on 127.0.0.1 is taken"):
            open_listener("127.0.0.1", port)
    with pytest.raises(CannotStartError, match=r"Cannot listen on 192\.0\.2\.1, port 80"):
        open_listener("192.0.2.1", 80)


def test_server_that_others_can_reach_takes_keys_only(tmp_path: Path) -> None:
    (port,) = find_free_ports(1)
    env = {**os.environ, "DARKROOM_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    words = ["api", "--host", "0.0.0.0", "--port", str(port)]  # noqa: S104 - what is tested
    made = CliRunner().invoke(app, ["keys", "create", "k"], env={"DARKROOM_HOME": str(tmp_path)})
    process = subprocess.Popen(
        [sys.executable, "-m", "cli", *words], env=env, stderr=subprocess.DEVNULL
    )
    try:
        url = f"http://127.0.0.1:{port}"
        while not Client(url).is_ready():
            assert process.poll() is None
            time.sleep(0.05)

        with pytest.raises(ServerError) as refused:
            Client(url).list_models()
        models = Client(url, made.stdout.strip()).list_models()
    finally:
        process.terminate()
        code = process.wait()

    assert 0 == code
    assert not (tmp_path / "valkey" / "darkroom.json").exists()  # the broker has ended, too
    assert 401 == refused.value.status
    assert [] == models


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--limit-mm-per-prompt", "pictures=2"], "error: --limit-mm-per-prompt: give image=N"),
        (["--workers", "0"], "--workers"),
        (["--max-model-len", "0"], "--max-model-len"),
        (["--task", "embed"], "--task"),
        (["--enable-lora"], "'--enable-lora': No adapter is applied per request. Merge"),
        (["--lora-modules", "a=b", "c=d"], "'--lora-modules': No adapter is applied"),
        (["--mm-processor-kwargs", "4"], "error: --mm-processor-kwargs must be a JSON object"),
    ],
)
def test_option_that_makes_no_sense_starts_nothing(
    words: list[str], message: str, tmp_path: Path
) -> None:
    env = {"DARKROOM_HOME": str(tmp_path / "home")}

    run = CliRunner().invoke(app, ["serve", "m", *words], env=env)

    assert 2 == run.exit_code
    assert message in run.stderr
    assert not (tmp_path / "home").exists()


def test_workers_are_told_what_the_server_was_told() -> None:
    plain = ServeOptions("m")
    full = ServeOptions(
        "m",
        revision="v2",
        trust_remote_code=True,
        chat_template="t.jinja",
        mm_processor_kwargs='{"num_crops": 4}',
    )

    assert ("worker", "--model", "m", "--device", "auto", "--dtype", "auto") == worker_args(plain)
    assert {
        *worker_args(plain),
        *("--revision", "v2"),
        *("--chat-template", "t.jinja"),
        *("--mm-processor-kwargs", '{"num_crops": 4}'),
        "--trust-remote-code",
    } == set(worker_args(full))
