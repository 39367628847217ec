"""
InternVL 2.5 and 3, in the form that transformers loads: a picture in tiles, and once more whole.

The tiles stand in the grid whose aspect is nearest to the picture's; four patches become one token.
A frame of a clip is one tile, with its number before it.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from engine.errors import BadConfig
from engine.families.llava_next import cut_tiles
from engine.families.protocol import Description, Family, Plan, Rows, Visual, check_text
from engine.families.resizing import CLIP_MEAN, CLIP_STD, check_aspect, read_sides, resize
from engine.families.tiles import TileEncoder
from media.decoded import Fit

MIN_TILES, MAX_TILES = 1, 12  # where the checkpoint does not say
TOO_LARGE = 2  # times the picture's area: tiles of so much more show nothing new


class InternVL(Family):
    """A plan's layout is its tiles across and down; None for a clip."""

    image_token_id: int
    video_token_id: int

    def __init__(self, description: Description) -> None:
        super().__init__(description)
        check_text(self.text_config)
        config = description.config
        self._pictures = pictures = description.pictures
        tokenizer = description.tokenizer
        self._tokenizer = description.copy_tokenizer()
        self.image_placeholder = self.image_slot = tokenizer.context_image_token
        self.video_placeholder = self.video_slot = tokenizer.video_token
        self.image_token_id = config.image_token_id
        self.video_token_id = tokenizer.convert_tokens_to_ids(tokenizer.video_token)
        self._before, self._after = (
            (tokenizer.convert_tokens_to_ids(token),)
            for token in (tokenizer.start_image_token, tokenizer.end_image_token)
        )
        vision = config.vision_config
        (self._tile_px, width_px), (patch_px, _) = vision.image_size, vision.patch_size
        self._side = self._tile_px // patch_px
        self._merge = round(1 / config.downsample_ratio)
        self._num_rows = (self._side // self._merge) ** 2
        self._min_tiles = pictures.get("min_patches") or MIN_TILES
        self._max_tiles = pictures.get("max_patches") or MAX_TILES
        self._resample = Image.Resampling(pictures.get("resample") or Image.Resampling.BICUBIC)
        is_read_so = (
            self._tile_px == width_px
            and self._side % self._merge == 0
            and read_sides(pictures.get("size") or self._tile_px) == (self._tile_px,) * 2
            and config.vision_feature_layer == -1
            and config.vision_feature_select_strategy == "default"
        )
        if not is_read_so:
            raise BadConfig(
                "This InternVL checkpoint reads its pictures in another way than the published ones: "
                "square tiles, as large in preprocessor_config.json as for its encoder, whose last "
                "layer is read. Only these are supported."
            )

    # --- on the host ---------------------------------------------------------------------------------

    def plan_picture(self, width_px: int, height_px: int, area: Any) -> Plan:
        check_aspect(width_px, height_px)
        across, down = choose_grid(
            width_px, height_px, self._tile_px, self._min_tiles, self._max_tiles
        )
        num_tiles = across * down + int(across * down > 1)
        return Plan(
            (self._before, Rows(self.image_token_id, num_tiles * self._num_rows), self._after),
            num_patches=num_tiles * self._side**2,
            width_px=across * self._tile_px,
            height_px=down * self._tile_px,
            layout=(across, down),
        )

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
        check_aspect(width_px, height_px)
        pieces: list[Rows | tuple[int, ...]] = []
        for number in range(1, num_frames + 1):
            name = f"Frame{number}: " if number == 1 else f"\nFrame{number}: "
            ids = tuple(self._tokenizer.encode(name, add_special_tokens=False).ids)
            pieces += [ids + self._before, Rows(self.image_token_id, self._num_rows), self._after]
        return Plan(
            tuple(pieces),
            num_patches=num_frames * self._side**2,
            width_px=self._tile_px,
            height_px=self._tile_px,
        )

    def plan_embeddings(self, num_rows: int, grid: tuple[int, int, int] | None) -> Plan:
        """With the same tokens around them as a picture has."""
        (rows,) = super().plan_embeddings(num_rows, grid).pieces
        return Plan((self._before, rows, self._after))

    def fit(self, plan: Plan) -> Fit | None:
        """What is seen in one tile is squashed into it."""
        is_one = (plan.width_px, plan.height_px) == (self._tile_px, self._tile_px)
        return Fit(self._tile_px, self._tile_px, self._resample) if is_one else None

    def cut_picture(self, image: Image.Image, plan: Plan) -> Visual:
        tiles = cut_tiles(
            resize(image, plan.height_px, plan.width_px, self._resample), self._tile_px
        )
        if len(tiles) > 1:
            tiles.append(self._squash(image))
        return self._build(tiles, plan)

    def cut_clip(self, frames: Sequence[Image.Image], plan: Plan) -> Visual:
        return self._build([self._squash(frame) for frame in frames], plan, is_clip=True)

    def _squash(self, image: Image.Image) -> Image.Image:
        return resize(image, self._tile_px, self._tile_px, self._resample)

    # --- on the device -------------------------------------------------------------------------------

    def attach(self, model: Any) -> None:
        super().attach(model)
        self._tower, self._projector = model.model.vision_tower, model.model.multi_modal_projector
        self._encoder = TileEncoder(
            self._tower,
            self._pictures,
            CLIP_MEAN,
            CLIP_STD,
            tile_patches=self._side**2,
        )

    @torch.inference_mode()
    def encode(self, visuals: Sequence[Visual]) -> list[Tensor]:
        seen = self._encoder.encode(visuals, self._see, self.repeats)
        return [tiles.flatten(0, 1) for tiles in seen]

    def _see(self, pixels: Tensor) -> Tensor:
        x = self._tower.embeddings(pixels)
        for layer in self._tower.encoder.layer:
            x = layer(x)
        patches = self._tower.layernorm(x)[:, 1:]  # without the class token
        return self._projector(join_patches(patches, self._side, self._merge))  # type: ignore[no-any-return]


def join_patches(patches: Tensor, side: int, merge: int) -> Tensor:
    """(tiles, side**2, width) -> (tiles, (side / merge)**2, width * merge**2): neighbours in one row."""
    blocks = patches.reshape(len(patches), side // merge, merge, side // merge, merge, -1)
    return blocks.transpose(2, 3).reshape(len(patches), (side // merge) ** 2, -1)


def choose_grid(
    width_px: int, height_px: int, tile_px: int, min_tiles: int, max_tiles: int
) -> tuple[int, int]:
    """
    Tiles across and down: of all grids the one with the aspect nearest to the picture's.

    Of several equally near ones it is the largest that is not TOO_LARGE times the picture.
    """
    best, nearest = (1, 1), float("inf")
    for across, down in _list_grids(min_tiles, max_tiles):
        apart = abs(width_px / height_px - across / down)
        is_worth_it = TOO_LARGE * width_px * height_px > across * down * tile_px**2
        if apart < nearest or (apart == nearest and is_worth_it):
            best, nearest = (across, down), apart
    return best


@cache
def _list_grids(min_tiles: int, max_tiles: int) -> list[tuple[int, int]]:
    """All of so many tiles, the smallest first."""
    sides = range(1, max_tiles + 1)
    grids = [(x, y) for x in sides for y in sides if min_tiles <= x * y <= max_tiles]
    return sorted(grids, key=lambda grid: grid[0] * grid[1])
