"""The likeliest token of each row of logits."""

import torch
from torch import Tensor

from engine.kernels import has_kernels

NO_TOKEN = -1  # instead of an id: the row holds a NaN, or nothing that may be chosen


def argmax(logits: Tensor) -> Tensor:
    """
    (num_rows, vocab), any float type -> (num_rows,), int64.

    The lowest id of the largest, compared in float32; `NO_TOKEN` where the largest is not finite.
    """
    if has_kernels(logits):
        from engine.kernels.gpu import greedy

        return greedy.argmax(logits)
    return plain_argmax(logits)


def plain_argmax(logits: Tensor) -> Tensor:
    """`argmax` in torch alone."""
    token_ids = logits.argmax(dim=-1)  # documented to give the first of equal ones; NaN is largest
    largest = logits.gather(-1, token_ids[:, None]).flatten()
    return torch.where(largest.isfinite(), token_ids, NO_TOKEN)
