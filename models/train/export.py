"""
Write darkroom-tiny as a checkpoint: bfloat16 weights under the published names, and the configs.

`python -m models.train.export` writes the configs; a training run writes the weights.
"""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from models.train import settings as size

FOLDER = Path(__file__).parents[1] / "darkroom-tiny"
PUBLISHED_NAMES = (("model.visual.", "visual."), ("model.language_model.", "model."))

# The same conversation format as Qwen2-VL's: roles between <|im_start|> and <|im_end|>, a picture as
# one placeholder between vision marks, and a system turn where the caller gave none.
CHAT_TEMPLATE = """\
{%- set seen = namespace(images=0, videos=0) -%}
{%- for message in messages -%}
{%- if loop.first and message['role'] != 'system' -%}
<|im_start|>system
SYSTEM_PROMPT<|im_end|>
{{ '' }}
{%- endif -%}
<|im_start|>{{ message['role'] }}
{% if message['content'] is string -%}
{{ message['content'] }}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] in ('image', 'image_url') -%}
{%- set seen.images = seen.images + 1 -%}
{%- if add_vision_id %}Picture {{ seen.images }}: {% endif -%}
<|vision_start|><|image_pad|><|vision_end|>
{%- elif part['type'] in ('video', 'video_url') -%}
{%- set seen.videos = seen.videos + 1 -%}
{%- if add_vision_id %}Video {{ seen.videos }}: {% endif -%}
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
""".replace("SYSTEM_PROMPT", size.SYSTEM_PROMPT)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=FOLDER, help="the checkpoint's folder")
    options = parser.parse_args()
    write_configs(options.out, Tokenizer.from_file(str(FOLDER / "tokenizer.json")))


def write_weights(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    published = {
        theirs + name.removeprefix(ours): tensor.to(torch.bfloat16).contiguous()
        for name, tensor in weights.items()
        for ours, theirs in PUBLISHED_NAMES
        if name.startswith(ours)
    }
    save_file(published, str(folder / "model.safetensors"), metadata={"format": "pt"})


def unpublished(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A checkpoint's weights under the names of `network.TinyQwen2VL`."""
    ours_of = {theirs: ours for ours, theirs in PUBLISHED_NAMES}
    return {
        ours_of[name[: name.index(".") + 1]] + name[name.index(".") + 1 :]: tensor
        for name, tensor in weights.items()
    }


def write_configs(folder: Path, tokenizer: Tokenizer) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    for name, content in configs(tokenizer).items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")


def configs(tokenizer: Tokenizer) -> dict[str, dict[str, object]]:
    ids = {token: tokenizer.token_to_id(token) for token in size.SPECIAL_TOKENS}
    num_tokens = -(-tokenizer.get_vocab_size() // 16) * 16
    return {
        "config.json": {
            "architectures": ["Qwen2VLForConditionalGeneration"],
            "model_type": "qwen2_vl",
            "dtype": "bfloat16",
            "image_token_id": ids["<|image_pad|>"],
            "video_token_id": ids["<|video_pad|>"],
            "vision_start_token_id": ids["<|vision_start|>"],
            "vision_end_token_id": ids["<|vision_end|>"],
            "tie_word_embeddings": True,
            "text_config": {
                "model_type": "qwen2_vl_text",
                "dtype": "bfloat16",
                "vocab_size": num_tokens,
                "hidden_size": size.TEXT_WIDTH,
                "intermediate_size": size.TEXT_MLP,
                "num_hidden_layers": size.TEXT_DEPTH,
                "num_attention_heads": size.TEXT_HEADS,
                "num_key_value_heads": size.TEXT_KV_HEADS,
                "max_position_embeddings": size.MAX_POSITIONS,
                "rms_norm_eps": 1e-6,
                "bos_token_id": ids["<|endoftext|>"],
                "eos_token_id": ids["<|im_end|>"],
                "tie_word_embeddings": True,
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": size.ROPE_THETA,
                    "mrope_section": list(size.MROPE_SECTION),
                },
            },
            "vision_config": {
                "model_type": "qwen2_vl_vision",
                "depth": size.VISION_DEPTH,
                "embed_dim": size.VISION_WIDTH,
                "hidden_size": size.TEXT_WIDTH,
                "mlp_ratio": size.VISION_MLP_RATIO,
                "num_heads": size.VISION_HEADS,
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
            "max_new_tokens": 256,
        },
        "preprocessor_config.json": {
            "image_processor_type": "Qwen2VLImageProcessor",
            "min_pixels": size.AREA.min_pixels,
            "max_pixels": size.AREA.max_pixels,
            "patch_size": 14,
            "temporal_patch_size": 2,
            "merge_size": 2,
            "image_mean": list(size.IMAGE_MEAN),
            "image_std": list(size.IMAGE_STD),
        },
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "model_max_length": size.MAX_POSITIONS,
            "clean_up_tokenization_spaces": False,
        },
    }


if __name__ == "__main__":
    main()
