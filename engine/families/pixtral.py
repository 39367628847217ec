"""
Pixtral and Mistral 3: pictures of any size within a square, a token at the end of each row.

A picture that does not fit into the square is shrunk, then both sides grow to whole tokens. The
encoder knows the row and column of each patch and reads many pictures in one row. In Mistral 3
neighbouring patches become one token; Pixtral itself is a LLaVA in the form that transformers loads.
"""

import math
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from engine.errors import BadConfig, BadEmbeddings
from engine.families.packed import PackedEncoder, in_packing_order, split_rows
from engine.families.protocol import (
    Description,
    Family,
    ImageTooNarrowError,
    Plan,
    Rows,
    Visual,
    check_text,
)
from engine.families.resizing import CLIP_MEAN, CLIP_STD, check_aspect, resize
from engine.uploads import upload
from media.decoded import Fit

LONGEST_PX = 1024  # of a side, where the checkpoint does not say
MERGES = (1, 2)  # patches of a token, each way


def target_size(
    width_px: int, height_px: int, most: tuple[int, int], token_px: int
) -> tuple[int, int]:
    """
    Tokens down and across: (rows, columns).

    Args:
        most: height and width in pixels that a picture may have before it grows to whole tokens.

    Raises:
        ImageTooNarrowError: less than a pixel would be left of the shorter side.
    """
    check_aspect(width_px, height_px)
    ratio = max(height_px / most[0], width_px / most[1])
    if ratio > 1:
        height, width = math.floor(height_px / ratio), math.floor(width_px / ratio)
        if min(height, width) < 1:
            raise ImageTooNarrowError(f"{width_px}x{height_px}", max_ratio=min(most))
        height_px, width_px = height, width
    return -(-height_px // token_px), -(-width_px // token_px)


def cut_patches(pixels: Tensor, merge: int, patch_px: int) -> Tensor:
    """
    Args:
        pixels: (pictures, height_px, width_px, 3), any device.

    Returns:
        (patches, 3 * patch_px**2), channel-major; the patches of one token are neighbours.
    """
    num, height, width, _ = pixels.shape
    down, across = (side // patch_px // merge for side in (height, width))
    blocks = pixels.view(num, down, merge, patch_px, across, merge, patch_px, 3)
    return blocks.permute(0, 1, 4, 2, 5, 7, 3, 6).reshape(-1, 3 * patch_px**2)


def patch_positions(rows: int, columns: int, merge: int) -> npt.NDArray[np.int64]:
    """Row and column of each patch of so many tokens, in the order of `cut_patches`: (patches, 2)."""
    places = np.indices((rows * merge, columns * merge)).reshape(2, rows, merge, columns, merge)
    return places.transpose(1, 3, 2, 4, 0).reshape(-1, 2).astype(np.int64)


class Pixtral(Family):
    """A plan's layout is its rows and columns of tokens."""

    image_token_id: int

    def __init__(self, description: Description) -> None:
        super().__init__(description)
        check_text(self.text_config)
        config, pictures = description.config, description.pictures
        vision = config.vision_config
        self._merge: int = getattr(config, "spatial_merge_size", 1)
        self._patch_px: int = vision.patch_size
        is_read_so = (
            vision.model_type == "pixtral"
            and self._merge in MERGES
            and isinstance(self._patch_px, int)
            and config.vision_feature_layer == -1
            and getattr(config, "vision_feature_select_strategy", "full") == "full"
            and pictures.get("do_resize", True)
            and not pictures.get("do_center_crop")
        )
        if not is_read_so:
            raise BadConfig(
                "This checkpoint reads its pictures in another way than the published Pixtral and "
                "Mistral 3: with a Pixtral encoder, whose last layer is read whole, and patches merged "
                "2 x 2 or not at all. Only these are supported."
            )
        names = {
            kind: description.processor.get(f"image{kind}_token") or f"[IMG{kind.upper()}]"
            for kind in ("", "_break", "_end")
        }
        self.image_placeholder = self.image_slot = names[""]
        self.image_token_id = config.image_token_id
        ids = [
            description.tokenizer.convert_tokens_to_ids(names[kind]) for kind in ("_break", "_end")
        ]
        if None in ids or description.tokenizer.unk_token_id in ids:
            raise BadConfig(
                f"The tokenizer does not fit the model: it lacks {names['_break']} or "
                f"{names['_end']}. Give the model's own tokenizer.json."
            )
        self._break_id, self._end_id = ids
        size = pictures.get("size") or {"longest_edge": LONGEST_PX}
        longest = size.get("longest_edge")
        self._most = (longest, longest) if longest else (size["height"], size["width"])
        self._resample = Image.Resampling(pictures.get("resample") or Image.Resampling.BICUBIC)
        self._levels = 1 / pictures.get("rescale_factor", 1 / 255)
        self._mean, self._std = (0.0,) * 3, (1.0,) * 3
        if pictures.get("do_normalize", True):
            self._mean = tuple(pictures.get("image_mean") or CLIP_MEAN)
            self._std = tuple(pictures.get("image_std") or CLIP_STD)
        self._num_heads: int = vision.num_attention_heads

    # --- on the host ---------------------------------------------------------------------------------

    def plan_picture(self, width_px: int, height_px: int, area: Any) -> Plan:
        token_px = self._patch_px * self._merge
        rows, columns = target_size(width_px, height_px, self._most, token_px)
        return Plan(
            self._write(rows, columns),
            num_patches=rows * columns * self._merge**2,
            width_px=columns * token_px,
            height_px=rows * token_px,
            layout=(rows, columns),
        )

    def plan_embeddings(self, num_rows: int, grid: tuple[int, int, int] | None) -> Plan:
        if self._merge != 2:
            raise BadEmbeddings("This model takes no image embeddings. Give pictures.")
        if grid is None or grid[0] != 1:
            raise BadEmbeddings(
                "This model's pictures stand in rows: give image_grid_thw beside image_embeds, of one "
                "time each."
            )
        return Plan(self._write(grid[1] // self._merge, grid[2] // self._merge))

    def _write(self, rows: int, columns: int) -> tuple[Rows | tuple[int, ...], ...]:
        pieces = (Rows(self.image_token_id, columns), (self._break_id,)) * rows
        return (*pieces[:-1], (self._end_id,))

    def fit(self, plan: Plan) -> Fit | None:
        return Fit(plan.width_px, plan.height_px, self._resample)

    def cut_picture(self, image: Image.Image, plan: Plan) -> Visual:
        return self._build([resize(image, plan.height_px, plan.width_px, self._resample)], plan)

    # --- on the device -------------------------------------------------------------------------------

    def attach(self, model: Any) -> None:
        super().attach(model)
        self._tower, self._projector = model.model.vision_tower, model.model.multi_modal_projector
        self._weight: Tensor = self._tower.patch_conv.weight.flatten(1)  # its kernel is its stride
        device, dtype = self._weight.device, self._weight.dtype
        self._taken, self._divided = (
            torch.tensor(values, device=device)[:, None] * self._levels
            for values in (self._mean, self._std)
        )
        head_dim = len(self._weight) // self._num_heads
        self._encoder = PackedEncoder(device, dtype, self._num_heads, head_dim)

    @torch.inference_mode()
    def encode(self, visuals: Sequence[Visual]) -> list[Tensor]:
        """Run the encoder once over many pictures of any sizes, packed into one row."""
        order = in_packing_order(visuals)
        packed = [visuals[index] for index in order]
        units = [visual.plan.num_patches for visual in packed]
        packing = self._encoder.pack(units, rounds_up=self.repeats is not None)
        layouts = [visual.plan.layout for visual in packed]
        places = np.concatenate(
            [patch_positions(rows, columns, self._merge) for rows, columns in layouts]
        )
        positions = packing.fill(upload(places, self._weight.device))
        embedded = packing.fill(self._embed(packed))
        features = self._encoder.run(packing, self.repeats, self._see, embedded, positions)
        return split_rows(features, visuals, order)

    def _embed(self, packed: Sequence[Visual]) -> Tensor:
        """Cut pixels into patches and embed them; pictures of equal sizes stand together."""
        pixels = self._encoder.uploads.gather([visual.pixels for visual in packed])
        pieces, at = [], 0
        for shape, group in groupby(visual.pixels.shape[1:] for visual in packed):
            end = at + len(list(group)) * shape.numel()
            pictures = pixels[at:end].view(-1, *shape)
            pieces.append(cut_patches(pictures, self._merge, self._patch_px))
            at = end
        patches = torch.cat(pieces).float().view(-1, 3, self._patch_px**2)
        normalised = (patches - self._taken) / self._divided
        return F.linear(normalised.flatten(1).to(self._weight.dtype), self._weight)

    def _see(self, _starts: Tensor, embedded: Tensor, positions: Tensor) -> Tensor:
        x = self._tower.ln_pre(embedded[None])
        angles = self._tower.patch_positional_embedding(x, positions)
        for layer in self._tower.transformer.layers:
            x = layer(x, None, position_embeddings=angles)
        return self._project(x[0])

    def _project(self, patches: Tensor) -> Tensor:
        """(patches, width) -> (tokens, hidden)."""
        projector = self._projector
        if not hasattr(projector, "patch_merger"):
            return projector(patches)  # type: ignore[no-any-return]
        normed = projector.norm(patches)
        tokens = normed.view(-1, self._merge**2, normed.shape[1]).transpose(1, 2).flatten(1)
        merged = projector.patch_merger.merging_layer(tokens)
        return projector.linear_2(projector.act(projector.linear_1(merged)))  # type: ignore[no-any-return]
