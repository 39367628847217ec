"""Where a checkpoint is looked for, and what stands on the streams while it is read."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMMIT = "0123456789abcdef0123456789abcdef01234567"

LOAD_WITHOUT_NETWORK = """
import os, socket, sys

def refuse(*_, **__):
    os.write(2, b"the network was asked\\n")
    os._exit(9)

socket.getaddrinfo = socket.create_connection = refuse

from engine import LLM
from engine.errors import BadConfig

try:
    LLM(sys.argv[1]).close()
except BadConfig as error:
    print(error)
"""


@pytest.fixture
def cache(tmp_path: Path, tiny_folder: Path) -> Path:
    """A hub's cache, as `hf download org/tiny` leaves it."""
    model = tmp_path / "hub" / "models--org--tiny"
    shutil.copytree(tiny_folder, model / "snapshots" / COMMIT)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(COMMIT)
    return tmp_path / "hub"


def load(model: str, cache: Path) -> subprocess.CompletedProcess[str]:
    """Load a model in a process that may use the network as far as its settings say."""
    env = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    return subprocess.run(
        [sys.executable, "-c", LOAD_WITHOUT_NETWORK, model],
        env=env | {"PYTHONPATH": str(ROOT), "HF_HUB_CACHE": str(cache)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_model_in_the_cache_is_loaded_without_the_network_and_in_silence(cache: Path) -> None:
    run = load("org/tiny", cache)

    assert (0, "", "") == (run.returncode, run.stdout, run.stderr)


def test_model_that_is_not_in_the_cache_is_told_with_the_way_to_get_it(cache: Path) -> None:
    run = load("org/other", cache)

    assert (0, "") == (run.returncode, run.stderr)
    assert (
        "The model 'org/other' cannot be loaded: there is no such folder, and it is not in the "
        "hub's cache. Fetch it with `hf download org/other`.\n"
    ) == run.stdout


def test_model_that_is_in_the_cache_in_part_is_told_with_the_way_to_get_it(cache: Path) -> None:
    (cache / "models--org--tiny" / "snapshots" / COMMIT / "model.safetensors").unlink()

    run = load("org/tiny", cache)

    assert (0, "") == (run.returncode, run.stderr)
    assert run.stdout.endswith("Fetch all of it with `hf download org/tiny`.\n")
