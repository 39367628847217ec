"""Fused layers say what transformers' own layers say, in float32 to the last few bits."""

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2VLForConditionalGeneration,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.vision_utils import get_vision_window_index

from engine import fuse
from engine.attention import VISION_ATTENTION, Ends, TextContext, VisionContext, using
from engine.fuse import Fusions
from engine.kernels import (
    activated,
    added,
    attended,
    folded,
    products,
    quantised,
    rope,
    rotated,
    split,
)
from engine.kernels.products import PackedLinear
from engine.kernels.quantised import Fp8Linear, Fp8Rows
from tests.engine.tiny import ALL_KV_HEADS, ONE_KV_HEAD, Shape, write_tiny_qwen2_vl
from tests.engine.tiny_qwen import (
    QWEN2_5_VL,
    QWEN2_5_VL_OTHER,
    QWEN3_VL,
    QWEN3_VL_OTHER,
    write_tiny_qwen,
)

NUM_TOKENS = 23
# A merged product may sum in another order; the tiny weights are large, so states are too.
RTOL, ATOL = 1e-5, 1e-4


@pytest.fixture(params=[{}, ONE_KV_HEAD, ALL_KV_HEADS], ids=["two", "one", "all"])
def qwen(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    shape: Shape = request.param
    folder = write_tiny_qwen2_vl(tmp_path, seed=7, **shape)
    return _frozen(Qwen2VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32))


@pytest.fixture(
    params=[QWEN2_5_VL, QWEN2_5_VL_OTHER, QWEN3_VL, QWEN3_VL_OTHER],
    ids=["2.5", "2.5 other", "3", "3 other"],
)
def later_qwen(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """A Qwen-VL after the second generation."""
    folder = write_tiny_qwen(tmp_path, request.param, seed=7)
    return _frozen(AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32))


@pytest.fixture
def llava() -> Any:
    torch.manual_seed(3)
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=56,
        patch_size=14,
    )
    text = LlamaConfig(
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=100,
        max_position_embeddings=128,
    )
    model = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_index=99)
    )
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return _frozen(model)


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


def _frozen(model: Any) -> Any:
    return model.eval().requires_grad_(False)


def assert_near(expected: Tensor, actual: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=RTOL, atol=ATOL)


def fused_copy(model: Any, fusions: Fusions | None = None) -> Any:
    twin = copy.deepcopy(model)
    fuse.apply(twin, fusions)
    return twin


def run_text(model: Any, num_tokens: int = NUM_TOKENS) -> Tensor:
    """Hidden states of one causal row of tokens whose three axes differ."""
    text = model.model.language_model
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, num_tokens, text.config.hidden_size, generator=generator)
    positions = torch.randint(0, 90, (3, 1, num_tokens), generator=generator)
    output = text(
        inputs_embeds=x.to(model.dtype),
        position_ids=positions if "mrope" in str(text.config.to_dict()) else positions[0],
        use_cache=False,
    )
    return output.last_hidden_state  # type: ignore[no-any-return]


def run_vision(model: Any) -> Tensor:
    """Features of two pictures of 2 x 4 patches and one of 4 x 6, packed."""
    model.model.visual.config._attn_implementation = VISION_ATTENTION
    grids = torch.tensor([[1, 2, 4], [1, 2, 4], [1, 4, 6]])
    width = model.config.vision_config.in_channels * 2 * 14**2
    patches = torch.randn(40, width, generator=torch.Generator().manual_seed(1))
    with using(VisionContext([(2, 8), (1, 24)])):
        return model.model.visual(patches.to(model.dtype), grid_thw=grids).pooler_output  # type: ignore[no-any-return]


def run_later_vision(model: Any) -> list[Tensor]:
    """All that the encoder hands to the text: of 8 patches, 2 times 24, and 60, packed."""
    model.model.visual.config._attn_implementation = VISION_ATTENTION
    vision = model.config.vision_config
    grids = torch.tensor([[1, 2, 4], [2, 4, 6], [1, 10, 6]])
    context = VisionContext([(1, 8), (2, 24), (1, 60)])
    given: dict[str, Any] = {}
    if hasattr(vision, "window_size"):
        index, starts = get_vision_window_index(
            grids, vision.spatial_merge_size, vision.window_size, vision.patch_size
        )
        given = {"window_index": index, "cu_window_seqlens": starts}
        sizes = [(1, size) for size in starts.diff().tolist()]
        context = replace(context, windows=(starts, VisionContext(sizes)))
    shape = int(grids.prod(1).sum()), vision.in_channels * 2 * vision.patch_size**2
    patches = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    with using(context):
        output = model.model.visual(patches, grid_thw=grids, **given)
    return [output.pooler_output, *getattr(output, "deepstack_features", ())]


def test_layers_of_later_generations_say_the_same(later_qwen: Any) -> None:
    fused = fused_copy(later_qwen)

    for expected, actual in zip(run_later_vision(later_qwen), run_later_vision(fused), strict=True):
        assert_near(expected, actual)
    assert_near(run_text(later_qwen), run_text(fused))


def test_everything_of_later_generations_is_swapped(later_qwen: Any) -> None:
    swapped = fuse.apply(later_qwen)
    text, vision = later_qwen.config.text_config, later_qwen.config.vision_config
    kinds = {type(layer).__name__ for layer in later_qwen.model.visual.blocks}

    assert {"FusedVisionBlock"} == kinds
    assert text.num_hidden_layers in swapped.values()
    assert vision.depth in swapped.values()
    assert isinstance(later_qwen.model.language_model.rotary_emb, fuse.RotaryTable)
    assert {} == dict(fuse.apply(later_qwen))  # nothing is left to swap


def test_text_layers_say_the_same(qwen: Any) -> None:
    fused = fused_copy(qwen)

    assert_near(run_text(qwen), run_text(fused))
    assert_near(run_text(qwen, 1), run_text(fused, 1))


def test_vision_blocks_say_the_same(qwen: Any) -> None:
    assert_near(run_vision(qwen), run_vision(fused_copy(qwen)))


def test_products_of_many_rows_activate_where_that_was_chosen(
    qwen: Any, later_qwen: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, int]] = []

    def multiply(x: Tensor, linear: nn.Linear, activation: activated.Activation) -> Tensor:
        seen.append((activation, x.numel() // x.shape[-1]))
        return activated.multiply(x, linear, activation)

    monkeypatch.setattr(activated, "choose", lambda *_: NUM_TOKENS)
    monkeypatch.setattr(activated, "_multiply_in_one", multiply)
    fused, later = fused_copy(qwen), fused_copy(later_qwen)

    assert_near(run_text(qwen), run_text(fused))
    assert {("silu_mul", NUM_TOKENS)} == set(seen)
    seen.clear()
    assert_near(run_text(qwen, NUM_TOKENS - 1), run_text(fused, NUM_TOKENS - 1))
    assert not seen
    assert_near(run_vision(qwen), run_vision(fused))
    assert {("quick_gelu", 40)} == set(seen)
    seen.clear()
    for expected, actual in zip(run_later_vision(later_qwen), run_later_vision(later), strict=True):
        assert_near(expected, actual)
    kind = "silu_mul" if later_qwen.config.model_type == "qwen2_5_vl" else "gelu_tanh"
    assert {(kind, 8 + 2 * 24 + 60)} == set(seen)


def test_encoders_rotate_in_their_products_where_that_was_chosen(
    qwen: Any, later_qwen: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def multiply(x: Tensor, linear: nn.Linear, *rest: Any) -> Tensor:
        seen.append(len(x))
        return rotated.multiply(x, linear, *rest)

    monkeypatch.setattr(rotated, "choose", lambda *_: 41)
    monkeypatch.setattr(rotated, "_multiply_in_one", multiply)
    fused, later = fused_copy(qwen), fused_copy(later_qwen)

    assert_near(run_vision(qwen), run_vision(fused))
    assert not seen
    for expected, actual in zip(run_later_vision(later_qwen), run_later_vision(later), strict=True):
        assert_near(expected, actual)
    assert {8 + 2 * 24 + 60} == set(seen)


@pytest.mark.parametrize("fp8", [False, True])
def test_halves_of_layers_are_added_in_their_products_where_that_was_chosen(
    qwen: Any, later_qwen: Any, monkeypatch: pytest.MonkeyPatch, fp8: bool
) -> None:
    """Also where, of fewer rows, they would stay in parts."""
    seen: list[int] = []
    asked: set[tuple[bool, bool]] = set()

    def choose(_linear: nn.Module, *, is_rms: bool, gives_fp8: bool) -> int:
        asked.add((is_rms, gives_fp8))
        return NUM_TOKENS

    def multiply(inner: Tensor | Fp8Rows, linear: nn.Linear | Fp8Linear, x: Tensor) -> Tensor:
        seen.append(x.numel() // x.shape[-1])
        added_up: Tensor = x + linear(inner)
        return added_up

    fusions = Fusions(fp8=fp8)
    text, vision = run_text(fused_copy(qwen, fusions)), run_vision(fused_copy(qwen, fusions))
    later = run_later_vision(fused_copy(later_qwen, fusions))
    monkeypatch.setattr(added, "choose", choose)
    monkeypatch.setattr(added, "multiply", multiply)
    monkeypatch.setattr(split, "choose", lambda *_, **__: split.Span(1, NUM_TOKENS))
    fused = fused_copy(qwen, fusions)

    assert {(True, fp8), (False, fp8)} == asked  # of the text model and of the encoder
    assert_near(text, run_text(fused))
    assert [NUM_TOKENS] * 2 * qwen.config.text_config.num_hidden_layers == seen
    seen.clear()
    run_text(fused, NUM_TOKENS - 1)
    assert not seen
    assert_near(vision, run_vision(fused))
    assert [40] * 2 * qwen.config.vision_config.depth == seen
    for expected, actual in zip(
        later, run_later_vision(fused_copy(later_qwen, fusions)), strict=True
    ):
        assert_near(expected, actual)


@pytest.mark.parametrize("fp8", [False, True])
def test_products_of_few_rows_stay_in_parts_where_that_was_chosen(
    qwen: Any, later_qwen: Any, monkeypatch: pytest.MonkeyPatch, fp8: bool
) -> None:
    seen: list[int] = []

    def multiply(x: Tensor | Fp8Rows, linear: nn.Linear | Fp8Linear) -> Tensor:
        rows = x.values if isinstance(x, Fp8Rows) else x
        seen.append(rows.numel() // rows.shape[-1])
        return split_before(x, linear)

    split_before = split.multiply
    fusions = Fusions(fp8=fp8)
    qwen_before, later_before = fused_copy(qwen, fusions), fused_copy(later_qwen, fusions)
    monkeypatch.setattr(split, "choose", lambda *_, **__: split.Span(1, NUM_TOKENS))
    monkeypatch.setattr(split, "multiply", multiply)
    fused, later = fused_copy(qwen, fusions), fused_copy(later_qwen, fusions)

    assert_near(run_text(qwen_before), run_text(fused))
    assert [NUM_TOKENS] * 2 * qwen.config.text_config.num_hidden_layers == seen
    seen.clear()
    assert_near(run_text(qwen_before, NUM_TOKENS + 1), run_text(fused, NUM_TOKENS + 1))
    assert not seen
    assert_near(run_text(qwen_before, 1), run_text(fused, 1))
    assert_near(run_text(later_before), run_text(later))
    monkeypatch.setattr(split, "choose", lambda *_, **__: split.Span(1, 10**6))
    seen.clear()
    assert_near(run_vision(qwen_before), run_vision(fused_copy(qwen, fusions)))
    assert not seen  # LayerNorm adds no parts


def test_norms_are_left_to_the_products_around_them_where_that_was_chosen(
    qwen: Any, later_qwen: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the products before them would add alone."""
    seen: list[int] = []
    normed: list[int] = []
    asked: set[tuple[folded.Behind, bool, int]] = set()

    def choose(
        _end: nn.Linear,
        _reader: nn.Linear,
        behind: folded.Behind,
        *,
        is_rms: bool,
        least_added: int,
    ) -> int:
        asked.add((behind, is_rms, least_added))
        return NUM_TOKENS

    def multiply(inner: Tensor, linear: nn.Linear, x: Tensor) -> folded.Summed:
        seen.append(x.numel() // x.shape[-1])
        return folded_before(inner, linear, x)

    def norm(product: folded.Folded, summed: folded.Summed) -> Tensor:
        normed.append(summed.totals.shape[1])
        return norm_before(product, summed)

    folded_before, norm_before = folded.multiply_and_sum_up, folded.Folded._multiply
    draw_norms(qwen)
    draw_norms(later_qwen)
    monkeypatch.setattr(rotated, "choose", lambda *_: 10**6)
    monkeypatch.setattr(activated, "choose", lambda *_: 10**7)
    monkeypatch.setattr(added, "choose", lambda *_, **__: NUM_TOKENS)
    monkeypatch.setattr(folded, "choose", choose)
    monkeypatch.setattr(folded, "multiply_and_sum_up", multiply)
    monkeypatch.setattr(folded.Folded, "_multiply", norm)
    fused = fused_copy(qwen)
    asked_of_qwen = set(asked)
    later = fused_copy(later_qwen)
    num_layers = qwen.config.text_config.num_hidden_layers
    depth = qwen.config.vision_config.depth

    assert_near(run_text(qwen), run_text(fused))
    assert [NUM_TOKENS] * 2 * num_layers == seen
    assert [NUM_TOKENS] * (2 * num_layers - 1) == normed  # behind the last layer is another norm
    assert_near(run_vision(qwen), run_vision(fused))
    assert [40] * 2 * depth == seen[2 * num_layers :]
    assert [40] * (2 * depth - 1) == normed[2 * num_layers - 1 :]
    heads = 2 * qwen.config.vision_config.num_heads
    dim = 2 * qwen.config.vision_config.embed_dim // heads
    assert {
        (folded.Behind(), True, NUM_TOKENS),
        (folded.Behind("silu_mul", least_rows=10**7), True, NUM_TOKENS),
        (folded.Behind(dim=dim, num_heads=heads, least_rows=10**6), False, NUM_TOKENS),
        (folded.Behind("quick_gelu", least_rows=10**7), False, NUM_TOKENS),
    } == asked_of_qwen
    seen.clear()
    assert_near(run_text(qwen, NUM_TOKENS - 1), run_text(fused, NUM_TOKENS - 1))
    assert not seen
    for expected, actual in zip(run_later_vision(later_qwen), run_later_vision(later), strict=True):
        assert_near(expected, actual)
    assert {8 + 2 * 24 + 60} == set(seen)
    assert_near(run_text(later_qwen), run_text(later))


def test_norms_stay_where_the_products_around_them_cannot_do_them(
    qwen: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No product in fp8 can, and none of an encoder whose heads are not interleaved."""
    draw_norms(qwen)
    in_fp8 = run_text(fused_copy(qwen, Fusions(fp8=True)))
    monkeypatch.setattr(folded, "choose", lambda *_, **__: 1)

    small, fused = fused_copy(qwen, Fusions(fp8=True)), fused_copy(qwen)

    assert torch.equal(in_fp8, run_text(small))
    assert_near(run_vision(qwen), run_vision(fused))
    ends = [module for module in fused.modules() if isinstance(module, fuse.Adding)]
    num_layers, depth = (
        qwen.config.text_config.num_hidden_layers,
        qwen.config.vision_config.depth,
    )
    assert 2 * num_layers + depth == sum(end.least_folded == 1 for end in ends)


def test_norms_keep_their_weights_where_nothing_is_left_to_products(qwen: Any) -> None:
    draw_norms(qwen)
    weights = [layer.post_attention_layernorm.weight for layer in qwen.model.language_model.layers]

    fused = fused_copy(qwen).model.language_model

    for weight, layer in zip(weights, fused.layers, strict=True):
        assert torch.equal(weight, layer.mlp_norm.weight)


def test_what_leaves_a_layer_is_rounded_once_and_its_own() -> None:
    x, delta = torch.tensor([[1.0, 256.0]]).bfloat16(), torch.tensor([[2.0, 1.0]]).bfloat16()
    parts = torch.tensor([[[1.0, 1.0]], [[1.0, 0.003]]])  # just over half a step from 256
    before = x.clone()

    carried, in_parts = fuse.leave(fuse.Carried(x, delta)), fuse.leave(fuse.InParts(x, parts))

    assert [[3.0, 256.0]] == carried.tolist()
    assert [[3.0, 258.0]] == in_parts.tolist()
    assert torch.equal(before, x)
    assert torch.equal(x, fuse.leave(folded.Summed(x, parts)))
    assert torch.equal(x, fuse.leave(x))


def draw_norms(model: nn.Module) -> None:
    """Weights and biases that are not those of a norm that nobody has trained."""
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data = torch.rand_like(parameter) + 0.5 * name.endswith("weight")


def test_everything_of_qwen2_vl_is_swapped(qwen: Any) -> None:
    depth = qwen.config.text_config.num_hidden_layers
    blocks = qwen.config.vision_config.depth

    expected = {
        "Qwen2VLDecoderLayer": depth,
        "Qwen2VLRMSNorm": 1,  # the last; the others went with their layers
        "Qwen2VLRotaryEmbedding": 1,
        "Qwen2VLVisionBlock": blocks,
        "LayerNorm": 1,  # the merger's
        "GELU": 1,  # its too
    }
    weights = sum(parameter.numel() for parameter in qwen.parameters())

    assert expected == dict(fuse.apply(qwen))
    assert weights == sum(parameter.numel() for parameter in qwen.parameters())
    assert {} == dict(fuse.apply(qwen))  # nothing is left to swap


def test_one_side_alone_can_be_swapped(qwen: Any) -> None:
    text, vision = copy.deepcopy(qwen), copy.deepcopy(qwen)
    swapped = fuse.apply(vision, Fusions(text=False))

    assert {"Qwen2VLVisionBlock", "LayerNorm", "GELU"} == set(swapped)
    assert "Qwen2VLVisionBlock" not in fuse.apply(text, Fusions(vision=False))
    assert_near(run_vision(qwen), run_vision(vision))
    assert_near(run_text(qwen), run_text(text))


def test_bfloat16_is_no_worse_than_before(qwen: Any) -> None:
    exact_text, exact_vision = run_text(qwen), run_vision(qwen)
    plain = copy.deepcopy(qwen).bfloat16()
    for ours, exact in (
        (plain.model.language_model.rotary_emb, qwen.model.language_model.rotary_emb),
        (plain.model.visual.rotary_pos_emb, qwen.model.visual.rotary_pos_emb),
    ):
        ours.inv_freq = exact.inv_freq.clone()  # `bfloat16()` casts it too, which no loader does
    fused = fused_copy(plain)

    for run, exact in ((run_text, exact_text), (run_vision, exact_vision)):
        before = (run(plain).float() - exact).norm()
        after = (run(fused).float() - exact).norm()

        assert after <= 1.1 * before


def test_the_input_of_the_first_layer_is_left_alone(qwen: Any) -> None:
    fused = fused_copy(qwen).model.language_model
    x = torch.randn(1, 5, fused.config.hidden_size)
    before = x.clone()

    fused(inputs_embeds=x, position_ids=torch.arange(5).expand(3, 1, 5), use_cache=False)

    assert torch.equal(before, x)


def test_attention_may_rotate_and_store_by_itself(qwen: Any) -> None:
    config = qwen.config.text_config
    shape = (64, config.num_key_value_heads, config.hidden_size // config.num_attention_heads)
    stored: dict[int, Tensor] = {}

    def attend(module: Any, q: Tensor, k: Tensor, v: Tensor, attention_mask: None, **kwargs: Any):  # type: ignore[no-untyped-def]
        keys, values = torch.zeros(shape), torch.zeros(shape)
        rows = torch.arange(16, 16 + NUM_TOKENS)
        heads, cos, sin = kwargs["merged"]
        rope.rotate_and_store_(heads, cos, sin, keys, values, rows)
        stored[module.layer_idx] = keys
        assert torch.equal(values[16 : 16 + NUM_TOKENS], v[0].transpose(0, 1))
        in_rows = keys[16 : 16 + NUM_TOKENS].transpose(0, 1)[None]
        out = torch.nn.functional.scaled_dot_product_attention(
            q, in_rows, v, is_causal=True, scale=kwargs["scaling"], enable_gqa=True
        )
        return out.transpose(1, 2), None

    AttentionInterface.register("rotating_flash", attend)
    fused = fused_copy(qwen, Fusions(rope_in_attention=True))
    fused.model.language_model.config._attn_implementation = "rotating_flash"

    actual = run_text(fused)

    assert_near(run_text(qwen), actual)
    assert len(stored) == config.num_hidden_layers


def test_llava_says_the_same(llava: Any) -> None:
    fused = copy.deepcopy(llava)
    swapped = fuse.apply(fused)
    pixels = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(1))

    expected = llava.model.get_image_features(pixels).pooler_output
    actual = fused.model.get_image_features(pixels).pooler_output

    assert swapped["LlamaDecoderLayer"] == 3
    assert swapped["CLIPAttention"] == swapped["CLIPMLP"] == 3
    assert swapped["Conv2d"] == 1
    assert_near(run_text(llava), run_text(fused))
    for one, other in zip(actual, expected, strict=True):
        assert_near(other, one)


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize(("height", "width"), [(42, 28), (45, 41)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_patches_of_a_convolution_come_from_a_product(
    height: int, width: int, has_bias: bool, memory_format: torch.memory_format
) -> None:
    """Also of pictures that patches do not divide, whose last pixels no patch has."""
    conv = nn.Conv2d(3, 24, (14, 7), (14, 7), bias=has_bias)
    x = torch.randn(2, 3, height, width).to(memory_format=memory_format)

    fused = fuse.FusedPatches(conv)

    assert conv.weight is fused.weight
    assert_near(conv(x), fused(x))
    assert conv(x[:0]).shape == fused(x[:0]).shape


@pytest.mark.parametrize(
    "change", [{"stride": 4}, {"padding": 1}, {"dilation": 2}, {"groups": 3}], ids=str
)
def test_a_convolution_of_another_kind_stays(change: dict[str, Any]) -> None:
    kind: dict[str, Any] = {"kernel_size": 8, "stride": 8, **change}
    model = nn.Sequential(nn.Conv2d(3, 24, **kind), nn.Conv2d(24, 8, 2, 2))

    assert {"Conv2d": 1} == fuse.apply(model)
    assert isinstance(model[0], nn.Conv2d)


def test_siglip_says_the_same() -> None:
    torch.manual_seed(5)
    config = SiglipVisionConfig(
        hidden_size=36,
        intermediate_size=56,
        num_hidden_layers=3,
        num_attention_heads=3,
        image_size=56,
        patch_size=14,
    )
    model: Any = _frozen(SiglipVisionModel(config))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    fused = copy.deepcopy(model)
    swapped = fuse.apply(fused)
    pixels = torch.randn(2, 3, 56, 56)

    assert 3 == swapped["SiglipAttention"]
    assert 3 <= swapped["SiglipMLP"]  # and that of the head, where it has one
    assert_near(model(pixels).last_hidden_state, fused(pixels).last_hidden_state)


@pytest.mark.parametrize("model_type", ["qwen2", "mistral"])
@pytest.mark.parametrize("window", [None, 5])
def test_other_text_models_say_the_same(model_type: str, window: int | None) -> None:
    torch.manual_seed(4)
    text = AutoConfig.for_model(
        model_type,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        vocab_size=100,
        max_position_embeddings=128,
        sliding_window=window,
        use_sliding_window=window is not None,
        max_window_layers=1,  # of Qwen2: the first looks at everything
    )
    vision = CLIPVisionConfig(hidden_size=32, num_attention_heads=2, num_hidden_layers=1)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=99)
    model: Any = LlavaForConditionalGeneration(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    fused = copy.deepcopy(_frozen(model))
    swapped = fuse.apply(fused)

    assert 3 == swapped["Qwen2DecoderLayer" if model_type == "qwen2" else "MistralDecoderLayer"]
    assert_near(run_text(model), run_text(fused))


def test_what_is_not_known_is_left_alone(llava: Any) -> None:
    text = llava.model.language_model
    text.layers[1].mlp.act_fn = nn.ReLU()
    text.rotary_emb.rope_type = "dynamic"
    llava.model.vision_tower.encoder.layers[0].mlp.activation_fn = nn.GELU()
    expected = run_text(llava)

    swapped = fuse.apply(llava)

    assert swapped["LlamaDecoderLayer"] == 2
    assert swapped["CLIPMLP"] == 2
    assert "LlamaRotaryEmbedding" not in swapped
    assert_near(expected, run_text(llava))


def test_packed_layers_say_the_same(
    qwen: Any, later_qwen: Any, llava: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "MIN_WEIGHTS", 1)
    for model in (qwen, later_qwen, llava):
        fused = fused_copy(model, Fusions(packs=True))
        if not any(isinstance(module, PackedLinear) for module in fused.modules()):
            pytest.skip("torch has no such products on this processor")
        hidden = run_text(model, 70)

        assert_near(hidden, run_text(fused, 70))
        assert_near(model.lm_head(hidden), fused.lm_head(hidden))
        if model is qwen:
            assert_near(run_vision(model), run_vision(fused))


def test_fp8_stays_near(qwen: Any) -> None:
    """Random weights are harder than trained ones: nothing in them is sparse or small."""
    fused = fused_copy(qwen, Fusions(fp8=True))
    kinds = {type(module).__name__ for module in fused.modules()}

    assert "Fp8Linear" in kinds
    for run in (run_text, run_vision):
        exact, found = run(qwen), run(fused)
        assert not torch.equal(exact, found)
        assert torch.cosine_similarity(exact.flatten(), found.flatten(), dim=0) > 0.9


def test_what_a_product_in_fp8_reads_is_activated_into_fp8(qwen: Any) -> None:
    fused = fused_copy(qwen, Fusions(fp8=True))
    seen: list[tuple[bool, bool]] = []

    def look(inner: fuse.Activated, _inputs: Any, made: Tensor | Fp8Rows) -> None:
        seen.append((inner.gives_fp8, isinstance(made, Fp8Rows)))

    for module in fused.modules():
        if isinstance(module, fuse.Activated):
            module.register_forward_hook(look)
    run_text(fused)
    run_vision(fused)

    assert {(True, True)} == set(seen)


def test_no_product_in_16_bits_activates_into_fp8(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activated, "choose", lambda *_: 1)
    linear, reader = (nn.Linear(32, 32, dtype=torch.bfloat16) for _ in range(2))
    x = torch.randn(3, 32, dtype=torch.bfloat16)

    inner = fuse.Activated(linear, Fp8Linear(reader), "quick_gelu")

    expected = activated.activate_in_fp8(linear(x), "quick_gelu")
    assert torch.equal(expected.read(), inner(x).read())


def test_encoders_in_fp8_activate_and_rotate_in_their_products_where_that_was_chosen(
    qwen: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With scales that are known before there is a result, as far off as those by its largest number."""
    seen: set[str] = set()

    def activate(
        rows: Fp8Rows, linear: Fp8Linear, activation: activated.Activation, bound: activated.Bound
    ) -> Fp8Rows:
        seen.add(activation)
        inner = activated.activate(linear(rows).float(), activation)
        scales = rows.scales * bound.share + bound.rest
        assert (inner.abs() <= scales * quantised.MOST).all()
        return Fp8Rows((inner / scales).to(quantised.FP8), scales)

    def rotate(x: Fp8Rows, linear: Fp8Linear, *rest: Any) -> Tensor:
        seen.add("rotated")
        return rotated.multiply(x, linear, *rest)

    exact, apart = run_vision(qwen), run_vision(fused_copy(qwen, Fusions(fp8=True)))
    monkeypatch.setattr(activated, "choose", lambda *_: 1)
    monkeypatch.setattr(rotated, "choose", lambda *_: 1)
    monkeypatch.setattr(activated, "_multiply_in_one_in_fp8", activate)
    monkeypatch.setattr(rotated, "_multiply_in_one", rotate)

    in_one = run_vision(fused_copy(qwen, Fusions(text=False, fp8=True)))

    assert {"quick_gelu", "rotated"} == seen
    assert not torch.equal(apart, in_one)
    assert (in_one - exact).norm() < 1.2 * (apart - exact).norm()


def test_an_encoder_in_fp8_knows_how_large_its_values_become(
    qwen: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the weights of these: those of queries and keys are much smaller here."""
    draw_norms(qwen)
    depth, width = qwen.config.vision_config.depth, qwen.config.vision_config.embed_dim
    for block in qwen.model.visual.blocks:
        block.attn.qkv.weight.data[2 * width :] *= 100.0
    seen: list[float] = []
    quantise = attended.quantise

    def look(found: Tensor, factors: Tensor) -> Fp8Rows:
        seen.append((found * factors).abs().max().item())
        return quantise(found, factors)

    monkeypatch.setattr(attended, "quantise", look)
    run_vision(fused_copy(qwen, Fusions(fp8=True)))

    assert depth == len(seen)
    assert all(quantised.MOST / 32 < most <= quantised.MOST for most in seen)


@pytest.mark.parametrize(("width", "kind"), [(48, Fp8Linear), (40, nn.Linear)])
def test_fp8_passes_over_widths_that_it_cannot_multiply(width: int, kind: type[nn.Module]) -> None:
    torch.manual_seed(1)
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=40,  # made even
        num_hidden_layers=1,
        num_attention_heads=width // 8,
        num_key_value_heads=width // 8,
        vocab_size=20,
    )
    model = _frozen(LlamaForCausalLM(config))
    exact = model.model(input_ids=torch.tensor([[1, 2, 3]]), use_cache=False).last_hidden_state

    fuse.apply(model, Fusions(fp8=True))
    found = model.model(input_ids=torch.tensor([[1, 2, 3]]), use_cache=False).last_hidden_state

    mlp: Any = model.model.layers[0].mlp
    assert isinstance(mlp.reader, kind)
    assert isinstance(mlp.down, kind)
    assert isinstance(model.model.layers[0].attention.out, nn.Linear)  # too narrow for a pass
    assert (found - exact).norm() < 0.1 * exact.norm()


def test_only_a_layer_that_none_follows_gives_the_ends_alone(qwen: Any) -> None:
    text = qwen.model.language_model
    x, ends = torch.randn(1, NUM_TOKENS, text.config.hidden_size), Ends(torch.tensor([4, 22]))
    expected = text(inputs_embeds=x, use_cache=False).last_hidden_state
    fuse.apply(qwen)
    *others, last = text.layers
    assert last.gives_ends
    assert not any(layer.gives_ends for layer in others)

    with using(TextContext((), (), torch.zeros(0), (), (), (), ends=ends)):
        cut = text(inputs_embeds=x, use_cache=False).last_hidden_state
        last.gives_ends = False  # as where a layer follows that is no fused one
        whole = text(inputs_embeds=x, use_cache=False).last_hidden_state

    assert ends.are_cut
    assert_near(expected[:, ends.rows], cut)
    assert_near(expected, whole)


def test_positions_go_with_layers_that_are_left_alone() -> None:
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=50,
        hidden_act="gelu",
    )
    model: Any = _frozen(LlamaForCausalLM(config))
    ids = torch.arange(NUM_TOKENS)[None]
    expected = model(ids, use_cache=False).logits

    swapped = fuse.apply(model)

    assert not swapped["LlamaDecoderLayer"]
    assert_near(expected, model(ids, use_cache=False).logits)


def test_a_cache_of_transformers_own_is_refused(qwen: Any) -> None:
    fused = fused_copy(qwen)

    with pytest.raises(ValueError, match="use_cache=False"):
        fused(input_ids=torch.tensor([[1, 2, 3]]), use_cache=True)


def test_a_bias_that_one_part_lacks_is_zero() -> None:
    parts = [nn.Linear(3, 2), nn.Linear(3, 4, bias=False)]
    x = torch.randn(5, 3)

    merged = fuse.merge_linears(parts)

    torch.testing.assert_close(merged(x), torch.cat([part(x) for part in parts], dim=1))
