"""
Idefics3 and the first SmolVLM: a picture in square tiles, each with its row and column said, and once
more whole.

Its longer side is brought to a fixed length, then both sides to whole tiles; a picture of one tile is
seen as that. A tile is a SigLIP's, of which neighbouring patches become one token.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from engine.errors import BadConfig, BadEmbeddings
from engine.families.llava_next import cut_tiles
from engine.families.protocol import Description, Family, Plan, Rows, Visual, check_text
from engine.families.resizing import check_aspect, resize
from engine.families.tiles import TileEncoder, Tower

MEAN = STD = (0.5, 0.5, 0.5)
LONGEST_PX, TILE_PX = 1456, 364  # where the checkpoint does not say
MOST_PX = 4096  # of a side on the way, whatever the checkpoint says


class Idefics3(Family):
    """A plan's layout is the width and height of the picture on the way to its tiles."""

    image_placeholder = image_slot = "<image>"
    image_token_id: int

    def __init__(self, description: Description) -> None:
        super().__init__(description)
        check_text(self.text_config)
        config = description.config
        self._pictures = pictures = description.pictures
        self._tokenizer = description.copy_tokenizer()
        named = description.tokenizer
        self._around = getattr(named, "fake_image_token", "<fake_token_around_image>")
        self._whole = getattr(named, "global_image_token", "<global-img>")
        self.image_token_id = config.image_token_id
        self._longest_px = (pictures.get("size") or {}).get("longest_edge", LONGEST_PX)
        self._tile_px = (pictures.get("max_image_size") or {}).get("longest_edge", TILE_PX)
        self._resample = Image.Resampling(pictures.get("resample") or Image.Resampling.LANCZOS)
        self._is_split = pictures.get("do_image_splitting", True)
        self._side = self._tile_px // config.vision_config.patch_size
        if self._side % config.scale_factor or not pictures.get("do_resize", True):
            raise BadConfig(
                "The model's preprocessor_config.json makes other tiles than its encoder reads. Give "
                "the model's own preprocessor_config.json."
            )
        self._num_rows = (self._side // config.scale_factor) ** 2

    # --- on the host ---------------------------------------------------------------------------------

    def plan_picture(self, width_px: int, height_px: int, area: Any) -> Plan:
        check_aspect(width_px, height_px)
        first = fit_longest(width_px, height_px, self._longest_px)
        width, height = (
            fill_tiles(*first, self._tile_px) if self._is_split else (self._tile_px,) * 2
        )
        down, across = height // self._tile_px, width // self._tile_px
        num_tiles = down * across
        return Plan(
            self._write(*((down, across) if num_tiles > 1 else (0, 0))),
            num_patches=(num_tiles + int(num_tiles > 1)) * self._side**2,
            width_px=width,
            height_px=height,
            layout=first,
        )

    def plan_embeddings(self, num_rows: int, grid: tuple[int, int, int] | None) -> Plan:
        """Of one tile: of several, nobody says how they stand."""
        super().plan_embeddings(num_rows, grid)
        if num_rows != self._num_rows:
            raise BadEmbeddings(
                f"This model reads text between the tiles of a picture. Give embeddings of one tile, "
                f"{self._num_rows} tokens instead of {num_rows}, or give the picture."
            )
        return Plan(self._write(0, 0))

    def _write(self, down: int, across: int) -> tuple[Rows | tuple[int, ...], ...]:
        """The text of so many tiles and the whole picture, features in their places."""
        rows = Rows(self.image_token_id, self._num_rows)
        pieces: list[Rows | tuple[int, ...]] = []
        text = ""
        for row in range(1, down + 1):
            for column in range(1, across + 1):
                text += f"{self._around}<row_{row}_col_{column}>"
                pieces += [self._encode(text), rows]
                text = ""
            text = "\n"
        text += f"\n{self._around}" if down else self._around
        return (*pieces, self._encode(text + self._whole), rows, self._encode(self._around))

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def cut_picture(self, image: Image.Image, plan: Plan) -> Visual:
        first_width, first_height = plan.layout
        first = resize(image, first_height, first_width, self._resample)
        filled = resize(first, plan.height_px, plan.width_px, self._resample)
        tiles = cut_tiles(filled, self._tile_px)
        if len(tiles) > 1:
            tiles.append(resize(filled, self._tile_px, self._tile_px, self._resample))
        return self._build(tiles, plan)

    # --- on the device -------------------------------------------------------------------------------

    def attach(self, model: Any) -> None:
        super().attach(model)
        self.text = model.model.text_model
        tower = model.model.vision_model
        self._tower = Tower(
            tower, -1, drops_first=False, embed=_FullTiles(tower.embeddings, self._side)
        )
        self._norm, self._connector = tower.post_layernorm, model.model.connector
        self._encoder = TileEncoder(tower, self._pictures, MEAN, STD, tile_patches=self._side**2)

    @torch.inference_mode()
    def encode(self, visuals: Sequence[Visual]) -> list[Tensor]:
        seen = self._encoder.encode(visuals, self._see, self.repeats)
        return [tiles.flatten(0, 1) for tiles in seen]

    def _see(self, pixels: Tensor) -> Tensor:
        return self._connector(self._norm(self._tower(pixels)))  # type: ignore[no-any-return]


class _FullTiles(nn.Module):
    """
    An encoder's embeddings of tiles in which no patch is padding: their positions are found once.

    The model's own call finds them by each tile's mask, for which the host waits for the device. Some
    versions of transformers also do so in the model's type, where 16 bits take neighbours for one.
    """

    def __init__(self, embeddings: Any, side: int) -> None:
        super().__init__()
        self._patches, self._position = embeddings.patch_embedding, embeddings.position_embedding
        positions = place_patches(side, embeddings.num_patches_per_side)
        self._positions = positions.to(self._position.weight.device)

    def forward(self, pixels: Tensor) -> Tensor:
        patches: Tensor = self._patches(pixels).flatten(2).transpose(1, 2)
        places: Tensor = self._position(self._positions)
        return patches + places


def place_patches(side: int, known_side: int) -> Tensor:
    """(side * side,), int64: the position of each patch of a tile among known_side * known_side."""
    edges = torch.arange(1 / known_side, 1.0, 1 / known_side)
    places = torch.arange(side, dtype=torch.float32) * (1.0 / torch.tensor(side))
    found = torch.bucketize(places.clamp(max=1 - 1e-6), edges, right=True)
    return (found[:, None] * known_side + found).flatten()


def fit_longest(width_px: int, height_px: int, longest_px: int) -> tuple[int, int]:
    """(width, height) with the longer side as given, the other one even, neither over MOST_PX."""
    aspect = width_px / height_px
    if width_px >= height_px:
        width, height = longest_px, int(longest_px / aspect)
        height += height % 2
    else:
        width, height = int(longest_px * aspect), longest_px
        width += width % 2
    width, height = max(width, 1), max(height, 1)
    aspect = width / height
    if width >= height and width > MOST_PX:
        width, height = MOST_PX, int(MOST_PX / aspect)
    elif height > MOST_PX:
        width, height = int(MOST_PX * aspect), MOST_PX
    return max(width, 1), max(height, 1)


def fill_tiles(width_px: int, height_px: int, tile_px: int) -> tuple[int, int]:
    """(width, height) in whole tiles: the longer side rounded up, then the other one that goes with it."""
    aspect = width_px / height_px
    if width_px >= height_px:
        width = math.ceil(width_px / tile_px) * tile_px
        return width, math.ceil(int(width / aspect) / tile_px) * tile_px
    height = math.ceil(height_px / tile_px) * tile_px
    return math.ceil(int(height * aspect) / tile_px) * tile_px, height
