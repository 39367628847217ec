"""
Folders of models that see pictures in tiles, in the form in which they are published, but for weights.

SmolVLM (of Idefics3's type) and InternVL 3, of any size. Texts around tiles cost more tokens here than with
the published tokenizers, as a token is a byte.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

from engine.families.resizing import CLIP_MEAN, CLIP_STD

SMOL_FIRST = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
SMOL_LAST = ("<fake_token_around_image>", "<image>", "<end_of_utterance>")
# As published from the 22nd special token on, but that `<video>` stands inside the vocabulary.
INTERN_LAST = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    *(f"<|reserved_{n}|>" for n in range(19)),
    *("<img>", "</img>", "<IMG_CONTEXT>", "<video>"),
)
SMOL_TEMPLATE = """\
<|im_start|>
{%- for message in messages -%}
{{ message['role'] | capitalize }}:
{%- if message['content'] is string %} {{ message['content'] }}{% else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' %}<image>{% elif 'text' in part %} {{ part['text'] }}{% endif -%}
{%- endfor -%}
{%- endif -%}
<end_of_utterance>
{% endfor -%}
{%- if add_generation_prompt %}Assistant:{% endif -%}
"""
INTERN_TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message['role'] }}
{% if message['content'] is string %}{{ message['content'] }}{% else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' %}<IMG_CONTEXT>
{% elif part['type'] == 'video' %}<video>
{% elif 'text' in part %}{{ part['text'] }}{% endif -%}
{%- endfor -%}
{%- endif -%}
<|im_end|>
{% endfor -%}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif -%}
"""


@dataclass(frozen=True, slots=True)
class TiledShape:
    """
    The sizes of one model, in transformers' own words.

    Attributes:
        text, vision: of the two configs.
        config: of the whole.
        pictures: of preprocessor_config.json.
        num_text_ids: ids before the last special tokens.
        first, last: special tokens before the bytes, and from num_text_ids on.
        placeholder: of these, whose places features take.
        named: those that the tokenizer has attributes for.
        ends: the token that ends an answer.
    """

    text: Mapping[str, Any]
    vision: Mapping[str, Any]
    config: Mapping[str, Any]
    pictures: Mapping[str, Any]
    num_text_ids: int
    first: tuple[str, ...]
    last: tuple[str, ...]
    placeholder: str
    named: Mapping[str, str]
    ends: str
    template: str


SMOL_TEXT: Mapping[str, Any] = {
    "model_type": "llama",
    "vocab_size": 49_155,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 24,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 16_384,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 273_768.0},
    "tie_word_embeddings": False,
}
SMOL_VISION: Mapping[str, Any] = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
}
INTERN_TEXT: Mapping[str, Any] = {
    "model_type": "qwen2",
    "vocab_size": 151_674,
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32_768,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    "tie_word_embeddings": False,
}
INTERN_VISION: Mapping[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": [448, 448],
    "patch_size": [14, 14],
    "attention_bias": True,
}


def smolvlm(
    text: Mapping[str, Any] | None = None,
    vision: Mapping[str, Any] | None = None,
    *,
    num_text_ids: int = 49_152,
    longest_px: int = 1536,
    scale_factor: int = 3,
) -> TiledShape:
    """
    SmolVLM-Instruct, or one that differs from it in this.

    Args:
        longest_px: that a picture's longer side becomes; a tile is as large as the encoder reads.
    """
    vision = {**SMOL_VISION, **(vision or {})}
    return TiledShape(
        text={**SMOL_TEXT, **(text or {})},
        vision={"model_type": "idefics3_vision", **vision},
        config={
            "architectures": ["Idefics3ForConditionalGeneration"],
            "model_type": "idefics3",
            "scale_factor": scale_factor,
        },
        pictures={
            "image_processor_type": "Idefics3ImageProcessor",
            "do_image_splitting": True,
            "size": {"longest_edge": longest_px},
            "max_image_size": {"longest_edge": vision["image_size"]},
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
            "resample": 1,
        },
        num_text_ids=num_text_ids,
        first=SMOL_FIRST,
        last=SMOL_LAST,
        placeholder="<image>",
        named={},
        ends="<end_of_utterance>",
        template=SMOL_TEMPLATE,
    )


def internvl3(
    text: Mapping[str, Any] | None = None,
    vision: Mapping[str, Any] | None = None,
    *,
    num_text_ids: int = 151_643,
    max_tiles: int = 12,
) -> TiledShape:
    """InternVL3-2B in the form whose name ends in -hf, or one that differs from it in this."""
    vision = {**INTERN_VISION, **(vision or {})}
    height_px, width_px = vision["image_size"]
    return TiledShape(
        text={**INTERN_TEXT, **(text or {})},
        vision={"model_type": "internvl_vision", **vision},
        config={
            "architectures": ["InternVLForConditionalGeneration"],
            "model_type": "internvl",
            "downsample_ratio": 0.5,
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "default",
        },
        pictures={
            "image_processor_type": "GotOcr2ImageProcessor",
            "crop_to_patches": True,
            "min_patches": 1,
            "max_patches": max_tiles,
            "size": {"height": height_px, "width": width_px},
            "image_mean": list(CLIP_MEAN),
            "image_std": list(CLIP_STD),
            "resample": 3,
        },
        num_text_ids=num_text_ids,
        first=(),
        last=INTERN_LAST,
        placeholder="<IMG_CONTEXT>",
        named={
            "context_image_token": "<IMG_CONTEXT>",
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "video_token": "<video>",
        },
        ends="<|im_end|>",
        template=INTERN_TEMPLATE,
    )


def configs(
    shape: TiledShape, tokenizer: Tokenizer, dtype: str = "bfloat16"
) -> dict[str, dict[str, Any]]:
    """The files of a checkpoint by their names, but for tokenizer.json and the weights."""
    begins = tokenizer.token_to_id("<|endoftext|>")
    ends = tokenizer.token_to_id(shape.ends)
    return {
        "config.json": {
            **shape.config,
            "dtype": dtype,
            "image_token_id": tokenizer.token_to_id(shape.placeholder),
            "tie_word_embeddings": shape.text["tie_word_embeddings"],
            "text_config": {
                "dtype": dtype,
                "bos_token_id": begins,
                "eos_token_id": ends,
                **shape.text,
            },
            "vision_config": {"dtype": dtype, **shape.vision},
        },
        "generation_config.json": {
            "bos_token_id": begins,
            "eos_token_id": ends,
            "pad_token_id": begins,
            "do_sample": False,
        },
        "preprocessor_config.json": dict(shape.pictures),
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": shape.ends,
            "pad_token": "<|endoftext|>",
            "model_max_length": shape.text["max_position_embeddings"],
            "clean_up_tokenization_spaces": False,
            "extra_special_tokens": dict(shape.named),
        },
    }
