"""The largest logit of each row: every program looks at a piece of a row, then one at its pieces."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.gpu import count_blocks
from engine.kernels.greedy import NO_TOKEN

BLOCK = 4096


@triton.jit
def _best_of_piece(
    logits_ptr, best_ptr, index_ptr, row_stride, vocab, num_pieces, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    piece = tl.program_id(1)
    column = piece * BLOCK + tl.arange(0, BLOCK)
    inside = column < vocab
    x = tl.load(logits_ptr + row * row_stride + column, mask=inside, other=float("-inf"))
    x = x.to(tl.float32)
    x = tl.where(x == x, x, float("inf"))  # NaN: not finite is all that counts
    best = tl.max(x, axis=0)
    index = tl.min(tl.where((x == best) & inside, column, vocab), axis=0)
    tl.store(best_ptr + row * num_pieces + piece, best)
    tl.store(index_ptr + row * num_pieces + piece, index)


@triton.jit
def _best_of_pieces(
    best_ptr, index_ptr, out_ptr, vocab, num_pieces, NONE: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    piece = tl.arange(0, BLOCK)
    inside = piece < num_pieces
    best = tl.load(best_ptr + row * num_pieces + piece, mask=inside, other=float("-inf"))
    index = tl.load(index_ptr + row * num_pieces + piece, mask=inside, other=vocab)
    largest = tl.max(best, axis=0)
    chosen = tl.min(tl.where(best == largest, index, vocab), axis=0)
    is_finite = (largest < float("inf")) & (largest > float("-inf"))
    tl.store(out_ptr + row, tl.where(is_finite, chosen, NONE).to(tl.int64))


def argmax(logits: Tensor) -> Tensor:
    """(num_rows, vocab) -> (num_rows,), int64."""
    num_rows, vocab = logits.shape
    assert logits.stride(1) == 1
    out = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    if num_rows == 0:
        return out
    num_pieces = count_blocks(vocab, BLOCK)
    best = torch.empty((num_rows, num_pieces), dtype=torch.float32, device=logits.device)
    index = torch.empty((num_rows, num_pieces), dtype=torch.int32, device=logits.device)
    _best_of_piece[(num_rows, num_pieces)](
        logits, best, index, logits.stride(0), vocab, num_pieces, BLOCK=BLOCK, num_warps=8
    )
    _best_of_pieces[(num_rows,)](
        best,
        index,
        out,
        vocab,
        num_pieces,
        NONE=NO_TOKEN,
        BLOCK=triton.next_power_of_2(num_pieces),
        num_warps=1,
    )
    return out
