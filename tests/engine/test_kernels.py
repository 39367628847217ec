"""
The plain twins say what their docstrings say; tests/gpu/test_kernels.py compares the kernels with
them.
"""

import copy
import math
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.qwen2_vl import modeling_qwen2_vl as qwen2_vl

from bench.leaks import read_heap
from engine import kernels
from engine.kernels import (
    activated,
    activations,
    added,
    attended,
    decode,
    draw,
    folded,
    greedy,
    in_one,
    norms,
    pictures,
    pixels,
    products,
    prompts,
    quantised,
    rope,
    rotated,
    split,
    timing,
    trials,
)
from engine.kernels.in_one import Product
from engine.kernels.quantised import Fp8Rows
from engine.request import SamplingParams
from engine.sampler import Sampler, SamplingRow, draw_numbers
from tests.engine.linears import as_linear


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


def test_a_cpu_has_no_kernels() -> None:
    assert not kernels.has_kernels(torch.empty(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_is_that_of_transformers(dtype: torch.dtype) -> None:
    theirs = qwen2_vl.Qwen2VLRMSNorm(48, eps=1e-5).to(dtype)
    theirs.weight.data = drawn(48, seed=1).to(dtype)
    x = drawn(2, 7, 48).to(dtype)

    assert torch.equal(theirs(x), norms.rms_norm(x, theirs.weight, 1e-5))


def test_norms_of_a_sum_keep_the_sum() -> None:
    x, delta, weight, bias = (
        drawn(7, 48),
        drawn(7, 48, seed=1),
        drawn(48, seed=2),
        drawn(48, seed=3),
    )
    for_rms, for_layer = delta.clone(), delta.clone()

    rms = norms.add_rms_norm_(for_rms, x, weight, 1e-6)
    layer = norms.add_layer_norm_(for_layer, x, weight, bias, 1e-6)

    assert torch.equal(x + delta, for_rms)
    assert torch.equal(x + delta, for_layer)
    assert torch.equal(norms.rms_norm(x + delta, weight, 1e-6), rms)
    assert torch.equal(F.layer_norm(x + delta, (48,), weight, bias, 1e-6), layer)


def test_silu_mul_takes_the_gates_first() -> None:
    gate, up = drawn(3, 5), drawn(3, 5, seed=1)

    assert torch.equal(F.silu(gate) * up, activations.silu_mul(torch.cat([gate, up], dim=-1)))


def test_quick_gelu_writes_over_its_input() -> None:
    x = drawn(3, 5)
    expected = x * torch.sigmoid(1.702 * x)

    returned = activations.quick_gelu_(x)

    assert returned is x
    assert torch.equal(expected, x)


@pytest.mark.parametrize(
    ("dtype", "rtol", "atol"), [(torch.float32, 1e-4, 1e-5), (torch.bfloat16, 0.01, 1e-3)]
)
@pytest.mark.parametrize(
    ("activation", "twin"),
    [
        ("none", lambda x: x),
        ("swish", F.silu),
        ("gelu", lambda x: F.gelu(x, approximate="tanh")),
    ],
)
def test_packed_products_are_those_of_a_linear(
    dtype: torch.dtype, rtol: float, atol: float, activation: str, twin: Any
) -> None:
    """Rounded once in 16 bits, where a Linear and what follows it would be twice."""
    linear = nn.Linear(320, 448).to(dtype)
    exact = copy.deepcopy(linear).float()
    packed = products.PackedLinear.find(linear, activation)
    shared = products.PackedLinear.find(linear, activation, is_shared=True)
    if packed is None or shared is None:
        pytest.skip("torch has no such products on this processor")
    for num_rows in (0, 1, 3, 50, 64, 65, 341):
        x = drawn(1, num_rows, 320).to(dtype)
        expected = twin(exact(x.float()))

        for product in (packed, shared):
            torch.testing.assert_close(product(x).float(), expected, rtol=rtol, atol=atol)


def test_few_rows_are_one_product_however_many() -> None:
    sizes: list[int] = []

    def call(rows: torch.Tensor) -> torch.Tensor:
        sizes.append(len(rows))
        return 2 * rows

    for num_rows in (1, 3, 24, 33, 64, 65, 300, 700):
        x = drawn(num_rows, 5)
        assert torch.equal(2 * x, products.by_blocks(call, x, 5))

    assert [1, 4, 24, 48, 64, *(64, 1), *(256, 48), *(256, 256, 64, 64, 64)] == sizes


def test_small_products_are_not_packed() -> None:
    assert products.PackedLinear.find(nn.Linear(256, 256)) is None


def test_packed_products_keep_little_of_the_numbers_of_rows_that_they_saw() -> None:
    """oneDNN keeps a kernel for each: over a megabyte."""
    packed = products.PackedLinear.find(nn.Linear(512, 768))
    if packed is None:
        pytest.skip("torch has no such products on this processor")
    x = drawn(1023, 512)
    for size in products.BLOCK_SIZES:
        packed(x[:size])
    before = read_heap()
    for num_rows in range(600, 700):
        packed(x[:num_rows])
    after = read_heap()
    if before is None or after is None:
        pytest.skip("no glibc, which could be asked")

    assert after.held_bytes - before.held_bytes < 20 << 20


def test_gelu_is_torchs_own() -> None:
    for shape in ((7, 40), (2, 7, 40), (1, 40)):
        x = drawn(*shape)

        torch.testing.assert_close(F.gelu(x), activations.gelu(x), rtol=1e-6, atol=1e-6)
        assert activations.gelu(x).is_contiguous()


def test_gelu_keeps_nothing_of_the_shapes_that_it_saw() -> None:
    """oneDNN keeps a kernel for each: 28 kB."""
    if read_heap() is None:
        pytest.skip("no glibc, which could be asked")
    x = drawn(300, 64)
    activations.gelu(x)
    before = read_heap()
    for num_rows in range(100, 300):
        activations.gelu(x[:num_rows])
    after = read_heap()

    assert before is not None
    assert after is not None
    assert after.held_bytes - before.held_bytes < 200_000


def test_rotation_is_that_of_transformers_for_text() -> None:
    merged, angles = drawn(11, 6, 16), drawn(11, 8, seed=1).repeat(1, 2)
    cos, sin = angles.cos(), angles.sin()
    query, key = merged[:, :4], merged[:, 4:]
    expected = [
        x[0].transpose(0, 1)
        for x in qwen2_vl.apply_rotary_pos_emb(
            query.transpose(0, 1)[None], key.transpose(0, 1)[None], cos[None], sin[None]
        )
    ]

    rope.rotate_(merged, cos[:, :8], sin[:, :8])

    assert torch.equal(torch.cat(expected, dim=1), merged)


def test_rotation_is_that_of_transformers_for_vision() -> None:
    heads, angles = drawn(11, 3, 20).bfloat16(), drawn(11, 10, seed=1).repeat(1, 2)
    cos, sin = angles.cos(), angles.sin()
    expected, _ = qwen2_vl.apply_rotary_pos_emb_vision(heads, heads, cos, sin)

    rope.rotate_(heads, cos, sin)

    assert torch.equal(expected, heads)


def test_rotation_in_pairs_is_that_of_halves_with_the_numbers_in_another_order() -> None:
    heads, angles = drawn(11, 5, 20), drawn(11, 10, seed=1)
    pairs = heads.view(11, 5, 2, 10).transpose(-1, -2).flatten(-2)
    merged = torch.cat([pairs, drawn(11, 2, 20, seed=2)], dim=1)

    rope.rotate_(heads, angles.cos(), angles.sin())
    rope.rotate_(merged[:, :5], angles.cos(), angles.sin(), in_pairs=True)

    assert torch.equal(heads, merged.view(11, 7, 10, 2)[:, :5].transpose(-1, -2).flatten(-2))
    assert torch.equal(drawn(11, 2, 20, seed=2), merged[:, 5:])


def test_storing_fills_the_rows_of_the_call_and_no_other() -> None:
    merged, angles = drawn(3, 4 + 2 * 2, 16), drawn(3, 8, seed=1)
    keys, values = torch.full((9, 2, 16), 7.0), torch.full((9, 2, 16), 7.0)
    rows = torch.tensor([8, 0, 4])
    turned = merged.clone()
    rope.rotate_(turned[:, :6], angles.cos(), angles.sin())

    rope.rotate_and_store_(merged, angles.cos(), angles.sin(), keys, values, rows)

    assert torch.equal(turned, merged)
    assert torch.equal(turned[:, 4:6], keys[rows])
    assert torch.equal(turned[:, 6:], values[rows])
    untouched = [1, 2, 3, 5, 6, 7]
    assert keys[untouched].eq(7).all()
    assert values[untouched].eq(7).all()


def test_the_table_holds_what_each_axis_turns() -> None:
    inv_freq = torch.tensor([1.0, 0.1, 0.01])
    cos, sin = rope.build_table(inv_freq, 50, 2.0)
    positions = torch.tensor([[3, 0], [40, 7], [5, 49]])

    found = rope.look_up(positions, torch.tensor([0, 2, 1]), cos, sin)

    angles = torch.tensor([[3.0, 0.5, 0.4], [0.0, 4.9, 0.07]])
    torch.testing.assert_close(2 * angles.cos(), found[0])
    torch.testing.assert_close(2 * angles.sin(), found[1])


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 2, 16), (6, 1, 64), (3, 3, 8)])
def test_decode_attention_reads_its_own_rows_alone(heads: int, kv_heads: int, dim: int) -> None:
    rng = random.Random(dim)
    lens = [1, 16, 0, 33, 100]
    starts = [16 + 112 * slot for slot in rng.sample(range(5), 5)]
    keys, values = torch.full((2, 640, kv_heads, dim), math.nan)  # rows of others
    for start, length in zip(starts, lens, strict=True):
        keys[start : start + length] = drawn(length, kv_heads, dim, seed=start)
        values[start : start + length] = drawn(length, kv_heads, dim, seed=start + 1)
    query = drawn(5, heads, dim)

    found = decode.attend(
        query, keys, values, torch.tensor(starts), torch.tensor(lens), 128, dim**-0.5
    )

    for index, (start, length) in enumerate(zip(starts, lens, strict=True)):
        if not length:
            assert found[index].eq(0).all()
            continue
        rows = slice(start, start + length)
        for head in range(heads):
            kv_head = head * kv_heads // heads
            scores = keys[rows, kv_head] @ query[index, head] * dim**-0.5
            expected = scores.softmax(0) @ values[rows, kv_head]
            torch.testing.assert_close(expected, found[index, head])


def test_patches_see_their_own_picture_alone() -> None:
    merged = drawn(4 + 1 + 9, 3 * 2, 16)
    query, key, value = torch.split(merged, 2, dim=1)
    starts = torch.tensor([0, 4, 5, 14], dtype=torch.int32)

    found = pictures.attend(query, key, value, starts, 9, 0.25)

    for start, end in ((0, 4), (4, 5), (5, 14)):
        for head in range(2):
            scores = query[start:end, head] @ key[start:end, head].T * 0.25
            expected = scores.softmax(-1) @ value[start:end, head]
            torch.testing.assert_close(expected, found[start:end, head])


def test_pictures_take_views_of_one_projection() -> None:
    query, key, value = torch.split(drawn(5, 3 * 2, 16), 2, dim=1)

    assert pictures.takes(query, key, value)
    assert pictures.takes(query.contiguous(), key, value)
    assert not pictures.takes(query, key.contiguous(), value)


WAYS: dict[pictures.Way, float] = {"varlen": 10.0, "dense": 7.0}


def test_kernel_that_is_faster_than_both_of_torchs_takes_equal_pictures_too() -> None:
    fast, wide, small = pictures.HopperCut(), pictures.HopperCut(3, 64), pictures.WINDOW_CUT

    choice = pictures.pick({**WAYS, fast: 6.0, wide: 6.1, small: 7.1})

    assert pictures.Choice(fast, beats_dense=True, windows=small) == choice


def test_kernel_that_is_slower_than_dense_batches_takes_mixed_sizes_only() -> None:
    first, second, third = pictures.CUTS

    choice = pictures.pick({**WAYS, first: 8.0, second: 7.5, third: 9.0})

    assert pictures.Choice(second, beats_dense=False, windows=second) == choice


def test_a_tie_of_kernels_goes_to_the_first() -> None:
    first, second = pictures.HOPPER_CUTS

    assert first == pictures.pick({**WAYS, first: 6.0, second: 5.8}).own
    assert first == pictures.pick({**WAYS, first: 5.8, second: 6.0}).own
    assert second == pictures.pick({**WAYS, first: 6.0, second: 5.6}).own


def test_short_pictures_have_a_kernel_of_their_own() -> None:
    first, second = pictures.HOPPER_CUTS
    long: dict[pictures.Way, float] = {**WAYS, first: 6.0, second: 6.5}
    short: dict[pictures.Way, float] = {**WAYS, first: 3.0, second: 2.7}

    choice = pictures.pick_by_size({1564: long, 576: short})

    assert [second, second, first] == [choice.find_own(most) for most in (4, 1024, 1025)]
    alone = pictures.pick_by_size({1564: long})
    assert [first, first] == [alone.find_own(most) for most in (4, 1564)]
    slow: dict[pictures.Way, float] = {**WAYS, first: 11.0, second: 11.0}
    neither = pictures.pick_by_size({1564: slow, 576: slow})
    assert [None, None] == [neither.find_own(most) for most in (4, 1564)]
    only_long = pictures.pick_by_size({1564: {**WAYS, first: 1.0, second: 1.1}, 576: slow})
    assert [first, first] == [only_long.find_own(most) for most in (4, 1564)]


def test_without_a_stopwatch_the_first_kernel_is_used() -> None:
    cuts = *pictures.HOPPER_CUTS, pictures.WINDOW_CUT
    plain, *_ = pictures.CUTS

    assert pictures.Choice(cuts[0], beats_dense=True, windows=cuts[-1]) == pictures.take(cuts)
    assert pictures.Choice(cuts[0], beats_dense=True) == pictures.take(cuts[:-1])
    assert pictures.Choice(plain, beats_dense=False, windows=plain) == pictures.take(pictures.CUTS)


def test_kernels_are_chosen_by_time_unless_said_otherwise() -> None:
    assert timing.chooses_by_time()
    with timing.choosing(by_time=False):
        assert not timing.chooses_by_time()
        with timing.choosing(by_time=True):
            assert timing.chooses_by_time()
        assert not timing.chooses_by_time()
    assert timing.chooses_by_time()


def test_comparison_that_lacks_memory_is_tried_again_and_not_remembered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    num_missing, num_calls = 0, 0

    def compare() -> str:
        nonlocal num_calls
        num_calls += 1
        if num_calls > num_missing:
            return "compared"
        raise torch.OutOfMemoryError

    def compare_with(missing: int) -> tuple[str, int]:
        nonlocal num_missing, num_calls
        num_missing, num_calls = missing, 0
        return trials.unless_memory_is_short(compare, "the usual"), num_calls

    monkeypatch.setattr("torch.cuda.empty_cache", lambda: None)

    assert ("compared", 1) == compare_with(0)
    assert ("compared", 2) == compare_with(1)
    assert ("the usual", 2) == compare_with(2)


@pytest.mark.parametrize(
    ("error", "is_remembered"), [(torch.OutOfMemoryError(), False), (OSError("no compiler"), True)]
)
def test_device_is_without_kernels_only_where_they_do_not_work(
    monkeypatch: pytest.MonkeyPatch, error: Exception, is_remembered: bool
) -> None:
    ends: list[Exception | None] = [error, None]

    def run(device: torch.device) -> None:
        end = ends.pop(0)
        if end is not None:
            raise end

    monkeypatch.setitem(sys.modules, "engine.kernels.gpu.probe", SimpleNamespace(run=run))
    kernels._has_triton.cache_clear()
    try:
        if not is_remembered:
            with pytest.raises(torch.OutOfMemoryError):
                kernels._has_triton(torch.device("cpu"))
        assert is_remembered is not kernels._has_triton(torch.device("cpu"))
    finally:
        kernels._has_triton.cache_clear()


def test_kernel_that_gains_little_is_not_used() -> None:
    first, *_ = pictures.CUTS

    assert pictures.Choice() == pictures.pick({**WAYS, first: 9.6})
    assert pictures.Choice(pictures.HopperCut(), beats_dense=True) == pictures.pick(
        {**WAYS, first: 9.6, pictures.HopperCut(): 6.0}
    )
    assert pictures.Choice(pictures.HopperCut(), beats_dense=True) == pictures.pick(
        {**WAYS, pictures.HopperCut(): 6.0}
    )


def test_kernel_for_hopper_is_tried_first_where_it_runs() -> None:
    def find(dtype: torch.dtype, dim: int, has_hopper: bool = True) -> list[Any]:
        return pictures.find_cuts(dtype, dim, has_hopper=has_hopper)

    ours = pictures.HOPPER_CUTS

    assert [(*ours, pictures.WINDOW_CUT), pictures.CUTS] == find(torch.bfloat16, 80)
    assert [ours] == find(torch.float16, 72)
    assert [pictures.CUTS] == find(torch.float32, 80)
    assert [pictures.CUTS] == find(torch.bfloat16, 80, has_hopper=False)
    assert not find(torch.bfloat16, 16)
    assert not find(torch.float32, 72)


def test_where_the_kernel_for_hopper_breaks_the_plain_ones_are_compared(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def compare(*args: Any, by_time: bool) -> pictures.Choice:
        *_, cuts = args
        if cuts[0] in pictures.HOPPER_CUTS:
            raise ImportError(f"this Gluon has no such name, by_time={by_time}")
        return pictures.take(cuts)

    for name in ("has_kernels", "is_hopper"):
        monkeypatch.setattr(pictures, name, lambda _: True)
    monkeypatch.setattr(pictures, "_compare", compare)
    choose = partial(pictures._choose.__wrapped__, torch.device("cpu"), torch.bfloat16, 16)

    assert pictures.take(pictures.CUTS) == choose(80, pictures.CALLS, True)
    assert pictures.Choice() == choose(72, pictures.CALLS, True)


def test_a_cpu_has_no_choice_of_kernels() -> None:
    assert pictures.Choice() == pictures.choose(torch.device("cpu"), torch.bfloat16, 16, 80)


def test_a_cpu_has_no_kernel_for_prompts() -> None:
    assert not prompts.is_usable(torch.device("cpu"), torch.bfloat16, 128)


@pytest.mark.parametrize("activation", get_args(activated.Activation))
def test_activated_products_are_a_product_and_an_activation(
    activation: activated.Activation,
) -> None:
    x, weight, bias = drawn(2, 7, 48), drawn(96, 48, seed=1), drawn(96, seed=2)
    product = F.linear(x, weight, bias)
    gate, up = product.chunk(2, dim=-1)
    expected = {
        "quick_gelu": product * torch.sigmoid(1.702 * product),
        "gelu_tanh": F.gelu(product, approximate="tanh"),
        "silu_mul": F.silu(gate) * up,
    }

    actual = activated.multiply(x, as_linear(weight, bias), activation)

    torch.testing.assert_close(actual, expected[activation])


@pytest.mark.parametrize("has_bias", [True, False])
def test_rotated_products_give_the_scores_of_a_product_and_a_rotation(has_bias: bool) -> None:
    x, weight, angles = drawn(7, 48), drawn(5 * 16, 48, seed=1), drawn(7, 8, seed=3)
    bias = drawn(5 * 16, seed=2) if has_bias else None
    expected = F.linear(x, weight, bias).view(7, 5, 16)
    rope.rotate_(expected[:, :4], angles.cos(), angles.sin())  # two heads of queries, two of keys

    linear = as_linear(weight, bias)
    rotated.interleave_(linear, 16, 4)
    actual = rotated.multiply(x, linear, angles.cos(), angles.sin(), 16, 4).view(7, 5, 16)

    for one, other in ((0, 2), (1, 3), (1, 2)):
        scores, expected_scores = (x[:, one] @ x[:, other].T for x in (actual, expected))
        torch.testing.assert_close(scores, expected_scores, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(actual[:, 4], expected[:, 4])


@pytest.mark.parametrize("is_rms", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
def test_no_value_of_a_normed_row_is_beyond_what_fp8_holds(has_bias: bool, is_rms: bool) -> None:
    width, depth = 32, 48
    weight = drawn(width, depth, seed=1) * torch.logspace(-3, 3, width)[:, None]
    bias = drawn(width, seed=2) if has_bias else None
    norm = nn.RMSNorm(depth, eps=0.0) if is_rms else nn.LayerNorm(depth, eps=0.0)
    for number, parameter in enumerate(norm.parameters()):
        nn.init.normal_(parameter, generator=torch.Generator().manual_seed(number))
    # Of all rows one is the worst for each value: the one that its weights are.
    rows = torch.cat([weight * norm.weight, -weight * norm.weight, drawn(50, depth) ** 5])

    factors = attended.find_factors(weight, bias, norm)

    values = F.linear(norm(rows), weight, bias) * factors
    assert (width,) == factors.shape
    assert values.abs().max() <= quantised.MOST
    if is_rms and not has_bias:  # and the bound is no further off than it says
        assert values.abs().max() > 0.99 * quantised.MOST / attended.SURE


def test_no_value_is_beyond_what_fp8_holds_where_biases_cancel_each_other_out() -> None:
    """Rounded to fp8 they do not: what is left of them may be more than all that rows add."""
    norm = nn.LayerNorm(64)
    nn.init.constant_(norm.weight, 0.01)
    nn.init.normal_(norm.bias, generator=torch.Generator().manual_seed(1))
    bias = norm.bias.data
    weight = drawn(32, 64)
    weight -= (weight @ bias)[:, None] * bias / (bias @ bias)
    rows = quantised.layer_norm(drawn(500, 64, seed=2), norm.weight, bias, norm.eps)

    factors = attended.find_factors(weight, None, norm)

    values = quantised.Fp8Linear(as_linear(weight))(rows) * factors
    assert values.abs().max() <= quantised.MOST


def test_a_product_reads_what_attention_gives_in_fp8() -> None:
    linear = as_linear(drawn(48, 32, seed=1), drawn(48, seed=2))
    factors = torch.logspace(0, 2, 32)
    x = drawn(7, 32)

    rows = attended.quantise(x, factors)

    assert quantised.FP8 == rows.values.dtype
    again = attended.quantise(rows.values, factors)
    assert torch.equal(rows.read(), again.read())
    actual = attended.read_by(linear, factors)(rows)
    assert (actual - linear(x)).norm() < 0.05 * linear(x).norm()


def test_angles_are_packed_once_and_for_as_long_as_they_live() -> None:
    angles = drawn(5, 36, seed=3).repeat(1, 2)
    cos, sin = angles.cos(), angles.sin()

    packed = rotated.pack(cos, sin, 72)

    assert 0 == packed.stride(0) % 16
    torch.testing.assert_close(packed[:, :72:2].float(), cos[:, :36], rtol=0, atol=3e-4)
    torch.testing.assert_close(packed[:, 1:72:2].float(), sin[:, :36], rtol=0, atol=3e-4)
    assert packed is rotated.pack(cos, sin, 72)
    assert packed is not rotated.pack(cos, sin, 64)
    assert packed is not rotated.pack(cos.clone(), sin, 72)
    kept = len(rotated._packed)
    del cos
    assert kept - 1 == len(rotated._packed)


def test_products_in_fp8_are_interleaved_with_their_scales() -> None:
    x, angles = drawn(7, 48), drawn(7, 8, seed=3)
    linear = as_linear(drawn(5 * 16, 48, seed=1), drawn(5 * 16, seed=2))
    small = quantised.Fp8Linear(linear)
    rotated.interleave_(linear, 16, 4)
    expected = quantised.Fp8Linear(linear)

    rotated.interleave_(small, 16, 4)

    of_heads = angles.cos(), angles.sin(), 16, 4
    rows = quantised.quantise(x)
    assert torch.equal(
        rotated.multiply(rows, expected, *of_heads), rotated.multiply(rows, small, *of_heads)
    )


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu_tanh"])
@pytest.mark.parametrize("has_bias", [True, False])
def test_bounds_of_products_in_fp8_hold_and_are_near_enough(
    activation: activated.Activation, has_bias: bool
) -> None:
    """
    Also where a row has a number far from all others, or is along a weight; and with something to
    spare where it is what makes the largest sum that there can be.
    """
    linear = as_linear(drawn(96, 48, seed=1), drawn(96, seed=2) * 30 if has_bias else None)
    x = drawn(40, 48)
    x[3, 7], x[4] = 1e4, linear.weight[5] * 50
    x[5] = 0.0
    small = quantised.Fp8Linear(linear)
    read = small.rows.read()
    x[6] = read[read.abs().sum(1).argmax()].sign()
    rows = quantised.quantise(x)
    exact = activated.activate(small(rows).float(), activation)
    bound = activated.find_bound(small, activation)
    assert bound is not None
    scales = rows.scales * bound.share + bound.rest

    assert (exact.abs() * 1.005 <= scales * quantised.MOST).all()
    found = quantised.Fp8Rows((exact / scales).to(quantised.FP8), scales).read()
    for made, most in ((found, 0.04), (quantised.quantise(exact).read(), 0.035)):
        assert ((made - exact).norm(dim=1) <= most * exact.norm(dim=1)).all()


def test_bounds_are_as_far_up_as_the_furthest_bias_though_it_is_negative() -> None:
    linear = as_linear(drawn(96, 48), -drawn(96, seed=1).abs() - 1.0)

    bound = activated.Bound.find(quantised.Fp8Linear(linear))

    assert bound is not None
    assert bound.share > 0
    assert 1.0 < bound.rest * quantised.MOST / linear.bias.abs().max() < 1.02


def test_no_bound_where_one_output_would_cost_the_others_their_last_bits() -> None:
    weight = drawn(96, 48)
    weight[7] *= 6
    assert activated.Bound.find(quantised.Fp8Linear(as_linear(weight))) is not None
    weight[7] *= 6
    assert activated.Bound.find(quantised.Fp8Linear(as_linear(weight))) is None
    assert activated.Bound.find(quantised.Fp8Linear(as_linear(torch.zeros(96, 48)))) is None
    assert activated.find_bound(quantised.Fp8Linear(as_linear(drawn(96, 48))), "silu_mul") is None


def test_products_in_parts_add_up_and_so_do_their_norms() -> None:
    inner, weight, x = drawn(2, 7, 64), drawn(48, 64, seed=1), drawn(2, 7, 48, seed=2)
    norm, linear = drawn(48, seed=3), as_linear(weight)

    parts = split.multiply(inner, linear)
    total, normed = norms.add_parts_rms_norm(parts, x, norm, 1e-6)

    assert (14, 48) == parts.shape[1:]
    torch.testing.assert_close(total, x + inner @ weight.T)
    torch.testing.assert_close(normed, norms.rms_norm(total, norm, 1e-6))
    rows, small = quantised.quantise(inner), quantised.Fp8Linear(linear)
    in_fp8 = split.multiply(rows, small)
    torch.testing.assert_close(in_fp8.sum(0), small(rows).flatten(0, 1))
    total, of_fp8 = quantised.add_parts_rms_norm(in_fp8, x, norm, 1e-6)
    expected = quantised.rms_norm(total, norm, 1e-6)
    assert torch.equal(expected.read(), of_fp8.read())


@pytest.mark.parametrize(
    ("shares", "span"),
    [
        ({512: 0.8, 256: 0.8, 128: 1.1}, (129, 512)),
        ({512: 1.1, 256: 0.9, 128: 0.9, 64: 0.9, 16: 0.9}, (1, 256)),
        ({512: 1.1, 256: 0.9, 128: 1.0, 64: 0.5}, (129, 256)),
        ({512: 1.1, 256: 1.1, 128: 1.1, 64: 1.1, 16: 1.1}, (1, 0)),
        ({512: math.inf}, (1, 0)),
        ({512: 0.5, 256: math.inf}, (257, 512)),
    ],
)
def test_products_are_split_for_the_numbers_of_rows_with_which_that_is_faster(
    monkeypatch: pytest.MonkeyPatch, shares: dict[int, float], span: tuple[int, int]
) -> None:
    monkeypatch.setattr(split, "_compare", lambda *args: shares[args[-1]])

    product = Product(torch.device("cpu"), torch.bfloat16, 8960, 1536, has_bias=False)

    assert split.Span(*span) == split._choose(product, False)


def test_a_cpu_goes_on_behind_every_product() -> None:
    linear = as_linear(drawn(96, 48).bfloat16())

    for kind in (linear, quantised.Fp8Linear(linear)):
        assert in_one.NEVER == activated.choose(kind, "quick_gelu")
        assert in_one.NEVER == rotated.choose(kind, 16, 4)
        assert in_one.NEVER == added.choose(kind, is_rms=True, gives_fp8=False)
        assert split.NEVER == split.choose(kind, gives_fp8=False)


def test_each_kind_of_product_is_compared_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[str] = []
    aligned: list[tuple[int, ...]] = []

    def is_possible(_device: torch.device, _dtype: torch.dtype, *widths: int) -> bool:
        aligned.append(widths)
        return True

    def choose_rows(name: str, _compare: Any) -> int:
        compared.append(name)
        return 512

    monkeypatch.setattr(in_one, "is_possible", is_possible)
    monkeypatch.setattr(in_one, "choose_rows", choose_rows)
    end, reader = as_linear(drawn(48, 32).bfloat16()), as_linear(drawn(96, 48).bfloat16())
    small, behind = quantised.Fp8Linear(reader), folded.Behind("silu_mul", least_rows=2048)

    chosen = [
        activated.choose(reader, "silu_mul"),
        activated.choose(small, "quick_gelu"),
        rotated.choose(reader, 16, 4),
        added.choose(small, is_rms=True, gives_fp8=True),
        folded.choose(end, reader, behind, is_rms=True, least_added=in_one.NEVER),
    ]

    assert [512] * 5 == chosen
    assert [
        "activated_product dtype=torch.bfloat16 activation=silu_mul width=96 depth=48",
        "activated_product dtype=torch.float8_e4m3fn activation=quick_gelu width=96 depth=48",
        "rotated_product dtype=torch.bfloat16 heads=4 dim=16 width=96 depth=48",
        "added_product dtype=torch.float8_e4m3fn width=96 depth=48 fp8_behind=True",
        f"folded_norm dtype=torch.bfloat16 widths=32,48,96 behind={behind}",
    ] == compared
    assert [{48}, {48, 96}, {48, 96}, {48, 96}, {32, 48}] == [set(widths) for widths in aligned]
    reader.weight[7] *= 36
    small = quantised.Fp8Linear(reader)
    assert [in_one.NEVER, 512] == [  # a GELU has no bound
        activated.choose(small, activation) for activation in ("quick_gelu", "silu_mul")
    ]


@pytest.mark.parametrize(
    ("shares", "least_rows"),
    [
        ({16_384: 0.7, 8192: 0.8, 2048: 0.9, 512: 1.1}, 2048),
        ({16_384: 0.9, 8192: 1.1}, 16_384),
        ({16_384: 0.7, 8192: 0.8, 2048: 0.9, 512: 0.9}, 512),
        ({16_384: 0.99}, in_one.NEVER),
        ({16_384: 0.8, 8192: math.inf}, in_one.NEVER),
        ({2048: 0.9, 512: 1.1}, 2048),  # no memory for more
        ({512: 0.9}, 512),
        ({}, in_one.NEVER),
    ],
)
def test_activated_products_are_compared_on_calls_for_which_there_is_memory(
    monkeypatch: pytest.MonkeyPatch, shares: dict[int, float], least_rows: int
) -> None:
    asked = Product(torch.device("cpu"), torch.bfloat16, 48, 96, has_bias=False), "silu_mul"
    compared = []

    def compare(*args: Any) -> float:
        *shape, rows = args
        assert list(asked) == shape
        compared.append(rows)
        if rows not in shares:
            raise torch.OutOfMemoryError
        return shares[rows]

    monkeypatch.setattr("torch.cuda.empty_cache", lambda: None)
    monkeypatch.setattr(activated, "_compare", compare)

    with timing.choosing(by_time=True):
        assert least_rows == timing.ask_once(activated._choose, *asked)
        num_compared = len(compared)
        shares.update(dict.fromkeys(in_one.ROWS, 0.5))

        # One model's layers are all alike, and the next model's asked anew.
        assert least_rows == timing.ask_once(activated._choose, *asked)
        assert num_compared == len(compared)
    with timing.choosing(by_time=True):
        assert timing.ask_once(activated._choose, *asked) == 512


def sum_exactly(x: Tensor | Fp8Rows, linear: Any, fault: str | None) -> Tensor:
    """The product in float32, which nobody has rounded, or what a kernel with a fault would make of it."""
    given: list[Any] = [
        x,
        linear.rows if isinstance(linear, quantised.Fp8Linear) else linear.weight,
    ]
    for index, name in enumerate(("row scales", "column scales")):
        if fault == name:
            given[index] = given[index]._replace(scales=given[index].scales.roll(1, 0))
    rows, weight = (part.read() if isinstance(part, Fp8Rows) else part.float() for part in given)
    return F.linear(rows, weight, None if fault == "bias" else linear.bias.float())


@pytest.mark.parametrize(
    ("dtype", "fault"),
    [
        (torch.bfloat16, None),
        (torch.bfloat16, "bias"),
        (quantised.FP8, None),
        (quantised.FP8, "bias"),
        (quantised.FP8, "row scales"),
        (quantised.FP8, "column scales"),
    ],
)
@pytest.mark.parametrize("product", [*get_args(activated.Activation), "rotated", "added"])
def test_products_in_one_pass_their_comparisons_if_they_are_right(
    monkeypatch: pytest.MonkeyPatch, product: str, dtype: torch.dtype, fault: str | None
) -> None:
    """With stand-ins for the kernels that round once, as these do."""
    sum_up = partial(sum_exactly, fault=fault)

    def activate(x: Tensor, linear: nn.Linear, activation: activated.Activation) -> Tensor:
        return activated.activate(sum_up(x, linear), activation).to(x.dtype)

    def activate_in_fp8(
        x: Fp8Rows, linear: Any, activation: activated.Activation, bound: activated.Bound | None
    ) -> Fp8Rows:
        exact = activated.activate(sum_up(x, linear), activation)
        if bound is None:
            return quantised.quantise(exact.bfloat16())
        scales = x.scales * bound.share + bound.rest
        return Fp8Rows((exact / scales).to(quantised.FP8), scales)

    def rotate(
        x: Tensor | Fp8Rows, linear: Any, cos: Tensor, sin: Tensor, dim: int, num_heads: int
    ) -> Tensor:
        exact = sum_up(x, linear)
        rope.rotate_(exact.view(len(cos), -1, dim)[:, :num_heads], cos, sin, in_pairs=True)
        return exact.bfloat16()

    monkeypatch.setattr(activated, "_multiply_in_one", activate)
    monkeypatch.setattr(activated, "_multiply_in_one_in_fp8", activate_in_fp8)
    monkeypatch.setattr(rotated, "_multiply_in_one", rotate)
    monkeypatch.setattr(
        added, "multiply", lambda x, linear, stream: (stream + sum_up(x, linear)).to(stream.dtype)
    )
    monkeypatch.setattr(in_one, "time_ms", lambda _call: 1.0)
    monkeypatch.setattr("torch.cuda.device", lambda _device: nullcontext())
    torch.manual_seed(0)
    asked = Product(torch.device("cpu"), dtype, 2048, 1280, has_bias=True)
    for rows in (500, 3):
        match product:
            case "rotated":
                heads = asked._replace(width=15 * 80)
                shares = [rotated._compare.__wrapped__(heads, 80, 10, rows)]
            case "added":
                shares = [
                    added._compare.__wrapped__(asked, is_rms, gives_fp8, rows)
                    for is_rms in (True, False)
                    for gives_fp8 in (True, False)
                ]
            case _:
                activation: Any = product
                shares = [activated._compare.__wrapped__(asked, activation, rows)]

        assert {math.inf if fault else 1.0} == set(shares)


@pytest.mark.parametrize("fault", [None, "bias", "mean"])
@pytest.mark.parametrize(
    "behind",
    [folded.Behind("quick_gelu"), folded.Behind("silu_mul"), folded.Behind(dim=80, num_heads=10)],
)
def test_folded_norms_pass_their_comparison_if_they_are_right(
    monkeypatch: pytest.MonkeyPatch, behind: folded.Behind, fault: str | None
) -> None:
    take = folded.Folded._take

    def take_what_is_left(
        product: folded.Folded, summed: folded.Summed
    ) -> tuple[Tensor, Tensor, Tensor | None, folded.Norm]:
        x, weight, bias, norm = take(product, summed)
        sums = None if fault == "mean" else norm.weight_sums
        return x, weight, None if fault == "bias" else bias, norm._replace(weight_sums=sums)

    monkeypatch.setattr(folded.Folded, "_take", take_what_is_left)
    monkeypatch.setattr(in_one, "time_ms", lambda _call: 1.0)
    monkeypatch.setattr("torch.cuda.device", lambda _device: nullcontext())
    torch.manual_seed(0)
    end = Product(torch.device("cpu"), torch.bfloat16, 2048, 1280, has_bias=True)
    reader = end._replace(depth=1280, width=15 * 80)

    share = folded._compare.__wrapped__(end, reader, behind, False, in_one.NEVER, 200)

    assert (math.inf if fault else 1.0) == share


@pytest.mark.parametrize("has_bias", [True, False])
def test_a_product_takes_on_a_norms_weight_and_bias_in_its_own_type(has_bias: bool) -> None:
    weight, bias, x = drawn(32, seed=2), drawn(32, seed=3), drawn(7, 32, seed=4)
    linear = as_linear(drawn(48, 32).bfloat16(), drawn(48, seed=1).bfloat16() if has_bias else None)
    expected = F.linear(x * weight + bias, linear.weight.float())
    if has_bias:
        expected += linear.bias.float()

    folded.fold_(linear, weight, bias)

    assert {torch.bfloat16} == {part.dtype for part in linear.parameters()}
    assert not any(part.requires_grad for part in linear.parameters())
    found = F.linear(x, linear.weight.float(), linear.bias.float())
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.2)


@pytest.mark.parametrize("lacks_a_part", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, quantised.FP8])
@pytest.mark.parametrize("gives_fp8", [False, True])
def test_products_in_parts_pass_their_comparison_if_they_are_right(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, gives_fp8: bool, lacks_a_part: bool
) -> None:
    multiply = split.multiply

    def multiply_some(x: Tensor | Fp8Rows, linear: nn.Linear | quantised.Fp8Linear) -> Tensor:
        return multiply(x, linear)[int(lacks_a_part) :]

    monkeypatch.setattr(split, "multiply", multiply_some)
    monkeypatch.setattr(in_one, "time_ms", lambda _call: 1.0)
    monkeypatch.setattr("torch.cuda.device", lambda _device: nullcontext())
    torch.manual_seed(0)
    asked = Product(torch.device("cpu"), dtype, 1024, 256, has_bias=False)

    share = split._compare.__wrapped__(asked, gives_fp8, 64)

    assert (math.inf if lacks_a_part else 1.0) == share


def test_rows_of_equal_numbers_are_normed_too() -> None:
    """Their squares, rounded, may add up to less than their mean would have it."""
    linear = as_linear(drawn(8, 1280))
    rows = torch.linspace(1, 1000, 64)[:, None].expand(-1, 1280)
    totals = torch.stack([rows.sum(1), rows.square().sum(1)])[..., None]

    found = folded.Folded(linear, 1e-6, is_rms=False)(folded.Summed(rows.contiguous(), totals))

    assert found.isfinite().all()


def test_questions_have_one_answer_in_each_load() -> None:
    answers = iter(range(9))

    def answer(_question: str) -> int:
        return next(answers)

    assert [0, 1] == [timing.ask_once(answer, "a") for _ in range(2)]
    with timing.choosing(by_time=False):
        assert [2, 2, 3] == [timing.ask_once(answer, question) for question in "aab"]
        with timing.choosing(by_time=True):
            assert timing.ask_once(answer, "a") == 4
        assert timing.ask_once(answer, "a") == 2
    assert timing.ask_once(answer, "a") == 5


class Kernel(ModuleType):
    """What `engine.kernels.gpu.draw` is on a GPU."""

    def __init__(self, call: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__("engine.kernels.gpu.draw")
        self.num_calls = 0
        self._call = call

    def draw(self, logits: Tensor, draws: Tensor) -> Tensor:
        self.num_calls += 1
        return self._call(logits, draws)


@pytest.fixture
def give_kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Any], Kernel]]:
    """Let tensors of a CPU be drawn from by a kernel like this."""

    def give(call: Callable[[Tensor, Tensor], Tensor]) -> Kernel:
        kernel = Kernel(call)
        monkeypatch.setitem(sys.modules, kernel.__name__, kernel)
        monkeypatch.setattr("engine.kernels.gpu.draw", kernel, raising=False)
        monkeypatch.setattr(draw, "has_kernels", lambda _: True)
        return kernel

    draw._try.cache_clear()
    yield give
    draw._try.cache_clear()


def cannot_be_compiled(logits: Tensor, draws: Tensor) -> Tensor:
    raise RuntimeError(f"ptxas knows no maxnreg: {logits.shape}, {draws.shape}")


def takes_the_first(logits: Tensor, _draws: Tensor) -> Tensor:
    return torch.zeros(len(logits), dtype=torch.int64)


ROWS = [
    SamplingRow(SamplingParams(temperature=0.8, top_k=9), 1, 3),
    SamplingRow(SamplingParams(temperature=0.0), 2, 3),
    SamplingRow(SamplingParams(top_p=0.9), 3, 3),
    SamplingRow(SamplingParams(presence_penalty=0.5), 4, 1, output_token_ids=[7]),
]


@pytest.mark.parametrize("rows", [ROWS, ROWS[:3]])
@pytest.mark.parametrize("breaks", [cannot_be_compiled, takes_the_first])
def test_where_the_kernel_that_draws_does_not_work_tokens_are_drawn_without_it(
    give_kernel: Callable[[Any], Kernel], breaks: Any, rows: list[SamplingRow]
) -> None:
    logits = 3 * drawn(len(rows), 50)
    expected = Sampler(50, "cpu").sample(logits, rows).tolist()
    numbers = [draw_numbers(row.params, row.seed, row.sample_index) for row in rows[:3]]
    table = torch.from_numpy(draw.table(numbers, [3, 3, 3], 3))
    kernel = give_kernel(breaks)

    assert not draw.is_usable(logits[:0])
    assert expected == Sampler(50, "cpu").sample(logits, rows).tolist()
    assert expected[:3] == draw.draw(logits[:3], table).tolist()
    assert kernel.num_calls == 1  # that was tried once


def test_lack_of_memory_says_nothing_of_the_kernel_that_draws(
    give_kernel: Callable[[Any], Kernel], monkeypatch: pytest.MonkeyPatch
) -> None:
    num_missing = 2

    def draw_later(logits: Tensor, draws: Tensor) -> Tensor:
        nonlocal num_missing
        num_missing -= 1
        if num_missing >= 0:
            raise torch.OutOfMemoryError
        return draw.plain_draw(logits, draws)

    monkeypatch.setattr("torch.cuda.empty_cache", lambda: None)
    give_kernel(draw_later)

    assert not draw.is_usable(drawn(2, 50))
    assert draw.is_usable(drawn(2, 50))


@pytest.mark.parametrize("vocab", [1, 50, 5000])
def test_the_kernel_draws_wherever_it_works(
    give_kernel: Callable[[Any], Kernel], vocab: int
) -> None:
    logits = 3 * drawn(len(ROWS), vocab)
    rows = [row if vocab > 7 else replace(row, output_token_ids=()) for row in ROWS]
    expected = Sampler(vocab, "cpu").sample(logits, rows).tolist()
    kernel = give_kernel(draw.plain_draw)

    assert draw.is_usable(logits[:0])
    assert expected == Sampler(vocab, "cpu").sample(logits, rows).tolist()
    assert expected[:3] == Sampler(vocab, "cpu").sample(logits[:3], rows[:3]).tolist()
    assert kernel.num_calls == 3


def test_greedy_rows_wait_for_no_kernel_that_draws(give_kernel: Callable[[Any], Kernel]) -> None:
    forms: list[dict[str, Any]] = [
        {},
        {"min_tokens": 2},
        {"logprobs": 1},
        {"presence_penalty": 1.0},
    ]
    rows = [
        SamplingRow(SamplingParams(temperature=0.0, **form), 1, 3, output_token_ids=[7, 7, 7])
        for form in forms
    ]
    kernel = give_kernel(cannot_be_compiled)
    sampler = Sampler(50, "cpu")

    sampler.sample(drawn(4, 50), rows)
    sampler.sample(drawn(2, 50), rows[:2])

    assert kernel.num_calls == 0


def test_argmax_is_the_samplers() -> None:
    logits = drawn(7, 50).bfloat16()
    logits[1] = -math.inf
    logits[2, 20] = math.nan
    logits[3, 5] = logits[3, 3] = 9.0
    logits[4, 0] = math.inf
    sampler = Sampler(50, "cpu")

    found = greedy.argmax(logits)

    assert sampler.sample_plain(logits).tolist() == found.tolist()
    assert [-1, -1, 3, -1] == found.tolist()[1:5]


def test_centred_pixels_are_padded_with_zeros() -> None:
    patches = torch.tensor([[0, 128, 255], [1, 2, 3]], dtype=torch.uint8)

    found = pixels.centre(patches, 128, 5, torch.bfloat16)

    assert [[-128, 0, 127, 0, 0], [-127, -126, -125, 0, 0]] == found.tolist()
    assert found.dtype == torch.bfloat16


def widened(rows: quantised.Fp8Rows) -> Tensor:
    return (rows.values.float().flatten(0, -2) * rows.scales).view(rows.values.shape)


def test_quantised_rows_keep_three_bits_of_every_number() -> None:
    x = drawn(2, 5, 32) * torch.logspace(-3, 4, 5)[:, None]  # rows of very different size
    x[0, 1] = 0.0

    rows = quantised.quantise(x)

    assert (10, 1) == rows.scales.shape
    least = x.abs().amax(-1, keepdim=True) / 448 * 2**-7  # below it fp8 has fewer bits
    assert ((widened(rows) - x).abs() <= (x.abs() / 16).clamp(min=least)).all()


def test_what_comes_before_a_product_quantises_its_own_result() -> None:
    x, delta, weight, bias = (
        drawn(7, 48),
        drawn(7, 48, seed=1),
        drawn(48, seed=2),
        drawn(48, seed=3),
    )
    sums = [delta.clone() for _ in range(4)]

    pairs = [
        (quantised.rms_norm(x, weight, 1e-6), norms.rms_norm(x, weight, 1e-6)),
        (quantised.layer_norm(x, weight, bias, 1e-6), norms.layer_norm(x, weight, bias, 1e-6)),
        (
            quantised.add_rms_norm_(sums[0], x, weight, 1e-6),
            norms.add_rms_norm_(sums[1], x, weight, 1e-6),
        ),
        (
            quantised.add_layer_norm_(sums[2], x, weight, bias, 1e-6),
            norms.add_layer_norm_(sums[3], x, weight, bias, 1e-6),
        ),
        (quantised.silu_mul(x), activations.silu_mul(x)),
        (quantised.quick_gelu(x.clone()), activations.quick_gelu_(x.clone())),
    ]

    assert all(torch.equal(x + delta, total) for total in sums)
    for rows, exact in pairs:
        expected = quantised.quantise(exact)
        assert torch.equal(expected.values.float(), rows.values.float())
        assert torch.equal(expected.scales, rows.scales)


@pytest.mark.parametrize("has_bias", [True, False])
def test_a_product_in_fp8_is_near_the_exact_one(has_bias: bool) -> None:
    linear = torch.nn.Linear(512, 64, bias=has_bias)
    x = drawn(1, 9, 512)
    exact = linear(x)

    found = quantised.Fp8Linear(linear)(x)

    assert exact.shape == found.shape
    assert (found - exact).norm() < 0.05 * exact.norm()
    assert torch.equal(found, quantised.Fp8Linear(linear)(quantised.quantise(x)))


def test_a_product_in_fp8_needs_widths_of_sixteen() -> None:
    with pytest.raises(ValueError, match="multiples of 16, not 40 and 64"):
        quantised.Fp8Linear(torch.nn.Linear(40, 64))
    assert quantised.Fp8Linear.find(torch.nn.Linear(64, 40)) is None
