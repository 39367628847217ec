"""
The least time that a workload can take on a device, from what must be multiplied and read.

Serial: encoder, then prefill, then decode, each at the device's sustained rate, nothing between.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engine.request import ImageUsed

CLIP_MODELS = ("llava", "phi3_v")
TILED_MODELS = ("idefics3", "internvl")
MERGE = 2


@dataclass(frozen=True, slots=True)
class Rates:
    """Of large bf16 matrix products, multiplications and additions counted, and of memory."""

    flops: float
    bytes_s: float


# Sustained and not peak: 798 TFLOP/s is the best that products of these shapes reached on an H100
# at full clocks, and nine tenths of the published bandwidth.
RATES: Mapping[str, Rates] = {"H100": Rates(798e12, 3.0e12), "H200": Rates(798e12, 4.3e12)}


@dataclass(frozen=True, slots=True)
class Asked:
    """One prompt, counted: patches of each of its pictures or of their tiles, and tokens."""

    pictures: Sequence[int]
    num_prompt_tokens: int
    num_output_tokens: int


@dataclass(frozen=True, slots=True)
class Floor:
    """Milliseconds a prompt."""

    encode: float
    prefill: float
    decode: float

    @property
    def total(self) -> float:
        return self.encode + self.prefill + self.decode


def find_rates(device_name: str) -> Rates | None:
    """What is known of a device; None for those that nobody has looked at."""
    return next((rates for name, rates in RATES.items() if name in device_name), None)


def floor(config: Any, asked: Sequence[Asked], batch: int, rates: Rates, bytes_each: int) -> Floor:
    """
    Args:
        config: a Qwen-VL's, LLaVA-1.5's, Phi-3.5-vision's, SmolVLM's or InternVL's.
        asked: the prompts of a run.
        batch: sequences that decode together; the weights are read once for all of them.
        bytes_each: of a weight, and of a number in the KV rows.
    """
    num = len(asked)
    text = config.text_config
    encoder_flops = _qwen_flops
    if config.model_type in CLIP_MODELS:
        encoder_flops = _clip_flops
    elif config.model_type in TILED_MODELS:
        encoder_flops = _tile_flops
    encode = sum(encoder_flops(config, n) for one in asked for n in one.pictures)
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    width, kv_width = text.num_attention_heads * head_dim, text.num_key_value_heads * head_dim
    layer = text.hidden_size * (2 * width + 2 * kv_width + 3 * text.intermediate_size)
    layers = layer * text.num_hidden_layers
    head = text.vocab_size * text.hidden_size
    prefill = sum(
        2 * layers * one.num_prompt_tokens
        + 2 * head
        # causal: half of two products of tokens x tokens x width
        + 2 * one.num_prompt_tokens**2 * width * text.num_hidden_layers
        for one in asked
    )
    row_bytes = 2 * text.num_hidden_layers * kv_width * bytes_each
    decode_bytes = sum(
        one.num_output_tokens
        * (
            (layers + head) * bytes_each / min(batch, num)
            + (one.num_prompt_tokens + one.num_output_tokens / 2) * row_bytes
        )
        for one in asked
    )
    return Floor(
        encode / rates.flops / num * 1000,
        prefill / rates.flops / num * 1000,
        decode_bytes / rates.bytes_s / num * 1000,
    )


def count_patches(config: Any, image: ImageUsed) -> list[int]:
    """Of one picture, in groups that attend to each other: all of it, or each tile and the whole."""
    if config.model_type not in (*TILED_MODELS, "phi3_v"):
        return [image.num_tokens * (1 if config.model_type == "llava" else MERGE**2)]
    tile_px, patch_px = _tile_sides(config.vision_config)
    num_tiles = image.used_width * image.used_height // tile_px**2
    # Phi sees every picture whole too, the others see a picture of one tile as that.
    num_whole = int(num_tiles > 1 or config.model_type == "phi3_v")
    return [(tile_px // patch_px) ** 2] * (num_tiles + num_whole)


def _tile_sides(vision: Any) -> tuple[int, int]:
    """Pixels of a tile and of a patch."""
    tile, patch = (
        side[0] if isinstance(side, list | tuple) else side
        for side in (vision.image_size, vision.patch_size)
    )
    return tile, patch


def _clip_flops(config: Any, num_patches: int) -> float:
    """Of the layers that are read, with the class token, and of the projector."""
    vision, hidden = config.vision_config, config.text_config.hidden_size
    width, num_tokens = vision.hidden_size, num_patches + 1
    is_phi = config.model_type == "phi3_v"
    read = config.vision_layer if is_phi else config.vision_feature_layer
    merge = MERGE**2 if is_phi else 1  # patches that the projector reads at once
    depth = read % (vision.num_hidden_layers + 1)
    layer = 2 * num_tokens * (4 * width**2 + 2 * width * vision.intermediate_size)
    attention = 4 * num_tokens**2 * width
    projector = 2 * num_patches / merge * (merge * width * hidden + hidden**2)
    embedding = 2 * num_patches * 3 * vision.patch_size**2 * width
    return float(depth * (layer + attention) + projector + embedding)


def _tile_flops(config: Any, num_patches: int) -> float:
    """Of one tile, through all layers: SmolVLM's one matrix behind them, or InternVL's two."""
    vision, hidden = config.vision_config, config.text_config.hidden_size
    width, is_intern = vision.hidden_size, config.model_type == "internvl"
    num_tokens = num_patches + int(is_intern)  # with its class token
    merged = width * (round(1 / config.downsample_ratio) if is_intern else config.scale_factor) ** 2
    layer = 2 * num_tokens * (4 * width**2 + 2 * width * vision.intermediate_size)
    attention = 4 * num_tokens**2 * width
    projector = 2 * num_patches * width * hidden  # rows fewer by as much as each is wider
    if is_intern:
        projector += 2 * num_patches * width / merged * hidden**2
    embedding = 2 * num_patches * 3 * _tile_sides(vision)[1] ** 2 * width
    return float(vision.num_hidden_layers * (layer + attention) + projector + embedding)


def _qwen_flops(config: Any, num_patches: int) -> float:
    """Of any generation; its pictures are stills, and a window is taken for a full one."""
    vision = config.vision_config
    if config.model_type == "qwen2_vl":
        width, out = vision.embed_dim, vision.hidden_size
        mlp = 2 * vision.mlp_ratio * width
    else:
        width, out = vision.hidden_size, vision.out_hidden_size
        mlp = (3 if config.model_type == "qwen2_5_vl" else 2) * vision.intermediate_size
    layers = vision.depth * 2 * num_patches * width * (4 * width + mlp)
    num_full = len(getattr(vision, "fullatt_block_indexes", range(vision.depth)))
    seen = num_full * num_patches
    if num_full < vision.depth:
        seen += (vision.depth - num_full) * (vision.window_size // vision.patch_size) ** 2
    attention = 4 * num_patches * seen * width
    merged = MERGE**2 * width
    num_mergers = 1 + len(getattr(vision, "deepstack_visual_indexes", ()))
    mergers = num_mergers * 2 * (num_patches / MERGE**2) * merged * (merged + out)
    embedding = 2 * num_patches * 3 * vision.patch_size**2 * width
    return float(layers + attention + mergers + embedding)
