"""Trying a kernel before an answer rests on it. Not while a CUDA graph is captured."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

logger = logging.getLogger(__name__)

T = TypeVar("T")


@contextmanager
def left_out_if_broken(kernel: str, device: torch.device) -> Iterator[None]:
    """
    End the block where the kernel that it tries raises, say so in the log, and go on behind it.

    Raises:
        OutOfMemoryError: which says nothing of the kernel.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - a vendor's compiler: it raises whatever it likes
        logger.warning("%s_unusable device=%s error=%s", kernel, device, error)


def unless_memory_is_short(call: Callable[[], T], otherwise: T) -> T:
    """
    What the call gives; `otherwise` where the device lacks memory even once unused memory is free.

    NOTE: a call that remembers its results must raise then: there may be memory the next time.
    """
    for is_last in (False, True):
        try:
            return call()
        except torch.OutOfMemoryError as error:
            if is_last:
                logger.warning("kernels_not_compared error=%s", error)
        torch.cuda.empty_cache()
    return otherwise
