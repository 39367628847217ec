"""
Model folders at full size without a download: config, processor, tokenizer and chat template.

Speed does not depend on what weights have learned, so they are drawn on the device
(`load_format="dummy"`). The tokenizer has one token a byte, fillers up to the first special id, and
the special tokens at their real ids, on which placeholders and the size of the embedding depend.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE

from bench import later_qwen, phi3_v, tiled
from bench.later_qwen import LaterQwenShape, qwen2_5, qwen3
from bench.tiled import TiledShape, internvl3, smolvlm
from engine.families import llava
from engine.families.resizing import CLIP_MEAN, CLIP_STD
from models.train.settings import SPECIAL_TOKENS

CHAT_TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message['role'] }}
{% if message['content'] is string -%}
{{ message['content'] }}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] in ('image', 'image_url') -%}
<|vision_start|><|image_pad|><|vision_end|>
{%- elif part['type'] in ('video', 'video_url') -%}
<|vision_start|><|video_pad|><|vision_end|>
{%- elif 'text' in part -%}
{{ part['text'] }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
<|im_end|>
{{ '' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{{ '' }}
{%- endif -%}
"""

LLAVA_FIRST, LLAVA_LAST = ("<unk>", "<s>", "</s>"), ("<image>", "<pad>", "<video>")


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of a Qwen2-VL, in transformers' own words."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    num_text_ids: int  # ids before the first special token
    tie_word_embeddings: bool
    mrope_section: tuple[int, int, int]
    vision_depth: int
    vision_embed_dim: int
    vision_num_heads: int
    max_position_embeddings: int = 32768


@dataclass(frozen=True, slots=True)
class LlavaShape:
    """The sizes of a LLaVA-1.5: a CLIP encoder before a Llama with as many KV heads as heads."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    vocab_size: int
    num_text_ids: int
    vision_width: int
    vision_depth: int
    vision_heads: int
    image_px: int
    max_position_embeddings: int = 4096


AnyShape = Shape | LlavaShape | LaterQwenShape | TiledShape | phi3_v.Shape

TINY_NUM_TEXT_IDS = 260
TINY_TEXT: Mapping[str, Any] = {
    "vocab_size": 288,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}
TINY_VISION: Mapping[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}

SHAPES: Mapping[str, AnyShape] = {
    "qwen2-vl-2b": Shape(1536, 8960, 28, 12, 2, 151936, 151643, True, (16, 24, 24), 32, 1280, 16),
    "qwen2-vl-7b": Shape(3584, 18944, 28, 28, 4, 152064, 151643, False, (16, 24, 24), 32, 1280, 16),
    "tiny-50m": Shape(512, 1408, 6, 8, 2, 32768, 32700, True, (8, 12, 12), 8, 384, 6),
    "tiny-1m": Shape(64, 128, 2, 4, 2, 512, 400, True, (2, 3, 3), 2, 64, 2, 8192),
    "phi-3.5-vision": phi3_v.PUBLISHED,
    "tiny-phi": phi3_v.TINY,
    "qwen2.5-vl-3b": qwen2_5(
        {"hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36}
    ),
    "qwen3-vl-2b": qwen3({"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28}),
    "qwen3-vl-4b": qwen3(
        {
            "hidden_size": 2560,
            "intermediate_size": 9728,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
        }
    ),
    "tiny-qwen2.5-vl": qwen2_5(
        {
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 4096,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10_000.0,
                "mrope_section": [2, 3, 3],
            },
        },
        {
            "depth": 3,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "window_size": 56,  # two tokens a side
            "fullatt_block_indexes": [1],
        },
        pictures={"max_pixels": 224 * 224},
        vocab_size=272,
        num_text_ids=256,
    ),
    "tiny-qwen3-vl": qwen3(
        {
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 24,  # wider together than a token
            "max_position_embeddings": 4096,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10_000.0,
                "mrope_interleaved": True,
                "mrope_section": [6, 3, 3],
            },
        },
        {
            "depth": 4,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "num_position_embeddings": 36,
            "deepstack_visual_indexes": [0, 2],
        },
        pictures={"size": {"shortest_edge": 64 * 64, "longest_edge": 256 * 256}},
        clips={"size": {"shortest_edge": 64 * 64, "longest_edge": 4 * 128 * 128}},
        vocab_size=272,
        num_text_ids=256,
    ),
    "llava-1.5-7b": LlavaShape(4096, 11008, 32, 32, 32064, 32000, 1024, 24, 16, 336),
    "tiny-llava": LlavaShape(64, 128, 2, 4, 512, 400, 32, 3, 2, 56),
    "smolvlm-2.2b": smolvlm(),
    "internvl3-2b": internvl3(),
    "tiny-smolvlm": smolvlm(
        {**TINY_TEXT, "num_key_value_heads": 4},
        {**TINY_VISION, "image_size": 48, "patch_size": 8},
        num_text_ids=TINY_NUM_TEXT_IDS,
        longest_px=96,
    ),
    "tiny-internvl": internvl3(
        TINY_TEXT,
        {**TINY_VISION, "image_size": [56, 56], "patch_size": [14, 14]},
        num_text_ids=TINY_NUM_TEXT_IDS,
        max_tiles=4,
    ),
}


def write_model(name: str, folder: Path) -> Path:
    """Write everything but the weights of a model in SHAPES; return its folder."""
    return write_shape(SHAPES[name], folder)


def write_shape(shape: AnyShape, folder: Path, dtype: str = "bfloat16") -> Path:
    """The same of any shape; dtype is what the config says of the weights of later Qwens."""
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(shape, dict):
        return phi3_v.write_phi3_v(folder, **shape)
    if isinstance(shape, LlavaShape):
        tokenizer = build_llava_tokenizer(shape.num_text_ids)
        template, files = llava.CHAT_TEMPLATE, _llava_configs(shape)
    elif isinstance(shape, TiledShape):
        tokenizer = build_tokenizer(shape.num_text_ids, first=shape.first, last=shape.last)
        template, files = shape.template, tiled.configs(shape, tokenizer, dtype)
    else:
        tokenizer, template = build_tokenizer(shape.num_text_ids), CHAT_TEMPLATE
        if isinstance(shape, LaterQwenShape):
            files = later_qwen.configs(shape, tokenizer, dtype)
        else:
            files = _configs(shape, tokenizer)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(template)
    for file, content in files.items():
        (folder / file).write_text(json.dumps(content, indent=2) + "\n")
    return folder


def build_tokenizer(
    num_text_ids: int,
    *,
    first: Sequence[str] = (),
    last: Sequence[str] = SPECIAL_TOKENS,
    begins_with: str | None = None,
) -> Tokenizer:
    """
    One token a byte, fillers, then special tokens from the id `num_text_ids` on.

    Args:
        first, last: special tokens before the bytes, and from `num_text_ids` on.
        begins_with: the one that is put before every text.
    """
    symbols = [*first, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    fillers = [f"<filler_{n}>" for n in range(num_text_ids - len(symbols))]
    vocab = {symbol: i for i, symbol in enumerate([*symbols, *fillers])}
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in (*first, *last)]
    )
    if begins_with is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{begins_with} $A",
            special_tokens=[(begins_with, tokenizer.token_to_id(begins_with))],
        )
    return tokenizer


def build_llava_tokenizer(num_text_ids: int) -> Tokenizer:
    """The same with the special tokens of LLaVA-1.5 at their ids; every text begins with `<s>`."""
    return build_tokenizer(num_text_ids, first=LLAVA_FIRST, last=LLAVA_LAST, begins_with="<s>")


def _llava_configs(shape: LlavaShape) -> dict[str, dict[str, Any]]:
    return {
        "config.json": {
            "architectures": ["LlavaForConditionalGeneration"],
            "model_type": "llava",
            "dtype": "bfloat16",
            "image_token_index": shape.num_text_ids,
            "vision_feature_layer": -2,
            "vision_feature_select_strategy": "default",
            "text_config": {
                "model_type": "llama",
                "dtype": "bfloat16",
                "vocab_size": shape.vocab_size,
                "hidden_size": shape.hidden_size,
                "intermediate_size": shape.intermediate_size,
                "num_hidden_layers": shape.num_hidden_layers,
                "num_attention_heads": shape.num_attention_heads,
                "num_key_value_heads": shape.num_attention_heads,
                "max_position_embeddings": shape.max_position_embeddings,
                "rms_norm_eps": 1e-5,
                "bos_token_id": 1,
                "eos_token_id": 2,
                "tie_word_embeddings": False,
            },
            "vision_config": {
                "model_type": "clip_vision_model",
                "dtype": "bfloat16",
                "hidden_size": shape.vision_width,
                "intermediate_size": 4 * shape.vision_width,
                "num_hidden_layers": shape.vision_depth,
                "num_attention_heads": shape.vision_heads,
                "image_size": shape.image_px,
                "patch_size": 14,
            },
        },
        "generation_config.json": {"bos_token_id": 1, "eos_token_id": 2, "do_sample": False},
        "preprocessor_config.json": {
            "image_processor_type": "CLIPImageProcessor",
            "size": {"shortest_edge": shape.image_px},
            "crop_size": {"height": shape.image_px, "width": shape.image_px},
            "image_mean": list(CLIP_MEAN),
            "image_std": list(CLIP_STD),
        },
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "pad_token": "<pad>",
            "unk_token": "<unk>",
            "model_max_length": shape.max_position_embeddings,
            "clean_up_tokenization_spaces": False,
        },
    }


def _configs(shape: Shape, tokenizer: Tokenizer) -> dict[str, dict[str, Any]]:
    ids = {token: tokenizer.token_to_id(token) for token in SPECIAL_TOKENS}
    return {
        "config.json": {
            "architectures": ["Qwen2VLForConditionalGeneration"],
            "model_type": "qwen2_vl",
            "dtype": "bfloat16",
            "image_token_id": ids["<|image_pad|>"],
            "video_token_id": ids["<|video_pad|>"],
            "vision_start_token_id": ids["<|vision_start|>"],
            "vision_end_token_id": ids["<|vision_end|>"],
            "tie_word_embeddings": shape.tie_word_embeddings,
            "text_config": {
                "model_type": "qwen2_vl_text",
                "dtype": "bfloat16",
                "vocab_size": shape.vocab_size,
                "hidden_size": shape.hidden_size,
                "intermediate_size": shape.intermediate_size,
                "num_hidden_layers": shape.num_hidden_layers,
                "num_attention_heads": shape.num_attention_heads,
                "num_key_value_heads": shape.num_key_value_heads,
                "max_position_embeddings": shape.max_position_embeddings,
                "rms_norm_eps": 1e-6,
                "bos_token_id": ids["<|endoftext|>"],
                "eos_token_id": ids["<|im_end|>"],
                "tie_word_embeddings": shape.tie_word_embeddings,
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 1e6,
                    "mrope_section": list(shape.mrope_section),
                },
            },
            "vision_config": {
                "model_type": "qwen2_vl_vision",
                "depth": shape.vision_depth,
                "embed_dim": shape.vision_embed_dim,
                "hidden_size": shape.hidden_size,
                "mlp_ratio": 4,
                "num_heads": shape.vision_num_heads,
                "patch_size": 14,
                "spatial_merge_size": 2,
                "temporal_patch_size": 2,
            },
        },
        "generation_config.json": {
            "bos_token_id": ids["<|endoftext|>"],
            "eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]],
            "pad_token_id": ids["<|endoftext|>"],
            "do_sample": False,
        },
        "preprocessor_config.json": {
            "image_processor_type": "Qwen2VLImageProcessor",
            "min_pixels": 3136,
            "max_pixels": 12845056,
            "patch_size": 14,
            "temporal_patch_size": 2,
            "merge_size": 2,
            "image_mean": list(CLIP_MEAN),
            "image_std": list(CLIP_STD),
        },
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "model_max_length": shape.max_position_embeddings,
            "clean_up_tokenization_spaces": False,
        },
    }
