"""Attention over ragged runs in training: the kernels and their gradients, against the mask."""

import pytest
import torch
from torch import Tensor

from models.train import ragged
from models.train.ragged import Turns

pytestmark = pytest.mark.gpu
SHARED, TURNS = [40, 7, 129, 24, 0], [[30, 5, 9], [60], [1, 1], [94], []]


def starts(sizes: list[int]) -> Tensor:
    return torch.tensor([0, *torch.tensor(sizes).cumsum(0).tolist()], dtype=torch.int32).cuda()


def turns() -> Turns:
    return Turns(
        parts=starts([*SHARED, *(size for of_one in TURNS for size in of_one), 0, 0]),
        longest_part=160,
        samples=starts(SHARED),
        longest_sample=160,
        sample_turns=starts([sum(of_one) for of_one in TURNS]),
        longest_sample_turns=128,
        num_shared=sum(SHARED),
    )


QKV = tuple[Tensor, Tensor, Tensor]


def random_qkv(num: int, heads: int, kv_heads: int, dim: int) -> QKV:
    torch.manual_seed(0)
    shapes = [(num, h, dim) for h in (heads, kv_heads, kv_heads)]
    q, k, v = (torch.randn(s, device="cuda", dtype=torch.bfloat16) for s in shapes)
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_()


def in_double(qkv: QKV) -> QKV:
    q, k, v = (x.detach().double().requires_grad_() for x in qkv)
    return q, k, v


def check(qkv: QKV, out: Tensor, exact: QKV, wanted: Tensor) -> None:
    """Outputs are close, and so are the gradients of a random weighting of them."""
    weight = torch.randn_like(wanted).bfloat16()
    torch.autograd.backward([(out * weight).sum(), (wanted * weight.double()).sum()])
    close(out, wanted)
    for got, right in zip(qkv, exact, strict=True):
        assert got.grad is not None
        assert right.grad is not None
        close(got.grad, right.grad)


def close(got: Tensor, wanted: Tensor) -> None:
    error = (got.float() - wanted.float()).norm() / wanted.float().norm()
    assert error < 0.01, f"{error:.1e}"


def test_turns_and_their_gradients_equal_the_mask() -> None:
    spans = turns()
    qkv = random_qkv(sum(SHARED) + sum(map(sum, TURNS)), 4, 2, 64)
    exact = in_double(qkv)
    mask = ragged.visible(spans, len(qkv[0]))

    check(qkv, ragged.attend_turns(*qkv, spans), exact, ragged._masked(*exact, mask))


def test_runs_and_their_gradients_equal_the_mask() -> None:
    run_starts = starts([64, 200, 4, 0, 256, 16])
    qkv = random_qkv(540, 6, 6, 32)
    exact = in_double(qkv)
    run = ragged._run_of(run_starts, 540)
    mask = run[:, None] == run[None, :]

    check(qkv, ragged.attend_runs(*qkv, run_starts, 256), exact, ragged._masked(*exact, mask))
