"""
Phi-3.5-vision as a module: transformers has its two halves, Phi-3 and CLIP, and not the whole.

Modules have the names under which the published weights are stored, so that a checkpoint is read
without the code that lies beside it. Nothing here knows of prompts, sizes or batches.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel, Phi3Config, PreTrainedConfig
from transformers.models.phi3.modeling_phi3 import Phi3Model, Phi3PreTrainedModel

from engine.errors import BadConfig
from engine.kernels import rope

MERGE = 2  # patches that become one token, each way
# The published config names its encoder, openai/clip-vit-large-patch14-336, and none of its sizes.
CLIP_LARGE_336: Mapping[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}
LONG_ROPE = ("su", "longrope")  # the name at its publication, and the later one


class Phi3VConfig(PreTrainedConfig):  # type: ignore[no-untyped-call]
    """
    The two halves' configs in the form of transformers' other models that see.

    Attributes:
        vision_layer: whose states are read, as an index into embeddings and layers; the published -2.
    """

    model_type = "phi3_v"
    sub_configs = {"text_config": Phi3Config, "vision_config": CLIPVisionConfig}  # noqa: RUF012

    text_config: Any = None
    vision_config: Any = None
    vision_layer: int = -2
    tie_word_embeddings: bool = False

    @classmethod
    def from_pretrained(cls, folder: Any, **_: Any) -> "Phi3VConfig":  # type: ignore[override]
        """Read a folder's config.json in its published form; code that it names is not looked at."""
        published, _ = PreTrainedConfig.get_config_dict(folder, local_files_only=True)
        return read_config(published)


def read_config(published: Mapping[str, Any]) -> Phi3VConfig:
    """
    Args:
        published: the content of config.json: Phi-3's words, `img_processor` for the encoder and
            `embd_layer` for what stands between. A `vision_config` gives the encoder other sizes.

    Raises:
        BadConfig: a variant that was never published.
    """
    between, encoder = published["embd_layer"], published["img_processor"]
    is_known = (
        encoder["name"] == "clip_vision_model"
        and encoder.get("type_feature", "patch") == "patch"
        and between.get("use_hd_transform")
        and between.get("with_learnable_separator")
        and between.get("hd_transform_order") == "sub_glb"
        and between.get("projection_cls") == "mlp"
    )
    if not is_known:
        raise BadConfig(
            "This Phi-3 vision checkpoint reads pictures in another way than the published ones: only "
            "clip_vision_model with tiles, learnable separators, order sub_glb and an mlp is supported."
        )
    vision = CLIPVisionConfig(**{**CLIP_LARGE_336, **published.get("vision_config", {})})
    if encoder["image_dim_out"] != vision.hidden_size:
        raise BadConfig(
            f"img_processor.image_dim_out is {encoder['image_dim_out']}, but the encoder's width is "
            f"{vision.hidden_size}."
        )
    known = set(Phi3Config().to_dict()) - {"model_type", "rope_parameters", "architectures"}
    words = {name: value for name, value in published.items() if name in known}
    most = published["max_position_embeddings"]
    window = words.pop("sliding_window", None)
    if window is not None and window < most:
        raise BadConfig(f"sliding_window={window} is less than the context. That is not supported.")
    if (
        published.get("hidden_act", "silu") != "silu"
        or published.get("partial_rotary_factor", 1) != 1
    ):
        raise BadConfig("This Phi-3 vision checkpoint needs silu, and all of a head to be rotated.")
    text = Phi3Config(**words, sliding_window=None, rope_parameters=_read_rope(published))
    dtype = published.get("dtype", published.get("torch_dtype"))
    config = Phi3VConfig(
        text_config=text,
        vision_config=vision,
        vision_layer=encoder.get("layer_idx", -2),
        tie_word_embeddings=bool(published.get("tie_word_embeddings", False)),
    )
    config.dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    return config


def _read_rope(published: Mapping[str, Any]) -> dict[str, Any]:
    scaling = published.get("rope_scaling")
    plain = {"rope_type": "default", "rope_theta": published.get("rope_theta", 10000.0)}
    if scaling is None:
        return plain
    kind = scaling.get("type", scaling.get("rope_type"))
    if kind not in LONG_ROPE:
        raise BadConfig(f"rope_scaling of the type {kind!r} is not supported: use longrope.")
    return plain | {
        "rope_type": "longrope",
        "short_factor": scaling["short_factor"],
        "long_factor": scaling["long_factor"],
        "original_max_position_embeddings": published["original_max_position_embeddings"],
        "factor": published["max_position_embeddings"]
        / published["original_max_position_embeddings"],
    }


class PictureEmbedding(nn.Module):
    """
    From tiles to rows of the text model's width.

    Axes: tiles of one size, the patches of a tile, C the encoder's width, `side` tokens a tile each
    way, H the text model's width.
    """

    def __init__(self, config: Phi3VConfig) -> None:
        super().__init__()
        vision = config.vision_config
        tower = CLIPVisionModel._from_config(vision)  # type: ignore[no-untyped-call]
        self.img_processor = nn.ModuleDict({"vision_model": tower})
        self.side: int = vision.image_size // vision.patch_size // MERGE
        width = MERGE**2 * vision.hidden_size
        hidden = config.text_config.hidden_size
        self.glb_GN = nn.Parameter(torch.zeros(1, 1, width))
        self.sub_GN = nn.Parameter(torch.zeros(1, 1, 1, width))
        self.img_projection = nn.Sequential(
            nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden)
        )

    def merge(self, patches: Tensor) -> Tensor:
        """(tiles, patches, C) -> (tiles, side, side, 4 * C), 2 x 2 neighbours in one."""
        cells = patches.view(len(patches), self.side, MERGE, self.side, MERGE, -1)
        return cells.transpose(2, 3).reshape(len(patches), self.side, self.side, -1)

    def lay_out(self, cells: Tensor, rows: int, columns: int) -> Tensor:
        """
        One picture's tokens in reading order, not projected yet.

        Args:
            cells: (1 + rows * columns, side, side, 4 * C): the whole picture, then its tiles by rows.

        Returns:
            (num_tokens, 4 * C): the lines of the joined tiles, each ended by `sub_GN`; `glb_GN`; the
            lines of the whole picture, ended likewise.
        """
        whole, tiles = cells[0], cells[1:]
        joined = tiles.view(rows, columns, *whole.shape).transpose(1, 2)
        joined = joined.reshape(rows * self.side, columns * self.side, -1)
        return torch.cat([self._end_lines(joined), self.glb_GN[0], self._end_lines(whole)])

    def _end_lines(self, lines: Tensor) -> Tensor:
        ends = self.sub_GN[0].expand(len(lines), 1, -1)
        return torch.cat([lines, ends], dim=1).flatten(0, 1)


class Phi3VForCausalLM(Phi3PreTrainedModel):  # type: ignore[no-untyped-call]
    """The whole model: `model` is Phi-3's with the picture embedding hung in, under its published name."""

    config_class = Phi3VConfig
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    @classmethod
    def from_pretrained(cls, folder: Any, **words: Any) -> Any:  # type: ignore[override]
        """The published model has its word embeddings twice; which of the names is stored varies."""
        words["key_mapping"] = {r"^model\.vision_embed_tokens\.wte\.": "model.embed_tokens."}
        return super().from_pretrained(folder, **words)

    def __init__(self, config: Phi3VConfig) -> None:
        super().__init__(config)
        self.model = Phi3Model(config.text_config)
        self.model.vision_embed_tokens = PictureEmbedding(config)
        hidden, vocab = config.text_config.hidden_size, config.text_config.vocab_size
        self.lm_head = nn.Linear(hidden, vocab, bias=False)
        self.post_init()  # type: ignore[no-untyped-call]


class SwitchedRotary(nn.Module):
    """
    Phi-3's rotary positions with LongRoPE, the factors chosen by token instead of by call.

    transformers takes the longest sequence of a call to choose the factors of all. Here position p
    below `num_positions` has the short factors, and num_positions + p the long ones for position p.
    It gives (1, T, dim / 2) of float32, as fused attention reads it.
    """

    def __init__(self, rotary: Any, num_positions: int) -> None:
        super().__init__()
        rope_parameters = rotary.config.rope_parameters
        half, device = len(rotary.inv_freq), rotary.inv_freq.device
        base = rope_parameters["rope_theta"] ** (torch.arange(half, device=device).float() / half)
        tables = [
            rope.build_table(
                1.0
                / (torch.tensor(rope_parameters[name], dtype=torch.float32, device=device) * base),
                num_positions,
                rotary.attention_scaling,
            )
            for name in ("short_factor", "long_factor")
        ]
        cos, sin = (torch.cat(pair) for pair in zip(*tables, strict=True))
        self.cos, self.sin = nn.Buffer(cos, persistent=False), nn.Buffer(sin, persistent=False)
        self.axis_of = nn.Buffer(
            torch.zeros(half, dtype=torch.long, device=device), persistent=False
        )

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """position_ids: (1, T)."""
        cos, sin = rope.look_up(position_ids, self.axis_of, self.cos, self.sin)
        return cos[None], sin[None]
