"""
Tiny random checkpoints of LLaVA's kind, written as transformers writes them.

Each has a default and a second shape: other heads, other patches, another way to bring pictures to
their size.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from bench.configs import LLAVA_FIRST, LLAVA_LAST, build_tokenizer
from engine.families import FAMILIES
from tests.engine.tiny import NUM_BYTES, WEIGHT_STD

Changes = Mapping[str, Mapping[str, Any]]
"""
What to write over a default: values by part, `text`, `vision`, `config`, `pictures`, `clips`,
`processor`.
"""

PICTURE_FILES = {
    "pictures": "preprocessor_config.json",
    "clips": "video_preprocessor_config.json",
    "processor": "processor_config.json",
}
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


LLAVA_NEXT: Changes = {
    **LLAVA,
    "config": {
        **LLAVA["config"],
        "image_grid_pinpoints": [[56, 112], [112, 56], [112, 112], [168, 56], [56, 168]],
    },
    "pictures": {
        **LLAVA["pictures"],
        "image_processor_type": "LlavaNextImageProcessor",
        "image_grid_pinpoints": [[56, 112], [112, 56], [112, 112], [168, 56], [56, 168]],
    },
}
# A SigLIP of patches that do not fill its picture, another text model, more resolutions.
SIGLIP: Mapping[str, Any] = {
    "model_type": "siglip_vision_model",
    "hidden_size": 36,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "image_size": 44,
    "patch_size": 8,
    "vision_use_head": False,
}
QWEN2: Mapping[str, Any] = {
    "model_type": "qwen2",
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
GRID_44 = [[44 * rows, 44 * columns] for rows in range(1, 4) for columns in range(1, 4)]
LLAVA_NEXT_OTHER: Changes = {
    "text": QWEN2,
    "vision": SIGLIP,
    "config": {
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
        "image_grid_pinpoints": GRID_44,
    },
    "pictures": {
        "size": {"height": 44, "width": 44},
        "crop_size": {"height": 44, "width": 44},
        "image_grid_pinpoints": GRID_44,
        "image_mean": [0.5, 0.4, 0.3],
        "image_std": [0.5, 0.25, 0.2],
        "resample": 2,
    },
    "processor": {
        "patch_size": 8,
        "vision_feature_select_strategy": "full",
        "num_additional_image_tokens": 0,
    },
}
# Every third layer looks at all rows; heads are wider than their share, and turn by two tables.
GEMMA: Mapping[str, Any] = {
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "query_pre_attn_scalar": 24,
    "sliding_window": 12,
    "sliding_window_pattern": 3,
    "rope_local_base_freq": 100.0,
    "rope_theta": 10000.0,
    "rope_scaling": {"rope_type": "linear", "factor": 4.0},
    "tie_word_embeddings": True,
}
# Wider heads that share one KV head, layers named one by one, the last one a window.
GEMMA_OTHER: Mapping[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 48,
    "query_pre_attn_scalar": 48,
    "sliding_window": 5,
    "layer_types": ["full_attention", "full_attention", "sliding_attention"],
    "tie_word_embeddings": True,
}
# Mistral, all of whose layers look at fewer rows than most prompts have.
LLAVA_NEXT_WINDOW: Changes = {
    "text": {"model_type": "mistral", "num_key_value_heads": 2, "sliding_window": 24},
}
LLAVA_ONEVISION: Changes = {
    "text": {**LLAMA, **QWEN2},
    "vision": SIGLIP,
    "config": {
        "video_token_index": IMAGE_ID + 2,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
        "vision_aspect_ratio": "anyres_max_4",
        "image_grid_pinpoints": GRID_44,
    },
    "pictures": {
        "image_processor_type": "LlavaOnevisionImageProcessor",
        "size": {"height": 44, "width": 44},
        "image_grid_pinpoints": GRID_44,
        "image_mean": [0.5, 0.4, 0.3],
        "image_std": [0.5, 0.25, 0.2],
    },
    "processor": {
        "num_image_tokens": 25,
        "vision_feature_select_strategy": "full",
        "vision_aspect_ratio": "anyres_max_4",
    },
}
# Heads of 16, an even number of patches, a second layer read, everything shrunk to two tiles.
LLAVA_ONEVISION_OTHER: Changes = {
    "text": {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4},
    "vision": {"hidden_size": 32, "num_attention_heads": 2, "image_size": 48, "patch_size": 8},
    "config": {
        "vision_feature_layer": [-2, -1],
        "vision_aspect_ratio": "anyres_max_2",
        "image_grid_pinpoints": [[48, 48], [48, 96], [96, 48], [96, 96], [144, 144]],
    },
    "pictures": {
        "size": {"height": 48, "width": 48},
        "image_grid_pinpoints": [[48, 48], [48, 96], [96, 48], [96, 96], [144, 144]],
    },
    "processor": {"num_image_tokens": 36, "vision_aspect_ratio": "anyres_max_2"},
}


# As published for pictures among text: nothing is said of crops, and squashing is SigLIP's default.
LLAVA_SIGLIP: Changes = {
    "text": QWEN2,
    "vision": SIGLIP,
    "config": LLAVA_NEXT_OTHER["config"],
    "pictures": {
        "image_processor_type": "SiglipImageProcessor",
        "size": {"height": 44, "width": 44},
        "crop_size": None,
    },
    "processor": LLAVA_NEXT_OTHER["processor"],
}


INTERNVL_MARKS = ("<IMG_CONTEXT>", "<pad>", "<video>", "<img>", "</img>")
INTERNVL: Changes = {
    "text": {**LLAMA, **QWEN2},
    "vision": {
        "model_type": "internvl_vision",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": [56, 56],
        "patch_size": [14, 14],
    },
    "config": {"image_token_id": IMAGE_ID},
    "pictures": {
        "image_processor_type": "GotOcr2ImageProcessor",
        "size": {"height": 56, "width": 56},
        "crop_to_patches": True,
        "max_patches": 6,
    },
    "processor": {"image_seq_length": 4},
}
# RMSNorm, also of queries and keys, wider heads, a norm at the end, a Llama, tiles of a third size.
INTERNVL_OTHER: Changes = {
    "text": LLAMA,
    "vision": {
        "hidden_size": 48,
        "norm_type": "rms_norm",
        "use_qk_norm": True,
        "attention_bias": True,
        "use_mean_pooling": False,
        "image_size": [48, 48],
        "patch_size": [8, 8],
    },
    "pictures": {
        "size": {"height": 48, "width": 48},
        "min_patches": 2,
        "max_patches": 4,
        "image_mean": [0.5, 0.4, 0.3],
        "image_std": [0.5, 0.25, 0.2],
        "resample": 2,
    },
    "processor": {"image_seq_length": 9},
}


# `row 3` and `column 3` are no tokens here, but letters.
IDEFICS3_MARKS = (
    "<image>",
    "<pad>",
    "<fake_token_around_image>",
    "<global-img>",
    *(f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)),
    "<end_of_utterance>",
)
IDEFICS3: Changes = {
    "text": LLAMA,
    "vision": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 48,
        "patch_size": 8,
    },
    "config": {"image_token_id": IMAGE_ID, "scale_factor": 2},
    "pictures": {
        "image_processor_type": "Idefics3ImageProcessor",
        "size": {"longest_edge": 120},
        "max_image_size": {"longest_edge": 48},
    },
    "processor": {"image_seq_len": 9},
}
# Patches that do not fill a tile, three times three of them a token, other colours, a Qwen2.
IDEFICS3_OTHER: Changes = {
    "text": QWEN2,
    "vision": {
        "hidden_size": 36,
        "num_attention_heads": 3,
        "num_hidden_layers": 3,
        "image_size": 44,
        "patch_size": 7,
    },
    "config": {"scale_factor": 3},
    "pictures": {
        "size": {"longest_edge": 88},
        "max_image_size": {"longest_edge": 44},
        "image_mean": [0.5, 0.4, 0.3],
        "image_std": [0.5, 0.25, 0.2],
        "resample": 2,
    },
    "processor": {"image_seq_len": 4},
}
IDEFICS3_WHOLE: Changes = {"pictures": {"do_image_splitting": False}}
# Frames are told of in a file of their own: other colours, another filter, shrunk on their way.
SMOLVLM_OTHER: Changes = {
    **IDEFICS3_OTHER,
    "clips": {
        "video_processor_type": "SmolVLMVideoProcessor",
        "max_image_size": {"longest_edge": 44},
        "video_sampling": {"fps": 1, "max_frames": 64, "video_size": {"longest_edge": 36}},
        "image_mean": [0.4, 0.5, 0.6],
        "image_std": [0.25, 0.5, 0.4],
        "resample": 3,
    },
}


def write_tiny_idefics3(folder: Path, *, seed: int = 0, changes: Changes | None = None) -> Path:
    return write(folder, "idefics3", IDEFICS3, changes or {}, seed, marks=IDEFICS3_MARKS)


def write_tiny_smolvlm(folder: Path, *, seed: int = 0, changes: Changes | None = None) -> Path:
    default = {
        **IDEFICS3,
        "pictures": {**IDEFICS3["pictures"], "image_processor_type": "SmolVLMImageProcessor"},
        **({"clips": {}} if "clips" in (changes or {}) else {}),  # otherwise there is no such file
    }
    return write(folder, "smolvlm", default, changes or {}, seed, marks=IDEFICS3_MARKS)


def write_tiny_internvl(folder: Path, *, seed: int = 0, changes: Changes | None = None) -> Path:
    named = {
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
        "start_image_token": "<img>",
        "end_image_token": "</img>",
    }
    return write(
        folder, "internvl", INTERNVL, changes or {}, seed, marks=INTERNVL_MARKS, named=named
    )


PIXTRAL_MARKS = ("[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]")
PIXTRAL: Changes = {
    "text": {**LLAMA, "model_type": "mistral", "num_key_value_heads": 2, "sliding_window": None},
    "vision": {
        "model_type": "pixtral",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 224,
        "patch_size": 16,
    },
    "config": {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"},
    "pictures": {
        "image_processor_type": "PixtralImageProcessor",
        "size": {"longest_edge": 208},
        "patch_size": {"height": 16, "width": 16},
    },
    "processor": {"patch_size": 16, "spatial_merge_size": 1},
}
# Wider heads, SiLU, a window that is shorter than a picture, a square of other sides, other colours.
PIXTRAL_OTHER: Changes = {
    "text": {"head_dim": 16, "sliding_window": 32},
    "vision": {
        "hidden_size": 48,
        "num_attention_heads": 3,
        "num_hidden_layers": 3,
        "hidden_act": "silu",
        "patch_size": 14,
        "rope_theta": 100.0,
    },
    "config": {"projector_hidden_act": "gelu_pytorch_tanh"},
    "pictures": {
        "size": {"height": 210, "width": 220},
        "patch_size": {"height": 14, "width": 14},
        "image_mean": [0.5, 0.4, 0.3],
        "image_std": [0.5, 0.25, 0.2],
        "resample": 2,
    },
    "processor": {"patch_size": 14},
}
# Its processor asks for sides of whole tokens, whatever the patch of its image processor is.
MISTRAL3: Changes = {
    **PIXTRAL,
    "config": {"vision_feature_layer": -1, "spatial_merge_size": 2},
    "pictures": {**PIXTRAL["pictures"], "patch_size": {"height": 28, "width": 28}},
    "vision": {**PIXTRAL["vision"], "patch_size": 14},
    "processor": {"patch_size": 14, "spatial_merge_size": 2},
}
MISTRAL3_OTHER: Changes = {
    "text": {"head_dim": 16, "num_key_value_heads": 4, "sliding_window": 40},
    "vision": {
        "hidden_size": 64,
        "num_attention_heads": 2,
        "patch_size": 8,
        "hidden_act": "silu",
    },
    "config": {"multimodal_projector_bias": True, "projector_hidden_act": "silu"},
    "pictures": {
        "size": {"longest_edge": 200},
        "patch_size": {"height": 16, "width": 16},
        "image_mean": [0.5, 0.4, 0.3],
        "image_std": [0.5, 0.25, 0.2],
    },
    "processor": {"patch_size": 8},
}


def write_tiny_pixtral(folder: Path, *, seed: int = 0, changes: Changes | None = None) -> Path:
    return write(folder, "llava", PIXTRAL, changes or {}, seed, marks=PIXTRAL_MARKS)


def write_tiny_mistral3(folder: Path, *, seed: int = 0, changes: Changes | None = None) -> Path:
    return write(folder, "mistral3", MISTRAL3, changes or {}, seed, marks=PIXTRAL_MARKS)


GEMMA3_MARKS = ("<image_soft_token>", "<pad>", "<start_of_image>", "<end_of_image>")
GEMMA3: Changes = {
    "text": {**LLAMA, **GEMMA, "model_type": "gemma3_text"},
    "vision": {**SIGLIP, "image_size": 56, "patch_size": 14},
    "config": {
        "mm_tokens_per_image": 4,
        "boi_token_index": IMAGE_ID + 2,
        "eoi_token_index": IMAGE_ID + 3,
    },
    "pictures": {
        "image_processor_type": "Gemma3ImageProcessor",
        "size": {"height": 56, "width": 56},
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "do_pan_and_scan": None,
    },
    "processor": {"image_seq_length": 4},
}
# Windows shorter than a picture, other heads, other patches, other colours.
GEMMA3_OTHER: Changes = {
    "text": {**GEMMA_OTHER, "rope_scaling": None, "sliding_window": 10},
    "vision": {"hidden_size": 48, "num_attention_heads": 2, "image_size": 64, "patch_size": 8},
    "config": {"mm_tokens_per_image": 16},
    "pictures": {
        "size": {"height": 64, "width": 64},
        "image_mean": [0.5, 0.4, 0.3],
        "image_std": [0.5, 0.25, 0.2],
        "resample": 3,
    },
    "processor": {"image_seq_length": 16},
}


def write_tiny_gemma3(folder: Path, *, seed: int = 0, changes: Changes | None = None) -> Path:
    named = {
        "image_token": "<image_soft_token>",
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
    }
    return write(folder, "gemma3", GEMMA3, changes or {}, seed, marks=GEMMA3_MARKS, named=named)


def write_tiny_text(folder: Path, *, seed: int = 0, changes: Changes) -> Path:
    """A text model alone: the `text` of a LLaVA with these changes."""
    write(folder, "", {"text": LLAMA, "config": {}}, changes, seed)
    return folder


def write_tiny_llava(folder: Path, *, seed: int = 0, changes: Changes | None = None) -> Path:
    """Write a whole LLaVA-1.5 (weights, configs, tokenizer; no chat template); return its folder."""
    return write(folder, "llava", LLAVA, changes or {}, seed)


def write_tiny_llava_next(folder: Path, *, seed: int = 0, changes: Changes | None = None) -> Path:
    return write(folder, "llava_next", LLAVA_NEXT, changes or {}, seed)


def write_tiny_llava_onevision(
    folder: Path, *, seed: int = 0, changes: Changes | None = None
) -> Path:
    return write(folder, "llava_onevision", LLAVA_ONEVISION, changes or {}, seed)


def write(
    folder: Path,
    model_type: str,
    default: Changes,
    changes: Changes,
    seed: int,
    *,
    marks: Sequence[str] = LLAVA_LAST,
    named: Mapping[str, str] | None = None,
) -> Path:
    """
    Args:
        marks: special tokens from IMAGE_ID on.
        named: those that the tokenizer has attributes for.
    """
    folder.mkdir(parents=True, exist_ok=True)
    parts = {part: {**default[part], **changes.get(part, {})} for part in default}
    tokenizer = build_tokenizer(NUM_TEXT_IDS, first=LLAVA_FIRST, last=marks, begins_with="<s>")
    tokenizer.save(str(folder / "tokenizer.json"))
    config: dict[str, Any] = {"dtype": "float32", **parts["config"]}
    if "vision" in parts:
        config |= {
            "model_type": model_type,
            "image_token_index": IMAGE_ID,
            "text_config": parts["text"],
            "vision_config": parts["vision"],
        }
    else:
        config |= parts["text"]
    files: dict[str, Any] = {
        "config.json": config,
        **{name: parts[part] for part, name in PICTURE_FILES.items() if part in parts},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "pad_token": "<pad>",
            "unk_token": "<unk>",
            "extra_special_tokens": dict(named or {}),
        },
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    _save_weights(folder, config["model_type"], seed)
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
