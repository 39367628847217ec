"""Tiny random Phi-3.5-vision checkpoints, whole and in the published form, different for each seed."""

from pathlib import Path
from typing import Unpack

import torch
from safetensors.torch import save_file

from bench.phi3_v import Shape, write_phi3_v
from engine.families.phi3_v_model import Phi3VConfig, Phi3VForCausalLM

WEIGHT_STD = 0.2  # see tests/engine/tiny.py
DEFAULT: Shape = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "original_max_position_embeddings": 300,
    "num_text_ids": 259,
    "vocab_size": 308,
    "num_crops": 6,
    "vision_config": {  # tiles of 28 px, 2 x 2 tokens each
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 7,
    },
}
# As many KV heads as query heads, as published; tiles of 48 px, 3 x 3 tokens each.
ALL_KV_HEADS: Shape = {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "num_crops": 16,
    "vision_config": {
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "image_size": 48,
        "patch_size": 8,
    },
}


def write_tiny_phi3_v(folder: Path, *, seed: int = 0, **given: Unpack[Shape]) -> Path:
    """Write a whole checkpoint; return its folder."""
    shape: Shape = {**DEFAULT, **given}
    write_phi3_v(folder, "float32", **shape)
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):  # names and shapes, without transformers' own initialisation
        model = Phi3VForCausalLM(Phi3VConfig.from_pretrained(folder))
    weights = {}
    for name, parameter in model.named_parameters():
        drawn = torch.randn(parameter.shape, generator=generator) * WEIGHT_STD
        is_scale = "norm" in name and name.endswith("weight")  # of a norm: around one
        weights[name] = (1 + drawn if is_scale else drawn).bfloat16().float()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
