"""
From the host to the device without waiting.

A plain copy of pageable memory makes the host wait until the device has done all that was queued
before it. From pinned memory the copy is queued like everything else.
"""

from collections.abc import Sequence
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor


def pin(array: npt.NDArray[Any], device: torch.device) -> Tensor:
    """A host array as a tensor of the host, where the device may copy it from."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory() if device.type == "cuda" else tensor


def upload(array: npt.NDArray[Any], device: torch.device) -> Tensor:
    """A host array as a tensor on the device. On a CPU it shares the array's memory."""
    return pin(array, device).to(device, non_blocking=True)


class Download:
    """
    A tensor on its way to the host, queued behind the work that makes it.

    Args:
        tensor: on any device; not changed until the work queued so far is done.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        if tensor.device.type != "cuda":
            self._host = tensor
            return
        self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self._host.copy_(tensor, non_blocking=True)
        self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._event.record()

    def wait(self) -> Tensor:
        """The tensor on the host, once it is there."""
        if self._event is not None:
            self._event.synchronize()
        return self._host


class Uploads:
    """Pixels from the host to the device, on a stream of their own, beside what was queued before."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def gather(self, pieces: Sequence[Tensor]) -> Tensor:
        """All of them, one after the other, on the device: (bytes,), uint8."""
        flat = [piece.view(-1) for piece in pieces]
        if self._stream is None:
            return torch.cat(flat).to(self._device)
        computing = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._stream):
            gathered = torch.empty(sum(map(len, flat)), dtype=torch.uint8, device=self._device)
            at = 0
            for piece in flat:
                gathered[at : at + len(piece)].copy_(piece, non_blocking=True)
                at += len(piece)
        computing.wait_stream(self._stream)
        gathered.record_stream(computing)
        return gathered
