"""
LLaVA-NeXT: a picture is seen whole and in tiles, and each row of the tiles ends in a learned break.

The picture is fitted into the best of a few resolutions, each so many tiles high and wide, and what
was border is taken out of the features again.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from engine.errors import BadConfig
from engine.families.llava import find_template
from engine.families.protocol import Description, Family, Plan, Rows, Visual, check_text
from engine.families.resizing import CLIP_MEAN, CLIP_STD, check_aspect, read_sides, resize
from engine.families.tiles import TileEncoder, Tower, count_patches

Resolution = tuple[int, int]
"""Height and width in pixels."""


@dataclass(frozen=True, slots=True)
class Tiling:
    """
    How a picture's features lie.

    Attributes:
        rows, columns: of tiles; none for a picture that is only seen whole.
        top, left: rows and columns of patches that are border, on both sides.
        height, width: of what is left, in patches, and of what it is shrunk to.
    """

    rows: int = 0
    columns: int = 0
    top: int = 0
    left: int = 0
    height: int = 0
    width: int = 0


class LlavaNext(Family):
    """A plan's layout is its `Tiling`."""

    image_placeholder = image_slot = "<image>"
    image_token_id: int
    mean, std = CLIP_MEAN, CLIP_STD  # where the checkpoint does not say

    def __init__(self, description: Description) -> None:
        super().__init__(description)
        check_text(self.text_config)
        self.chat_template = find_template(self.text_config)
        self.config = config = description.config
        self.image_token_id = config.image_token_id
        self._pictures = pictures = description.pictures
        vision = config.vision_config
        self._tile_px: int = vision.image_size
        self._side = vision.image_size // vision.patch_size
        num_rows, self._num_patches = count_patches(vision)
        self._drops_first = config.vision_feature_select_strategy == "default"
        self._num_rows = num_rows - int(self._drops_first)
        # The checkpoint's two lists must say the same: by one the pixels are cut, by the other the
        # features were put together in training.
        self._resolutions = [(height, width) for height, width in config.image_grid_pinpoints]
        self._resample = Image.Resampling(pictures.get("resample") or Image.Resampling.BICUBIC)
        self._check_pictures(pictures)

    def _check_pictures(self, pictures: Mapping[str, Any]) -> None:
        told = pictures.get("image_grid_pinpoints")
        sizes = [read_sides(pictures[key]) for key in ("size", "crop_size") if pictures.get(key)]
        fits = (
            self._num_rows == self._side**2  # no class token among them
            and all(size in (self._tile_px, (self._tile_px,) * 2) for size in sizes)
            and all(not side % self._tile_px for sides in self._resolutions for side in sides)
        )
        if not fits or (told and [tuple(sides) for sides in told] != self._resolutions):
            raise BadConfig(
                "The model's preprocessor_config.json cuts other tiles than its encoder reads. Give "
                "the model's own preprocessor_config.json."
            )

    # --- on the host ---------------------------------------------------------------------------------

    def plan_picture(self, width_px: int, height_px: int, area: Any) -> Plan:
        check_aspect(width_px, height_px)
        height, width = choose_resolution(height_px, width_px, self._resolutions)
        tiling = self._tile(height_px, width_px, height // self._tile_px, width // self._tile_px)
        num_rows = self._num_rows + tiling.height * (tiling.width + 1)  # with a break each
        return Plan(
            (Rows(self.image_token_id, num_rows),),
            num_patches=self._num_patches * (1 + tiling.rows * tiling.columns),
            width_px=width,
            height_px=height,
            layout=tiling,
        )

    def _tile(self, height_px: int, width_px: int, rows: int, columns: int) -> Tiling:
        height, width = rows * self._side, columns * self._side
        top, left = find_border(height_px, width_px, height, width)
        return Tiling(rows, columns, top, left, height - 2 * top, width - 2 * left)

    def cut_picture(self, image: Image.Image, plan: Plan) -> Visual:
        whole = resize(image, self._tile_px, self._tile_px, self._resample)
        fitted = fit(image, plan.height_px, plan.width_px, self._resample)
        return self._build([whole, *cut_tiles(fitted, self._tile_px)], plan)

    # --- on the device -------------------------------------------------------------------------------

    def attach(self, model: Any) -> None:
        super().attach(model)
        tower, config = model.model.vision_tower, self.config
        self._tower = Tower(tower, config.vision_feature_layer, drops_first=self._drops_first)
        self._projector = model.model.multi_modal_projector
        self._break = model.model.image_newline
        self._encoder = self._build_encoder(tower, self._pictures)

    def _build_encoder(self, tower: Any, pictures: Mapping[str, Any]) -> TileEncoder:
        return TileEncoder(
            tower,
            pictures,
            self.mean,
            self.std,
            tile_patches=self._num_patches,
        )

    @torch.inference_mode()
    def encode(self, visuals: Sequence[Visual]) -> list[Tensor]:
        encoded = self._encoder.encode(visuals, self._see, self.repeats)
        return [
            self._join(tiles, visual.plan.layout)
            for tiles, visual in zip(encoded, visuals, strict=True)
        ]

    def _see(self, pixels: Tensor) -> Tensor:
        return self._projector(self._tower(pixels))  # type: ignore[no-any-return]

    def _join(self, tiles: Tensor, tiling: Tiling) -> Tensor:
        """(1 + tiles, rows, hidden) -> (rows of the picture, hidden): whole, then by lines of tiles."""
        side = self._side
        grid = tiles[1:].reshape(tiling.rows, tiling.columns, side, side, -1)
        grid = grid.transpose(1, 2).reshape(tiling.rows * side, tiling.columns * side, -1)
        top, left = tiling.top, tiling.left
        seen = self._shrink(grid[top : len(grid) - top, left : grid.shape[1] - left], tiling)
        breaks = self._break.expand(len(seen), 1, -1)
        return torch.cat([tiles[0], torch.cat([seen, breaks], dim=1).flatten(0, 1)])

    def _shrink(self, grid: Tensor, tiling: Tiling) -> Tensor:
        """(rows, columns, hidden) of patches to the plan's height and width, where they are more."""
        return grid


def choose_resolution(
    height_px: int, width_px: int, resolutions: Sequence[Resolution]
) -> Resolution:
    """The one that shows most of a picture's pixels and, of several, the smallest."""

    def value(resolution: Resolution) -> tuple[int, int]:
        height, width = resolution
        scale = min(width / width_px, height / height_px)
        shown = min(int(width_px * scale) * int(height_px * scale), width_px * height_px)
        return shown, shown - height * width

    return max(resolutions, key=value)


def fit(
    image: Image.Image, height_px: int, width_px: int, resample: Image.Resampling
) -> Image.Image:
    """As large as fits into this size, in the middle of black."""
    scale_x, scale_y = width_px / image.width, height_px / image.height
    if scale_x < scale_y:
        size = min(math.ceil(image.height * scale_x), height_px), width_px
    else:
        size = height_px, min(math.ceil(image.width * scale_y), width_px)
    resized = resize(image, *size, resample)
    canvas = Image.new("RGB", (width_px, height_px))
    canvas.paste(resized, ((width_px - resized.width) // 2, (height_px - resized.height) // 2))
    return canvas


def cut_tiles(image: Image.Image, tile_px: int) -> list[Image.Image]:
    """Row by row; both sides are multiples of tile_px."""
    return [
        image.crop((left, top, left + tile_px, top + tile_px))
        for top in range(0, image.height, tile_px)
        for left in range(0, image.width, tile_px)
    ]


def find_border(height_px: int, width_px: int, height: int, width: int) -> tuple[int, int]:
    """
    Rows above and columns left of a picture that was fitted into height x width patches.

    As many are taken away below and on the right. Rounded as the models were trained.
    """
    if width_px / height_px > width / height:
        return (height - int(round(height_px * (width / width_px), 7))) // 2, 0
    return 0, (width - int(round(width_px * (height / height_px), 7))) // 2
