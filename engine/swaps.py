"""
Faster pieces for a loaded model, where the device takes them.

Each has a plain form in transformers or torch, and the answers are the same.
"""

import logging
from collections.abc import Iterable
from typing import Any

import torch

from engine.fuse import Fusions, apply
from engine.kernels import decode, has_kernels, prompts
from engine.kernels.decode import DecodeAttention
from engine.kernels.prompts import PrefillAttention

logger = logging.getLogger(__name__)

MAX_KERNEL_DIM = 128  # wider heads may not fit the memory of a GPU's processor: flash takes them


def fuse(model: Any, *, fp8: bool = False) -> None:
    """Put merged projections, norms, activations and rope into a loaded model, in place."""
    swapped = apply(model, Fusions(fp8=fp8, rope_in_attention=True, packs=True))
    logger.info("layers_fused %s", " ".join(f"{name}={n}" for name, n in sorted(swapped.items())))


def find_decode_attention(
    device: torch.device, dtype: torch.dtype, head_dim: int
) -> DecodeAttention | None:
    """A kernel for one new token a sequence, straight on the slabs; None where none runs."""
    is_taken = dtype in (torch.float16, torch.bfloat16) and head_dim <= MAX_KERNEL_DIM
    return decode.attend if is_taken and has_kernels(torch.empty(1, device=device)) else None


def find_prefill_attention(
    device: torch.device, dtype: torch.dtype, head_dims: Iterable[int]
) -> PrefillAttention | None:
    """A kernel for prompts straight on the slabs; None where none runs in a layer of such heads."""
    are_taken = [prompts.is_usable(device, dtype, dim) for dim in sorted(set(head_dims))]
    return prompts.attend if all(are_taken) else None
