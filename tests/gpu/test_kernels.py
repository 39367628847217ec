"""
Every kernel says what its plain torch twin says, at every shape in use and at the odd ones.

Needs torch and Triton, and no plugin of pytest:
`python3 -m pytest -c /dev/null --rootdir . --noconftest tests/gpu/test_kernels.py -s -q`. With
TRITON_INTERPRET=1 it runs without a GPU, on Triton's interpreter, at a smaller size.
"""

import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.kernels import (
    activated,
    activations,
    added,
    decode,
    draw,
    folded,
    greedy,
    in_one,
    norms,
    pictures,
    prompts,
    quantised,
    rope,
    rotated,
    split,
    timing,
)
from tests.engine.linears import as_linear

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if IS_INTERPRETED else "cuda"
WIDTHS = (48, 1280) if IS_INTERPRETED else (48, 1024, 1280, 1536, 3584, 4096)
NUM_ROWS = (1, 3) if IS_INTERPRETED else (1, 3, 257, 20_000)
# The interpreter multiplies the bits of bfloat16 matrices instead of their numbers.
HALF = torch.float16 if IS_INTERPRETED else torch.bfloat16
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

pytestmark = [pytest.mark.gpu]
if not IS_INTERPRETED:
    pytestmark.append(pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"))


def kernel(name: str) -> Any:
    """A module of kernels; not the function that may choose the twin."""
    import importlib

    return importlib.import_module(f"engine.kernels.gpu.{name}")


def drawn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype).to(DEVICE)


def on_cpu(*tensors: Tensor) -> list[Tensor]:
    """Copies on which the public functions choose the twin."""
    return [tensor.detach().cpu().clone() for tensor in tensors]


def assert_near(expected: Tensor, actual: Tensor, dtype: torch.dtype | None = None) -> None:
    """
    Within two of the type's last places; four on Triton's interpreter, which cuts off where a
    device rounds.
    """
    dtype = dtype or actual.dtype
    assert expected.shape == actual.shape
    assert expected.dtype == actual.dtype
    expected, actual = expected.double().cpu(), actual.double().cpu()
    step = 4e-6 if dtype == torch.float32 else torch.finfo(dtype).eps
    allowed = (4 if IS_INTERPRETED else 2) * step * expected.abs().clamp(min=1.0)
    apart = (expected - actual).abs() - allowed
    assert apart.max().item() <= 0, f"{apart.max().item()} beyond"


def assert_same_sum(expected: Tensor, actual: Tensor) -> None:
    """Bit for bit, where bfloat16 is rounded."""
    if IS_INTERPRETED and actual.dtype == torch.bfloat16:
        assert_near(expected, actual)
    else:
        assert torch.equal(expected, actual.cpu())


def test_the_public_functions_use_the_kernels_here() -> None:
    if IS_INTERPRETED:
        pytest.skip("the interpreter is nobody's choice")
    from engine.kernels import has_kernels

    assert has_kernels(torch.empty(1, device=DEVICE))
    assert not has_kernels(torch.empty(1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_rms_norm(width: int, dtype: torch.dtype) -> None:
    for num_rows in NUM_ROWS:
        x = drawn(num_rows, width, dtype=dtype)
        weight = drawn(width, dtype=dtype, seed=1)

        x_copy, weight_copy = on_cpu(x, weight)
        expected = norms.rms_norm(x_copy, weight_copy, 1e-6)

        assert_near(expected, kernel("norms").norm(x, weight, None, 1e-6))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_add_rms_norm(width: int, dtype: torch.dtype) -> None:
    for num_rows in NUM_ROWS:
        x = drawn(1, num_rows, width, dtype=dtype)
        delta = drawn(1, num_rows, width, dtype=dtype, seed=2)
        weight = drawn(width, dtype=dtype, seed=1)
        delta_copy, x_copy, weight_copy = on_cpu(delta, x, weight)

        expected = norms.add_rms_norm_(delta_copy, x_copy, weight_copy, 1e-6)
        actual = kernel("norms").add_norm_(delta, x, weight, None, 1e-6)

        assert_near(expected, actual)
        assert_same_sum(delta_copy, delta)
        assert torch.equal(x_copy, x.cpu())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_layer_norm_alone_and_after_an_addition(width: int, dtype: torch.dtype) -> None:
    for num_rows in NUM_ROWS:
        x = drawn(num_rows, width, dtype=dtype) + 1
        delta = drawn(num_rows, width, dtype=dtype, seed=2)
        weight, bias = drawn(width, dtype=dtype, seed=1), drawn(width, dtype=dtype, seed=3)
        delta_copy, x_copy, weight_copy, bias_copy = on_cpu(delta, x, weight, bias)

        alone = norms.layer_norm(x_copy, weight_copy, bias_copy, 1e-6)
        added = norms.add_layer_norm_(delta_copy, x_copy, weight_copy, bias_copy, 1e-6)

        assert_near(alone, kernel("norms").norm(x, weight, bias, 1e-6))
        assert_near(added, kernel("norms").add_norm_(delta, x, weight, bias, 1e-6))
        assert_same_sum(delta_copy, delta)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [96, 2049, 8960])
def test_silu_mul(width: int, dtype: torch.dtype) -> None:
    for num_rows in NUM_ROWS:
        x = 3 * drawn(1, num_rows, 2 * width, dtype=dtype)

        assert_near(activations.silu_mul(*on_cpu(x)), kernel("activations").silu_mul(x))


@pytest.mark.skipif(IS_INTERPRETED, reason="seventy thousand rows")
def test_silu_mul_of_more_rows_than_a_grid_has() -> None:
    x = drawn(70_001, 2 * 64, dtype=torch.bfloat16)

    assert_near(activations.silu_mul(*on_cpu(x)), kernel("activations").silu_mul(x))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [64, 5120])
def test_quick_gelu(width: int, dtype: torch.dtype) -> None:
    for num_rows in NUM_ROWS:
        x = 3 * drawn(num_rows, width, dtype=dtype)
        exact = x.double().cpu()
        expected = (exact * torch.sigmoid(1.702 * exact)).to(dtype)

        returned = kernel("activations").quick_gelu_(x)

        assert returned.data_ptr() == x.data_ptr()
        assert_near(expected, x)


# Rows, depth and width of products in parts: tiles are of 64 rows, 128 columns and 64 of the depth.
SPLIT = [(1, 128, 48), (5, 320, 136)]
if not IS_INTERPRETED:
    SPLIT += [(1, 8960, 1536), (64, 8960, 1536), (65, 8960, 1536), (448, 8960, 1536)]
    SPLIT += [(512, 1536, 1536), (130, 11_008, 4096), (7, 4096, 4096), (300, 64, 24)]


@pytest.mark.parametrize(("num_rows", "depth", "width"), SPLIT)
@pytest.mark.parametrize("dtype", [HALF, torch.float16])
def test_products_in_parts(
    num_rows: int, depth: int, width: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    if IS_INTERPRETED:
        monkeypatch.setattr("engine.kernels.gpu.split.count_processors", lambda _: 8)
    x = drawn(num_rows, depth, dtype=dtype)
    weight = (drawn(width, depth, seed=1) * depth**-0.5).to(dtype)

    parts = kernel("split").multiply(x, weight)

    assert torch.float32 == parts.dtype
    assert (num_rows, width) == parts.shape[1:]
    assert len(parts) <= 16
    torch.testing.assert_close(parts.sum(0), x.float() @ weight.float().T, rtol=1e-3, atol=1e-3)
    assert torch.equal(parts, kernel("split").multiply(x, weight))
    if depth % 128:
        return
    rows, small = quantised.quantise(x), quantised.quantise(weight)
    given = rows.values, small.values, rows.scales, small.scales
    in_fp8 = kernel("split").multiply(*given)
    # Sums in the tensor cores have some 14 bits.
    expected = rows.read() @ small.read().T
    torch.testing.assert_close(in_fp8.sum(0), expected, rtol=2e-2, atol=2e-2)
    assert torch.equal(in_fp8, kernel("split").multiply(*given))


@pytest.mark.parametrize("num_parts", [1, 3])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("num_rows", NUM_ROWS[:3])
def test_norms_of_what_stands_in_parts(num_rows: int, width: int, num_parts: int) -> None:
    x, weight = drawn(num_rows, width, dtype=torch.bfloat16), drawn(width, seed=1)
    parts, before = drawn(num_parts, num_rows, width, seed=2), x.clone()
    on_host = on_cpu(parts, x, weight.bfloat16())
    expected = norms.add_parts_rms_norm(on_host[0], on_host[1], on_host[2], 1e-6)

    actual = kernel("norms").add_parts_norm(parts, x, weight.bfloat16(), None, 1e-6)

    assert torch.equal(before, x)
    for ours, theirs in zip(actual, expected, strict=True):
        assert_near(theirs, ours)
    if IS_INTERPRETED:  # it rounds up to a power of two wrongly
        return
    total, in_fp8 = kernel("norms").add_parts_norm_in_fp8(parts, x, weight.bfloat16(), None, 1e-6)
    assert torch.equal(actual[0], total)
    exact = quantised.quantise(expected[1]).read()
    torch.testing.assert_close(quantised.Fp8Rows(*in_fp8).read().cpu(), exact, rtol=0.15, atol=0.02)


HEADS = [(4, 2, 16), (12, 2, 128), (32, 32, 128), (16, 16, 80), (6, 1, 64), (3, 3, 8)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), HEADS)
@pytest.mark.parametrize("repeats", [1, 2])
def test_rotate(heads: int, kv_heads: int, dim: int, dtype: torch.dtype, repeats: int) -> None:
    """Angles come once for both halves of a head, or twice over as transformers has them."""
    num_tokens = 5 if IS_INTERPRETED else 1001
    merged = drawn(num_tokens, heads + 2 * kv_heads, dim, dtype=dtype)
    angles = drawn(num_tokens, dim // 2, seed=4).repeat(1, repeats)
    cos, sin = angles.cos(), angles.sin()
    copy, cos_copy, sin_copy = on_cpu(merged, cos, sin)

    rope.rotate_(copy[:, : heads + kv_heads], cos_copy, sin_copy)
    kernel("rope").rotate_(merged[:, : heads + kv_heads], cos, sin)

    assert_near(copy, merged)
    assert torch.equal(copy[:, heads + kv_heads :], merged[:, heads + kv_heads :].cpu())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "dim"), [(32, 80), (32, 64), (3, 8)])
def test_rotate_in_pairs(heads: int, dim: int, dtype: torch.dtype) -> None:
    num_tokens = 5 if IS_INTERPRETED else 1001
    merged, angles = drawn(num_tokens, heads + 2, dim, dtype=dtype), drawn(num_tokens, dim, seed=4)
    copy, cos, sin = on_cpu(merged, angles.cos(), angles.sin())

    rope.rotate_(copy[:, :heads], cos, sin, in_pairs=True)
    kernel("rope").rotate_(merged[:, :heads], angles.cos(), angles.sin(), in_pairs=True)

    assert_near(copy, merged)
    assert torch.equal(copy[:, heads:], merged[:, heads:].cpu())


@pytest.mark.parametrize("kv_dtype", [None, torch.float8_e4m3fn])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), HEADS)
def test_rotate_and_store(
    heads: int, kv_heads: int, dim: int, kv_dtype: torch.dtype | None
) -> None:
    num_tokens = 5 if IS_INTERPRETED else 1001
    dtype = torch.bfloat16
    merged = drawn(num_tokens, heads + 2 * kv_heads, dim, dtype=dtype)
    merged[0, -1, :4] = 1000.0  # more than fp8 holds
    angles = drawn(num_tokens, dim // 2, seed=4)
    shape = (2 * num_tokens, kv_heads, dim)
    keys, values = (drawn(*shape, seed=s).to(kv_dtype or dtype) for s in (5, 6))
    rows = torch.randperm(2 * num_tokens, generator=torch.Generator().manual_seed(7))
    rows = rows[:num_tokens].to(DEVICE)
    copies = on_cpu(merged, angles.cos(), angles.sin())
    stored = [tensor.float().clone() for tensor in on_cpu(keys, values)]
    for_rows = rows.cpu()

    rope.rotate_(copies[0][:, : heads + kv_heads], copies[1], copies[2])
    stored[0][for_rows] = copies[0][:, heads : heads + kv_heads].float()
    stored[1][for_rows] = copies[0][:, heads + kv_heads :].float()
    kernel("rope").rotate_and_store_(merged, angles.cos(), angles.sin(), keys, values, rows)

    assert_near(copies[0], merged)
    if kv_dtype is not None:
        stored = [tensor.clamp(-448, 448).to(kv_dtype).float() for tensor in stored]
    assert_near(stored[0], keys.float(), kv_dtype or dtype)
    assert_near(stored[1], values.float(), kv_dtype or dtype)


@pytest.mark.parametrize("axes", [1, 3])
def test_look_up(axes: int) -> None:
    half, num_positions = 40, 500
    cos, sin = rope.build_table(torch.rand(half), num_positions, 1.25)
    positions = torch.randint(0, num_positions, (axes, 77), generator=torch.Generator())
    axis_of = torch.arange(half) % axes

    expected = rope.look_up(positions, axis_of, cos, sin)
    on_device = [tensor.to(DEVICE) for tensor in (positions, axis_of, cos, sin)]
    actual = kernel("rope").look_up(*on_device)

    assert all(torch.equal(a, b.cpu()) for a, b in zip(expected, actual, strict=True))


def slabs(rng: random.Random, lens: list[int]) -> tuple[list[int], int]:
    """Starts of slabs that lie in another order than their sequences, and rows in all."""
    order = rng.sample(range(len(lens)), len(lens))
    starts, at = [0] * len(lens), 16
    for index in order:
        starts[index] = at
        at += -(-max(lens[index], 1) // 16) * 16
    return starts, at


def poisoned(starts: list[int], lens: list[int], shape: tuple[int, int, int]) -> list[Tensor]:
    """Keys and values with NaN in every row that belongs to no sequence."""
    made = []
    for seed in (8, 9):
        rows = drawn(*shape, dtype=torch.float32, seed=seed)
        is_used = torch.zeros(shape[0], dtype=torch.bool, device=DEVICE)
        for start, length in zip(starts, lens, strict=True):
            is_used[start : start + length] = True
        rows[~is_used] = float("nan")
        made.append(rows)
    return made


@pytest.mark.parametrize("kv_dtype", [None, torch.float8_e4m3fn])
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), HEADS)
@pytest.mark.parametrize("split_rows", [128, 512])
def test_decode_attention(
    heads: int,
    kv_heads: int,
    dim: int,
    dtype: torch.dtype,
    kv_dtype: torch.dtype | None,
    split_rows: int,
) -> None:
    rng = random.Random(dim)
    lens = [1, 16, 17, 64, 65, 127, 128, 129, 0, 300, 513]
    if not IS_INTERPRETED:
        lens += [rng.randint(1, 2500) for _ in range(50)] + [2500]
    starts, num_rows = slabs(rng, lens)
    keys, values = (
        x.to(dtype).to(kv_dtype or dtype) for x in poisoned(starts, lens, (num_rows, kv_heads, dim))
    )
    query = drawn(len(lens), heads + 2, dim, dtype=dtype)[:, :heads]  # a view, as from a projection
    start, length = (torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in (starts, lens))
    q, k, v = (x.float().double() for x in on_cpu(query, keys, values))

    expected = decode.attend(q, k, v, start.cpu(), length.cpu(), max(lens), dim**-0.5)
    actual = kernel("decode").attend(
        query, keys, values, start, length, max(lens), dim**-0.5, split_rows
    )

    assert actual.is_contiguous()
    allowed = 2e-5 if dtype == torch.float32 else 0.02
    assert (expected - actual.double().cpu()).abs().max().item() < allowed


def test_decode_attention_does_not_depend_on_neighbours_or_on_the_bound() -> None:
    lens = [700, 3, 130, 512]
    starts, num_rows = slabs(random.Random(1), lens)
    keys, values = (drawn(num_rows, 2, 64, dtype=HALF, seed=s) for s in (1, 2))
    query = drawn(4, 6, 64, dtype=HALF)
    start, length = (torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in (starts, lens))
    attend = kernel("decode").attend

    together = attend(query, keys, values, start, length, 700, 0.125, 128)
    bounded = attend(query, keys, values, start, length, 4096, 0.125, 128)
    alone = torch.cat(
        [
            attend(
                query[i : i + 1], keys, values, start[i : i + 1], length[i : i + 1], 800, 0.125, 128
            )
            for i in range(4)
        ]
    )

    assert torch.equal(together, bounded)
    assert torch.equal(together, alone)


@pytest.mark.skipif(IS_INTERPRETED, reason="graphs need a device")
def test_decode_attention_in_a_graph_reads_changed_lengths() -> None:
    lens = [700, 3, 130, 0]
    starts, num_rows = slabs(random.Random(1), [1024] * 4)
    keys, values = (drawn(num_rows, 2, 128, dtype=HALF, seed=s) for s in (1, 2))
    query = drawn(4, 12, 128, dtype=torch.bfloat16)
    start, length = (torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in (starts, lens))

    def run() -> Tensor:
        return decode.attend(query, keys, values, start, length, 1024, 0.1, split_rows=256)

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for changed in ([1, 1024, 0, 513], [1000, 0, 7, 512]):
        length.copy_(torch.tensor(changed, dtype=torch.int32))
        graph.replay()

        assert torch.equal(run(), captured)
        assert captured[changed.index(0)].abs().max().item() == 0


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("cut", pictures.CUTS, ids=str)
@pytest.mark.parametrize(("heads", "dim"), [(2, 64), (3, 80), (1, 96), (2, 128)])
def test_attention_in_pictures(heads: int, dim: int, cut: pictures.Cut, dtype: torch.dtype) -> None:
    sizes = [4, 64, 129, 1, 200] if IS_INTERPRETED else [4, 64, 1564, 1, 576, 129, 3996]
    starts = torch.tensor([0, *torch.tensor(sizes).cumsum(0).tolist()], dtype=torch.int32)
    merged = drawn(sum(sizes), 3 * heads, dim, dtype=dtype)
    query, key, value = torch.split(merged, heads, dim=1)
    q, k, v = (x.float().double() for x in on_cpu(query, key, value))

    expected = pictures.attend(q, k, v, starts, max(sizes), dim**-0.5)
    actual = kernel("pictures").attend(
        query, key, value, starts.to(DEVICE), max(sizes), dim**-0.5, **asdict(cut)
    )

    assert actual.is_contiguous()
    allowed = 2e-5 if dtype == torch.float32 else 0.02
    assert (expected - actual.double().cpu()).abs().max().item() < allowed


def is_hopper() -> bool:
    if IS_INTERPRETED or not torch.cuda.is_available():
        return False
    return torch.cuda.get_device_capability() == (9, 0)


needs_hopper = pytest.mark.skipif(not is_hopper(), reason="a kernel for Hopper")
HOPPER_CUTS = [*pictures.HOPPER_CUTS, pictures.HopperCut(2, 64)]


def starts_of(sizes: list[int]) -> Tensor:
    return torch.tensor([0, *torch.tensor(sizes).cumsum(0).tolist()], dtype=torch.int32)


def attend_in_pictures(merged: Tensor, sizes: list[int], cut: pictures.HopperCut) -> Tensor:
    """(T, heads, dim), by the kernel for Hopper; (T, 3 * heads, dim) are given."""
    query, key, value = torch.split(merged, merged.shape[1] // 3, dim=1)
    return kernel("pictures_hopper").attend(  # type: ignore[no-any-return]
        query, key, value, starts_of(sizes).to(DEVICE), max(sizes), 0.1, **asdict(cut)
    )


@needs_hopper
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("cut", HOPPER_CUTS, ids=str)
@pytest.mark.parametrize(("heads", "dim"), [(3, 64), (4, 72), (16, 80), (2, 96), (1, 128)])
def test_attention_in_pictures_on_hopper(
    heads: int, dim: int, cut: pictures.HopperCut, dtype: torch.dtype
) -> None:
    """Of all sizes around tiles and groups; what lies behind the last picture is not a number."""
    sizes = [4, 64, 0, 1564, 1, 576, 63, 65, 127, 128, 129, 191, 192, 193, 2500, 0]
    num = sum(sizes)
    merged = drawn(num + 37, 3 * heads, dim, dtype=dtype)
    merged[num:] = float("nan")
    query, key, value = (
        x[:num].float().double() for x in on_cpu(*torch.split(merged, heads, dim=1))
    )

    expected = pictures.attend(query, key, value, starts_of(sizes), max(sizes), 0.1)
    actual = attend_in_pictures(merged, sizes, cut)

    assert actual.is_contiguous()
    assert (expected - actual[:num].double().cpu()).abs().max().item() < 0.02
    assert torch.equal(actual[:num], attend_in_pictures(merged, sizes, cut)[:num])


@needs_hopper
@pytest.mark.parametrize("cut", [*HOPPER_CUTS, pictures.WINDOW_CUT], ids=str)
@pytest.mark.parametrize(("heads", "dim"), [(4, 64), (16, 80), (2, 96), (1, 128)])
def test_attention_in_pictures_gives_fp8(
    heads: int, dim: int, cut: pictures.Cut | pictures.HopperCut
) -> None:
    """Each column times its factor, and nothing behind the last picture."""
    lens = [64, 1, 200, 129, 576, 0]
    merged = drawn(sum(lens) + 30, 3 * heads, dim, dtype=torch.bfloat16)
    q, k, v = torch.split(merged, heads, dim=1)
    starts = starts_of(lens).to(DEVICE)
    factors = torch.logspace(0, 2, heads * dim, device=DEVICE)
    call = q, k, v, starts, max(lens), dim**-0.5, cut

    actual = pictures.attend(*call, factors)

    assert quantised.FP8 == actual.dtype
    plain = pictures.attend(*call)[: sum(lens)].float() * factors.view(heads, dim)
    expected = plain.clamp(-quantised.MOST, quantised.MOST)
    torch.testing.assert_close(
        actual[: sum(lens)].float(), expected, rtol=1 / 16 + 1 / 128, atol=0.02
    )
    assert torch.equal(
        actual[: sum(lens)].view(torch.uint8),
        pictures.attend(*call, factors)[: sum(lens)].view(torch.uint8),
    )


@needs_hopper
@pytest.mark.parametrize("cut", HOPPER_CUTS, ids=str)
@pytest.mark.parametrize("dim", [72, 80, 128])
def test_pictures_on_hopper_know_nothing_of_each_other(dim: int, cut: pictures.HopperCut) -> None:
    """Of many, whose heads share programs, each is to the last bit what it is alone."""
    sizes = [300, 41, 515] * 40
    merged = drawn(sum(sizes), 3 * 16, dim, dtype=torch.bfloat16)
    merged[300:341] = float("nan")

    together = torch.split(attend_in_pictures(merged, sizes, cut), sizes)
    alone = [attend_in_pictures(x, [len(x)], cut) for x in torch.split(merged, sizes)]

    assert together[1].isnan().all()
    assert all(torch.equal(*pair) for pair in zip(together[2:], alone[2:], strict=True))
    assert torch.equal(together[0], alone[0])
    assert all(x.isfinite().all() for x in (together[0], *together[2:]))


@needs_hopper
@pytest.mark.parametrize("cut", HOPPER_CUTS, ids=str)
def test_pictures_on_hopper_in_a_graph_read_changed_starts(cut: pictures.HopperCut) -> None:
    attend = kernel("pictures_hopper").attend
    merged = drawn(700, 3 * 16, 80, dtype=torch.bfloat16)
    query, key, value = torch.split(merged, 16, dim=1)
    starts = starts_of([100, 70, 333, 64]).to(DEVICE)

    def run() -> Tensor:
        return attend(query, key, value, starts, 512, 0.1, **asdict(cut))  # type: ignore[no-any-return]

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for sizes in ([300, 10, 0, 390], [1, 0, 512, 64]):
        starts.copy_(starts_of(sizes))
        graph.replay()

        num = sum(sizes)
        q, k, v = (x[:num].float().cpu() for x in (query, key, value))
        expected = pictures.attend(q, k, v, starts.cpu(), 512, 0.1)
        assert torch.equal(run()[:num], captured[:num])
        assert (expected - captured[:num].float().cpu()).abs().max().item() < 0.02


@needs_hopper
@pytest.mark.parametrize(
    ("heads", "dim", "patches"), [(16, 80, 1564), (16, 72, 729), (16, 64, 577)]
)
def test_hopper_has_a_kernel_of_its_own(heads: int, dim: int, patches: int) -> None:
    calls = ((32_768 // patches, patches),)
    choice = pictures.choose(torch.device("cuda"), torch.bfloat16, heads, dim, calls)
    print(heads, dim, patches, choice)

    assert isinstance(choice.own, pictures.HopperCut)


@needs_hopper
def test_without_a_stopwatch_a_choice_is_always_the_same() -> None:
    with timing.choosing(by_time=False):
        choice = pictures.choose(torch.device("cuda"), torch.bfloat16, 16, 80)
        linear = as_linear(drawn(5120, 1280, dtype=torch.bfloat16))

        assert pictures.take((*pictures.HOPPER_CUTS, pictures.WINDOW_CUT)) == choice
        assert in_one.NEVER == activated.choose(linear, "quick_gelu")


# Tokens of a call, and rows with what came before them, at and around tiles and groups.
PROMPTS = [
    *((1, 1), (5, 5), (64, 64), (65, 65), (127, 127), (128, 128), (129, 129), (300, 300), (0, 0)),
    *((1, 77), (64, 200), (100, 1000), (63, 500), (700, 701), (0, 9), (200, 263), (257, 2000)),
]


@dataclass(frozen=True, slots=True)
class Slabs:
    """Queries, rows and where they lie, on the device."""

    query: Tensor
    keys: Tensor
    values: Tensor
    query_starts: Tensor
    slab_starts: Tensor
    lens: Tensor

    @classmethod
    def draw(
        cls,
        sizes: Sequence[tuple[int, int]],
        heads: int,
        kv_heads: int,
        dim: int,
        dtype: torch.dtype,
    ) -> "Slabs":
        """Slabs in any order; what lies between them and behind the last query is not a number."""
        num = sum(size for size, _ in sizes)
        merged = drawn(num + 37, heads + 2 * kv_heads, dim, dtype=dtype)
        merged[num:] = float("nan")
        starts, at = [0] * len(sizes), 3
        for index in random.Random(0).sample(range(len(sizes)), len(sizes)):
            starts[index], at = at, at + sizes[index][1] + 5
        keys, values = drawn(2, at + 300, kv_heads, dim, dtype=dtype, seed=1)
        is_free = torch.ones(len(keys), dtype=torch.bool, device=DEVICE)
        for start, (_, length) in zip(starts, sizes, strict=True):
            is_free[start : start + length] = False
        keys[is_free] = values[is_free] = float("nan")
        # As an engine has them: rows of one table, whose places are no multiples of anything.
        table = torch.tensor(
            [
                starts_of([size for size, _ in sizes]).tolist(),
                [*starts, 0],
                [*(n for _, n in sizes), 0],
            ],
            dtype=torch.int32,
            device=DEVICE,
        )
        return cls(merged[:, :heads], keys, values, table[0], table[1], table[2, :-1])

    def attend(self, most: int) -> Tensor:
        attend = kernel("prompts_hopper").attend
        return attend(*self, most, 0.1)  # type: ignore[no-any-return]

    def attend_plainly(self, most: int) -> Tensor:
        query, keys, values, query_starts, slab_starts, lens = on_cpu(*self)
        return prompts.attend(
            query.float(), keys.float(), values.float(), query_starts, slab_starts, lens, most, 0.1
        )

    def __iter__(self) -> Iterator[Tensor]:
        return (getattr(self, field.name) for field in fields(self))


@needs_hopper
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dim", prompts.DIMS)
@pytest.mark.parametrize(("heads", "kv_heads"), [(12, 2), (7, 1), (4, 4), (16, 8)])
def test_attention_of_prompts_on_hopper(
    heads: int, kv_heads: int, dim: int, dtype: torch.dtype
) -> None:
    slabs = Slabs.draw(PROMPTS, heads, kv_heads, dim, dtype)
    num = sum(size for size, _ in PROMPTS)

    expected = slabs.attend_plainly(700)
    actual = slabs.attend(1024)

    assert actual.is_contiguous()
    torch.testing.assert_close(actual[:num].float().cpu(), expected[:num], atol=0.02, rtol=0.02)
    assert torch.equal(actual[:num], slabs.attend(700)[:num])


@needs_hopper
@pytest.mark.parametrize("dim", prompts.DIMS)
def test_prompts_on_hopper_know_nothing_of_each_other(dim: int) -> None:
    """Of many, whose heads share programs, each is to the last bit what it is alone."""
    slabs = Slabs.draw(PROMPTS * 12, 12, 2, dim, torch.bfloat16)
    together = slabs.attend(700)

    for index in [*range(17), *range(190, 204)]:
        span = slice(*slabs.query_starts[index : index + 2].tolist())
        alone = replace(
            slabs,
            query=slabs.query[span],
            query_starts=slabs.query_starts[index : index + 2] - span.start,
            slab_starts=slabs.slab_starts[index : index + 1],
            lens=slabs.lens[index : index + 1],
        ).attend(700)
        assert torch.equal(alone, together[span])
        assert alone.isfinite().all()


@needs_hopper
@pytest.mark.parametrize("dim", prompts.DIMS)
def test_prompts_on_hopper_in_a_graph_read_changed_slabs(dim: int) -> None:
    slabs = Slabs.draw([(100, 100), (70, 70), (333, 340), (64, 64)], 12, 2, dim, torch.bfloat16)
    for rows in (slabs.query, slabs.keys, slabs.values):
        rows.nan_to_num_()
    slabs.attend(512)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = slabs.attend(512)
    for sizes, starts in (
        ([(300, 310), (10, 20), (0, 0), (157, 157)], [200, 3, 0, 530]),
        ([(0, 0), (512, 600), (1, 1), (54, 55)], [9, 20, 700, 0]),
    ):
        slabs.query_starts.copy_(starts_of([size for size, _ in sizes]))
        slabs.slab_starts[:-1] = torch.tensor(starts)
        slabs.lens.copy_(torch.tensor([length for _, length in sizes]))
        graph.replay()

        num = sum(size for size, _ in sizes)
        expected = slabs.attend_plainly(512)
        assert torch.equal(captured[:num], slabs.attend(512)[:num])
        torch.testing.assert_close(
            captured[:num].float().cpu(), expected[:num], atol=0.02, rtol=0.02
        )


@needs_hopper
def test_prompts_on_hopper_are_attended_to_by_a_kernel_of_its_own() -> None:
    device = torch.device("cuda")

    assert all(
        prompts.is_usable(device, dtype, dim)
        for dtype in (torch.bfloat16, torch.float16)
        for dim in prompts.DIMS
    )
    assert not prompts.is_usable(device, torch.bfloat16, 80)
    assert not prompts.is_usable(device, torch.float32, 128)


@pytest.mark.skipif(IS_INTERPRETED, reason="speed is a device's")
def test_a_choice_of_split_products_is_made_for_each_shape(
    caplog: pytest.LogCaptureFixture,
) -> None:
    for depth, width in ((8960, 1536), (1536, 1536), (11_008, 4096), (4096, 4096)):
        linear = nn.Linear(depth, width, bias=False, dtype=torch.bfloat16, device=DEVICE)
        for kind in (linear, quantised.Fp8Linear(linear)):
            for gives_fp8 in (False, True):
                span = split.choose(kind, gives_fp8=gives_fp8)
                print(type(kind).__name__, depth, width, gives_fp8, span)

                assert span == split.NEVER or span.has(span.most)
        assert split.NEVER == split.choose(linear.float(), gives_fp8=False)
    assert "unusable" not in caplog.text


@pytest.mark.skipif(IS_INTERPRETED, reason="speed is a device's")
def test_a_choice_of_kernels_is_made_once() -> None:
    device = torch.device("cuda")
    choice = pictures.choose(device, torch.bfloat16, 16, 80)
    print(choice)

    assert choice is pictures.choose(device, torch.bfloat16, 16, 80)
    assert choice.own is not None or not choice.beats_dense
    assert pictures.Choice() == pictures.choose(device, torch.bfloat16, 2, 16)  # not among DIMS


@needs_hopper
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("activation", get_args(activated.Activation))
def test_activated_products(
    activation: activated.Activation, has_bias: bool, dtype: torch.dtype
) -> None:
    """At widths that tiles do not divide, as a product in float32 activates them."""
    for width, depth in ((6848, 1280), (4320, 1152), (96, 40)):
        weight = (drawn(width, depth, seed=1) * depth**-0.5).to(dtype)
        bias = drawn(width, dtype=dtype, seed=2) if has_bias else None
        for num_rows in (0, 1, 129, 3001):
            x = drawn(num_rows, depth, dtype=dtype)
            linear = as_linear(weight, bias)
            actual = activated.multiply(x, linear, activation, least_rows=0)

            assert (num_rows, width // (1 + (activation == "silu_mul"))) == actual.shape
            assert actual.is_contiguous()
            if num_rows:
                exact = as_linear(weight.float(), None if bias is None else bias.float())
                expected = activated.multiply(x.float(), exact, activation)
                assert_near(expected.to(dtype), actual)
                again = activated.multiply(x, linear, activation, least_rows=0)
                assert torch.equal(actual, again)


@needs_hopper
@pytest.mark.parametrize("activation", get_args(activated.Activation))
def test_activated_products_know_nothing_of_what_lies_behind(
    activation: activated.Activation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows behind the last one are neither read nor written, and one row's NaN is its own."""
    weight, bias = (drawn(*shape, dtype=torch.bfloat16) for shape in ((5120, 1280), (5120,)))
    x = drawn(3, 500, 1280, dtype=torch.bfloat16)
    x[1, 7] = float("nan")
    width = 2560 if activation == "silu_mul" else 5120
    whole = torch.full((1700, width), 7.0, dtype=torch.bfloat16, device=DEVICE)
    rows = torch.cat([x.flatten(0, 1), x.new_full((200, 1280), float("nan"))])[:1500]

    expected = activated.multiply(x, as_linear(weight, bias), activation, least_rows=0)
    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "new_empty", lambda _self, shape: whole[: shape[0]])
        kind = get_args(activated.Activation).index(activation)
        actual = kernel("in_one").multiply_and_activate(rows, weight, bias, kind)

    assert (3, 500, width) == expected.shape
    assert torch.equal(whole[1500:], torch.full_like(whole[1500:], 7.0))
    assert [507] == actual.isnan().any(dim=1).nonzero().flatten().tolist()
    assert torch.equal(expected.flatten(0, 1).nan_to_num(), actual.nan_to_num())


@needs_hopper
@pytest.mark.parametrize("activation", get_args(activated.Activation))
def test_activated_products_in_a_graph(activation: activated.Activation) -> None:
    linear = as_linear(drawn(5120, 1280, dtype=torch.bfloat16) * 0.03)
    x = drawn(3001, 1280, dtype=torch.bfloat16)

    def run() -> Tensor:
        return activated.multiply(x, linear, activation, least_rows=0)

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for seed in (1, 2):
        x.copy_(drawn(3001, 1280, dtype=torch.bfloat16, seed=seed))
        graph.replay()

        assert torch.equal(run(), captured)


# Heads, those that are rotated, numbers in a head, depth; tiles are of 128 rows and 256 columns.
ROTATED = [
    (48, 32, 80, 1280),
    (48, 32, 64, 1024),
    (20, 16, 128, 1536),
    (6, 4, 24, 40),
    (6, 6, 8, 64),
]


@needs_hopper
@pytest.mark.parametrize(
    ("dtype", "angle_dtype"),  # each pair of both is compiled anew
    [(torch.bfloat16, torch.float32), (torch.float16, torch.bfloat16)],
)
@pytest.mark.parametrize(("heads", "num_rotated", "dim", "depth"), ROTATED)
def test_rotated_products(
    heads: int,
    num_rotated: int,
    dim: int,
    depth: int,
    angle_dtype: torch.dtype,
    dtype: torch.dtype,
) -> None:
    """As a product in float32 and a rotation, with and without a bias."""
    width = heads * dim
    weight = (drawn(width, depth, seed=1) * depth**-0.5).to(dtype)
    for num_rows in (0, 1, 129, 3001):
        x = drawn(num_rows, depth, dtype=dtype)
        of_heads = (*draw_angles(num_rows, dim, angle_dtype), dim, num_rotated)
        for bias in (None, drawn(width, dtype=dtype, seed=2)):
            linear = as_linear(weight, bias)
            actual = rotated.multiply(x, linear, *of_heads, 0)

            assert (num_rows, width) == actual.shape
            assert actual.is_contiguous()
            if num_rows:
                exact = as_linear(weight.float(), None if bias is None else bias.float())
                assert_near(rotated.multiply(x.float(), exact, *of_heads).to(dtype), actual)
                assert torch.equal(actual, rotated.multiply(x, linear, *of_heads, 0))


def draw_angles(num: int, dim: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Cosines and sines, (num, dim) each: twice over, as transformers has them."""
    angles = drawn(num, dim // 2, seed=3).repeat(1, 2) * 9
    return angles.cos().to(dtype), angles.sin().to(dtype)


@needs_hopper
def test_rotated_products_know_nothing_of_what_lies_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows and angles behind the last row are neither read nor written, and a row's NaN is its own."""
    linear = as_linear(*(drawn(*s, dtype=torch.bfloat16) for s in ((3840, 1280), (3840,))))
    rows = torch.full((1700, 1280), float("nan"), dtype=torch.bfloat16, device=DEVICE)
    rows[:1500] = drawn(1500, 1280, dtype=torch.bfloat16)
    rows[507] = float("nan")
    x = rows[:1500]
    angles = torch.full((1700, 80), float("nan"), device=DEVICE)
    angles[:1500] = drawn(1500, 80, seed=3)
    of_heads = angles.cos()[:1500], angles.sin()[:1500], 80, 32
    whole = torch.full((1700, 3840), 7.0, dtype=torch.bfloat16, device=DEVICE)

    expected = rotated.multiply(x, linear, *of_heads, 0)
    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "new_empty", lambda _self, shape, **_: whole[: shape[0]])
        actual = rotated.multiply(x, linear, *of_heads, 0)

    assert torch.equal(whole[1500:], torch.full_like(whole[1500:], 7.0))
    assert [507] == actual.isnan().any(dim=1).nonzero().flatten().tolist()
    assert torch.equal(expected.nan_to_num(), actual.nan_to_num())


@needs_hopper
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize(("heads", "num_rotated", "dim", "depth"), ROTATED[:3])
def test_rotated_products_in_fp8(
    heads: int, num_rotated: int, dim: int, depth: int, has_bias: bool
) -> None:
    """As torch's product in fp8 and a rotation; sums in the tensor cores have some 14 bits."""
    width = heads * dim
    bias = drawn(width, dtype=torch.bfloat16, seed=2) if has_bias else None
    linear = as_linear((drawn(width, depth, seed=1) * depth**-0.5).bfloat16(), bias)
    small = quantised.Fp8Linear(linear)
    for num_rows in (1, 129, 3001):
        x = quantised.quantise(drawn(num_rows, depth, dtype=torch.bfloat16))
        of_heads = (*draw_angles(num_rows, dim), dim, num_rotated)
        actual = rotated.multiply(x, small, *of_heads, 0)
        exact = as_linear(small.rows.read(), None if bias is None else bias.float())
        expected = rotated.multiply(x.read(), exact, *of_heads)

        assert torch.bfloat16 == actual.dtype
        torch.testing.assert_close(actual.float(), expected, rtol=0.02, atol=0.02)
        assert torch.equal(actual, rotated.multiply(x, small, *of_heads, 0))


@needs_hopper
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("activation", get_args(activated.Activation))
def test_activated_products_in_fp8(activation: activated.Activation, has_bias: bool) -> None:
    """As near to exact ones as fp8 is, as is a result whose scales are by its largest numbers."""
    for width, depth in ((5120, 1280), (4320, 1152), (96, 48)):
        bias = drawn(width, dtype=torch.bfloat16, seed=2) if has_bias else None
        small = quantised.Fp8Linear(
            as_linear((drawn(width, depth, seed=1) * depth**-0.5).bfloat16(), bias)
        )
        bound = activated.find_bound(small, activation)
        exact = as_linear(small.rows.read(), None if bias is None else bias.float())
        for num_rows in (1, 129, 3001):
            x = quantised.quantise(drawn(num_rows, depth, dtype=torch.bfloat16))
            args = x, small, activation, bound
            actual, apart = (activated.multiply_in_fp8(*args, rows) for rows in (0, in_one.NEVER))
            expected = activated.multiply(x.read(), exact, activation)

            assert apart.values.shape == actual.values.shape
            assert apart.scales.shape == actual.scales.shape
            for found in (actual, apart):
                assert (found.read() - expected).norm() < 0.05 * expected.norm()
            again = activated.multiply_in_fp8(*args, 0)
            assert torch.equal(actual.read(), again.read())


@needs_hopper
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("has_bias", [True, False])
def test_added_products(has_bias: bool, dtype: torch.dtype) -> None:
    """At widths that tiles do not divide."""
    for width, depth in ((1280, 5120), (1152, 4304), (48, 40)):
        weight = (drawn(width, depth, seed=1) * depth**-0.5).to(dtype)
        bias = drawn(width, dtype=dtype, seed=2) if has_bias else None
        linear = as_linear(weight, bias)
        exact = as_linear(weight.float(), None if bias is None else bias.float())
        for num_rows in (0, 1, 129, 3001):
            inner, x = drawn(1, num_rows, depth, dtype=dtype), drawn(1, num_rows, width, seed=4)
            x = x.to(dtype)
            before = x.clone()
            actual = added.multiply(inner, linear, x)

            assert x.shape == actual.shape
            assert torch.equal(before, x)
            if num_rows:
                assert_near((x.float() + exact(inner.float())).to(dtype), actual)
                assert torch.equal(actual, added.multiply(inner, linear, x))


@needs_hopper
def test_added_products_take_a_bias_from_any_address() -> None:
    """Also right after one whose address is a multiple of more: it is read in fewer pieces."""
    weight = drawn(1280, 640, dtype=torch.bfloat16, seed=1) * 0.04
    biases = drawn(1281, dtype=torch.bfloat16, seed=2)
    inner, x = (drawn(1, 300, width, dtype=torch.bfloat16) for width in (640, 1280))
    for bias in (biases[:-1], biases[1:], biases[:-1]):
        exact = as_linear(weight.float(), bias.float())(inner.float())
        actual = added.multiply(inner, as_linear(weight, bias), x)

        assert_near((x.float() + exact).bfloat16(), actual)


@needs_hopper
@pytest.mark.parametrize("in_fp8", [False, True])
def test_added_products_know_nothing_of_what_lies_behind(
    in_fp8: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows behind the last row are neither read nor written, and a row's NaN is its own."""
    linear = as_linear(*(drawn(*s, dtype=torch.bfloat16) for s in ((1152, 1280), (1152,))))
    rows, stream = (
        torch.full((1700, width), float("nan"), dtype=torch.bfloat16, device=DEVICE)
        for width in (1280, 1152)
    )
    rows[:1500] = drawn(1500, 1280, dtype=torch.bfloat16, seed=1)
    stream[:1500] = drawn(1500, 1152, dtype=torch.bfloat16, seed=2)
    stream[507] = float("nan")
    product = quantised.Fp8Linear(linear) if in_fp8 else linear
    whole = torch.full((1700, 1152), 7.0, dtype=torch.bfloat16, device=DEVICE)

    expected = added.multiply(rows[:1500], product, stream[:1500])
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty_like", lambda x: whole[: len(x)])
        actual = added.multiply(rows[:1500], product, stream[:1500])

    assert torch.equal(whole[1500:], torch.full_like(whole[1500:], 7.0))
    assert [507] == actual.isnan().any(dim=1).nonzero().flatten().tolist()
    assert torch.equal(expected.nan_to_num(), actual.nan_to_num())


@needs_hopper
def test_activated_products_in_fp8_know_nothing_of_what_lies_behind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As others; results are in fp8, whose tiles are half as wide in memory."""
    small = quantised.Fp8Linear(
        as_linear(*(drawn(*s, dtype=torch.bfloat16) for s in ((4304, 1280), (4304,))))
    )
    rows = drawn(1500, 1280, dtype=torch.bfloat16, seed=1)
    rows[507] = float("nan")
    x, whole = quantised.quantise(rows), torch.full((1700, 4304), 7, dtype=torch.uint8).to(DEVICE)
    bound = activated.find_bound(small, "gelu_tanh")

    def run() -> Tensor:
        return activated.multiply_in_fp8(x, small, "gelu_tanh", bound, 0).values

    expected = run()
    with monkeypatch.context() as patch:
        patch.setattr(
            Tensor,
            "new_empty",
            lambda _self, shape, dtype: whole[: shape[0]].view(dtype),
        )
        actual = run()

    assert torch.equal(whole[1500:], torch.full_like(whole[1500:], 7))
    assert torch.equal(expected.view(torch.uint8), actual.view(torch.uint8))
    others = torch.arange(1500, device=DEVICE) != 507
    assert actual[507].float().isnan().all()
    assert actual.float()[others].isfinite().all()


@needs_hopper
@pytest.mark.parametrize("has_bias", [True, False])
def test_added_products_in_fp8(has_bias: bool) -> None:
    for width, depth in ((1280, 5120), (1152, 4320), (96, 48)):
        bias = drawn(width, dtype=torch.bfloat16, seed=2) if has_bias else None
        linear = as_linear((drawn(width, depth, seed=1) * depth**-0.5).bfloat16(), bias)
        small = quantised.Fp8Linear(linear)
        exact = as_linear(small.rows.read(), None if bias is None else bias.float())
        for num_rows in (1, 129, 3001):
            inner = drawn(num_rows, depth, dtype=torch.bfloat16)
            rows = quantised.quantise(inner)
            x = drawn(num_rows, width, seed=4, dtype=torch.bfloat16)
            actual = added.multiply(rows, small, x)

            expected = x.float() + exact(rows.read())
            torch.testing.assert_close(actual.float(), expected, rtol=0.02, atol=0.02)
            assert torch.equal(actual, added.multiply(inner, small, x))


# Of the product behind a norm: what it does, and its width; the norm is 1280 or 1536 wide.
FOLDED = [
    (folded.Behind("quick_gelu"), 5120),
    (folded.Behind("gelu_tanh"), 4304),
    (folded.Behind("silu_mul"), 6848),
    (folded.Behind(dim=80, num_heads=32), 3840),
    (folded.Behind(), 2048),
]


def run_folded(
    product: folded.Folded,
    summed: folded.Summed,
    behind: folded.Behind,
    angles: tuple[Tensor, Tensor],
) -> Tensor:
    if behind.num_heads:
        return product.rotate(summed, *angles, behind.dim, behind.num_heads)
    if behind.activation is not None:
        return product.activate(summed, behind.activation)
    found: Tensor = product(summed)
    return found


@needs_hopper
@pytest.mark.parametrize("is_rms", [True, False])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize(("behind", "width"), FOLDED)
def test_folded_norms(behind: folded.Behind, width: int, has_bias: bool, is_rms: bool) -> None:
    """Two products and the norm between them are near the same in float32, by the plain forms."""
    for depth, inner_width in ((1280, 5120), (1536, 1536)):
        first = as_linear(
            (drawn(depth, inner_width, seed=1) * inner_width**-0.5).bfloat16(),
            drawn(depth, seed=2, dtype=torch.bfloat16) if has_bias else None,
        )
        second = as_linear(
            (drawn(width, depth, seed=3) * depth**-0.5).bfloat16(),
            drawn(width, seed=4, dtype=torch.bfloat16) if has_bias else None,
        )
        product = folded.Folded(second, 1e-6, is_rms=is_rms)
        exact = folded.Folded(
            as_linear(*(x.float().cpu() for x in second.parameters())), 1e-6, is_rms=is_rms
        )
        for num_rows in (1, 129, 3001):
            inner = drawn(num_rows, inner_width, dtype=torch.bfloat16)
            # Rows of other sizes, and whose mean is not zero.
            x = (
                drawn(num_rows, depth, seed=5)
                * torch.arange(1, num_rows + 1, device=DEVICE)[:, None]
            )
            x = (x % 50 + 3).bfloat16()
            summed = folded.multiply_and_sum_up(inner, first, x)
            angles = draw_angles(num_rows, behind.dim or 8)
            actual = run_folded(product, summed, behind, angles)

            assert torch.equal(added.multiply(inner, first, x), summed.x)
            parts = F.pad(summed.x.float(), (0, -depth % 256)).view(num_rows, -1, 256)
            for found, expected in zip(
                summed.totals, (parts.sum(-1), parts.square().sum(-1)), strict=True
            ):
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-2)
            rows = summed.x.float().cpu()
            whole = folded.Summed(rows, torch.stack([rows.sum(1), rows.square().sum(1)])[..., None])
            wanted = run_folded(exact, whole, behind, (angles[0].cpu(), angles[1].cpu()))
            torch.testing.assert_close(actual.float().cpu(), wanted, rtol=0.02, atol=0.02)
            assert torch.equal(actual, run_folded(product, summed, behind, angles))


@needs_hopper
@pytest.mark.parametrize(("behind", "width"), FOLDED)
def test_a_choice_of_folded_norms_is_made_for_each_shape(
    behind: folded.Behind, width: int, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = (
        nn.Linear(*widths, dtype=torch.bfloat16, device=DEVICE)
        for widths in ((5120, 1280), (1280, width))
    )
    for is_rms in (True, False):
        usual = in_one.NEVER
        least_rows = folded.choose(first, second, behind, is_rms=is_rms, least_added=usual)
        print(behind, is_rms, least_rows)

        assert least_rows in (*in_one.ROWS, in_one.NEVER)
    assert "unusable" not in caplog.text


@needs_hopper
def test_a_choice_of_added_products_is_made_for_each_shape(
    caplog: pytest.LogCaptureFixture,
) -> None:
    for width, depth in ((1280, 1280), (1280, 5120), (1536, 8960)):
        linear = nn.Linear(depth, width, dtype=torch.bfloat16, device=DEVICE)
        for kind in (linear, quantised.Fp8Linear(linear)):
            for gives_fp8 in (False, True):
                least_rows = added.choose(kind, is_rms=False, gives_fp8=gives_fp8)
                print(type(kind).__name__, width, depth, gives_fp8, least_rows)

                assert least_rows in (*in_one.ROWS, in_one.NEVER)
    assert "unusable" not in caplog.text


@needs_hopper
def test_a_choice_of_rotated_products_is_made_for_each_shape(
    caplog: pytest.LogCaptureFixture,
) -> None:
    linear = nn.Linear(1280, 3840, dtype=torch.bfloat16, device=DEVICE)
    for kind in (linear, quantised.Fp8Linear(linear)):
        least_rows = rotated.choose(kind, 80, 32)
        print(type(kind).__name__, least_rows)

        assert least_rows in (*in_one.ROWS, in_one.NEVER)
    assert in_one.NEVER == rotated.choose(nn.Linear(1280, 3840, device=DEVICE), 80, 32)
    narrow = nn.Linear(36, 36, dtype=torch.bfloat16, device=DEVICE)
    assert in_one.NEVER == rotated.choose(narrow, 6, 4)
    assert "unusable" not in caplog.text


@needs_hopper
def test_a_choice_of_activated_products_is_made_for_each_shape(
    caplog: pytest.LogCaptureFixture,
) -> None:
    for activation in get_args(activated.Activation):
        linear = nn.Linear(1536, 17_920, bias=False, dtype=torch.bfloat16, device=DEVICE)
        least_rows = activated.choose(linear, activation)
        in_fp8 = activated.choose(quantised.Fp8Linear(linear), activation)
        print(activation, least_rows, in_fp8)

        assert least_rows in in_one.ROWS
        assert in_fp8 in (*in_one.ROWS, in_one.NEVER)
        assert in_one.NEVER == activated.choose(nn.Linear(1536, 64, device=DEVICE), activation)
        narrow = nn.Linear(36, 36, dtype=torch.bfloat16, device=DEVICE)
        assert in_one.NEVER == activated.choose(narrow, activation)
    assert "unusable" not in caplog.text


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [7, 4096, 5000, 151_936])
def test_argmax(vocab: int, dtype: torch.dtype) -> None:
    logits = drawn(9, vocab, dtype=dtype)
    logits[1] = -float("inf")
    logits[2, vocab // 2] = float("nan")
    logits[3, 5] = logits[3, 3] = 100.0  # the lower of two
    logits[4, vocab - 1] = 100.0
    logits[5, 0] = float("inf")
    logits[6] = 0.0
    logits[7, : vocab - 1] = -float("inf")

    expected = greedy.argmax(*on_cpu(logits))
    actual = kernel("greedy").argmax(logits)

    assert expected.tolist() == actual.tolist()
    assert [-1, -1, 3, vocab - 1, -1, 0, vocab - 1] == actual.tolist()[1:8]
    assert (
        greedy.argmax(*on_cpu(logits[:, :5])).tolist()
        == kernel("greedy").argmax(logits[:, :5]).tolist()
    )


# What rows are drawn with: (temperature, top_k, top_p, min_p).
KINDS = [
    (0.0, 0, 1.0, 0.0),
    (1.0, 0, 1.0, 0.0),
    (0.7, 20, 0.8, 0.0),
    (1.0, 0, 0.95, 0.0),
    (1.5, 0, 1.0, 0.05),
    (0.7, 1, 1.0, 0.0),
    (1.0, 0, 1e-9, 0.0),
    (5.0, 700, 0.999, 1e-6),
    (1e-3, 0, 1.0, 0.0),
    (2.0, 10**12, 0.9, 0.001),
    (1.0, 2, 1.0, 1.0),
    (0.3, 0, 0.5, 0.2),
    (2.0, 0, 1 - 1e-12, 0.0),
]


def table_of(num: int, seed: int) -> Tensor:
    rng = random.Random(seed)
    rows = [
        draw.numbers(
            rng.randrange(1 << 63),
            i % 3,
            temperature=kind[0],
            top_k=kind[1],
            top_p=kind[2],
            min_p=kind[3],
        )
        for i, kind in ((i, KINDS[i % len(KINDS)]) for i in range(num))
    ]
    return torch.from_numpy(draw.table(rows, [rng.randrange(1000) for _ in rows], num))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [50, 1003] if IS_INTERPRETED else [1, 50, 1003, 32_000, 151_936])
@pytest.mark.parametrize("scale", [0.0, 1.0, 4.0])
def test_draw(vocab: int, dtype: torch.dtype, scale: float) -> None:
    """
    Nearly flat logits keep more ids than a program sees first, high ones a few.

    A number may fall where the last places of an exponential decide: once in some ten thousand draws.
    """
    num = (2 if IS_INTERPRETED else 4) * len(KINDS)
    logits = scale * drawn(num, vocab, dtype=dtype)
    logits[14, :: 2 if vocab > 1 else 1] = -float("inf")
    logits[15] = -float("inf")
    logits[16, vocab // 2] = float("nan")
    logits[17, vocab - 1] = float("inf")
    logits[18:31] = logits[18:31].round()
    table = table_of(num, vocab)

    expected = draw.draw(*on_cpu(logits, table))
    actual = kernel("draw").draw(logits, table.to(DEVICE)).cpu()

    assert [-1, -1, -1] == actual[15:18].tolist()
    assert (expected != actual).sum().item() <= (1 if vocab > 1003 else 0)
    part = logits[:, : max(1, vocab - 3)]
    apart = draw.draw(*on_cpu(part, table)) != kernel("draw").draw(part, table.to(DEVICE)).cpu()
    assert apart.sum().item() <= (1 if vocab > 1003 else 0)


@pytest.mark.skipif(IS_INTERPRETED, reason="many rows")
@pytest.mark.parametrize("kind", [k for k in KINDS if k[0] > 0 and k[1] != 1])
def test_draws_are_as_frequent_as_the_definition_says(
    kind: tuple[float, int, float, float],
) -> None:
    """20,000 draws from one row of more ids than a program sees first, by quarters of what is kept."""
    num, vocab = 20_000, 5000
    line = drawn(1, vocab, dtype=torch.bfloat16)
    temperature, top_k, top_p, min_p = kind
    rows = [
        draw.numbers(seed, 0, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
        for seed in range(num)
    ]
    table = torch.from_numpy(draw.table(rows, [0] * num, num)).to(DEVICE)

    ids = kernel("draw").draw(line.expand(num, -1), table).cpu()

    expected = draw.plain_draw(line.expand(500, -1).cpu(), table[:, :500].cpu().contiguous())
    assert (expected == ids[:500]).float().mean().item() > 0.99
    logits = line.double().cpu()[0]
    weights = torch.exp((logits - logits.max()) / temperature)
    weights[weights < min_p] = 0
    order = logits.sort(descending=True, stable=True).indices
    weights[order[top_k or vocab :]] = 0
    before = weights[order].cumsum(0) - weights[order]
    weights[order[before >= top_p * weights.sum()]] = 0
    assert weights[ids].min().item() > 0
    cells = (weights.cumsum(0) / weights.sum() * 4).long().clamp(max=3)
    counts = torch.bincount(cells[ids], minlength=4).double()
    wanted = torch.zeros(4, dtype=torch.float64).index_add_(0, cells, weights)
    wanted = wanted / weights.sum() * num
    spread = ((counts - wanted) ** 2 / wanted.clamp(min=1e-9))[wanted > 5].sum().item()
    assert spread < 25  # of three degrees: once in some 50,000


@pytest.mark.skipif(IS_INTERPRETED, reason="graphs")
def test_draw_in_a_graph_goes_on_with_its_table() -> None:
    logits = drawn(26, 32_000, dtype=torch.bfloat16)
    table = table_of(26, 1).to(DEVICE)
    kernel("draw").draw(logits, table)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = kernel("draw").draw(logits, table)
    seen = []
    for _ in range(3):
        table[draw.AT] += 1
        graph.replay()
        assert torch.equal(kernel("draw").draw(logits, table), replayed)
        seen.append(tuple(replayed.tolist()))
    assert 3 == len(set(seen))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_pixels", "width"), [(588, 592), (1176, 1184), (12, 12)])
def test_centre(num_pixels: int, width: int, dtype: torch.dtype) -> None:
    patches = torch.randint(0, 256, (33, num_pixels), dtype=torch.uint8)

    expected = F.pad(patches.to(dtype) - 128, (0, width - num_pixels))
    actual = kernel("pixels").centre(patches.to(DEVICE), 128, width, dtype)

    assert torch.equal(expected, actual.cpu())


def assert_near_rows(expected: quantised.Fp8Rows, actual: tuple[Tensor, Tensor]) -> None:
    """As numbers, within one step of fp8 and of a type of 16 bits before it."""
    values, scales = actual
    assert expected.values.shape == values.shape
    assert expected.scales.shape == scales.shape
    if IS_INTERPRETED:  # it loses the carry where rounding up reaches the next power of two
        is_near = (expected.values.float() - values.float()).abs() <= values.float().abs() * 0.15
        assert is_near.float().mean().item() > 0.9
        assert_near(expected.scales, scales, torch.float16)
        return
    wide = [(v.float().flatten(0, -2) * s).double().cpu() for v, s in (expected, (values, scales))]
    allowed = wide[0].abs() * 0.15 + expected.scales.double().cpu() * 2**-6
    apart = (wide[0] - wide[1]).abs() - allowed
    assert apart.max().item() <= 0, f"{apart.max().item()} beyond"
    # Most do not move at all: a step is what falls on the other side of a border.
    assert (wide[0] - wide[1]).norm() < 0.03 * wide[0].norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("width", WIDTHS)
def test_norms_in_fp8(width: int, dtype: torch.dtype) -> None:
    for num_rows in NUM_ROWS:
        x, delta = drawn(num_rows, width, dtype=dtype), drawn(num_rows, width, dtype=dtype, seed=2)
        weight, bias = drawn(width, dtype=dtype, seed=1), drawn(width, dtype=dtype, seed=3)
        x_copy, weight_copy, bias_copy = on_cpu(x, weight, bias)
        gpu = kernel("norms")

        assert_near_rows(
            quantised.rms_norm(x_copy, weight_copy, 1e-6), gpu.norm_in_fp8(x, weight, None, 1e-6)
        )
        assert_near_rows(
            quantised.layer_norm(x_copy, weight_copy, bias_copy, 1e-6),
            gpu.norm_in_fp8(x, weight, bias, 1e-6),
        )
        for shift in (None, bias):
            kept, (kept_copy,) = delta.clone(), on_cpu(delta)
            actual = gpu.add_norm_in_fp8_(kept, x, weight, shift, 1e-6)
            if shift is None:
                expected = quantised.add_rms_norm_(kept_copy, x_copy, weight_copy, 1e-6)
            else:
                expected = quantised.add_layer_norm_(
                    kept_copy, x_copy, weight_copy, bias_copy, 1e-6
                )
            assert_near_rows(expected, actual)
            assert_same_sum(kept_copy, kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("width", [48, 5120, 8960])
def test_activations_in_fp8(width: int, dtype: torch.dtype) -> None:
    for num_rows in NUM_ROWS:
        x = 3 * drawn(1, num_rows, 2 * width, dtype=dtype)
        x[0, 0] = 0.0
        gpu = kernel("quantised")

        assert_near_rows(quantised.quantise(*on_cpu(x)), gpu.quantise(x))
        assert_near_rows(quantised.silu_mul(*on_cpu(x)), gpu.silu_mul(x))
        assert_near_rows(quantised.quick_gelu(*on_cpu(x)), gpu.quick_gelu(x))


@pytest.mark.skipif(IS_INTERPRETED, reason="tensor cores")
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("num_rows", [1, 16, 77, 4096])
def test_products_in_fp8(num_rows: int, has_bias: bool) -> None:
    linear = torch.nn.Linear(1280, 3840, bias=has_bias).bfloat16()
    x = drawn(1, num_rows, 1280, dtype=torch.bfloat16)
    ours = quantised.Fp8Linear(linear)

    with torch.inference_mode():
        expected = ours(*on_cpu(x)).float()
        actual = ours.to(DEVICE)(x).cpu().float()

    assert expected.shape == actual.shape
    assert (expected - actual).norm() < 0.01 * expected.norm()
