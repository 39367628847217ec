"""Phi-3.5-vision against its published description, and against itself in batches of any kind."""

import itertools
import json
import random
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, processors
from tokenizers.models import BPE
from transformers import AutoTokenizer, Phi3Config
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

from bench.phi3_v import FIRST_TOKENS, LATER_TOKENS, write_phi3_v
from engine import LLM, Request, Result, SamplingParams, fuse
from engine.errors import BadConfig
from engine.families.phi3_v import Phi3V, fit, lay_on_white
from engine.families.phi3_v_model import Phi3VConfig, Phi3VForCausalLM, SwitchedRotary
from engine.families.protocol import ImageTooNarrowError, TileLimit
from media.images import from_pil
from tests.engine import phi3_v_reference as published
from tests.engine.families import NUM_ASKED
from tests.engine.phi3_v_reference import Phi3VReference
from tests.engine.pictures import GREEDY, as_array, data_url, draw, encode, error_of, token_ids
from tests.engine.tiny_phi3_v import ALL_KV_HEADS, DEFAULT, write_tiny_phi3_v
from tests.engine.ways import in_pieces, keeping_prefixes

NUM_MIXED = 100
NUM_MIXED_OTHER = NUM_ASKED or 30
LIMITS = {"image": 3}
TILE_PX = 336
QUESTION = "What is the content of each image?"
# The weights of microsoft/Phi-3.5-vision-instruct by its model.safetensors.index.json, 592 names:
# {a,b} stands for each, {n} for the numbers of a tower's layers.
PUBLISHED_NAMES = """
lm_head.weight
model.embed_tokens.weight
model.norm.weight
model.layers.{32}.{input_layernorm,post_attention_layernorm}.weight
model.layers.{32}.mlp.{down_proj,gate_up_proj}.weight
model.layers.{32}.self_attn.{o_proj,qkv_proj}.weight
model.vision_embed_tokens.{glb_GN,sub_GN}
model.vision_embed_tokens.img_projection.{0,2}.{bias,weight}
model.vision_embed_tokens.img_processor.vision_model.embeddings.class_embedding
model.vision_embed_tokens.img_processor.vision_model.embeddings.{patch,position}_embedding.weight
model.vision_embed_tokens.img_processor.vision_model.{pre_layrnorm,post_layernorm}.{bias,weight}
model.vision_embed_tokens.img_processor.vision_model.encoder.layers.{24}.{layer_norm1,layer_norm2}.{bias,weight}
model.vision_embed_tokens.img_processor.vision_model.encoder.layers.{24}.mlp.{fc1,fc2}.{bias,weight}
model.vision_embed_tokens.img_processor.vision_model.encoder.layers.{24}.self_attn.{k,out,q,v}_proj.{bias,weight}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_phi3_v(tmp_path_factory.mktemp("phi3_v"), seed=4)


@pytest.fixture(scope="module")
def reference(folder: Path) -> Phi3VReference:
    return Phi3VReference(folder)


@pytest.fixture(scope="module")
def phi(folder: Path) -> Iterator[LLM]:
    with LLM(str(folder), limit_mm_per_prompt=LIMITS) as llm:
        yield llm


# --- the checkpoint ----------------------------------------------------------------------------------


def _spelled_out(pattern: str) -> list[str]:
    pieces = pattern.replace("}", "{").split("{")
    choices = [[piece] if index % 2 == 0 else _choices(piece) for index, piece in enumerate(pieces)]
    return ["".join(chosen) for chosen in itertools.product(*choices)]


def _choices(piece: str) -> list[str]:
    names = piece.split(",")
    return names if len(names) > 1 else [str(n) for n in range(int(piece))]


def test_modules_are_named_as_the_published_weights(tmp_path: Path) -> None:
    names = [name for line in PUBLISHED_NAMES.split() for name in _spelled_out(line)]
    with torch.device("meta"):
        model = Phi3VForCausalLM(Phi3VConfig.from_pretrained(write_phi3_v(tmp_path)))

    assert 592 == len(names)
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    assert 8_293_242_880 == 2 * sum(weight.numel() for weight in model.parameters())


def test_published_config_is_read_word_by_word(tmp_path: Path) -> None:
    config = Phi3VConfig.from_pretrained(write_phi3_v(tmp_path))
    rope = config.text_config.rope_parameters

    assert (3072, 32, 32064) == (
        config.text_config.hidden_size,
        config.text_config.num_hidden_layers,
        config.text_config.vocab_size,
    )
    assert (1024, 24, 336, 14) == (
        config.vision_config.hidden_size,
        config.vision_config.num_hidden_layers,
        config.vision_config.image_size,
        config.vision_config.patch_size,
    )
    assert ("longrope", 4096, 48) == (
        rope["rope_type"],
        rope["original_max_position_embeddings"],
        len(rope["short_factor"]),
    )
    assert torch.bfloat16 == config.dtype


@pytest.mark.parametrize("end", ["<|end|>", "<|endoftext|>"])
def test_answer_ends_where_its_turn_does(phi: LLM, end: str) -> None:
    """generation_config.json, as published, names a token that is never said."""
    end_id = phi.get_tokenizer().convert_tokens_to_ids(end)
    params = SamplingParams(temperature=0, max_tokens=4, logit_bias={end_id: 100.0})

    (result,) = phi.generate("<|user|>\nhi<|end|>\n<|assistant|>\n", params, use_tqdm=False)

    (output,) = result.outputs
    assert ("stop", [end_id]) == (output.finish_reason, list(output.token_ids))


def _edit(folder: Path, name: str, edit: Any) -> None:
    content = json.loads((folder / name).read_text())
    edit(content)
    (folder / name).write_text(json.dumps(content))


ODD_CONFIGS: Mapping[str, Any] = {
    "order": lambda c: c["embd_layer"].update(hd_transform_order="glb_sub"),
    "projection": lambda c: c["embd_layer"].update(projection_cls="linear"),
    "encoder": lambda c: c["img_processor"].update(name="siglip"),
    "width": lambda c: c["img_processor"].update(image_dim_out=7),
    "window": lambda c: c.update(sliding_window=100),
    "rope": lambda c: c["rope_scaling"].update(type="yarn"),
    "activation": lambda c: c.update(hidden_act="gelu"),
    "part of a head": lambda c: c.update(partial_rotary_factor=0.5),
    "no embd_layer": lambda c: c.pop("embd_layer"),
}


@pytest.mark.parametrize("what", ODD_CONFIGS)
def test_variant_that_was_never_published_is_one_line(tmp_path: Path, what: str) -> None:
    write_tiny_phi3_v(tmp_path)
    _edit(tmp_path, "config.json", ODD_CONFIGS[what])

    with pytest.raises(BadConfig) as caught:
        LLM(str(tmp_path))

    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("trusts", [False, True])
def test_code_beside_the_weights_is_not_run_whoever_trusts_it(tmp_path: Path, trusts: bool) -> None:
    ran = tmp_path / "ran"
    folder = write_tiny_phi3_v(tmp_path / "model")
    for name, classes in (
        ("config.json", {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}),
        ("preprocessor_config.json", {"AutoProcessor": "code.Processor"}),
    ):
        _edit(folder, name, lambda content, classes=classes: content.update(auto_map=classes))
    (folder / "code.py").write_text(f"open({str(ran)!r}, 'w')\n")

    LLM(str(folder), trust_remote_code=trusts).close()

    assert not ran.exists()


@pytest.mark.parametrize("has_both", [True, False])
def test_word_embeddings_are_found_under_either_name(
    folder: Path, tmp_path: Path, has_both: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(folder, tmp_path / "model")
    weights = load_file(copy / "model.safetensors")
    embeddings = weights["model.embed_tokens.weight"]
    weights["model.vision_embed_tokens.wte.weight"] = embeddings.clone()
    if not has_both:
        del weights["model.embed_tokens.weight"]
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})

    with LLM(str(copy)) as llm:
        loaded: Any = llm.engine.checkpoint.family.embed
        assert torch.equal(embeddings, loaded.weight)
    assert ("", "") == capfd.readouterr()


# --- pictures ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "num_crops", "padded", "tokens"),
    [  # what the published processor says, by the tests of its port to JavaScript
        ((224, 224), 4, (672, 672), 757),
        ((1280, 640), 4, (672, 336), 457),
        ((1280, 640), 16, (1680, 1008), 2353),
    ],
)
def test_sizes_and_tokens_are_those_of_the_published_processor(
    size: tuple[int, int], num_crops: int, padded: tuple[int, int], tokens: int
) -> None:
    tiles = fit(*size, num_crops, TILE_PX)

    assert padded == (tiles.columns * TILE_PX, tiles.rows * TILE_PX)
    assert tokens == tiles.num_tokens(side=12)


@given(st.integers(1, 9000), st.integers(1, 9000), st.integers(1, 40))
def test_tokens_follow_the_published_formula(width: int, height: int, num_crops: int) -> None:
    try:
        tiles = fit(width, height, num_crops, TILE_PX)
    except ImageTooNarrowError:
        assert TILE_PX * num_crops < max(width, height) / min(width, height)
        return

    padded = tiles.columns * TILE_PX, tiles.rows * TILE_PX
    assert published.num_tokens(*padded) == tiles.num_tokens(side=12)
    assert tiles.rows * tiles.columns <= num_crops
    assert tiles.width_px <= padded[0] < tiles.width_px + TILE_PX
    assert tiles.height_px <= padded[1] < tiles.height_px + TILE_PX


def _sizes(num: int) -> list[tuple[int, int]]:
    rng = random.Random("sizes")
    sides = [(rng.randint(11, 300), rng.randint(11, 300)) for _ in range(num)]
    return [*sides, (2, 50), (50, 2), (56, 56), (84, 28), (28, 84)]


@pytest.mark.parametrize("num_crops", [1, 4, 16])
def test_pictures_are_laid_on_white_as_published(num_crops: int) -> None:
    for seed, (width, height) in enumerate(_sizes(20)):
        picture = draw(seed, width, height)
        tiles = fit(width, height, num_crops, 28)
        laid = lay_on_white(picture, tiles, 28)
        expected = published.hd_transform(picture, num_crops, 28)

        assert (tiles.columns * 28, tiles.rows * 28) == laid.size == expected.size
        assert np.array_equal(as_array(expected), as_array(laid)), (width, height)


def test_padding_is_white_and_half_above() -> None:
    black = Image.new("RGB", (90, 30))
    laid = as_array(lay_on_white(black, fit(90, 30, 4, 28), 28))  # 84 x 28: nothing to pad
    wide = as_array(lay_on_white(black, fit(90, 30, 2, 28), 28))  # 56 x 18 in 56 x 28

    assert laid.max() == 0
    assert [255] * 5 + [0] * 18 + [255] * 5 == wide[:, 0, 0].tolist()


def test_features_are_those_of_the_description(phi: LLM, reference: Phi3VReference) -> None:
    family = phi.engine.checkpoint.family
    pictures = [draw(seed, *size) for seed, size in enumerate(_sizes(8))]
    limit = TileLimit(reference.num_crops)
    plans = [family.plan_picture(*picture.size, limit) for picture in pictures]
    visuals = [family.cut_picture(*pair) for pair in zip(pictures, plans, strict=True)]

    with torch.inference_mode():
        together = family.encode(visuals)
        for picture, plan, visual, features in zip(pictures, plans, visuals, together, strict=True):
            expected = reference.see(picture)
            (alone,) = family.encode([visual])

            assert expected.shape == (plan.num_rows, family.hidden_size) == features.shape
            assert torch.allclose(expected, features, rtol=1e-4, atol=1e-4)
            assert torch.allclose(alone, features, rtol=1e-4, atol=1e-4)


def test_many_tiles_are_read_in_calls_of_so_many_patches(
    phi: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request may want 256 tiles of one picture, and the tower's memory is the device's."""
    family = phi.engine.checkpoint.family
    assert isinstance(family, Phi3V)
    plans = [family.plan_picture(300, 200, TileLimit(num)) for num in (16, 4)]
    visuals = [family.cut_picture(draw(seed, 300, 200), plan) for seed, plan in enumerate(plans)]
    expected = family.encode(visuals)
    patches_a_tile = plans[0].num_patches // (1 + plans[0].layout.rows * plans[0].layout.columns)
    monkeypatch.setattr("engine.families.tiles.MAX_BATCH_PATCHES", 3 * patches_a_tile)
    tower, sizes = family._tower, []

    def see(pixels: torch.Tensor) -> torch.Tensor:
        sizes.append(len(pixels))
        return tower(pixels)

    monkeypatch.setattr(family, "_tower", see)
    found = family.encode(visuals)

    num_tiles = sum(plan.num_patches for plan in plans) // patches_a_tile
    assert num_tiles == sum(sizes)
    assert 3 == max(sizes)
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_result_says_what_was_seen_of_a_picture(phi: LLM) -> None:
    (result,) = phi.generate(
        {"prompt": "<|image_1|>", "multi_modal_data": {"image": draw(1, 100, 60)}},
        GREEDY,
        use_tqdm=False,
    )

    (image,) = result.images
    assert (100, 60) == (image.width, image.height)
    assert (84, 56) == (image.used_width, image.used_height)  # 3 x 2 tiles of 28 px
    assert 4 * (3 * 2 + 1) + 1 + 2 * (2 + 1) == image.num_tokens
    assert image.num_tokens + 2 == len(result.prompt_token_ids or [])  # and <s> before and behind


def test_picture_too_narrow_for_a_pixel_is_refused(phi: LLM) -> None:
    line = Image.new("RGB", (400, 1))  # 6 tiles of 28 px along: 168 px at most
    asked = {"prompt": "<|image_1|>", "multi_modal_data": {"image": line}}

    assert "one side is over 168 times the other" in error_of(
        phi.generate(asked, GREEDY, use_tqdm=False)
    )


# --- num_crops -----------------------------------------------------------------------------------------


def _columns_and_rows(results: Sequence[Result]) -> list[tuple[int, int]]:
    assert [] == [result.error for result in results if result.error]
    return [(image.used_width, image.used_height) for r in results for image in r.images]


def test_num_crops_of_the_innermost_level_counts(folder: Path) -> None:
    picture = draw(3, 90, 90)
    asked: dict[str, Any] = {"prompt": "<|image_1|>", "multi_modal_data": {"image": picture}}
    one: dict[str, Any] = {**asked, "mm_processor_kwargs": {"num_crops": 1}}
    words = {"num_crops": 9}
    part = {"type": "image", "image": picture, "detail": "low"}

    with LLM(str(folder), mm_processor_kwargs={"num_crops": 4}) as llm:
        of_engine = llm.generate([asked, one], GREEDY, use_tqdm=False)
        of_call = llm.generate([asked, one], GREEDY, use_tqdm=False, mm_processor_kwargs=words)
        of_part = llm.chat([{"role": "user", "content": [part]}], GREEDY, use_tqdm=False)
    with LLM(str(folder)) as llm:
        of_checkpoint = llm.generate(asked, GREEDY, use_tqdm=False)

    assert [(56, 56), (28, 28)] == _columns_and_rows(of_engine)
    assert [(84, 84), (28, 28)] == _columns_and_rows(of_call)
    assert [(28, 28)] == _columns_and_rows(of_part)
    assert [(56, 56)] == _columns_and_rows(of_checkpoint)  # 6 allow no more


def test_prompt_that_is_too_long_is_told_how_many_tiles_would_fit(folder: Path) -> None:
    asked: dict[str, Any] = {
        "prompt": f"<|image_1|><|image_2|>{QUESTION}",
        "multi_modal_data": {"image": [draw(1, 90, 90), draw(2, 90, 30)]},
    }

    with LLM(str(folder), limit_mm_per_prompt=LIMITS, max_model_len=80) as llm:
        (refused,) = llm.generate(asked, GREEDY, use_tqdm=False)
        words = {"num_crops": 3}  # a tile for the first, three for the second
        (taken,) = llm.generate(asked, GREEDY, use_tqdm=False, mm_processor_kwargs=words)
        one_more = {"num_crops": 4}
        (over,) = llm.generate(asked, GREEDY, use_tqdm=False, mm_processor_kwargs=one_more)

    assert refused.error is not None
    assert refused.error.message.endswith("use num_crops=3 or less, or fewer images.")
    assert taken.error is None
    assert over.error is not None


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ({"num_crops": 0}, "num_crops'] must be a whole number of 1 or more"),
        ({"num_crops": 257}, "num_crops is 257. Give 256 at most."),
        ({"min_pixels": 784}, "min_pixels is not for this model. Use num_crops, or leave it out."),
    ],
)
def test_words_that_mean_nothing_here_are_refused(
    phi: LLM, folder: Path, words: dict[str, int], text: str
) -> None:
    asked = {"prompt": "<|image_1|>", "multi_modal_data": {"image": draw(1)}}

    assert text in error_of(
        phi.generate({**asked, "mm_processor_kwargs": words}, GREEDY, use_tqdm=False)
    )
    with pytest.raises(BadConfig, match="num_crops"):
        LLM(str(folder), mm_processor_kwargs=words)


def test_num_crops_is_refused_by_a_model_without_tiles(llm: LLM, tiny_folder: Path) -> None:
    prompt = "<|vision_start|><|image_pad|><|vision_end|>"
    asked = {
        "prompt": prompt,
        "multi_modal_data": {"image": draw(1)},
        "mm_processor_kwargs": {"num_crops": 4},
    }

    assert "num_crops is not for this model" in error_of(
        llm.generate(asked, GREEDY, use_tqdm=False)
    )
    with pytest.raises(BadConfig, match="num_crops is not for this model"):
        LLM(str(tiny_folder), mm_processor_kwargs={"num_crops": 4})


# --- prompts -------------------------------------------------------------------------------------------


def test_pieces_around_pictures_are_tokenised_one_by_one(phi: LLM, folder: Path) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(folder, config=Phi3Config())
    prompt = f"<|user|>\n<|image_1|>\n<|image_2|> and {QUESTION}<|end|>\n<|assistant|>\n"
    pictures = [draw(1, 28, 28), draw(2, 90, 28)]

    (result,) = phi.generate(
        {"prompt": prompt, "multi_modal_data": {"image": pictures}}, GREEDY, use_tqdm=False
    )

    image_id = tokenizer.convert_tokens_to_ids("<|image|>")
    expected: list[int] = []
    for text, image in itertools.zip_longest(
        ["<|user|>\n", "\n", f" and {QUESTION}<|end|>\n<|assistant|>\n"], result.images
    ):
        expected += tokenizer(text)["input_ids"]
        expected += [image_id] * image.num_tokens if image else []
    assert prompt == result.prompt
    assert expected == list(result.prompt_token_ids or [])
    assert 3 == expected.count(tokenizer.bos_token_id)


def _write_llama_tokenizer(folder: Path) -> None:
    """The published form: sentencepiece's, with bytes for what it does not know."""
    special = (*FIRST_TOKENS, *LATER_TOKENS)
    spelled = ["▁", *map(chr, range(33, 127)), "▁i", "is", "▁is"]
    names = [*FIRST_TOKENS, *(f"<0x{byte:02X}>" for byte in range(256)), *spelled]
    vocab = {name: index for index, name in enumerate(names)}
    merges = [("▁", "i"), ("i", "s"), ("▁i", "s")]
    model = BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True)  # noqa: S106
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(
        [
            AddedToken(name, special=True, normalized=False, rstrip=name.startswith("<|"))
            for name in special
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    words = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "legacy": False}
    _edit(folder, "tokenizer_config.json", lambda content: content.update(words))


def test_tokenizer_of_the_published_form_is_read_alike(tmp_path: Path) -> None:
    folder = write_tiny_phi3_v(tmp_path, vocab_size=420)
    _write_llama_tokenizer(folder)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder, config=Phi3Config())
    pieces = ["<|user|>\n", "\nthis is", f" {QUESTION}<|end|>\n<|assistant|>\n"]
    asked = {
        "prompt": "<|image_1|>".join(pieces[:2]) + "<|image_2|>" + pieces[2],
        "multi_modal_data": {"image": [draw(1), draw(2)]},
    }
    parts = [{"type": "image", "image": draw(1)}, {"type": "text", "text": "this is <|end|> it"}]
    typed = ["▁", "<0x0A>", *"th", "is", "▁is", "▁", *"<|end|>", "▁i", "t"]

    with LLM(str(folder), limit_mm_per_prompt=LIMITS) as llm:
        results = [
            *llm.generate(asked, GREEDY, use_tqdm=False),
            *llm.chat([{"role": "user", "content": parts}], GREEDY, use_tqdm=False),
        ]

    image_id = tokenizer.convert_tokens_to_ids("<|image|>")
    generated, chatted = (
        [index for index in result.prompt_token_ids or [] if index != image_id]
        for result in results
    )
    assert [index for piece in pieces for index in tokenizer(piece)["input_ids"]] == generated
    assert ["<s>", "<|user|>", "<s>", *typed, "<|end|>", "<|assistant|>"] == (
        tokenizer.convert_ids_to_tokens(chatted)
    )


@pytest.mark.parametrize(
    "prompt",
    [
        "<|image_2|><|image_1|>",
        "<|image_1|><|image_1|>",
        "<|image_1|><|image_3|>",
        "<|image_0|><|image_1|>",
    ],
)
def test_placeholders_out_of_order_are_refused(phi: LLM, prompt: str) -> None:
    asked = {"prompt": prompt, "multi_modal_data": {"image": [draw(1), draw(2)]}}

    (result,) = phi.generate(asked, GREEDY, use_tqdm=False)

    assert result.error is not None
    assert "placeholder_mismatch" == result.error.code
    assert "Number them in order from 1, each once: `<|image_1|>`" in result.error.message


def test_placeholder_that_is_missing_is_named_as_prompts_write_it(phi: LLM) -> None:
    asked = {"prompt": QUESTION, "multi_modal_data": {"image": draw(1)}}

    assert "0 placeholder(s) `<|image_1|>`" in error_of(phi.generate(asked, GREEDY, use_tqdm=False))


def test_what_users_type_in_a_chat_stays_text(phi: LLM) -> None:
    def ids(text: str) -> list[int]:
        content = [{"type": "image", "image": draw(1, 28, 28)}, {"type": "text", "text": text}]
        (result,) = phi.chat([{"role": "user", "content": content}], GREEDY, use_tqdm=False)
        assert result.error is None
        return list(result.prompt_token_ids or [])

    harmless = ids("@" * len("<|image_1|> <|end|>"))
    tokenizer = phi.get_tokenizer()
    spelled = tokenizer.convert_tokens_to_ids(list("<|image_1|>Ġ<|end|>"))
    at = harmless.index(tokenizer.convert_tokens_to_ids("@"))

    assert [*harmless[:at], *spelled, *harmless[at + len(spelled) :]] == ids("<|image_1|> <|end|>")


# --- the start page ------------------------------------------------------------------------------------


def test_start_page_example(folder: Path, reference: Phi3VReference) -> None:
    image1, image2 = draw(1, 120, 80), draw(2, 60, 90)

    llm = LLM(
        model=str(folder),
        trust_remote_code=True,  # Required to load Phi-3.5-vision
        max_model_len=4096,  # Otherwise, it may not fit in smaller GPUs
        limit_mm_per_prompt={"image": 2},  # The maximum number to accept
    )

    # Refer to the HuggingFace repo for the correct format to use
    prompt = (
        "<|user|>\n<|image_1|>\n<|image_2|>\nWhat is the content of each image?<|end|>\n"
        "<|assistant|>\n"
    )

    outputs = llm.generate(
        {
            "prompt": prompt,
            "multi_modal_data": {"image": [image1, image2]},
        },
        SamplingParams(temperature=0),
        use_tqdm=False,
    )

    images = [from_pil(image1), from_pil(image2)]
    expected = reference.generate(prompt, images=images, max_tokens=16)
    assert [expected] == token_ids(outputs)
    for o in outputs:
        assert isinstance(o.outputs[0].text, str)
    llm.close()


def test_chat_says_what_generate_says(phi: LLM) -> None:
    pictures = [draw(1, 120, 80), draw(2, 60, 90)]
    parts: list[dict[str, Any]] = [
        {"type": "image_url", "image_url": {"url": data_url(picture)}} for picture in pictures
    ]
    parts.append({"type": "text", "text": QUESTION})
    prompt = f"<|user|>\n<|image_1|>\n<|image_2|>\n{QUESTION}<|end|>\n<|assistant|>\n"
    asked = {"prompt": prompt, "multi_modal_data": {"image": [encode(p) for p in pictures]}}

    chatted = phi.chat([{"role": "user", "content": parts}], GREEDY, use_tqdm=False)

    assert token_ids(phi.generate(asked, GREEDY, use_tqdm=False)) == token_ids(chatted)


def test_frames_of_a_clip_are_so_many_pictures(phi: LLM) -> None:
    frames = [draw(seed, 60, 40) for seed in range(3)]
    pictures = [{"type": "image", "image": frame} for frame in frames]
    question = {"type": "text", "text": QUESTION}

    of_clip, of_pictures = (
        phi.chat([{"role": "user", "content": [*parts, question]}], GREEDY, use_tqdm=False)
        for parts in ([{"type": "video", "video": frames}], pictures)
    )

    assert token_ids(of_pictures) == token_ids(of_clip)


# --- LongRoPE ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_positions", [299, 300, 301, 900])
def test_positions_are_rotated_as_transformers_does_for_one_sequence(num_positions: int) -> None:
    most = DEFAULT["original_max_position_embeddings"]
    rotary = Phi3RotaryEmbedding(_text_config(most))
    switched = SwitchedRotary(rotary, 4096)
    positions = torch.arange(num_positions)[None]
    x = torch.zeros(1)

    expected = rotary(x, positions)
    actual = switched(x, positions + (4096 if num_positions > most else 0))

    for theirs, ours in zip(expected, actual, strict=True):  # theirs has everything twice
        torch.testing.assert_close(ours, theirs[..., :8], rtol=0, atol=1e-6)


def _text_config(most: int) -> Phi3Config:
    return Phi3Config(
        hidden_size=64,
        num_attention_heads=4,
        max_position_embeddings=4096,
        original_max_position_embeddings=most,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1 + n / 8 for n in range(8)],
            "long_factor": [1.0 + 4 * n for n in range(8)],
            "original_max_position_embeddings": most,
        },
    )


def test_factors_go_by_the_prompt_and_not_by_its_neighbours(
    phi: LLM, reference: Phi3VReference
) -> None:
    short, long = "Describe. " * 5, "Describe. " * 40  # 51 and 401 tokens, around 300
    expected = [reference.generate(p, max_tokens=12, ignore_eos=True) for p in (short, long)]

    together = phi.generate([short, long] * 3, GREEDY, use_tqdm=False)

    assert expected * 3 == token_ids(together)


def test_answer_that_crosses_the_length_goes_on_as_it_began(phi: LLM, folder: Path) -> None:
    most = DEFAULT["original_max_position_embeddings"]
    prompt = "a" * (most - 11)  # and <s>: ten tokens are left
    always_short = Phi3VReference(folder)
    config = (
        always_short.text.config
    )  # read at each call; what angles are scaled by is there by now
    config.original_max_position_embeddings = 10**6
    config.rope_parameters["original_max_position_embeddings"] = 10**6
    params = replace(GREEDY, max_tokens=30)

    results = phi.generate([prompt, "b" * 2 * most], params, use_tqdm=False)

    assert always_short.generate(prompt, max_tokens=30, ignore_eos=True) == token_ids(results)[0]


def test_all_layers_of_both_halves_are_fused(folder: Path) -> None:
    model = Phi3VForCausalLM(Phi3VConfig.from_pretrained(folder))

    swapped = fuse.apply(model)

    assert (2, 1) == (swapped["Phi3DecoderLayer"], swapped["Phi3RMSNorm"])
    assert (3, 3) == (swapped["CLIPAttention"], swapped["CLIPMLP"])


def test_short_context_has_the_short_factors_only(folder: Path) -> None:
    with LLM(str(folder), max_model_len=300) as llm:
        family = llm.engine.checkpoint.family
        assert isinstance(family, Phi3V)

        positions, delta = family.positions(299, [])

    assert (0, 298) == (delta, positions.max())


# --- all together --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Mixed:
    name: str
    prompt: str
    pictures: list[Image.Image]
    max_tokens: int

    def request(self) -> Request:
        params = SamplingParams(temperature=0, max_tokens=self.max_tokens, ignore_eos=True)
        media = {"image": self.pictures} if self.pictures else None
        return Request(
            prompt=self.prompt, multi_modal_data=media, params=params, request_id=self.name
        )


def mixed(reference: Phi3VReference, num: int) -> list[Mixed]:
    """None to three pictures, short and long texts, on both sides of the length that factors go by."""
    rng = random.Random("mixed")
    requests = []
    for index in range(num):
        pictures = [
            draw(rng.getrandbits(30), rng.randint(8, 200), rng.randint(8, 200))
            for _ in range(rng.choice((0, 0, 1, 1, 1, 2, 3)))
        ]
        texts = [
            " ".join(rng.choice(("red", "What", "is", "here?")) for _ in range(rng.randint(1, 12)))
            for _ in range(len(pictures) + 1)
        ]
        if rng.random() < 0.2:
            texts[-1] += " and so on" * 30
        marks = [f"<|image_{n + 1}|>" for n in range(len(pictures))]
        content = "".join(itertools.chain(*itertools.zip_longest(texts, marks, fillvalue="")))
        prompt = f"<|user|>\n{content}<|end|>\n<|assistant|>\n"
        length = sum(len(piece) for piece in reference.embed(prompt, pictures))
        # An answer that crosses the length is read anew by transformers, and goes on here.
        room = DEFAULT["original_max_position_embeddings"] + 1 - length
        max_tokens = rng.randint(1, 16)
        requests.append(
            Mixed(str(index), prompt, pictures, min(max_tokens, room) if room > 0 else max_tokens)
        )
    return requests


def answers(llm: LLM, asked: Sequence[Mixed]) -> dict[str, tuple[int, ...]]:
    results = list(llm.stream([request.request() for request in asked]))
    assert [] == [result.error for result in results if result.error]
    return {result.request_id: tuple(result.outputs[0].token_ids) for result in results}


@pytest.mark.parametrize(("shape", "num"), [({}, NUM_MIXED), (ALL_KV_HEADS, NUM_MIXED_OTHER)])
def test_answers_are_the_references_in_any_order(
    tmp_path: Path, shape: dict[str, Any], num: int
) -> None:
    write_tiny_phi3_v(tmp_path, seed=7, **shape)
    reference = Phi3VReference(tmp_path)
    asked = mixed(reference, num)
    expected = {
        m.name: tuple(
            reference.generate(
                m.prompt,
                images=[from_pil(picture) for picture in m.pictures],
                max_tokens=m.max_tokens,
                ignore_eos=True,
            )
        )
        for m in asked
    }
    shuffled = random.Random(5).sample(asked, len(asked))

    with LLM(str(tmp_path), limit_mm_per_prompt=LIMITS, max_num_seqs=24) as llm:
        in_one_call = answers(llm, asked)
        in_another_order = answers(llm, shuffled)
        with keeping_prefixes(llm):
            with in_pieces(llm):
                read_in_pieces = answers(llm, shuffled)
            from_kept_rows = answers(llm, asked)
        one_by_one: dict[str, tuple[int, ...]] = {}
        for request in asked:
            one_by_one |= answers(llm, [request])

    assert len(set(expected.values())) > num // 2  # equal answers would prove nothing
    assert expected == in_one_call
    assert expected == in_another_order
    assert expected == read_in_pieces
    assert expected == from_kept_rows
    assert expected == one_by_one
