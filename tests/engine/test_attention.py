"""Attention over packed sequences: each token sees its own rows, whatever lies around them."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention
from transformers.vision_utils import get_vision_window_index

from bench.later_qwen import LaterQwenShape
from engine import LLM, Request
from engine.attention import (
    VISION_ATTENTION,
    TextContext,
    VisionContext,
    attend_text,
    attend_vision,
    using,
)
from engine.errors import BadConfig
from engine.families.packed import PackedEncoder
from engine.kernels import pictures
from engine.kernels.decode import DecodeAttention, attend
from engine.kernels.pictures import Cut
from engine.runner import MAX_ENCODER_PATCHES, _calls
from engine.sequence import Sequence as Running
from tests.engine.families import CASES
from tests.engine.pictures import (
    CLIP,
    GREEDY,
    PICTURE,
    cut_clip,
    cut_picture,
    draw,
    draw_clip,
    token_ids,
)
from tests.engine.tiny_qwen import QWEN2_5_VL, QWEN2_5_VL_OTHER, write_tiny_qwen

DIM = 8
SCALE = 0.3


@dataclass(frozen=True, slots=True)
class Layer:
    """Queries, keys and values of sequences, each (heads, tokens, DIM)."""

    queries: list[Tensor]
    keys: list[Tensor]
    values: list[Tensor]


def draw_layer(lens: Sequence[int], heads: int, kv_heads: int, seed: int = 0) -> Layer:
    generator = torch.Generator().manual_seed(seed)

    def tensors(num_heads: int) -> list[Tensor]:
        return [torch.randn(num_heads, length, DIM, generator=generator) for length in lens]

    return Layer(tensors(heads), tensors(kv_heads), tensors(kv_heads))


def attend_densely(query: Tensor, key: Tensor, value: Tensor, window: int | None = None) -> Tensor:
    """(heads, tokens, DIM) -> (tokens, heads, DIM), by the definition; the queries are the last ones."""
    group = len(query) // len(key)
    key, value = key.repeat_interleave(group, dim=0), value.repeat_interleave(group, dim=0)
    scores = query @ key.transpose(1, 2) * SCALE
    newest = key.shape[1] - query.shape[1]
    hidden = torch.ones_like(scores, dtype=torch.bool).triu(1 + newest)
    if window is not None:
        hidden |= torch.ones_like(scores, dtype=torch.bool).tril(newest - window)
    return (scores.masked_fill(hidden, -torch.inf).softmax(-1) @ value).transpose(0, 1)


class SecondLayer(nn.Module):
    layer_idx = 1


def module() -> nn.Module:
    return SecondLayer()


@dataclass(frozen=True, slots=True)
class Rows:
    """KV rows of two layers, full of NaN until somebody writes."""

    keys: list[Tensor]
    values: list[Tensor]

    @classmethod
    def build(cls, num_rows: int, kv_heads: int, dtype: torch.dtype = torch.float32) -> "Rows":
        def tensors() -> list[Tensor]:
            return [torch.full((num_rows, kv_heads, DIM), torch.nan).to(dtype) for _ in range(2)]

        return cls(tensors(), tensors())

    def attend(
        self,
        layer: Layer,
        starts: Sequence[int],
        lens: Sequence[int],
        num_new: Sequence[int],
        window: int | None = None,
        kernel: DecodeAttention | None = None,
    ) -> list[Tensor]:
        """Run the last `num_new` tokens of each sequence, packed; one output for each."""
        query, key, value = (
            torch.cat([t[:, n - k : n] for t, n, k in zip(each, lens, num_new, strict=True)], dim=1)
            for each in (layer.queries, layer.keys, layer.values)
        )
        write_rows = [
            start + row
            for start, length, count in zip(starts, lens, num_new, strict=True)
            for row in range(length - count, length)
        ]
        spans = None
        if kernel is not None:  # in its plain form; what is behind the last slab is nobody's
            query_starts = torch.arange(len(lens) + 1, dtype=torch.int32)
            slab_starts = torch.tensor([*starts, 0], dtype=torch.int32)
            spans = query_starts, slab_starts, torch.tensor(lens, dtype=torch.int32)
        context = TextContext(
            self.keys,
            self.values,
            torch.tensor(write_rows),
            starts,
            lens,
            num_new,
            spans,
            max_queries=1 if kernel else None,
            decode_kernel=kernel,
        )
        with using(context):
            attended, _ = attend_text(
                module(), query[None], key[None], value[None], None, SCALE, sliding_window=window
            )
        return list(torch.split(attended[0], list(num_new)))


def in_fp8(numbers: Tensor) -> Tensor:
    """What rows in fp8 hold of these."""
    return numbers.clamp(-448, 448).to(torch.float8_e4m3fn).float()


shapes = st.tuples(st.sampled_from([(4, 4), (4, 2), (6, 1)]), st.integers(0, 1000))
windows = st.none() | st.integers(1, 24)


def place(lens: Sequence[int], seed: int) -> list[int]:
    """Slabs of room for 4 more tokens, in another order than the sequences', with gaps between."""
    order = torch.randperm(len(lens), generator=torch.Generator().manual_seed(seed)).tolist()
    starts, at = [0] * len(lens), 16
    for index in order:
        starts[index] = at
        at += lens[index] + 4 + index % 3 * 16
    return starts


@given(lens=st.lists(st.integers(1, 20), min_size=1, max_size=5), shape=shapes, window=windows)
def test_packed_prefill_is_prefill_one_by_one(
    lens: list[int], shape: tuple[tuple[int, int], int], window: int | None
) -> None:
    (heads, kv_heads), seed = shape
    layer = draw_layer(lens, heads, kv_heads, seed)
    starts = place(lens, seed)
    rows = Rows.build(1000, kv_heads)
    attended = rows.attend(layer, starts, lens, lens, window)

    for index, (start, length) in enumerate(zip(starts, lens, strict=True)):
        query, key, value = (t[index] for t in (layer.queries, layer.keys, layer.values))
        torch.testing.assert_close(attend_densely(query, key, value, window), attended[index])
        assert torch.equal(key.transpose(0, 1), rows.keys[1][start : start + length])
        assert torch.equal(value.transpose(0, 1), rows.values[1][start : start + length])
    assert rows.keys[0].isnan().all()  # the other layer's
    assert sum(lens) == (~rows.keys[1].isnan().any(-1).any(-1)).sum()


@given(
    sizes=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 20)), min_size=1, max_size=5),
    shape=shapes,
    window=windows,
)
def test_prompts_in_pieces_are_seen_as_whole(
    sizes: list[tuple[int, int]], shape: tuple[tuple[int, int], int], window: int | None
) -> None:
    (heads, kv_heads), seed = shape
    lens = [first + second for first, second in sizes]
    layer = draw_layer(lens, heads, kv_heads, seed)
    starts = place(lens, seed)
    rows = Rows.build(1000, kv_heads)
    firsts, seconds = ([pieces[n] for pieces in sizes] for n in range(2))
    pieces = (
        rows.attend(layer, starts, firsts, firsts, window),
        rows.attend(layer, starts, lens, seconds, window),
    )

    for index, (first, second) in enumerate(zip(*pieces, strict=True)):
        query, key, value = (t[index] for t in (layer.queries, layer.keys, layer.values))
        expected = attend_densely(query, key, value, window)
        torch.testing.assert_close(expected, torch.cat([first, second]))


@given(
    lens=st.lists(st.integers(1, 20), min_size=1, max_size=5),
    shape=shapes,
    num_steps=st.integers(1, 4),
    window=windows,
    has_kernel=st.booleans(),
)
def test_decode_over_slabs_in_any_order_is_dense_attention(
    lens: list[int],
    shape: tuple[tuple[int, int], int],
    num_steps: int,
    window: int | None,
    has_kernel: bool,
) -> None:
    (heads, kv_heads), seed = shape
    layer = draw_layer([length + num_steps for length in lens], heads, kv_heads, seed)
    starts = place(lens, seed)
    rows = Rows.build(1000, kv_heads)
    rows.attend(layer, starts, lens, lens, window)
    for step in range(1, num_steps + 1):
        grown = [length + step for length in lens]
        attended = rows.attend(
            layer, starts, grown, [1] * len(lens), window, kernel=attend if has_kernel else None
        )

        for index, length in enumerate(grown):
            expected = attend_densely(
                layer.queries[index][:, length - 1 : length],
                layer.keys[index][:, :length],
                layer.values[index][:, :length],
                window,
            )
            torch.testing.assert_close(expected, attended[index])


@given(
    runs=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 12)), min_size=1, max_size=5),
    seed=st.integers(0, 1000),
)
def test_vision_runs_of_mixed_sizes_are_pictures_one_by_one(
    runs: list[tuple[int, int]], seed: int
) -> None:
    sizes = [size for count, size in runs for _ in range(count)]
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (torch.randn(1, 3, sum(sizes), DIM, generator=generator) for _ in range(3))
    with using(VisionContext(runs)):
        attended, _ = attend_vision(module(), query, key, value, None, SCALE)

    start = 0
    for size in sizes:
        one = slice(start, start + size)
        expected = F.scaled_dot_product_attention(
            query[:, :, one], key[:, :, one], value[:, :, one], scale=SCALE
        )
        torch.testing.assert_close(expected.transpose(1, 2), attended[:, one])
        start += size


@pytest.mark.parametrize("num", [1, 5])
def test_batches_go_as_pictures_in_a_row_where_that_is_faster(num: int) -> None:
    """In both of the ways in which towers lay them, and in one that no view of theirs makes a row of."""
    generator = torch.Generator().manual_seed(num)
    merged = torch.randn(num, 9, 3, 2, DIM, generator=generator)
    apart = [part.contiguous() for part in merged.unbind(2)]
    by_head = [part.transpose(1, 2).contiguous().transpose(1, 2) for part in apart]
    for parts in (merged.unbind(2), apart, by_head):
        query, key, value = (part.transpose(1, 2) for part in parts)
        with using(VisionContext(())):
            expected, _ = attend_vision(module(), query, key, value, None, SCALE)
        with using(VisionContext((), cut=Cut())):
            for _ in range(2):  # as two layers do
                attended, _ = attend_vision(module(), query, key, value, None, SCALE)

                torch.testing.assert_close(expected, attended)
                assert attended.reshape(num, 9, -1).shape == (num, 9, 2 * DIM)


@pytest.mark.parametrize(("most", "is_short"), [(1024, True), (1025, False)])
def test_packed_pictures_are_attended_to_by_the_kernel_for_their_size(
    most: int, is_short: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And it is told what results in fp8 are multiplied by."""
    seen: list[tuple[Any, ...]] = []
    own, short = pictures.HOPPER_CUTS
    encoder = PackedEncoder(torch.device("cpu"), torch.float32, 2, DIM)
    encoder.has_varlen, encoder.choice = True, pictures.Choice(own, short=short)
    factors, attend_plainly = torch.ones(2 * DIM), pictures.attend

    def look(*args: Any) -> Tensor:
        seen.append(args[-2:])
        return attend_plainly(*args)

    def see(_starts: Tensor, merged: Tensor) -> Tensor:
        heads = torch.split(merged.view(-1, 6, DIM), 2, dim=1)
        query, key, value = (part.transpose(0, 1)[None] for part in heads)
        attended, _ = attend_vision(module(), query, key, value, None, SCALE, fp8_factors=factors)
        return attended[0]

    monkeypatch.setattr(pictures, "attend", look)
    packing = encoder.pack([5, most], rounds_up=False)
    found = encoder.run(packing, None, see, torch.randn(packing.num_patches, 6 * DIM))

    assert (5 + most, 2, DIM) == found.shape
    assert [(short if is_short else own, factors)] == seen


@pytest.mark.parametrize("shape", [QWEN2_5_VL, QWEN2_5_VL_OTHER], ids=["default", "other"])
@torch.inference_mode()
def test_layers_with_windows_see_what_transformers_own_see(
    tmp_path: Path, shape: LaterQwenShape
) -> None:
    folder = write_tiny_qwen(tmp_path, shape, seed=2)
    own = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, attn_implementation="sdpa")
    model: Any = own
    visual, vision = model.model.visual.eval(), model.config.vision_config
    grids = torch.tensor([[1, 6, 10], [3, 4, 4], [1, 14, 2]])
    size = int(grids.prod(1).sum()), 3 * 2 * vision.patch_size**2
    patches = torch.randn(size, generator=torch.Generator().manual_seed(1))
    expected = visual(patches, grid_thw=grids).pooler_output

    index, starts = get_vision_window_index(grids, 2, vision.window_size, vision.patch_size)
    windows = [(1, size) for size in starts.diff().tolist()]
    context = VisionContext([(1, 60), (3, 16), (1, 28)], windows=(starts, VisionContext(windows)))
    visual.config._attn_implementation = VISION_ATTENTION
    with using(context):
        found = visual(patches, grid_thw=grids, window_index=index, cu_window_seqlens=starts)
    with using(replace(context, windows=None)):
        unseen = visual(patches, grid_thw=grids, window_index=index, cu_window_seqlens=starts)

    torch.testing.assert_close(found.pooler_output, expected)
    assert (unseen.pooler_output - expected).abs().max() > 0.01


def test_context_is_gone_when_its_block_ends() -> None:
    with pytest.raises(LookupError), using(VisionContext([(1, 4)])):
        raise LookupError

    nothing = torch.zeros(1, 1, 4, DIM)
    for function in (attend_vision, attend_text):
        with pytest.raises(AssertionError):
            function(module(), nothing, nothing, nothing, None, SCALE)


@pytest.mark.parametrize(
    "asked",
    [{"softcap": 50.0}, {"s_aux": torch.zeros(4)}, {"is_causal": False}, {"chunk_size": 8}],
    ids=str,
)
def test_what_is_not_built_is_refused(asked: dict[str, Any]) -> None:
    x = torch.zeros(1, 1, 4, DIM)
    with pytest.raises(BadConfig, match=next(iter(asked))):
        attend_text(module(), x, x, x, None, SCALE, **asked)


@pytest.mark.parametrize("asked", [{"is_causal": True}, {"sliding_window": 3}, {"dropout": 0.1}])
def test_what_encoders_ask_for_and_is_not_built_is_refused(asked: dict[str, Any]) -> None:
    x = torch.zeros(1, 1, 4, DIM)
    with pytest.raises(BadConfig, match=next(iter(asked))):
        attend_vision(module(), x, x, x, None, SCALE, **asked)


def test_model_that_asks_for_more_is_refused_when_it_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As another version of transformers may, and its answers would be others without a word."""
    case = CASES["qwen3"]
    folder = case.write(tmp_path, seed=1, changes=case.changes)
    forward = Qwen3Attention.forward

    def bounded(self: Qwen3Attention, *given: Any, **words: Any) -> Any:
        return forward(self, *given, **{**words, "softcap": 50.0})

    monkeypatch.setattr(Qwen3Attention, "forward", bounded)
    with pytest.raises(BadConfig, match="softcap"):
        LLM(str(folder))


# --- the same through the whole engine ---------------------------------------------------------------


def test_encoder_reads_pictures_and_clips_together_as_one_by_one(llm: LLM) -> None:
    family = llm.engine.checkpoint.family
    sizes = [(84, 84), (200, 60), (84, 84), (28, 224), (60, 200)]
    visuals = [cut_picture(family, draw(seed, *size)) for seed, size in enumerate(sizes)]
    visuals.insert(2, cut_clip(family, draw_clip(1, 5)))
    visuals.append(cut_clip(family, draw_clip(2, 2, 60, 200)))
    together = family.encode(visuals)

    for visual, features in zip(visuals, together, strict=True):
        (alone,) = family.encode([visual])
        assert (visual.plan.num_rows, family.hidden_size) == features.shape
        torch.testing.assert_close(alone, features, atol=1e-4, rtol=1e-4)


def test_freed_rows_never_show(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one_row = 2 * 2 * 2 * 16 * 4
    options: dict[str, Any] = {"max_model_len": 128, "kv_cache_memory_bytes": 416 * one_row}
    clean, poisoned = LLM(str(tiny_folder), **options), LLM(str(tiny_folder), **options)
    rows = poisoned.engine._runner._rows
    finish = poisoned.engine._scheduler.finish
    num_poisoned = 0

    def poison(first: int, end: int) -> None:
        nonlocal num_poisoned
        num_poisoned += 1
        for tensor in (*rows.keys, *rows.values):
            tensor[first:end] = torch.nan

    def finish_and_poison(sequences: Collection[Running]) -> None:
        slabs = [(s.start, s.num_rows_at_most) for s in sequences if s.start is not None]
        finish(sequences)
        for start, num_rows in slabs:
            poison(start, start + num_rows)

    monkeypatch.setattr(poisoned.engine._scheduler, "finish", finish_and_poison)
    poison(0, len(rows.keys[0]))
    requests = [
        Request(prompt="x" * (number % 40 + 1), request_id=str(number)) for number in range(24)
    ]
    requests += [
        Request(
            prompt=PICTURE + CLIP,
            multi_modal_data={"image": draw(number), "video": draw_clip(number, 3)},
            request_id=f"seen {number}",
        )
        for number in range(8)
    ]
    expected = clean.generate(requests, GREEDY, use_tqdm=False)

    assert token_ids(expected) == token_ids(poisoned.generate(requests, GREEDY, use_tqdm=False))
    assert 1 + len(requests) == num_poisoned


@given(sizes=st.lists(st.sampled_from([4, 576, 1564, 3996, 20_000, 40_000]), max_size=60))
def test_encoder_calls_hold_every_picture_once_within_the_limit(sizes: list[int]) -> None:
    calls = _calls(sizes)

    assert list(range(len(sizes))) == [index for call in calls for index in call]
    for call in calls:
        assert 1 == len(call) or sum(sizes[index] for index in call) <= MAX_ENCODER_PATCHES


def test_encoder_calls_of_equal_pictures_are_even() -> None:
    assert [19, 19] == [len(call) for call in _calls([1564] * 38)]
    assert [15, 14, 14] == sorted((len(call) for call in _calls([1564] * 43)), reverse=True)
    assert [[0], [1], [2, 3]] == _calls([40_000, 40_000, 10, 10])


@pytest.mark.parametrize("kernel", [None, attend])
@pytest.mark.parametrize("size", [0.01, 1.0, 400.0])
def test_rows_in_fp8_are_read_as_what_they_hold(
    kernel: DecodeAttention | None, size: float
) -> None:
    """Prompts, pieces behind them and single tokens; what is too large is the largest, not NaN."""
    lens = [19, 3, 8]
    layer = draw_layer(lens, 4, 2, seed=5)
    layer = Layer(
        layer.queries, [key * size for key in layer.keys], [value * size for value in layer.values]
    )
    starts = place(lens, 5)
    rows = Rows.build(200, 2, torch.float8_e4m3fn)
    read, pieces, ones = [9, 1, 5], [9, 1, 2], [1, 1, 1]
    ends = [n + k for n, k in zip(read, pieces, strict=True)]
    found = [
        rows.attend(layer, starts, read, read),
        rows.attend(layer, starts, ends, pieces),
        rows.attend(layer, starts, lens, ones, kernel=kernel),
    ]

    for attended, sizes, counts in zip(
        found, (read, ends, lens), (read, pieces, ones), strict=True
    ):
        for index, (length, count) in enumerate(zip(sizes, counts, strict=True)):
            query = layer.queries[index][:, length - count : length]
            key, value = (in_fp8(x[index][:, :length]) for x in (layer.keys, layer.values))
            expected = attend_densely(query, key, value)
            torch.testing.assert_close(expected, attended[index], rtol=1e-5, atol=1e-5 * size)
