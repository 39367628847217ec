"""
Tiny random checkpoints of Qwen2.5-VL and Qwen3-VL, as tests/engine/tiny.py writes those of Qwen2-VL.

Each family has a default and a second shape: other heads, other windows or patches, other layers
that see everything or are handed on to the text.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.configs import build_tokenizer
from models.train import export
from tests.engine.tiny import NUM_BYTES, draw_weights, save_weights

Changes = Mapping[str, Mapping[str, Any]]
"""What to write over a default config: values by part, `text`, `vision`, `preprocessor` or `clips`."""

QWEN2_5_VL: Changes = {
    "text": {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 4096,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10_000.0,
            "mrope_section": [2, 3, 3],
        },
    },
    "vision": {
        "depth": 3,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 56,  # two tokens a side
        "fullatt_block_indexes": [1],
        "tokens_per_second": 2,
        "out_hidden_size": 64,
    },
    "preprocessor": {"patch_size": 14, "min_pixels": 56 * 56, "max_pixels": 224 * 224},
}

# One KV head, a head matrix of its own, smaller patches in larger windows, all seen by the last.
QWEN2_5_VL_OTHER: Changes = {
    "text": {
        "hidden_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 1,
        "tie_word_embeddings": False,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e6,
            "mrope_section": [4, 2, 2],
        },
    },
    "vision": {
        "depth": 4,
        "hidden_size": 64,
        "intermediate_size": 80,
        "num_heads": 4,
        "patch_size": 8,
        "window_size": 48,  # three tokens a side
        "fullatt_block_indexes": [0, 3],
        "tokens_per_second": 4,
        "out_hidden_size": 96,
    },
    "preprocessor": {"patch_size": 8, "min_pixels": 32 * 32, "max_pixels": 128 * 128},
}

QWEN3_VL: Changes = {
    "text": {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 24,  # wider together than a token
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 4096,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10_000.0,
            "mrope_interleaved": True,
            "mrope_section": [6, 3, 3],
        },
    },
    "vision": {
        "depth": 4,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "num_position_embeddings": 36,
        "deepstack_visual_indexes": [0, 2],
        "out_hidden_size": 64,
    },
    "preprocessor": {"patch_size": 16, "min_pixels": 64 * 64, "max_pixels": 256 * 256},
}

# As many KV heads as query heads, other patches, and every second layer's features are handed on.
QWEN3_VL_OTHER: Changes = {
    "text": {
        "hidden_size": 48,
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "head_dim": 16,
        "tie_word_embeddings": False,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e6,
            "mrope_interleaved": True,
            "mrope_section": [4, 2, 2],
        },
    },
    "vision": {
        "depth": 5,
        "hidden_size": 48,
        "num_heads": 4,
        "patch_size": 12,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0, 1, 4],
        "out_hidden_size": 48,
    },
    "preprocessor": {"patch_size": 12, "min_pixels": 48 * 48, "max_pixels": 192 * 192},
    "clips": {"size": {"shortest_edge": 64 * 64, "longest_edge": 224 * 224}},
}


def write_tiny_qwen2_5_vl(folder: Path, *, seed: int = 0, changes: Changes | None = None) -> Path:
    """Write a whole Qwen2.5-VL (weights, configs, tokenizer, chat template); return its folder."""
    _write(folder, "qwen2_5_vl", QWEN2_5_VL, changes or {})
    save_weights(folder, draw_weights(folder, seed))
    return folder


def write_tiny_qwen3_vl(folder: Path, *, seed: int = 0, changes: Changes | None = None) -> Path:
    """Write a whole Qwen3-VL; return its folder."""
    _write(folder, "qwen3_vl", QWEN3_VL, changes or {})
    half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | half))
    save_weights(folder, draw_weights(folder, seed))
    return folder


def _write(folder: Path, model_type: str, default: Changes, changes: Changes) -> None:
    """Everything but weights: the files of darkroom-tiny, with other configs in them."""
    export.write_configs(folder, build_tokenizer(NUM_BYTES))
    parts = {part: {**default[part], **changes.get(part, {})} for part in default}
    if "clips" in changes:
        clips = json.dumps(dict(changes["clips"]))
        (folder / "video_preprocessor_config.json").write_text(clips)
    config = json.loads((folder / "config.json").read_text())
    ids = {name: value for name, value in config.items() if name.endswith("token_id")}
    given = config["text_config"]
    text = {
        "model_type": f"{model_type}_text",
        "dtype": "float32",
        "vocab_size": given["vocab_size"],
        "bos_token_id": given["bos_token_id"],
        "eos_token_id": given["eos_token_id"],
        "tie_word_embeddings": True,
        **parts["text"],
    }
    vision = {"model_type": f"{model_type}_vision", **parts["vision"]}
    name = {"qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl": "Qwen3VL"}[model_type]
    (folder / "config.json").write_text(
        json.dumps(
            {
                "architectures": [f"{name}ForConditionalGeneration"],
                "model_type": model_type,
                "dtype": "float32",
                "tie_word_embeddings": text["tie_word_embeddings"],
                **ids,
                "text_config": text,
                "vision_config": vision,
            }
        )
    )
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | parts["preprocessor"]))
