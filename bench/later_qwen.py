"""
Folders of Qwen2.5-VL and Qwen3-VL in the form in which they are published, of any size, but for weights.

Benchmarks draw the weights on the device, tests write them for tiny ones.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tokenizers import Tokenizer

from engine.families.resizing import CLIP_MEAN, CLIP_STD
from models.train.settings import SPECIAL_TOKENS

CLASSES = {"qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl": "Qwen3VL"}


@dataclass(frozen=True, slots=True)
class LaterQwenShape:
    """
    The sizes of one model, in transformers' own words.

    Attributes:
        text, vision: of the two configs, and over what is published of all sizes.
        pictures, clips: of preprocessor_config.json and video_preprocessor_config.json.
    """

    model_type: str
    text: Mapping[str, Any]
    vision: Mapping[str, Any]
    pictures: Mapping[str, Any] = field(default_factory=dict)
    clips: Mapping[str, Any] = field(default_factory=dict)
    vocab_size: int = 151936
    num_text_ids: int = 151643  # ids before the first special token


QWEN2_5_TEXT = {
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 128_000,
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
}
QWEN2_5_VISION = {
    "depth": 32,
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
    "tokens_per_second": 2,
}
QWEN2_5_PICTURES = {
    "min_pixels": 3136,
    "max_pixels": 12_845_056,
    "image_mean": list(CLIP_MEAN),
    "image_std": list(CLIP_STD),
}
QWEN3_TEXT = {
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 262_144,
    "tie_word_embeddings": True,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 5e6,
        "mrope_interleaved": True,
        "mrope_section": [24, 20, 20],
    },
}
QWEN3_VISION = {
    "depth": 24,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_heads": 16,
    "patch_size": 16,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "num_position_embeddings": 2304,
    "deepstack_visual_indexes": [5, 11, 17],
}
QWEN3_PICTURES = {
    "size": {"shortest_edge": 65_536, "longest_edge": 16_777_216},
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}
QWEN3_CLIPS = {"size": {"shortest_edge": 4096, "longest_edge": 25_165_824}}


def qwen2_5(
    text: Mapping[str, Any], vision: Mapping[str, Any] | None = None, **more: Any
) -> LaterQwenShape:
    """A Qwen2.5-VL that differs from the published ones in this."""
    more["pictures"] = QWEN2_5_PICTURES | dict(more.get("pictures", {}))
    return LaterQwenShape(
        "qwen2_5_vl", QWEN2_5_TEXT | dict(text), QWEN2_5_VISION | dict(vision or {}), **more
    )


def qwen3(
    text: Mapping[str, Any], vision: Mapping[str, Any] | None = None, **more: Any
) -> LaterQwenShape:
    """A Qwen3-VL that differs from the published ones in this."""
    more["pictures"] = QWEN3_PICTURES | dict(more.get("pictures", {}))
    more.setdefault("clips", QWEN3_CLIPS)
    return LaterQwenShape(
        "qwen3_vl", QWEN3_TEXT | dict(text), QWEN3_VISION | dict(vision or {}), **more
    )


def configs(
    shape: LaterQwenShape, tokenizer: Tokenizer, dtype: str = "bfloat16"
) -> dict[str, dict[str, Any]]:
    """The files of a checkpoint by their names, but for tokenizer.json and the weights."""
    ids = {token: tokenizer.token_to_id(token) for token in SPECIAL_TOKENS}
    text = {
        "model_type": f"{shape.model_type}_text",
        "dtype": dtype,
        "vocab_size": shape.vocab_size,
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        **shape.text,
    }
    vision = {
        "model_type": f"{shape.model_type}_vision",
        "dtype": dtype,
        "out_hidden_size": text["hidden_size"],
        **shape.vision,
    }
    files: dict[str, dict[str, Any]] = {
        "config.json": {
            "architectures": [f"{CLASSES[shape.model_type]}ForConditionalGeneration"],
            "model_type": shape.model_type,
            "dtype": dtype,
            "image_token_id": ids["<|image_pad|>"],
            "video_token_id": ids["<|video_pad|>"],
            "vision_start_token_id": ids["<|vision_start|>"],
            "vision_end_token_id": ids["<|vision_end|>"],
            "tie_word_embeddings": text["tie_word_embeddings"],
            "text_config": text,
            "vision_config": vision,
        },
        "generation_config.json": {
            "bos_token_id": ids["<|endoftext|>"],
            "eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]],
            "pad_token_id": ids["<|endoftext|>"],
            "do_sample": False,
        },
        "preprocessor_config.json": {
            "image_processor_type": "Qwen2VLImageProcessor",
            "patch_size": vision["patch_size"],
            "temporal_patch_size": vision["temporal_patch_size"],
            "merge_size": vision["spatial_merge_size"],
            **shape.pictures,
        },
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "model_max_length": text["max_position_embeddings"],
            "clean_up_tokenization_spaces": False,
        },
    }
    if shape.clips:
        files["video_preprocessor_config.json"] = dict(shape.clips)
    return files
