"""`darkroom demo`, which is `make demo`: a service is started, used over REST, and stopped."""

import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.services


def start_demo(tmp_path: Path, *args: str, **env: str) -> "subprocess.Popen[str]":
    settings = {name: text for name, text in os.environ.items() if not name.startswith("DARKROOM_")}
    return subprocess.Popen(
        [sys.executable, "-m", "cli", "demo", "--device", "cpu", *args],
        env={**settings, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path), **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def find_processes(home: Path) -> list[int]:
    """Whoever was started with this home, and has not ended."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if f"DARKROOM_HOME={home}".encode() in words:
            found.append(int(folder.name))
    return found


def test_samples_go_through_a_service_that_keeps_them_and_ends(tmp_path: Path) -> None:
    with start_demo(tmp_path, "--check") as demo:
        output, errors = demo.communicate(timeout=240)

    (home,) = tmp_path.glob("darkroom-demo-*")
    with closing(sqlite3.connect(home / "darkroom.sqlite3")) as database:
        (states,) = database.execute(
            "SELECT jobs.state, num_total, num_completed, filename FROM jobs"
            " JOIN files ON files.id = input_file_id"
        )
    assert (0, "") == (demo.returncode, errors)
    assert "10 of 10 drawn samples are right; 14 samples in " in output
    assert ("completed", 14, 14, "samples.jsonl") == states
    for place in ("darkroom.sqlite3", "blobs", "up.log"):
        assert f"{home / place}\n" in output
        assert (home / place).exists()
    assert [] == find_processes(home)


def test_demo_that_is_told_to_end_leaves_nothing_running(tmp_path: Path) -> None:
    home = tmp_path / "home"
    with start_demo(tmp_path, DARKROOM_HOME=str(home)) as demo:
        log = home / "up.log"
        deadline = time.monotonic() + 120
        while not (log.exists() and "startup complete" in log.read_text()):
            assert time.monotonic() < deadline, "it took too long"
            time.sleep(0.05)
        demo.send_signal(signal.SIGTERM)
        demo.communicate(timeout=120)

    assert 128 + signal.SIGTERM == demo.returncode
    assert [] == find_processes(home)


def test_service_that_cannot_start_says_why(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "valkey").touch()  # where the broker's folder should be
    with start_demo(tmp_path, DARKROOM_HOME=str(home)) as demo:
        output, errors = demo.communicate(timeout=120)

    assert (2, "") == (demo.returncode, output)
    assert re.fullmatch(r"error: .*/valkey'\n", errors)
