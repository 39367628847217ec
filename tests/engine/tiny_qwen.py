"""
Tiny random checkpoints of Qwen2.5-VL and Qwen3-VL, as tests/engine/tiny.py writes those of Qwen2-VL.

Each family has two shapes: other heads, other windows or patches, other layers that see everything or
whose features are handed on to the text.
"""

from pathlib import Path

from bench.configs import SHAPES, write_shape
from bench.later_qwen import LaterQwenShape, qwen2_5, qwen3
from tests.engine.tiny import NUM_BYTES, draw_weights, save_weights

TINY_IDS = {"vocab_size": 272, "num_text_ids": NUM_BYTES}


def _tiny(name: str) -> LaterQwenShape:
    shape = SHAPES[name]
    assert isinstance(shape, LaterQwenShape)
    return shape


QWEN2_5_VL = _tiny("tiny-qwen2.5-vl")
QWEN3_VL = _tiny("tiny-qwen3-vl")

# One KV head, a head matrix of its own, smaller patches in larger windows, all seen by the last.
QWEN2_5_VL_OTHER = qwen2_5(
    {
        "hidden_size": 96,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 1,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e6,
            "mrope_section": [4, 2, 2],
        },
    },
    {
        "depth": 4,
        "hidden_size": 64,
        "intermediate_size": 76,  # uneven, as the published 3420
        "num_heads": 4,
        "patch_size": 8,
        "window_size": 48,  # three tokens a side
        "fullatt_block_indexes": [0, 3],
        "tokens_per_second": 4,
    },
    pictures={"min_pixels": 32 * 32, "max_pixels": 128 * 128},
    **TINY_IDS,
)

# As many KV heads as query heads, other patches, and features of three layers, the last one's too.
QWEN3_VL_OTHER = qwen3(
    {
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "head_dim": 16,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e6,
            "mrope_interleaved": True,
            "mrope_section": [4, 2, 2],
        },
    },
    {
        "depth": 5,
        "hidden_size": 48,
        "intermediate_size": 48,
        "num_heads": 4,
        "patch_size": 12,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0, 1, 4],
    },
    pictures={"size": {"shortest_edge": 48 * 48, "longest_edge": 192 * 192}},
    clips={},
    **TINY_IDS,
)


def write_tiny_qwen(folder: Path, shape: LaterQwenShape, *, seed: int = 0) -> Path:
    """Write a whole checkpoint (weights, configs, tokenizer, chat template); return its folder."""
    write_shape(shape, folder, dtype="float32")
    save_weights(folder, draw_weights(folder, seed))
    return folder
