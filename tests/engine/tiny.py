"""
Tiny random Qwen2-VL checkpoints, written in a moment and different for each seed.

The tokenizer has one token a byte. Weights are drawn ten times larger than a training would start
with: only then do pictures, words and positions change what is generated, and a test that compares
two outputs compares something. A few ids at the end of the vocabulary have no token, as in the
checkpoints of the world.
"""

import json
from pathlib import Path
from typing import Any, TypedDict, Unpack

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText

from bench.configs import build_tokenizer
from models.train import export

WEIGHT_STD = 0.2
NUM_BYTES = 256  # the tokenizer's ids before its special tokens


class Shape(TypedDict, total=False):
    """What may differ from the default; `mrope_section` sums to half of a text head's width."""

    text_width: int
    text_depth: int
    text_heads: int
    text_kv_heads: int
    text_mlp: int
    mrope_section: tuple[int, int, int]
    vision_width: int
    vision_depth: int
    vision_heads: int
    tie_word_embeddings: bool
    max_positions: int
    min_pixels: int
    max_pixels: int


DEFAULT: Shape = {
    "text_width": 64,
    "text_depth": 2,
    "text_heads": 4,
    "text_kv_heads": 2,
    "text_mlp": 96,
    "mrope_section": (2, 3, 3),
    "vision_width": 32,
    "vision_depth": 2,
    "vision_heads": 2,
    "tie_word_embeddings": True,
    "max_positions": 4096,
    "min_pixels": 56 * 56,  # 4 tokens
    "max_pixels": 224 * 224,  # 64 tokens
}

# Six query heads share one KV head, heads are wider, and the head has a matrix of its own.
ONE_KV_HEAD: Shape = {
    "text_width": 96,
    "text_depth": 3,
    "text_heads": 6,
    "text_kv_heads": 1,
    "mrope_section": (4, 2, 2),
    "vision_width": 64,
    "vision_heads": 4,
    "tie_word_embeddings": False,
}

# As many KV heads as query heads.
ALL_KV_HEADS: Shape = {
    "text_width": 48,
    "text_heads": 3,
    "text_kv_heads": 3,
    "mrope_section": (3, 3, 2),
    "vision_depth": 1,
}

# Of a width that the kernel for prompts on Hopper takes.
WIDE_HEADS: Shape = {
    "text_width": 256,
    "text_heads": 4,
    "text_kv_heads": 2,
    "mrope_section": (8, 12, 12),
}


def write_tiny_qwen2_vl(folder: Path, *, seed: int = 0, **shape: Unpack[Shape]) -> Path:
    """Write a whole checkpoint (weights, configs, tokenizer, chat template); return its folder."""
    export.write_configs(folder, build_tokenizer(NUM_BYTES))
    _reshape(folder, DEFAULT | shape)
    save_weights(folder, draw_weights(folder, seed))
    return folder


def _reshape(folder: Path, shape: Shape) -> None:
    """Give the configs that `export` wrote for darkroom-tiny another shape."""
    config = json.loads((folder / "config.json").read_text())
    config["dtype"] = config["text_config"]["dtype"] = "float32"
    config["tie_word_embeddings"] = shape["tie_word_embeddings"]
    config["text_config"] |= {
        "hidden_size": shape["text_width"],
        "intermediate_size": shape["text_mlp"],
        "num_hidden_layers": shape["text_depth"],
        "num_attention_heads": shape["text_heads"],
        "num_key_value_heads": shape["text_kv_heads"],
        "max_position_embeddings": shape["max_positions"],
        "tie_word_embeddings": shape["tie_word_embeddings"],
    }
    config["text_config"]["rope_parameters"]["mrope_section"] = list(shape["mrope_section"])
    config["vision_config"] |= {
        "depth": shape["vision_depth"],
        "embed_dim": shape["vision_width"],
        "hidden_size": shape["text_width"],
        "num_heads": shape["vision_heads"],
    }
    (folder / "config.json").write_text(json.dumps(config))

    path = folder / "preprocessor_config.json"
    limits = {"min_pixels": shape["min_pixels"], "max_pixels": shape["max_pixels"]}
    path.write_text(json.dumps(json.loads(path.read_text()) | limits))


def save_weights(folder: Path, weights: dict[str, Tensor]) -> None:
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def draw_weights(folder: Path, seed: int) -> dict[str, Tensor]:
    """Draw weights under their published names, each exact in bfloat16 as well as in float32."""
    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):  # names and shapes, without transformers' own initialisation
        model: Any = AutoModelForImageTextToText.from_config(config)  # type: ignore[no-untyped-call]
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, parameter in model.named_parameters():
        drawn = torch.randn(parameter.shape, generator=generator) * WEIGHT_STD
        is_scale = parameter.dim() == 1 and name.endswith("weight")  # of a norm: around one
        for ours, theirs in () if config.model_type == "qwen3_vl" else export.PUBLISHED_NAMES:
            name = f"{theirs}{name.removeprefix(ours)}" if name.startswith(ours) else name
        weights[name] = (1 + drawn if is_scale else drawn).bfloat16().float()
    return weights
