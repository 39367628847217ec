"""
Qwen3-VL: Qwen2-VL with learned positions, features for several layers, and clips told in moments.

The encoder adds to each patch a learned position, interpolated from a square table to the grid.
Some of its layers hand features on by themselves: they are added behind the first text layers, at the
places of their tokens. A clip is no block of tokens but pairs of frames, each behind the moment at
which it is seen, written as text, and with positions of its own.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine.attention import find_extra
from engine.families.protocol import AreaLimits, Description, Plan, Rows
from engine.families.qwen2_vl import (
    MERGE,
    TEMPORAL,
    USUAL_FRAME_S,
    Grid,
    Qwen2VL,
    area_of,
    fit_area,
    patch_positions,
)
from engine.families.resizing import check_aspect
from engine.fuse import Arriving, Carried, leave

HALF = (0.5, 0.5, 0.5)
USUAL_CLIP_AREA = AreaLimits(128 * 32 * 32, 768 * 32 * 32)  # all frames of a clip together


def clip_size(
    num_frames: int, height_px: int, width_px: int, area: AreaLimits, token_px: int
) -> tuple[int, int]:
    """
    The size, as (height, width) in pixels, to which the frames of a clip are resampled.

    As `target_size`, but the area is that of all frames together, an odd last one rounded to a pair,
    and a side shorter than a token is first made as long.

    Raises:
        ImageTooNarrowError: one side is over MAX_ASPECT times the other.

    Source: the published rule of the model (`smart_resize` in transformers' video processor); tests
    compare the two over random sizes.
    """
    if min(height_px, width_px) < token_px:
        grow = max(token_px / height_px, token_px / width_px)
        height_px, width_px = int(height_px * grow), int(width_px * grow)
    check_aspect(width_px, height_px)
    return fit_area(
        height_px,
        width_px,
        area,
        token_px,
        num_frames=num_frames,
        num_covered=round(num_frames / TEMPORAL) * TEMPORAL,
    )


def find_taps(grid: Grid, side: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """
    Which entries of a square table of positions each patch reads, between which it stands.

    Args:
        side: of the table; its corners are the corners of the grid.

    Returns:
        entries: (num_patches, 4). weights: (num_patches, 4), of which the sum is one.
    """
    places = patch_positions(grid)
    entries, weights = [], []
    for axis, count in enumerate((grid.rows, grid.columns)):
        # In float32, as transformers has it.
        at = np.arange(count, dtype=np.float32) * np.float32(side - 1) / np.float32(count - 1)
        before = np.floor(at)
        both = before[:, None] + np.arange(2, dtype=np.float32)
        of_axis = np.maximum(1 - np.abs(at[:, None] - both), 0)
        entries.append(np.clip(both, 0, side - 1).astype(np.int64)[places[:, axis]])
        weights.append(of_axis[places[:, axis]])
    four = (len(places), 4)
    return (
        (entries[0][:, :, None] * side + entries[1][:, None, :]).reshape(four),
        (weights[0][:, :, None] * weights[1][:, None, :]).reshape(four),
    )


class Qwen3VL(Qwen2VL):
    """A plan's layout is its `Grid`, of all of a clip."""

    usual_mean = usual_std = HALF

    def __init__(self, description: Description) -> None:
        super().__init__(description)
        config = description.config
        vision = config.vision_config
        self._side = math.isqrt(vision.num_position_embeddings)
        self._num_deeper = len(vision.deepstack_visual_indexes)
        self.feature_size = self.hidden_size * (1 + self._num_deeper)
        self.video_area = area_of(description.clips, USUAL_CLIP_AREA)
        self._vision_start: int = config.vision_start_token_id
        self._vision_end: int = config.vision_end_token_id
        self._tokenizer = description.copy_tokenizer()

    def plan_clip(
        self,
        width_px: int,
        height_px: int,
        num_frames: int,
        times_s: Sequence[float] | None,
        frame_s: float | None,
        duration_s: float | None,
        area: AreaLimits | None,
    ) -> Plan:
        """An odd last frame is doubled. What stands around the placeholder stays around it all."""
        if times_s is None:
            times_s = [index * USUAL_FRAME_S for index in range(num_frames)]
        times_s = [*times_s, *[times_s[-1]] * (-num_frames % TEMPORAL)]
        moments = [
            (first + last) / 2 for first, last in zip(times_s[::2], times_s[1::2], strict=True)
        ]
        limits, token_px = area or self.video_area, self.patch_px * MERGE
        num_seen = max(TEMPORAL, num_frames)
        height_px, width_px = clip_size(num_seen, height_px, width_px, limits, token_px)
        grid = Grid(len(moments), height_px // self.patch_px, width_px // self.patch_px)
        rows = Rows(self.video_token_id, grid.num_tokens // grid.times)
        pieces: list[Rows | tuple[int, ...]] = []
        for moment in moments:
            told = self._tokenizer.encode(f"<{moment:.1f} seconds>", add_special_tokens=False).ids
            pieces += [(*told, self._vision_start), rows, (self._vision_end,)]
        return Plan(
            tuple(pieces),
            num_patches=grid.num_patches,
            width_px=width_px,
            height_px=height_px,
            layout=grid,
        )

    def attach(self, model: Any) -> None:
        """As Qwen2-VL's; the first text layers add what features have for them."""
        super().attach(model)
        layers: Any = self.text.layers
        for index, layer in enumerate(layers[: self._num_deeper]):
            layer.register_forward_hook(partial(_add_extra, index))

    def _grid_inputs(self, grid: Grid) -> list[npt.NDArray[Any]]:
        return [*super()._grid_inputs(grid), *find_taps(grid, self._side)]

    def _see(  # type: ignore[override]
        self,
        max_patches: int,
        starts: Tensor,
        embedded: Tensor,
        positions: Tensor,
        entries: Tensor,
        weights: Tensor,
    ) -> Tensor:
        """Features for the embedding, and behind them those for each of the first layers."""
        seen = self._look(
            embedded,
            position_ids=positions,
            cu_seqlens=starts,
            max_seqlen=max_patches,
            interp_indices=entries,
            interp_weights=weights,
        )
        return torch.cat([seen.pooler_output, *seen.deepstack_features], dim=-1)


def _add_extra(layer: int, _module: Any, _inputs: Any, output: Arriving) -> Tensor | None:
    """A hook: what it returns, if anything, is the layer's result instead."""
    extra = find_extra(layer)
    if extra is None:
        return None
    if isinstance(output, Carried):
        output.delta.add_(extra)
        return None
    return leave(output).add_(extra)
