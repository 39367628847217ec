"""
Qwen2-VL: how pictures and clips become patches, placeholders and positions.

A picture of any size is resampled to a multiple of PATCH_PX * MERGE on both sides inside the area
limits, cut into patches of 14 x 14 pixels, and MERGE x MERGE neighbouring patches become one token.
The functions are arithmetic on sizes and uint8 pixels; `Qwen2VL` binds them to a checkpoint. Later
generations are under it, in files of their own.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from engine.cache import Cache
from engine.errors import BadConfig
from engine.families.packed import PackedEncoder, Packing, in_packing_order, split_rows
from engine.families.protocol import (
    AreaLimits,
    Description,
    Family,
    Pixels,
    Plan,
    Rows,
    Visual,
    check_positions,
)
from engine.families.resizing import CLIP_MEAN, CLIP_STD, check_aspect, resize
from engine.kernels.pixels import centre
from engine.uploads import upload
from media.decoded import Fit

PATCH_PX = 14
RESAMPLING = Image.Resampling.BICUBIC
MERGE = 2
TEMPORAL = 2  # frames that share one patch in a video; a still image is its own neighbour
TOKEN_PX = PATCH_PX * MERGE
MID_PIXEL = 128  # pixels less this are whole numbers below 2**8: exact in bfloat16 too
MAX_KNOWN_BYTES = 64 << 20  # of positions of sizes that came before, on the device
# Two frames a second, as the authors of later ones sample; for frames without times.
USUAL_FRAME_S = 0.5

Patches = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Grid:
    """
    The patches of one picture (num_frames_merged 1) or clip.

    Attributes:
        times: temporal patches; a clip has one for every TEMPORAL frames.
        rows, columns: spatial patches, each a multiple of MERGE.
        time_step: what positions go on from one of the times to the next.
    """

    times: int
    rows: int
    columns: int
    time_step: float = 1

    @property
    def num_patches(self) -> int:
        return self.times * self.rows * self.columns

    @property
    def num_tokens(self) -> int:
        return self.num_patches // MERGE**2


def target_size(
    height_px: int, width_px: int, area: AreaLimits, token_px: int = TOKEN_PX
) -> tuple[int, int]:
    """
    The size, as (height, width) in pixels, to which a picture is resampled.

    Both sides become multiples of token_px, the aspect ratio is kept as closely as that permits, and
    the area ends inside the limits.

    Raises:
        ImageTooNarrowError: one side is over MAX_ASPECT times the other.

    Source: the published rule of the model (`smart_resize` in transformers' image processor);
    tests compare the two over random sizes.
    """
    check_aspect(width_px, height_px)
    return fit_area(height_px, width_px, area, token_px)


def fit_area(
    height_px: int,
    width_px: int,
    area: AreaLimits,
    token_px: int,
    *,
    num_frames: int = 1,
    num_covered: int = 1,
) -> tuple[int, int]:
    """
    `target_size` for any aspect.

    Args:
        num_frames, num_covered: how many frames share the area, as they are and as they are counted
            once they stand in whole tokens.
    """
    rows, columns = round(height_px / token_px), round(width_px / token_px)
    covered = num_covered * rows * columns * token_px**2
    seen = num_frames * height_px * width_px
    if covered > area.max_pixels:
        shrink = math.sqrt(seen / area.max_pixels)
        rows = max(1, math.floor(height_px / shrink / token_px))
        columns = max(1, math.floor(width_px / shrink / token_px))
    elif covered < area.min_pixels:
        grow = math.sqrt(area.min_pixels / seen)
        rows = math.ceil(height_px * grow / token_px)
        columns = math.ceil(width_px * grow / token_px)
    return rows * token_px, columns * token_px


def resample(image: Image.Image, height_px: int, width_px: int) -> Image.Image:
    """Bicubic resampling of an RGB picture; the picture itself where it already has the size."""
    return resize(image, height_px, width_px, RESAMPLING)


def cut_patches(pixels: npt.NDArray[np.uint8]) -> Patches:
    """
    Cut one resampled picture into the patches that the vision encoder reads.

    Args:
        pixels: (height_px, width_px, 3), uint8, both sides multiples of TOKEN_PX.

    Returns:
        patches: (num_patches, 3 * PATCH_PX**2), uint8; channel-major inside a patch; the MERGE x
        MERGE patches of one token are neighbours.
    """
    height_px, width_px, _ = pixels.shape
    tokens_down, tokens_across = height_px // TOKEN_PX, width_px // TOKEN_PX
    blocks = pixels.reshape(tokens_down, MERGE, PATCH_PX, tokens_across, MERGE, PATCH_PX, 3)
    return blocks.transpose(0, 3, 1, 4, 6, 2, 5).reshape(-1, 3 * PATCH_PX**2)


def pair_frames(frames: list[Patches]) -> Patches:
    """
    Join the patches of neighbouring frames into temporal patches; an odd last frame is doubled.

    Args:
        frames: one (num_patches, 3 * PATCH_PX**2) array a frame, equal shapes.

    Returns:
        (times * num_patches, 3 * TEMPORAL * PATCH_PX**2), uint8, channel, then frame, then pixels.
    """
    if len(frames) % TEMPORAL:
        frames = [*frames, frames[-1]]
    stacked = np.stack(frames).reshape(len(frames) // TEMPORAL, TEMPORAL, -1, 3, PATCH_PX**2)
    return np.ascontiguousarray(stacked.transpose(0, 2, 3, 1, 4)).reshape(
        -1, 3 * TEMPORAL * PATCH_PX**2
    )


def double_frames(patches: Patches) -> Patches:
    """A still picture's patches in the form of temporal patches: each frame its own neighbour."""
    return np.repeat(patches.reshape(-1, 3, 1, PATCH_PX**2), TEMPORAL, axis=2).reshape(
        -1, 3 * TEMPORAL * PATCH_PX**2
    )


def patch_positions(grid: Grid) -> npt.NDArray[np.int64]:
    """
    Row and column of each patch, in the order of `cut_patches`, repeated for each temporal patch.

    Returns:
        (num_patches, 2), int64.
    """
    rows, columns = np.meshgrid(np.arange(grid.rows), np.arange(grid.columns), indexing="ij")
    shape = (grid.rows // MERGE, MERGE, grid.columns // MERGE, MERGE)
    ordered = [axis.reshape(shape).transpose(0, 2, 1, 3).ravel() for axis in (rows, columns)]
    return np.tile(np.stack(ordered, axis=1), (grid.times, 1)).astype(np.int64)


def token_positions(grid: Grid, start: int) -> npt.NDArray[np.int64]:
    """
    M-RoPE positions of one picture's or clip's placeholder tokens.

    Args:
        start: the position after the token before the placeholders.

    Returns:
        (3, num_tokens), int64: time, row, column. The next token stands at `next_position`.
    """
    # In float32, as transformers has it: a moment on the edge falls on the same side.
    times = np.arange(grid.times, dtype=np.float32) * np.float32(grid.time_step)
    axes = np.meshgrid(
        times.astype(np.int64),
        np.arange(grid.rows // MERGE),
        np.arange(grid.columns // MERGE),
        indexing="ij",
    )
    return np.stack([axis.ravel() for axis in axes]).astype(np.int64) + start


def next_position(grid: Grid, start: int) -> int:
    """The position of the token behind the placeholders; time does not count (transformers 5)."""
    return start + max(grid.rows, grid.columns) // MERGE


def square_grid(num_tokens: int) -> Grid:
    """
    The grid of a picture that came as bare features: the most nearly square one, lying if not square.

    The form with `image_grid_thw` says it exactly; this is for callers that have only features.
    """
    rows = max(n for n in range(1, math.isqrt(num_tokens) + 1) if num_tokens % n == 0)
    return Grid(1, rows * MERGE, num_tokens // rows * MERGE)


class Qwen2VL(Family):
    """
    A plan's layout is its `Grid`.

    Attributes:
        patch_px: a side of a patch, of this checkpoint.
    """

    image_placeholder = "<|image_pad|>"
    video_placeholder = "<|video_pad|>"
    image_slot = f"<|vision_start|>{image_placeholder}<|vision_end|>"  # as its template writes one
    video_slot = f"<|vision_start|>{video_placeholder}<|vision_end|>"
    num_axes = 3
    usual_mean, usual_std = CLIP_MEAN, CLIP_STD  # where preprocessor_config.json says nothing
    image_area: AreaLimits
    video_area: AreaLimits

    def __init__(self, description: Description) -> None:
        super().__init__(description)
        config = description.config
        vision = config.vision_config
        if (vision.spatial_merge_size, vision.temporal_patch_size) != (MERGE, TEMPORAL):
            raise BadConfig(
                "This checkpoint has other patches than of 2 frames each, merged 2 x 2. Only these "
                "are supported."
            )
        check_positions(self.text_config)
        self.patch_px: int = vision.patch_size
        self.pixels_a_token = (self.patch_px * MERGE) ** 2
        self.image_token_id: int = config.image_token_id
        self.video_token_id: int = config.video_token_id
        self._num_heads: int = vision.num_heads
        pictures = description.pictures
        self.image_area = area_of(pictures, AreaLimits())
        self.video_area = area_of(description.clips or pictures, AreaLimits())
        self._mean = tuple(pictures.get("image_mean", self.usual_mean))
        self._std = tuple(pictures.get("image_std", self.usual_std))
        self._check_reading("preprocessor_config.json", pictures)
        self._check_reading("video_preprocessor_config.json", description.clips)
        areas = (self.image_area, self.video_area)
        are_areas = all(0 < area.min_pixels <= area.max_pixels for area in areas)
        are_colours = all(len(values) == 3 for values in (self._mean, self._std))
        if not (are_areas and are_colours):
            raise ValueError("no model looks at pictures like that")

    def _check_reading(self, name: str, told: Mapping[str, Any]) -> None:
        """What is cut on the host and folded into a Linear in `attach` is this and nothing else."""
        built = {
            "do_resize": True,
            "resample": RESAMPLING,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "patch_size": self.patch_px,
            "merge_size": MERGE,
            "temporal_patch_size": TEMPORAL,
        }
        for word, value in built.items():
            if abs(told.get(word, value) - value) > 1e-6:
                raise BadConfig(
                    f"The model's {name} says {word}={told[word]}, where {value} is what "
                    "this family is read with. Give the model's own."
                )
        for word, colours in (("image_mean", self._mean), ("image_std", self._std)):
            if tuple(told.get(word, colours)) != colours:
                raise BadConfig(
                    f"The model's {name} says another {word} than its preprocessor_config.json, which "
                    "is not supported. Give the model's own."
                )

    def plan_picture(self, width_px: int, height_px: int, area: AreaLimits | None) -> Plan:
        return self._plan(self.image_token_id, width_px, height_px, area or self.image_area, 1)

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
        """An odd last frame is doubled."""
        times = -(-num_frames // TEMPORAL)
        return self._plan(self.video_token_id, width_px, height_px, area or self.video_area, times)

    def _plan(
        self,
        token_id: int,
        width_px: int,
        height_px: int,
        area: AreaLimits,
        times: int,
        time_step: float = 1,
    ) -> Plan:
        height_px, width_px = target_size(height_px, width_px, area, self.patch_px * MERGE)
        grid = Grid(times, height_px // self.patch_px, width_px // self.patch_px, time_step)
        return Plan(
            (Rows(token_id, grid.num_tokens),),
            num_patches=grid.num_patches,
            width_px=width_px,
            height_px=height_px,
            layout=grid,
        )

    def plan_embeddings(self, num_rows: int, grid: tuple[int, int, int] | None) -> Plan:
        of_rows = square_grid(num_rows) if grid is None else Grid(*grid)
        return Plan((Rows(self.image_token_id, num_rows),), layout=of_rows)

    def fit(self, plan: Plan) -> Fit | None:
        return Fit(plan.width_px, plan.height_px, RESAMPLING)

    def cut_picture(self, image: Image.Image, plan: Plan) -> Visual:
        return self._build([resample(image, plan.height_px, plan.width_px)], plan)

    def cut_clip(self, frames: Sequence[Image.Image], plan: Plan) -> Visual:
        resampled = [resample(frame, plan.height_px, plan.width_px) for frame in frames]
        return self._build(resampled, plan, is_clip=True)

    def _build(
        self, parts: Sequence[Image.Image | Pixels], plan: Plan, *, is_clip: bool = False
    ) -> Visual:
        doubled = [parts[-1]] * (-len(parts) % TEMPORAL) if is_clip else []
        return super()._build([*parts, *doubled], plan, is_clip=is_clip)

    def positions(
        self, num_tokens: int, media: Sequence[tuple[int, Plan]]
    ) -> tuple[npt.NDArray[np.int64], int]:
        """M-RoPE positions of a whole prompt."""
        pieces, row, at = [], 0, 0
        placed = [(start + first, grid) for start, plan in media for first, grid in _grids(plan)]
        for start, grid in placed:
            pieces.append(np.tile(np.arange(at, at + start - row), (3, 1)))
            at += start - row
            pieces.append(token_positions(grid, at))
            at = next_position(grid, at)
            row = start + grid.num_tokens
        pieces.append(np.tile(np.arange(at, at + num_tokens - row), (3, 1)))
        # Text goes on behind a clip from its longer side, however long the clip lasted, and what is
        # generated goes on from the last text: not from the largest position, which transformers'
        # own rope_deltas would say, and which its `generate` does not use.
        return np.concatenate(pieces, axis=1).astype(np.int64), at - row

    def attach(self, model: Any) -> None:
        """
        Take a loaded model's encoder: the patch embedding becomes one Linear on uint8 pixels.

        The convolution's kernel is its stride, so it is a Linear; mean, deviation and 1/255 are
        folded into it, and for a still picture, whose two frames are equal, its halves are summed.
        It reads pixels less MID_PIXEL: in 16 bits, what weights lose in rounding counts by the size
        of what they multiply, and a bias for pixels from 0 to 255 would take most of the sum back.
        """
        super().attach(model)
        self._visual = model.model.visual
        weight: Tensor = self._visual.patch_embed.proj.weight.detach()
        exact = weight.double().flatten(3)  # (embed, 3, TEMPORAL, PATCH_PX**2)
        mean, std = (
            torch.tensor(x, dtype=torch.float64, device=weight.device).view(1, 3, 1, 1)
            for x in (self._mean, self._std)
        )
        scaled = exact / (255 * std)
        self._clip_weight = _padded(scaled.flatten(1).to(weight.dtype))
        self._still_weight = _padded(scaled.sum(2).flatten(1).to(weight.dtype))
        bias = (MID_PIXEL * scaled - exact * mean / std).flatten(1).sum(1)
        if self._visual.patch_embed.proj.bias is not None:
            bias += self._visual.patch_embed.proj.bias.double()
        self._patch_bias = bias.to(weight.dtype)
        self._visual.patch_embed = nn.Identity()
        self._device, self._dtype = weight.device, weight.dtype
        head_dim = len(weight) // self._num_heads
        self.encoder = PackedEncoder(weight.device, weight.dtype, self._num_heads, head_dim)
        self._known: Cache[Grid, list[Tensor]] = Cache(MAX_KNOWN_BYTES)

    @torch.inference_mode()
    def encode(self, visuals: Sequence[Visual]) -> list[Tensor]:
        """Run the encoder once over many pictures and clips of any sizes, packed into one row."""
        order = in_packing_order(visuals)
        packed = [visuals[i] for i in order]
        grids: list[Grid] = [visual.plan.layout for visual in packed]
        units = [unit for grid in grids for unit in [grid.rows * grid.columns] * grid.times]
        packing = self.encoder.pack(units, rounds_up=self.repeats is not None)
        embedded = packing.fill(self._embed(packed))
        by_grid = zip(*(self._find_known(grid) for grid in grids), strict=True)
        known = [packing.fill(torch.cat(tensors)) for tensors in by_grid]
        features = self._run(packing, grids, embedded, *known)
        return split_rows(features, visuals, order)

    def _run(self, packing: Packing, grids: Sequence[Grid], *inputs: Tensor) -> Tensor:
        """
        The encoder's layers on packed patches: -> (rows, feature_size).

        Args:
            grids: of the pictures and clips, in their order.
            inputs: embedded patches, and what `_grid_inputs` gave for them.
        """
        see = partial(self._see, packing.max_patches)
        return self.encoder.run(packing, self.repeats, see, *inputs)

    def _see(self, max_patches: int, starts: Tensor, embedded: Tensor, positions: Tensor) -> Tensor:
        return self._look(  # type: ignore[no-any-return]
            embedded, position_ids=positions, cu_seqlens=starts, max_seqlen=max_patches
        ).pooler_output

    def _look(self, embedded: Tensor, **known: Any) -> Any:
        """Call the encoder, with all that it would otherwise compute from the grids."""
        grids = torch.tensor([[1, MERGE, len(embedded) // MERGE]])  # asked for, and not read
        return self._visual(embedded, grid_thw=grids, **known)

    def _grid_inputs(self, grid: Grid) -> list[npt.NDArray[Any]]:
        """What the encoder reads of a grid, a row for each patch: where it stands."""
        return [patch_positions(grid)]

    def _find_known(self, grid: Grid) -> list[Tensor]:
        """`_grid_inputs` on the device, kept for the next picture of this size."""
        found = self._known.find(grid)
        if found is None:
            found = [upload(array, self._device) for array in self._grid_inputs(grid)]
            self._known.put(grid, found, sum(tensor.nbytes for tensor in found))
        return found

    def _embed(self, packed: Sequence[Visual]) -> Tensor:
        """
        Cut pixels into patches and embed them, all on the device.

        Args:
            packed: pictures before clips, equal sizes together.
        """
        embedded = []
        pixels = self.encoder.uploads.gather([visual.pixels for visual in packed])
        at = 0
        for is_clip, of_kind in groupby(packed, key=lambda visual: visual.is_clip):
            pieces = []
            for shape, group in groupby(of_kind, key=lambda visual: visual.pixels.shape):
                num_frames, height, width, _ = shape
                num = num_frames * len(list(group))
                end = at + num * height * width * 3
                frames = pixels[at:end].view(num, height, width, 3)
                pieces.append(cut_on_device(frames, is_clip, self.patch_px))
                at = end
            patches = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
            weight = self._clip_weight if is_clip else self._still_weight
            centred = centre(patches, MID_PIXEL, weight.shape[1], self._dtype)
            embedded.append(F.linear(centred, weight, self._patch_bias))
        return embedded[0] if len(embedded) == 1 else torch.cat(embedded)


def _grids(plan: Plan) -> Iterator[tuple[int, Grid]]:
    """Where runs of features begin in a plan, and the grid of each: of all of it, or of one time."""
    grid: Grid = plan.layout
    at = 0
    for piece in plan.pieces:
        if isinstance(piece, Rows):
            whole = piece.number == grid.num_tokens
            yield at, grid if whole else Grid(1, grid.rows, grid.columns)
        at += piece.number if isinstance(piece, Rows) else len(piece)


def _padded(weight: Tensor) -> Tensor:
    """With columns of zeros up to the next multiple of 16: a GPU's fast products want rows aligned."""
    return F.pad(weight, (0, -weight.shape[1] % 16))


def cut_on_device(pixels: Tensor, is_clip: bool, patch_px: int = PATCH_PX) -> Tensor:
    """
    `cut_patches` and `pair_frames` for many pictures of one size, or for the frames of clips.

    Args:
        pixels: (num_frames, height_px, width_px, 3), uint8, any device.

    Returns:
        (patches, 3 * patch_px**2), or for clips (patches, 3 * TEMPORAL * patch_px**2), uint8.
    """
    num_frames, height, width, _ = pixels.shape
    together = TEMPORAL if is_clip else 1
    blocks = pixels.view(
        num_frames // together,
        together,
        height // patch_px // MERGE,
        MERGE,
        patch_px,
        width // patch_px // MERGE,
        MERGE,
        patch_px,
        3,
    )
    # times, token row, token column, patch row, patch column, channel, frame, pixel row and column
    ordered = blocks.permute(0, 2, 5, 3, 6, 8, 1, 4, 7)
    return ordered.reshape(-1, 3 * together * patch_px**2)


def area_of(processor: Mapping[str, Any], default: AreaLimits) -> AreaLimits:
    """The limits in either of the two forms in which checkpoints write them."""
    size = processor.get("size") or {}
    return AreaLimits(
        processor.get("min_pixels") or size.get("shortest_edge") or default.min_pixels,
        processor.get("max_pixels") or size.get("longest_edge") or default.max_pixels,
    )
