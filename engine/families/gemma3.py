"""
Gemma 3: every picture at one size, its patches averaged to a square of tokens that see each other.

A picture's tokens attend to those behind them too, up to the picture's end. The text model looks at a
window of rows in most layers and at all rows in some, and turns positions of the two differently.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

from PIL import Image
from torch import Tensor

from engine.errors import BadConfig
from engine.families.protocol import Description, check_text
from engine.families.resizing import SIGLIP_DEFAULT, Resizing
from engine.families.tiles import OneTile, TileEncoder, Tower, count_patches

# What its image processor does where the checkpoint does not say.
DEFAULT: Mapping[str, Any] = {**SIGLIP_DEFAULT, "resample": Image.Resampling.BILINEAR}


class Gemma3(OneTile):
    """A prompt names the token before a picture; the others are written around it, and line breaks."""

    sees_both_ways = True

    def __init__(self, description: Description) -> None:
        super().__init__(description)
        check_text(self.text_config)
        config = description.config
        self._pictures = {**DEFAULT, **description.pictures}
        self._resizing = Resizing.read(self._pictures)
        vision = config.vision_config
        self._num_rows: int = config.mm_tokens_per_image
        num_all, self._num_patches = count_patches(vision)
        side, patches = math.isqrt(self._num_rows), math.isqrt(self._num_patches)
        is_read_so = (
            num_all == self._num_patches
            and side**2 == self._num_rows
            and patches % side == 0
            and (vision.image_size,) * 2 == (self._resizing.height_px, self._resizing.width_px)
            and not self._pictures.get("do_pan_and_scan")
        )
        if not is_read_so:
            raise BadConfig(
                "This Gemma 3 checkpoint reads its pictures in another way than the published ones: "
                "whole (no pan and scan), as large in preprocessor_config.json as for its SigLIP, whose "
                "patches are averaged in squares. Only these are supported."
            )
        tokenizer = description.tokenizer
        picture = getattr(tokenizer, "image_token", "<image_soft_token>")
        before = getattr(tokenizer, "boi_token", "<start_of_image>")
        after = getattr(tokenizer, "eoi_token", "<end_of_image>")
        self.image_placeholder = picture
        self.image_written = self.image_slot = before
        self.image_token_id = config.image_token_id
        if self.image_token_id >= self.text_config.vocab_size:
            raise ValueError("a picture's token is none of the text model's")
        self._written = re.compile(f"{re.escape(before)}(?!{re.escape(picture)})")
        self._expanded = f"\n\n{before}{picture}{after}\n\n"

    # --- on the host ---------------------------------------------------------------------------------

    def read_text(self, text: str) -> str:
        return self._written.sub(lambda _: self._expanded, text)

    def attach(self, model: Any) -> None:
        super().attach(model)
        tower, self._projector = model.model.vision_tower, model.model.multi_modal_projector
        self._tower = Tower(tower, -1, drops_first=False)
        self._norm = getattr(tower, "vision_model", tower).post_layernorm
        self._encoder = TileEncoder(
            tower,
            self._pictures,
            DEFAULT["image_mean"],
            DEFAULT["image_std"],
            tile_patches=self._num_patches,
        )

    def _see(self, pixels: Tensor) -> Tensor:
        return self._projector(self._norm(self._tower(pixels)))  # type: ignore[no-any-return]
