"""
What every test stands on: no hub, few threads, and no GPU unless there is one.

The environment is set before anything imports torch or transformers, which read it once.
"""

import os
import signal

os.environ["HF_HUB_OFFLINE"] = "1"
# The bundled model is so small that on a large machine more threads only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import settings

# Whoever starts the tests in the background has told them to ignore Ctrl-C; some tests press it.
signal.signal(signal.SIGINT, signal.default_int_handler)

# A first example may load a model, and CI machines stall: pytest-timeout watches the clock instead.
settings.register_profile("darkroom", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("darkroom")


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
