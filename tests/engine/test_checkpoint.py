"""Where a checkpoint is looked for, and what stands on the streams while it is read."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from engine import LLM
from engine.errors import BadConfig

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


Change = Callable[[Path], object]


def write(name: str, content: object) -> Change:
    return lambda folder: (folder / name).write_text(json.dumps(content))


def update(name: str, **values: object) -> Change:
    def apply(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(content | values))

    return apply


def replace_by_folder(name: str) -> Change:
    def apply(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return apply


ODD: dict[str, Change] = {
    "a text for another part": update("config.json", text_config="none"),
    "a text for a part": update("config.json", vision_config="none"),
    "a list for a number": update("config.json", image_token_id=[]),
    "a dtype of nobody's": update("config.json", dtype="float7"),
    "no list of special ids": update("generation_config.json", eos_token_id={"a": 1}),
    "a text for a size": update("preprocessor_config.json", min_pixels="none", size="none"),
    "a number for a mean": update("preprocessor_config.json", image_mean=1),
    "a mean of one": update("preprocessor_config.json", image_mean=[0.5]),
    "another tokenizer.json": write("tokenizer.json", {"model": 1}),
    "a list for a tokenizer": write("tokenizer.json", []),
    "a list for its settings": write("tokenizer_config.json", []),
    "a folder for a config": replace_by_folder("config.json"),
    "no text": lambda folder: (folder / "generation_config.json").write_bytes(b"\xff\xfe"),
}


@pytest.mark.parametrize("what", ODD)
def test_odd_checkpoint_is_one_line(tiny_folder: Path, tmp_path: Path, what: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    ODD[what](folder)

    with pytest.raises(BadConfig) as caught:
        LLM(str(folder))

    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith(".")
