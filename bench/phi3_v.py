"""
Folders of Phi-3.5-vision in the form in which it is published, of any size, but for the weights.

Benchmarks draw the weights on the device, tests write them for tiny ones. The tokenizer has one token
a byte, and its special tokens stand in the published order, at the published ids where there is room.
"""

import json
from pathlib import Path
from typing import Any, TypedDict, Unpack

from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE

from engine.families.resizing import CLIP_MEAN, CLIP_STD

FIRST_TOKENS = ("<unk>", "<s>", "</s>")
LATER_TOKENS = (
    "<|endoftext|>",
    "<|assistant|>",
    *(f"<|placeholder{n}|>" for n in range(1, 5)),
    "<|system|>",
    "<|end|>",
    *(f"<|placeholder{n}|>" for n in range(5, 7)),
    "<|user|>",
    *(f"<|placeholder{n}|>" for n in range(7, 40)),
    "<|image|>",
)
NUM_BYTES = 256
CHAT_TEMPLATE = """\
{%- for message in messages -%}
<|{{ message['role'] }}|>
{{ message['content'] }}<|end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|assistant|>
{% endif -%}
"""


class Shape(TypedDict, total=False):
    """What may differ from the published model, in Phi-3's words and CLIP's."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    max_position_embeddings: int
    original_max_position_embeddings: int
    num_text_ids: int  # before LATER_TOKENS
    vocab_size: int
    vision_config: dict[str, int]
    num_crops: int


PUBLISHED: Shape = {
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 131072,
    "original_max_position_embeddings": 4096,
    "num_text_ids": 32000,
    "vocab_size": 32064,
    "num_crops": 16,
}
TINY: Shape = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 8192,
    "original_max_position_embeddings": 1024,
    "num_text_ids": 400,
    "vocab_size": 512,
    "num_crops": 4,
    "vision_config": {
        "hidden_size": 32,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 56,
        "patch_size": 14,
    },
}


def write_phi3_v(folder: Path, dtype: str = "bfloat16", **given: Unpack[Shape]) -> Path:
    """Write configs, tokenizer and chat template into a folder, which is made; return it."""
    folder.mkdir(parents=True, exist_ok=True)
    shape: Shape = {**PUBLISHED, **given}
    tokenizer = build_tokenizer(shape["num_text_ids"])
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, content in _configs(shape, tokenizer, dtype).items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    return folder


def build_tokenizer(num_text_ids: int) -> Tokenizer:
    """Every text begins with `<s>`; most special tokens take the space behind them along."""
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    num_fillers = num_text_ids - len(FIRST_TOKENS) - len(symbols)
    fillers = [f"<filler_{n}>" for n in range(num_fillers)]
    vocab = {name: i for i, name in enumerate([*FIRST_TOKENS, *symbols, *fillers])}
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [
            AddedToken(name, special=True, normalized=False, rstrip=name.startswith("<|"))
            for name in (*FIRST_TOKENS, *LATER_TOKENS)
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return tokenizer


def _configs(shape: Shape, tokenizer: Tokenizer, dtype: str) -> dict[str, dict[str, Any]]:
    ids = {name: tokenizer.token_to_id(name) for name in (*FIRST_TOKENS, *LATER_TOKENS)}
    half = shape["hidden_size"] // shape["num_attention_heads"] // 2
    more = {"vision_config": shape["vision_config"]} if "vision_config" in shape else {}
    width = shape.get("vision_config", {}).get("hidden_size", 1024)
    code = "microsoft/Phi-3.5-vision-instruct--"
    return {
        "config.json": {
            "architectures": ["Phi3VForCausalLM"],
            "auto_map": {
                "AutoConfig": f"{code}configuration_phi3_v.Phi3VConfig",
                "AutoModelForCausalLM": f"{code}modeling_phi3_v.Phi3VForCausalLM",
            },
            "model_type": "phi3_v",
            "attention_dropout": 0.0,
            "bos_token_id": ids["<s>"],
            "eos_token_id": ids["</s>"],
            "pad_token_id": ids["<|endoftext|>"],
            "embd_layer": {
                "embedding_cls": "image",
                "hd_transform_order": "sub_glb",
                "projection_cls": "mlp",
                "use_hd_transform": True,
                "with_learnable_separator": True,
            },
            "embd_pdrop": 0.0,
            "hidden_act": "silu",
            "hidden_size": shape["hidden_size"],
            "img_processor": {
                "image_dim_out": width,
                "model_name": "openai/clip-vit-large-patch14-336",
                "name": "clip_vision_model",
                "num_img_tokens": 144,
            },
            "initializer_range": 0.02,
            "intermediate_size": shape["intermediate_size"],
            "max_position_embeddings": shape["max_position_embeddings"],
            "num_attention_heads": shape["num_attention_heads"],
            "num_hidden_layers": shape["num_hidden_layers"],
            "num_key_value_heads": shape["num_key_value_heads"],
            "original_max_position_embeddings": shape["original_max_position_embeddings"],
            "resid_pdrop": 0.0,
            "rms_norm_eps": 1e-05,
            "rope_scaling": {
                "type": "su",
                "short_factor": [1.0 + n / half for n in range(half)],
                "long_factor": [1.0 + 32 * n / half for n in range(half)],
            },
            "rope_theta": 10000.0,
            "sliding_window": 2 * shape["max_position_embeddings"],
            "tie_word_embeddings": False,
            "torch_dtype": dtype,
            "use_cache": True,
            "vocab_size": shape["vocab_size"],
            **more,
        },
        "generation_config.json": {
            "bos_token_id": ids["<s>"],
            "eos_token_id": ids["</s>"],  # as published, though the model never says it
            "pad_token_id": ids["<|endoftext|>"],
        },
        "preprocessor_config.json": {
            "auto_map": {"AutoProcessor": f"{code}processing_phi3_v.Phi3VProcessor"},
            "image_processor_type": "Phi3VImageProcessor",
            "processor_class": "Phi3VProcessor",
            "num_crops": shape["num_crops"],
            "num_img_tokens": 144,
            "image_mean": list(CLIP_MEAN),
            "image_std": list(CLIP_STD),
        },
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<s>",
            "eos_token": "<|endoftext|>",
            "pad_token": "<|endoftext|>",
            "unk_token": "<unk>",
            "model_max_length": shape["max_position_embeddings"],
            "clean_up_tokenization_spaces": False,
            "chat_template": CHAT_TEMPLATE,
        },
    }
