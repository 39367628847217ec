"""
Faster pieces for a loaded model, where they are built and the device takes them.

What is not there has a plain form in transformers or torch, and the answers are the same.
"""

import logging
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

DecodeAttention = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int, float], Tensor]


def fuse(model: Any) -> None:
    """Put merged projections, norms, activations and rope into a loaded model, in place."""
    fusing = _find("engine.fuse")
    if fusing is not None:
        fusing.apply(model, fusing.Fusions())


def find_decode_attention(device: torch.device, dtype: torch.dtype) -> DecodeAttention | None:
    """
    A kernel for one new token a sequence, straight on the slabs; None where none runs.

    Called as `attend(query, keys, values, starts, lens, max_len, scale)`, query (num_seqs, heads,
    dim), and it gives (num_seqs, heads, dim).
    """
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        return None
    kernels, decoding = _find("engine.kernels"), _find("engine.kernels.decode")
    if (
        kernels is None
        or decoding is None
        or not kernels.has_kernels(torch.empty(1, device=device))
    ):
        return None
    attend: DecodeAttention = decoding.attend
    return attend


def find_argmax(device: torch.device) -> Callable[[Tensor], Tensor] | None:
    """(num_rows, vocab) -> (num_rows,), int64, as `Sampler.sample_plain` chooses; or None."""
    if device.type != "cuda":
        return None
    kernels, greedy = _find("engine.kernels"), _find("engine.kernels.greedy")
    if kernels is None or greedy is None or not kernels.has_kernels(torch.empty(1, device=device)):
        return None
    argmax: Callable[[Tensor], Tensor] = greedy.argmax
    return argmax


def _find(name: str) -> Any | None:
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not name.startswith(error.name):
            logger.warning("swap_missing module=%s lacks=%s", name, error.name)
        return None
