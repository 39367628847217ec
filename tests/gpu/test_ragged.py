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


def random_qkv(num: int, heads: int, kv_heads: int, dim: int) -> list[Tensor]:
    torch.manual_seed(0)
    return [
        torch.randn(num, h, dim, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for h in (heads, kv_heads, kv_heads)
    ]


def close(got: Tensor, wanted: Tensor) -> None:
    error = (got.float() - wanted.float()).norm() / wanted.float().norm()
    assert error < 0.01, f"{error:.1e}"


def test_turns_and_their_gradients_equal_the_mask() -> None:
    spans = turns()
    qkv = random_qkv(sum(SHARED) + sum(map(sum, TURNS)), 4, 2, 64)
    exact = [x.detach().double().requires_grad_() for x in qkv]
    out = ragged.attend_turns(*qkv, spans)
    wanted = ragged._masked(*exact, ragged.visible(spans, len(qkv[0])))
    weight = torch.randn_like(wanted)
    (out * weight.bfloat16()).sum().backward()
    (wanted * weight.bfloat16().double()).sum().backward()

    close(out, wanted)
    for got, right in zip(qkv, exact, strict=True):
        assert got.grad is not None
        assert right.grad is not None
        close(got.grad, right.grad)


def test_runs_and_their_gradients_equal_the_mask() -> None:
    run_starts = starts([64, 200, 4, 0, 256, 16])
    qkv = random_qkv(540, 6, 6, 32)
    exact = [x.detach().double().requires_grad_() for x in qkv]
    run = ragged._run_of(run_starts, 540)
    out = ragged.attend_runs(*qkv, run_starts, 256)
    wanted = ragged._masked(*exact, run[:, None] == run[None, :])
    weight = torch.randn_like(wanted)
    (out * weight.bfloat16()).sum().backward()
    (wanted * weight.bfloat16().double()).sum().backward()

    close(out, wanted)
    for got, right in zip(qkv, exact, strict=True):
        assert got.grad is not None
        assert right.grad is not None
        close(got.grad, right.grad)
