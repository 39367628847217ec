"""
Attention over runs of unequal length that stand behind one another in one row, without padding.

On a GPU in bfloat16 through torch's own FlashAttention; elsewhere by a mask over the whole row,
which is slow, obvious, and what a GPU test compares the kernels with.

Axes: T rows, heads, dim. Starts are cumulative, int32, one more than there are runs; runs may be empty.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Turns:
    """
    Which rows of a text see which: every run sees itself up to each row, and the runs behind
    `num_shared`, the turns, see the whole shared run of their sample as well.

    NOTE: a sample that has turns has a shared run of at least one row; the kernel gives no number for
    queries without keys.

    Attributes:
        parts: starts of the shared runs, then of the turns. longest_part: rows of the longest run.
        samples: starts of the shared runs. longest_sample: rows of the longest shared run.
        sample_turns: starts of each sample's turns, counted from the first turn of all.
        longest_sample_turns: rows of all turns of one sample, at most.
    """

    parts: Tensor
    longest_part: int
    samples: Tensor
    longest_sample: int
    sample_turns: Tensor
    longest_sample_turns: int
    num_shared: int


def attend_runs(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, longest: int) -> Tensor:
    """Every row sees all rows of its own run. q, k, v: (T, heads, dim) -> the same."""
    if _has_kernel(q):
        return _FlashRuns.apply(q, k, v, starts, longest)
    run = _run_of(starts, len(q))
    return _masked(q, k, v, run[:, None] == run[None, :])


def attend_turns(q: Tensor, k: Tensor, v: Tensor, turns: Turns) -> Tensor:
    """q: (T, heads, dim); k, v: (T, kv_heads, dim) -> (T, heads, dim)."""
    if _has_kernel(q):
        return _FlashTurns.apply(q, k, v, turns)
    return _masked(q, k, v, visible(turns, len(q)))


def visible(turns: Turns, num_rows: int) -> Tensor:
    """(T, T), true where the row sees the column."""
    part = _run_of(turns.parts, num_rows)
    row = torch.arange(num_rows, device=part.device)
    own = (part[:, None] == part[None, :]) & (row[:, None] >= row[None, :])
    shared = turns.num_shared
    sample = torch.cat(
        (_run_of(turns.samples, shared), _run_of(turns.sample_turns, num_rows - shared))
    )
    is_turn = row >= shared
    return own | (is_turn[:, None] & ~is_turn[None, :] & (sample[:, None] == sample[None, :]))


def _run_of(starts: Tensor, num_rows: int) -> Tensor:
    rows = torch.arange(num_rows, device=starts.device, dtype=starts.dtype)
    return torch.searchsorted(starts, rows, right=True) - 1


def _masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    return y[0].transpose(0, 1)


def _has_kernel(q: Tensor) -> bool:
    return q.is_cuda and q.dtype == torch.bfloat16


# --- FlashAttention ----------------------------------------------------------------------------------
# The operators are private to torch; tests/gpu compares what is built on them with the mask above.


@dataclass(frozen=True, slots=True)
class _Call:
    """One call of the kernel: where the runs of queries and of keys start, and how long they are."""

    q_starts: Tensor
    k_starts: Tensor
    max_q: int
    max_k: int
    is_causal: bool

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The attended rows, log-sum-exp as (heads, T), and two states for the way back."""
        out, lse, state, unused, _ = torch.ops.aten._flash_attention_forward(
            q,
            k,
            v,
            self.q_starts,
            self.k_starts,
            self.max_q,
            self.max_k,
            0.0,
            self.is_causal,
            False,
        )
        return out, lse, state, unused

    def backward(
        self,
        grad: Tensor,
        qkv: tuple[Tensor, Tensor, Tensor],
        out: Tensor,
        lse: Tensor,
        state: Tensor,
        unused: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        grads: tuple[Tensor, Tensor, Tensor] = torch.ops.aten._flash_attention_backward(
            grad, *qkv, out, lse, self.q_starts, self.k_starts, self.max_q, self.max_k, 0.0,
            self.is_causal, state, unused,
        )  # fmt: skip
        return grads


class _FlashRuns(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, starts: Tensor, longest: int) -> Tensor:
        ctx.call = _Call(starts, starts, longest, longest, is_causal=False)
        out, lse, state, unused = ctx.call.forward(q, k, v)
        ctx.save_for_backward(q, k, v, out, lse, state, unused)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, state, unused = ctx.saved_tensors
        grads = ctx.call.backward(grad.contiguous(), (q, k, v), out, lse, state, unused)
        return (*grads, None, None)


class _FlashTurns(torch.autograd.Function):
    """
    Two calls, each run on itself and all turns on their shared runs, joined by their log-sum-exps.

    On the way back each call gets the joint output and the joint log-sum-exp: the gradient of one
    softmax over both sets of columns is the sum of what each call then gives.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, turns: Turns) -> Tensor:
        cut = turns.num_shared
        own = _Call(turns.parts, turns.parts, turns.longest_part, turns.longest_part, True)
        across = _Call(
            turns.sample_turns,
            turns.samples,
            turns.longest_sample_turns,
            turns.longest_sample,
            is_causal=False,
        )
        out, lse, *states = own.forward(q, k, v)
        seen, seen_lse, *seen_states = across.forward(q[cut:], k[:cut], v[:cut])
        own_lse = lse[:, cut:]
        joint = torch.logaddexp(own_lse, seen_lse)
        share, seen_share = (
            (x - joint).exp().transpose(0, 1)[..., None] for x in (own_lse, seen_lse)
        )
        out[cut:] = (out[cut:] * share + seen * seen_share).to(out.dtype)
        lse[:, cut:] = joint
        ctx.own, ctx.across, ctx.cut = own, across, cut
        ctx.save_for_backward(q, k, v, out, lse, *states, *seen_states)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, state, unused, seen_state, seen_unused = ctx.saved_tensors
        cut, grad = ctx.cut, grad.contiguous()
        dq, dk, dv = ctx.own.backward(grad, (q, k, v), out, lse, state, unused)
        more = ctx.across.backward(
            grad[cut:],
            (q[cut:], k[:cut], v[:cut]),
            out[cut:],
            lse[:, cut:].contiguous(),
            seen_state,
            seen_unused,
        )
        dq[cut:] += more[0]
        dk[:cut] += more[1]
        dv[:cut] += more[2]
        return dq, dk, dv, None
