"""
What every test stands on: no hub, few threads, and no GPU unless there is one.

The environment is set before anything imports torch or transformers, which read it once.
"""

import gc
import os
import signal
from collections.abc import Iterator
from typing import TYPE_CHECKING

os.environ["HF_HUB_OFFLINE"] = "1"
# The bundled model is so small that on a large machine more threads only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from tests.services import S3Server

# Whoever starts the tests in the background has told them to ignore Ctrl-C; some tests press it.
signal.signal(signal.SIGINT, signal.default_int_handler)

# A first example may load a model, and CI machines stall: pytest-timeout watches the clock instead.
settings.register_profile("darkroom", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("darkroom")

# What tests import stays, a million objects: garbage is seldom looked for while they are imported, and
# among them never.
USUAL_THRESHOLD = gc.get_threshold()
gc.set_threshold(20_000, 50, 100)


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    gc.freeze()
    gc.set_threshold(*USUAL_THRESHOLD)


@pytest.hookimpl(trylast=True)
def pytest_unconfigure() -> None:
    gc.freeze()


@pytest.hookimpl(trylast=True)  # after -m has chosen, so that `-m "not gpu"` never loads torch here
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items or has_cuda_device():
        return
    for item in gpu_items:
        item.add_marker(pytest.mark.skip(reason="torch sees no CUDA device"))


def has_cuda_device() -> bool:
    import torch

    return torch.cuda.is_available()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The corpus of bad input ends in a table; here, since processes that share tests tell it here."""
    from tests.corpus.report import report

    report(terminalreporter, os.environ.get("DARKROOM_CORPUS_REPORT"))


@pytest.fixture(scope="session")
def s3_server() -> Iterator["S3Server"]:
    """One for all rooms: who kills or freezes it lets it go on afterwards."""
    # Imported here: where only the engine is installed there is no psycopg, and no need of it.
    from tests.services import start_s3

    with start_s3() as server:
        yield server


@pytest.fixture
def s3_settings(s3_server: "S3Server", monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """
    The environment of processes whose blobs lie under a new prefix, by its variables' names.

    This process has it too, so `load_config` finds the bucket and children inherit it.
    """
    s3_server.revive()
    settings = {
        **s3_server.env,
        "DARKROOM_BLOBS": f"s3://{s3_server.bucket}/{s3_server.make_prefix()}",
        "DARKROOM_S3_ENDPOINT_URL": s3_server.endpoint_url,
        "DARKROOM_S3_REGION": s3_server.region,
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    return settings
