"""
Tiny random checkpoints of LLaVA's kind, written as transformers writes them.

Each has a default and a second shape: other heads, other patches, another way to bring pictures to
their size.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from bench.configs import LLAVA_FIRST, build_llava_tokenizer
from engine.families import FAMILIES
from tests.engine.tiny import NUM_BYTES, WEIGHT_STD

Changes = Mapping[str, Mapping[str, Any]]
"""What to write over a default: values by part, `text`, `vision`, `config`, `pictures`, `processor`."""

NUM_TEXT_IDS = NUM_BYTES + len(LLAVA_FIRST)
IMAGE_ID = NUM_TEXT_IDS
VOCAB = NUM_TEXT_IDS + 8  # a few ids at the end have no token, as in the checkpoints of the world

LLAMA: Mapping[str, Any] = {
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": IMAGE_ID + 1,
    "tie_word_embeddings": False,
}
CLIP: Mapping[str, Any] = {
    "model_type": "clip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 56,
    "patch_size": 14,
    "projection_dim": 16,
}
LLAVA: Changes = {
    "text": LLAMA,
    "vision": CLIP,
    "config": {"vision_feature_layer": -2, "vision_feature_select_strategy": "default"},
    "pictures": {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": 56},
        "crop_size": {"height": 56, "width": 56},
    },
    "processor": {
        "patch_size": 14,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
    },
}
# Wider heads of which two share a KV head, two layers read, class token kept, pictures squashed.
LLAVA_OTHER: Changes = {
    "text": {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1},
    "vision": {"num_attention_heads": 4, "image_size": 48, "patch_size": 8},
    "config": {"vision_feature_layer": [-3, -1], "vision_feature_select_strategy": "full"},
    "pictures": {
        "do_center_crop": False,
        "size": {"height": 48, "width": 48},
        "resample": 2,
        "image_mean": [0.5, 0.4, 0.3],
        "image_std": [0.5, 0.25, 0.2],
    },
    "processor": {"patch_size": 8, "vision_feature_select_strategy": "full"},
}
# Pictures become square by a border of their mean colour.
LLAVA_PADDED: Changes = {
    "pictures": {"image_processor_type": "LlavaImageProcessor", "do_pad": True}
}


def write_tiny_llava(folder: Path, *, seed: int = 0, changes: Changes | None = None) -> Path:
    """Write a whole LLaVA-1.5 (weights, configs, tokenizer; no chat template); return its folder."""
    return write(folder, "llava", LLAVA, changes or {}, seed)


def write(folder: Path, model_type: str, default: Changes, changes: Changes, seed: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    parts = {part: {**default[part], **changes.get(part, {})} for part in default}
    build_llava_tokenizer(NUM_TEXT_IDS).save(str(folder / "tokenizer.json"))
    files: dict[str, Any] = {
        "config.json": {
            "model_type": model_type,
            "dtype": "float32",
            "image_token_index": IMAGE_ID,
            "text_config": parts["text"],
            "vision_config": parts["vision"],
            **parts["config"],
        },
        "preprocessor_config.json": parts["pictures"],
        "processor_config.json": parts["processor"],
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "pad_token": "<pad>",
            "unk_token": "<unk>",
        },
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    _save_weights(folder, model_type, seed)
    return folder


@torch.no_grad()
def _save_weights(folder: Path, model_type: str, seed: int) -> None:
    """Weights ten times larger than a training would start with, under their published names."""
    model: Any = FAMILIES[model_type].load_model_class()(AutoConfig.from_pretrained(folder))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        drawn = torch.randn(parameter.shape, generator=generator) * WEIGHT_STD
        is_scale = parameter.dim() == 1 and name.endswith("weight")  # of a norm: around one
        parameter.copy_((1 + drawn if is_scale else drawn).bfloat16().float())
    model.save_pretrained(folder)
