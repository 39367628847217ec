"""
The pieces between the matrix products, each in as few passes over memory as it can be.

Every piece is a function with a plain torch form, its twin, which says what it means and runs on a
CPU. On a GPU with Triton the same function calls a kernel of `engine.kernels.gpu`, which is imported
only there. Functions whose name ends in `_` write over what they are given.

It refuses to know models: engine/fuse.py puts the pieces into one.
"""

import logging
from functools import cache

import torch
from torch import Tensor

from engine.kernels.trials import left_out_if_broken

logger = logging.getLogger(__name__)


def has_kernels(x: Tensor) -> bool:
    """Whether the kernels of `engine.kernels.gpu` run where this tensor lives."""
    return x.is_cuda and _has_triton(x.device)


def is_hopper(device: torch.device) -> bool:
    """Whether the kernels in Gluon can be tried on a CUDA device: of no other generation are they."""
    return torch.cuda.get_device_capability(device) == (9, 0)


@cache
def _has_triton(device: torch.device) -> bool:
    """
    Try one kernel: Triton may be missing, or lack the compiler that its launchers need.

    NOTE: the first call must not come while a CUDA graph is captured.

    Raises:
        OutOfMemoryError: which is not remembered, as there may be memory the next time.
    """
    try:
        from engine.kernels.gpu import probe
    except ImportError as error:
        logger.warning("kernels_missing device=%s error=%s", device, error)
        return False
    with left_out_if_broken("kernels", device):
        probe.run(device)
        return True
    return False
