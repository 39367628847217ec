"""
The least time that prompts can take on a device, from what must be multiplied and read.

Serial: encoder, then prefill, then decode, each at the device's sustained rate, nothing between. All
layers are counted whole, so that figures of all times can be compared; of the last one an engine may
leave out what nobody reads, a thirtieth of a prefill. It knows shapes, and neither torch nor a
running engine.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from engine.request import ImageUsed, MediaKind

QWEN_MODELS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
CLIP_MODELS = ("llava", "phi3_v")
TILED_MODELS = ("idefics3", "internvl", "smolvlm")
MERGE = 2
TEMPORAL = 2  # frames of a clip that Qwen-VL cuts into the same patches
MAX_SIZES = 4096  # of pictures whose work is remembered


@dataclass(frozen=True, slots=True)
class Rates:
    """Of large bf16 matrix products, multiplications and additions counted, and of memory."""

    flops: float
    bytes_s: float


# Sustained and not peak: 798 TFLOP/s is the best that products of these shapes reached on an H100
# at full clocks, and nine tenths of the published bandwidth.
H100, H200 = Rates(798e12, 3.0e12), Rates(798e12, 4.3e12)
# By their whole names: cards that are named alike (PCIe, NVL, GH200, parts by MIG) are others.
RATES: Mapping[str, Rates] = {"NVIDIA H100 80GB HBM3": H100, "NVIDIA H200": H200}


@dataclass(frozen=True, slots=True)
class Asked:
    """
    One prompt, counted.

    Args:
        pictures: patches of each of its pictures, or of their tiles, that are encoded.
        num_cached_tokens: of the prompt, those whose rows were there; they are not read again.
    """

    pictures: Sequence[int]
    num_prompt_tokens: int
    num_output_tokens: int
    num_cached_tokens: int = 0


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
    return RATES.get(device_name)


class Floors:
    """
    Floors of one model on one device; asked for each prompt, so it remembers what does not change.

    Args:
        config: a Qwen-VL's, LLaVA-1.5's, Phi-3.5-vision's, SmolVLM's or InternVL's.
        batch: sequences that decode together; the weights are read once for all of them.
        bytes_each: of a weight, and of a number in the KV rows.
    """

    def __init__(self, config: Any, batch: int, rates: Rates, bytes_each: int) -> None:
        text = config.text_config
        flops_of = _qwen_flops
        if config.model_type in CLIP_MODELS:
            flops_of = _clip_flops
        elif config.model_type in TILED_MODELS:
            flops_of = _tile_flops
        self._config = config
        self._rates = rates
        self._encode_flops = lru_cache(MAX_SIZES)(lambda num: flops_of(config, num))
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        width, kv_width = text.num_attention_heads * head_dim, text.num_key_value_heads * head_dim
        layer = text.hidden_size * (2 * width + 2 * kv_width + 3 * text.intermediate_size)
        self._num_layers, self._width = text.num_hidden_layers, width
        self._layers = layer * text.num_hidden_layers
        self._head = text.vocab_size * text.hidden_size
        self._weight_bytes = (self._layers + self._head) * bytes_each / batch
        self._row_bytes = 2 * text.num_hidden_layers * kv_width * bytes_each

    def of(self, asked: Asked) -> Floor:
        encode = sum(self._encode_flops(num) for num in asked.pictures)
        num_read = asked.num_prompt_tokens - asked.num_cached_tokens
        prefill = (
            2 * self._layers * num_read
            + 2 * self._head
            # causal: half of two products of tokens x tokens x width
            + 2
            * (asked.num_prompt_tokens**2 - asked.num_cached_tokens**2)
            * self._width
            * self._num_layers
        )
        return Floor(
            encode / self._rates.flops * 1000,
            prefill / self._rates.flops * 1000,
            self.decode_ms(asked.num_prompt_tokens, asked.num_output_tokens),
        )

    def decode_ms(self, num_prompt_tokens: int, num_output_tokens: int) -> float:
        """Of one output."""
        bytes_a_token: float = (
            self._weight_bytes + (num_prompt_tokens + num_output_tokens / 2) * self._row_bytes
        )
        return num_output_tokens * bytes_a_token / self._rates.bytes_s * 1000

    def count_patches(self, image: ImageUsed) -> list[int]:
        """See `count_patches`."""
        return count_patches(self._config, image)


def find_floors(config: Any, device_name: str, batch: int, bytes_each: int) -> Floors | None:
    """None where the family or the device is none of those that are known here."""
    rates = find_rates(device_name)
    if rates is None or not _is_known(config):
        return None
    try:
        floors = Floors(config, batch, rates, bytes_each)
        floors.of(Asked([MERGE**2], 1, 1))
    except (AttributeError, TypeError, ValueError):
        return None  # a config of a known family that lacks what its published ones have
    return floors


def floor(config: Any, asked: Sequence[Asked], batch: int, rates: Rates, bytes_each: int) -> Floor:
    """
    The mean of the prompts of a run.

    Args:
        batch: as in `Floors`; no more than there are prompts.
    """
    num = len(asked)
    floors = Floors(config, min(batch, num), rates, bytes_each)
    each = [floors.of(one) for one in asked]
    return Floor(
        sum(one.encode for one in each) / num,
        sum(one.prefill for one in each) / num,
        sum(one.decode for one in each) / num,
    )


def _is_known(config: Any) -> bool:
    kind = config.model_type
    if kind == "llava":  # other encoders go by that name too
        return bool(config.vision_config.model_type == "clip_vision_model")
    return kind in (*QWEN_MODELS, *CLIP_MODELS, *TILED_MODELS)


def count_patches(config: Any, image: ImageUsed) -> list[int]:
    """
    Of a picture or clip, in groups that attend to each other: all of a picture, or each tile and the
    whole; of a clip each frame, or each pair. None of features that came as they are.
    """
    if not image.used_width:
        return []
    if config.model_type == "llava":
        return [image.num_tokens]
    is_clip = image.kind == MediaKind.VIDEO
    if config.model_type not in (*TILED_MODELS, "phi3_v"):
        if not is_clip:
            return [image.num_tokens * MERGE**2]
        patch_px = config.vision_config.patch_size
        num_pairs = -(-(image.num_frames or 1) // TEMPORAL)
        return [image.used_width * image.used_height // patch_px**2] * num_pairs
    tile_px, patch_px = _tile_sides(config.vision_config)
    a_tile = (tile_px // patch_px) ** 2
    if is_clip:
        return [a_tile] * (image.num_frames or 1)
    num_tiles = image.used_width * image.used_height // tile_px**2
    # Phi sees every picture whole too, the others see a picture of one tile as that.
    num_whole = int(num_tiles > 1 or config.model_type == "phi3_v")
    return [a_tile] * (num_tiles + num_whole)


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
