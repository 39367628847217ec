"""
Phi-3.5-vision: how pictures become tiles, tokens and lines, and how prompts name them.

A picture is resampled to whole tiles of 336 px, as many as the limit permits, and padded with white.
The encoder reads every tile, and the whole picture at the size of one tile. Tokens stand in reading
order: the lines of the joined tiles, a separator, the lines of the whole picture; each line has an
end of its own. All of them are rows of features, the separators too.

`phi3_v_model.py` holds the module; docs/decisions/0009 says where this differs from the published code.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from engine.attention import VISION_ATTENTION, VisionContext, dense_kernels, using
from engine.errors import BadConfig, PlaceholderMismatch
from engine.families.phi3_v_model import MERGE, PictureEmbedding, SwitchedRotary
from engine.families.protocol import (
    Description,
    Family,
    ImageTooNarrowError,
    Plan,
    Positions,
    Rows,
    Sizing,
    TileLimit,
    Visual,
)
from engine.families.resizing import CLIP_MEAN, CLIP_STD, resize
from engine.families.tiles import Tower, find_cut, max_tiles
from engine.uploads import Uploads

NUM_CROPS = 16  # at most, of one picture; 4 is the author's advice where there are many
WHITE = (255, 255, 255)
PLACEHOLDER = re.compile(r"<\|image(?:_(\d{1,9}))?\|>")  # numbered as published, or the bare token


@dataclass(frozen=True, slots=True)
class Tiles:
    """
    How one picture is cut, beside the whole at the size of one tile.

    Attributes:
        rows, columns: of tiles.
        width_px, height_px: of the picture in them, before it is padded.
    """

    rows: int
    columns: int
    width_px: int
    height_px: int

    @property
    def turned(self) -> "Tiles":
        """The same for the picture mirrored at its diagonal."""
        return Tiles(self.columns, self.rows, self.height_px, self.width_px)

    def num_tokens(self, side: int) -> int:
        """
        Args:
            side: tokens of one tile, each way; 12 as published.
        """
        whole = side * (side + 1)
        return self.rows * side * (self.columns * side + 1) + 1 + whole


def fit(width_px: int, height_px: int, num_crops: int, tile_px: int) -> Tiles:
    """
    How a picture of this size is cut into at most num_crops tiles.

    The longer side becomes as many whole tiles as keep the number of all tiles within the limit; the
    other side follows, and is rounded down to whole pixels.

    Raises:
        ImageTooNarrowError: less than a pixel would be left of the shorter side.
    """
    longer, shorter = max(width_px, height_px), min(width_px, height_px)
    ratio = longer / shorter
    along = 1
    while (along + 1) * math.ceil((along + 1) / ratio) <= num_crops:
        along += 1
    longer_px = along * tile_px
    shorter_px = int(longer_px / ratio)
    if shorter_px < 1:
        raise ImageTooNarrowError(f"{width_px}x{height_px}", max_ratio=longer_px)
    tiles = Tiles(math.ceil(shorter_px / tile_px), along, longer_px, shorter_px)
    return tiles.turned if width_px < height_px else tiles


def lay_on_white(image: Image.Image, tiles: Tiles, tile_px: int) -> Image.Image:
    """
    Resample an RGB picture and pad it to whole tiles, half on each side, the odd pixel behind.

    Upright pictures are turned for it, so that rounding falls as it does for the same picture lying.
    """
    is_upright = image.width < image.height
    if is_upright:
        image, tiles = image.transpose(Image.Transpose.TRANSPOSE), tiles.turned
    image = resize(image, tiles.height_px, tiles.width_px, Image.Resampling.BILINEAR)
    padded = Image.new("RGB", (tiles.columns * tile_px, tiles.rows * tile_px), WHITE)
    padded.paste(image, (0, (padded.height - image.height) // 2))
    return padded.transpose(Image.Transpose.TRANSPOSE) if is_upright else padded


class Phi3V(Family):
    """Source: the description of the published processor and model; tests hold one of our own."""

    image_placeholder = "<|image|>"
    image_written = "<|image_1|>"
    image_slot = image_placeholder
    turn_end = "<|end|>"  # of its template; generation_config.json says 2, which is never said

    def __init__(self, description: Description) -> None:
        super().__init__(description)
        vision = description.config.vision_config
        self.tile_px: int = vision.image_size
        self._grid: int = vision.image_size // vision.patch_size
        if self._grid % MERGE:
            raise BadConfig("A tile of this Phi-3 vision checkpoint is no even number of patches.")
        tokenizer = description.tokenizer
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_placeholder)
        # Its author's processor tokenises what stands between pictures piece by piece, so that each
        # piece begins as a text of its own does.
        starts = tokenizer("")["input_ids"]
        self.chat_start = "".join(tokenizer.convert_ids_to_tokens(starts))
        self.image_area = TileLimit(int(description.pictures.get("num_crops", NUM_CROPS)))
        self._mean, self._std = (
            torch.tensor(description.pictures.get(name, default)).view(3, 1, 1)
            for name, default in (("image_mean", CLIP_MEAN), ("image_std", CLIP_STD))
        )
        rope = self.text_config.rope_parameters
        self._longest_short: int | None = rope.get("original_max_position_embeddings")

    # --- on the host -------------------------------------------------------------------------------

    def read_text(self, text: str) -> str:
        return PLACEHOLDER.sub(self.image_placeholder + self.chat_start, text)

    def read_prompt(self, text: str) -> str:
        """Numbers count from 1 without a gap; the token itself, which has none, is taken as it is."""
        numbers = [int(match[1]) for match in PLACEHOLDER.finditer(text) if match[1]]
        if numbers != list(range(1, len(numbers) + 1)):
            raise PlaceholderMismatch.out_of_order(
                numbers, first="<|image_1|>", second="<|image_2|>"
            )
        return self.read_text(text)

    def plan_picture(self, width_px: int, height_px: int, area: Sizing | None) -> Plan:
        assert isinstance(area, TileLimit)
        tiles = fit(width_px, height_px, area.num_crops, self.tile_px)
        assert self.image_token_id is not None
        return Plan(
            (Rows(self.image_token_id, tiles.num_tokens(self._grid // MERGE)),),
            num_patches=(1 + tiles.rows * tiles.columns) * (1 + self._grid**2),
            width_px=tiles.columns * self.tile_px,
            height_px=tiles.rows * self.tile_px,
            layout=tiles,
        )

    def cut_picture(self, image: Image.Image, plan: Plan) -> Visual:
        return self._build([lay_on_white(image, plan.layout, self.tile_px)], plan)

    def positions(
        self, num_tokens: int, media: Sequence[tuple[int, Plan]]
    ) -> tuple[Positions, int]:
        """One axis; the long factors' positions stand behind all of the short ones'."""
        most = self._longest_short
        offset = self.text_config.max_position_embeddings
        delta = offset if most is not None and num_tokens > most else 0
        return np.arange(delta, delta + num_tokens, dtype=np.int64)[None], delta

    # --- on the device -----------------------------------------------------------------------------

    def attach(self, model: Any) -> None:
        super().attach(model)
        self._pictures: PictureEmbedding = model.model.vision_embed_tokens
        tower: Any = self._pictures.img_processor["vision_model"]
        tower.config._attn_implementation = VISION_ATTENTION  # of a copy of the config
        self._attention_cut = find_cut(tower, self._grid**2)
        self._tower = Tower(tower, model.config.vision_layer, drops_first=True)
        weight: Tensor = self._pictures.glb_GN
        self._device, self._dtype = weight.device, weight.dtype
        self._mean, self._std = self._mean.to(self._device), self._std.to(self._device)
        self._uploads = Uploads(self._device)
        if self._longest_short is not None:
            self.text.rotary_emb = SwitchedRotary(
                self.text.rotary_emb, self.text_config.max_position_embeddings
            )

    @torch.inference_mode()
    def encode(self, visuals: Sequence[Visual]) -> list[Tensor]:
        pixels = self._uploads.gather([visual.pixels for visual in visuals])
        tiles = []
        sizes = [visual.pixels.numel() for visual in visuals]
        for visual, piece in zip(visuals, torch.split(pixels, sizes), strict=True):
            tiles.append(self._cut(piece.view(visual.pixels.shape[1:]), visual.plan.layout))
        batches = torch.split(torch.cat(tiles), max_tiles(1 + self._grid**2))
        with using(VisionContext((), cut=self._attention_cut)), dense_kernels(self._device):
            cells = torch.cat([self._pictures.merge(self._tower(batch)) for batch in batches])
        by_picture = torch.split(cells, [len(group) for group in tiles])
        tokens = [
            self._pictures.lay_out(of_picture, visual.plan.layout.rows, visual.plan.layout.columns)
            for visual, of_picture in zip(visuals, by_picture, strict=True)
        ]
        rows = self._pictures.img_projection(torch.cat(tokens))
        return list(torch.split(rows, [len(group) for group in tokens]))

    def _cut(self, pixels: Tensor, tiles: Tiles) -> Tensor:
        """
        Args:
            pixels: (rows * tile_px, columns * tile_px, 3), uint8.

        Returns:
            (1 + rows * columns, 3, tile_px, tile_px), normalised: the whole, then its tiles by rows.
        """
        size = self.tile_px, self.tile_px
        picture = (pixels.permute(2, 0, 1).float() / 255 - self._mean) / self._std
        whole = F.interpolate(picture[None], size, mode="bicubic")
        cut = picture.view(3, tiles.rows, size[0], tiles.columns, size[1]).permute(1, 3, 0, 2, 4)
        return torch.cat([whole, cut.reshape(-1, 3, *size)]).to(self._dtype)
