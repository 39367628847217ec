"""
LLaVA-OneVision: LLaVA-NeXT with finer tiles, several pictures in one prompt, and clips.

A picture that is alone is seen whole and in tiles, however many, and their features are shrunk to what
so many tiles would give. Several pictures of one prompt are seen whole only, on a square of the
mean colour. A frame of a clip is seen whole, at half as many features a side.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from engine.families.llava_next import LlavaNext, Tiling
from engine.families.protocol import Description, Plan, Rows, Visual
from engine.families.resizing import check_aspect, resize, resize_padded
from engine.families.tiles import encode_kinds
from media.decoded import Fit

WHOLE, FRAMES = Tiling(), Tiling(height=1)  # layouts of what is not tiled
SHRINK_FROM = 1.1  # times too large a side before features are shrunk


class LlavaOnevision(LlavaNext):
    """A plan's layout is its `Tiling`; one without rows and columns for what is seen whole only."""

    video_placeholder = video_slot = "<video>"
    video_token_id: int

    def __init__(self, description: Description) -> None:
        super().__init__(description)
        self.chat_template = None
        config = description.config
        self.video_token_id = config.video_token_id
        self._max_tiles = int(config.vision_aspect_ratio.removeprefix("anyres_max_"))
        self._clips = description.clips or description.pictures
        self._clip_resample = Image.Resampling(
            self._clips.get("resample") or Image.Resampling.BICUBIC
        )
        mean = self._pictures.get("image_mean") or self.mean
        self._border = tuple(int(255 * level) for level in mean)
        self._pooled_side = math.ceil(self._side / 2)

    # --- on the host ---------------------------------------------------------------------------------

    def plan_one_of(self, number: int, width_px: int, height_px: int, area: Any) -> Plan:
        if number == 1:
            return self.plan_picture(width_px, height_px, area)
        check_aspect(width_px, height_px)
        return self._plan_whole(self.image_token_id, self._num_rows + 1, 1, WHOLE)

    def plan_clip(
        self,
        width_px: int,
        height_px: int,
        num_frames: int,
        times_s: Sequence[float] | None,
        frame_s: float | None,
        duration_s: float | None,
        area: Any,
    ) -> Plan:
        num_rows = num_frames * self._pooled_side**2 + 1
        return self._plan_whole(self.video_token_id, num_rows, num_frames, FRAMES)

    def _plan_whole(self, token_id: int, num_rows: int, num_tiles: int, layout: Tiling) -> Plan:
        return Plan(
            (Rows(token_id, num_rows),),
            num_patches=self._num_patches * num_tiles,
            width_px=self._tile_px,
            height_px=self._tile_px,
            layout=layout,
        )

    def _tile(self, height_px: int, width_px: int, rows: int, columns: int) -> Tiling:
        tiling = super()._tile(height_px, width_px, rows, columns)
        too_large = math.sqrt(tiling.height * tiling.width / (self._max_tiles * self._side**2))
        if too_large <= SHRINK_FROM:
            return tiling
        height, width = int(tiling.height // too_large), int(tiling.width // too_large)
        return Tiling(rows, columns, tiling.top, tiling.left, height, width)

    def fit(self, plan: Plan) -> Fit | None:
        """Frames are squashed; pictures are needed as they are."""
        if plan.layout != FRAMES:
            return None
        return Fit(self._tile_px, self._tile_px, self._clip_resample)

    def cut_picture(self, image: Image.Image, plan: Plan) -> Visual:
        if plan.layout.rows:
            return super().cut_picture(image, plan)
        px = self._tile_px
        return self._build([resize_padded(image, px, px, self._border, self._resample)], plan)

    def cut_clip(self, frames: Sequence[Image.Image], plan: Plan) -> Visual:
        px, resample = self._tile_px, self._clip_resample
        return self._build(
            [resize(frame, px, px, resample) for frame in frames], plan, is_clip=True
        )

    # --- on the device -------------------------------------------------------------------------------

    def attach(self, model: Any) -> None:
        super().attach(model)
        self._clip_encoder = self._build_encoder(model.model.vision_tower, self._clips)

    @torch.inference_mode()
    def encode(self, visuals: Sequence[Visual]) -> list[Tensor]:
        encoders = self._encoder, self._clip_encoder
        seen = encode_kinds(visuals, encoders, self._see, self.repeats)
        return [self._rows_of(*one) for one in zip(visuals, seen, strict=True)]

    def _rows_of(self, visual: Visual, tiles: Tensor) -> Tensor:
        if visual.plan.layout.rows:
            return self._join(tiles, visual.plan.layout)
        if visual.is_clip:
            grid = tiles.view(len(tiles), self._side, self._side, -1)
            tiles = _resample(grid, self._pooled_side, self._pooled_side)
        return torch.cat([tiles.flatten(0, -2), self._break[None]])

    def _shrink(self, grid: Tensor, tiling: Tiling) -> Tensor:
        if grid.shape[:2] == (tiling.height, tiling.width):
            return grid
        return _resample(grid[None], tiling.height, tiling.width)[0]


def _resample(grids: Tensor, height: int, width: int) -> Tensor:
    """(pictures, rows, columns, hidden) to other rows and columns, between the nearest four."""
    channels_first = grids.permute(0, 3, 1, 2).contiguous()
    resampled = F.interpolate(channels_first, size=(height, width), mode="bilinear")
    return resampled.permute(0, 2, 3, 1)
