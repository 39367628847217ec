"""Models that the engine's tests share, loaded once: a tiny random one, and the bundled one."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from engine import LLM
from engine.config import BUNDLED_FOLDER
from tests.engine.idle import assert_idle
from tests.engine.tiny import write_tiny_qwen2_vl

LIMITS = {"image": 4, "video": 2}


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_qwen2_vl(tmp_path_factory.mktemp("models") / "tiny", seed=1)


@pytest.fixture(scope="session")
def llm(tiny_folder: Path) -> Iterator[LLM]:
    """The random model with room for several pictures. Whoever borrows it leaves it idle."""
    llm = LLM(str(tiny_folder), limit_mm_per_prompt=LIMITS)
    yield llm
    llm.close()


@pytest.fixture(scope="session")
def bundled() -> str:
    """The name of the trained model."""
    if not (BUNDLED_FOLDER / "model.safetensors").is_file():
        pytest.skip("models/darkroom-tiny has no weights: `make train` makes them")
    return "darkroom-tiny"


@pytest.fixture(scope="session", params=["random", "bundled"])
def model(request: pytest.FixtureRequest) -> str:
    """The model of an example, random and trained."""
    if request.param == "bundled":
        return str(request.getfixturevalue("bundled"))
    return str(request.getfixturevalue("tiny_folder"))


@pytest.fixture(autouse=True)
def _leave_the_shared_model_idle(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "llm" in request.fixturenames:
        assert_idle(request.getfixturevalue("llm").engine)
