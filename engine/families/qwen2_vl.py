"""
Qwen2-VL: how pictures and clips become patches, placeholders and positions.

A picture of any size is resampled to a multiple of PATCH_PX * MERGE on both sides inside the area
limits, cut into patches of 14 x 14 pixels, and MERGE x MERGE neighbouring patches become one token.
The functions are arithmetic on sizes and uint8 pixels; `Qwen2VL` binds them to a checkpoint.
"""

import hashlib
import logging
import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
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

from engine.attention import VisionContext, can_use_flash, dense_kernels, using
from engine.errors import BadConfig
from engine.kernels.pictures import Choice, choose
from engine.kernels.pixels import centre
from engine.repeats import Repeats, power_up, round_up
from engine.uploads import upload

logger = logging.getLogger(__name__)

PATCH_PX = 14
MERGE = 2
TEMPORAL = 2  # frames that share one patch in a video; a still image is its own neighbour
TOKEN_PX = PATCH_PX * MERGE
MAX_ASPECT = 200
MID_PIXEL = 128  # pixels less this are whole numbers below 2**8: exact in bfloat16 too
MAX_DENSE_RUNS, MIN_DENSE_PICTURES = 4, 8  # of an encoder call whose pictures are dense batches
MAX_KNOWN_GRIDS = 256  # sizes whose positions are kept on the device
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)  # of the pictures that the encoder was trained on
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

Patches = npt.NDArray[np.uint8]


class ImageTooNarrowError(ValueError):
    """One side is over 200 times the other. The client's fault: never retried."""


@dataclass(frozen=True, slots=True)
class AreaLimits:
    """Smallest and largest area after resampling, in pixels, both inclusive."""

    min_pixels: int = 56 * 56
    max_pixels: int = 28 * 28 * 1280


@dataclass(frozen=True, slots=True)
class Grid:
    """
    The patches of one picture (num_frames_merged 1) or clip.

    Attributes:
        times: temporal patches; a clip has one for every TEMPORAL frames.
        rows, columns: spatial patches, each a multiple of MERGE.
    """

    times: int
    rows: int
    columns: int

    @property
    def num_patches(self) -> int:
        return self.times * self.rows * self.columns

    @property
    def num_tokens(self) -> int:
        return self.num_patches // MERGE**2


def target_size(height_px: int, width_px: int, area: AreaLimits) -> tuple[int, int]:
    """
    The size, as (height, width) in pixels, to which a picture is resampled.

    Both sides become multiples of TOKEN_PX, the aspect ratio is kept as closely as that permits, and
    the area ends inside the limits.

    Raises:
        ImageTooNarrowError: one side is over MAX_ASPECT times the other.

    Source: the published rule of the model (`smart_resize` in transformers' image processor);
    tests compare the two over random sizes.
    """
    longer, shorter = max(height_px, width_px), min(height_px, width_px)
    if longer > MAX_ASPECT * shorter:
        raise ImageTooNarrowError(f"{width_px}x{height_px}")
    rows, columns = round(height_px / TOKEN_PX), round(width_px / TOKEN_PX)
    covered = rows * columns * TOKEN_PX**2
    if covered > area.max_pixels:
        shrink = math.sqrt(height_px * width_px / area.max_pixels)
        rows = max(1, math.floor(height_px / shrink / TOKEN_PX))
        columns = max(1, math.floor(width_px / shrink / TOKEN_PX))
    elif covered < area.min_pixels:
        grow = math.sqrt(area.min_pixels / (height_px * width_px))
        rows = math.ceil(height_px * grow / TOKEN_PX)
        columns = math.ceil(width_px * grow / TOKEN_PX)
    return rows * TOKEN_PX, columns * TOKEN_PX


def resample(image: Image.Image, height_px: int, width_px: int) -> Image.Image:
    """Bicubic resampling of an RGB picture; the picture itself where it already has the size."""
    if image.size == (width_px, height_px):
        return image
    return image.resize((width_px, height_px), Image.Resampling.BICUBIC)


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
    axes = np.meshgrid(
        np.arange(grid.times),
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


@dataclass(frozen=True, slots=True, eq=False)
class Visual:
    """
    One picture or clip, resampled and ready for the encoder, which cuts it where it runs.

    Attributes:
        pixels: (num_frames, height_px, width_px, 3), uint8, host; one frame for a picture, TEMPORAL
            times grid.times for a clip.
        grid: of the patches that it is cut into.
        key: what it is: equal for equal pixels of equal shape; None where nobody asked.
    """

    pixels: Tensor
    grid: Grid
    is_clip: bool = False
    key: bytes | None = None

    @property
    def unit(self) -> int:
        """Patches that attend to each other: those of one picture, or of one pair of frames."""
        return self.grid.rows * self.grid.columns


class Qwen2VL:
    """
    What is Qwen2-VL's own about running a checkpoint; everything else is the same for all families.

    Args:
        config: the checkpoint's, a `Qwen2VLConfig`.
        processor: its preprocessor_config.json.
        video_processor: its video_preprocessor_config.json; None where it has none.
    """

    image_placeholder = "<|image_pad|>"
    video_placeholder = "<|video_pad|>"
    image_slot = f"<|vision_start|>{image_placeholder}<|vision_end|>"  # as its template writes one
    video_slot = f"<|vision_start|>{video_placeholder}<|vision_end|>"

    def __init__(
        self,
        config: Any,
        processor: Mapping[str, Any],
        video_processor: Mapping[str, Any] | None = None,
    ) -> None:
        vision = config.vision_config
        if (vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size) != (
            PATCH_PX,
            MERGE,
            TEMPORAL,
        ):
            raise BadConfig(
                "This Qwen2-VL checkpoint cuts other patches than 14 px, merged 2 x 2, 2 frames "
                "each. Only these are supported."
            )
        self.image_token_id: int = config.image_token_id
        self.video_token_id: int = config.video_token_id
        self.hidden_size: int = config.text_config.hidden_size
        self._num_heads: int = vision.num_heads
        self._head_dim: int = vision.embed_dim // vision.num_heads
        self.image_area = _area_of(processor)
        self.video_area = _area_of(video_processor or processor)
        self.mean = tuple(processor.get("image_mean", CLIP_MEAN))
        self.std = tuple(processor.get("image_std", CLIP_STD))
        self.uses_keys = False  # whether pictures are told apart, for a cache
        self._pins = False

    def plan_grid(
        self, width_px: int, height_px: int, area: AreaLimits, num_frames: int = 1
    ) -> Grid:
        """
        The patches that a picture or clip of this size is cut into; no pixel is needed to know.

        Raises:
            ImageTooNarrowError: one side is over MAX_ASPECT times the other.
        """
        height_px, width_px = target_size(height_px, width_px, area)
        times = -(-num_frames // TEMPORAL)
        return Grid(times, height_px // PATCH_PX, width_px // PATCH_PX)

    def cut_picture(self, image: Image.Image, area: AreaLimits) -> Visual:
        """
        Resample an RGB picture for the encoder.

        Raises:
            ImageTooNarrowError: one side is over MAX_ASPECT times the other.
        """
        return self._build([image], area, is_clip=False)

    def cut_clip(self, frames: Sequence[Image.Image], area: AreaLimits) -> Visual:
        """The same for a clip, all frames of one size; an odd last frame is doubled."""
        missing = [frames[-1]] * (-len(frames) % TEMPORAL)
        return self._build([*frames, *missing], area, is_clip=True)

    def _build(self, frames: Sequence[Image.Image], area: AreaLimits, *, is_clip: bool) -> Visual:
        height_px, width_px = target_size(frames[0].height, frames[0].width, area)
        pixels = self._empty((len(frames), height_px, width_px, 3))
        on_host = pixels.numpy()
        for index, frame in enumerate(frames):
            on_host[index] = np.asarray(resample(frame, height_px, width_px))
        times = len(frames) // TEMPORAL if is_clip else 1
        grid = Grid(times, height_px // PATCH_PX, width_px // PATCH_PX)
        key = None
        if self.uses_keys:
            shape = f"{is_clip} {pixels.shape} ".encode()
            digest = hashlib.sha256(shape)
            digest.update(on_host.data)
            key = digest.digest()
        return Visual(pixels, grid, is_clip, key)

    def _empty(self, shape: tuple[int, ...]) -> Tensor:
        """Memory of the host; where the device copies from it, in a place that stays."""
        if self._pins:
            try:
                return torch.empty(shape, dtype=torch.uint8, pin_memory=True)
            except RuntimeError:
                logger.warning("pinned_memory_is_out pictures go up more slowly", exc_info=True)
                self._pins = False
        return torch.empty(shape, dtype=torch.uint8)

    def positions(
        self, num_tokens: int, spans: Sequence[tuple[int, Grid]]
    ) -> tuple[npt.NDArray[np.int64], int]:
        """
        M-RoPE positions of a whole prompt.

        Args:
            spans: for each picture or clip, in order: where its placeholders start, and its grid.

        Returns:
            positions: (3, num_tokens), int64.
            delta: what generated tokens add to their row in the slab to get their position.
        """
        pieces, row, at = [], 0, 0
        for start, grid in spans:
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
        self._visual = model.model.visual
        weight: Tensor = self._visual.patch_embed.proj.weight.detach()
        exact = weight.double().flatten(3)  # (embed, 3, TEMPORAL, PATCH_PX**2)
        mean, std = (
            torch.tensor(x, dtype=torch.float64, device=weight.device).view(1, 3, 1, 1)
            for x in (self.mean, self.std)
        )
        scaled = exact / (255 * std)
        self._clip_weight = _padded(scaled.flatten(1).to(weight.dtype))
        self._still_weight = _padded(scaled.sum(2).flatten(1).to(weight.dtype))
        bias = MID_PIXEL * scaled - exact * mean / std
        self._patch_bias = bias.flatten(1).sum(1).to(weight.dtype)
        self._visual.patch_embed = nn.Identity()
        self._device, self._dtype = weight.device, weight.dtype
        self._pins = weight.device.type == "cuda"
        self._copies: torch.cuda.Stream | None = None
        if self._pins:
            self._copies = torch.cuda.Stream(weight.device)  # type: ignore[no-untyped-call]
        self._has_varlen = can_use_flash(weight.device, weight.dtype, self._head_dim)
        self._choice = Choice()
        if self._has_varlen:
            self._choice = choose(weight.device, weight.dtype, self._num_heads, self._head_dim)
        self._positions: OrderedDict[Grid, Tensor] = OrderedDict()
        self.repeats: Repeats | None = None  # the runner gives it where there are graphs

    @torch.inference_mode()
    def encode(self, visuals: Sequence[Visual]) -> list[Tensor]:
        """
        Run the encoder once over many pictures and clips of any sizes, packed into one row.

        Returns:
            For each, (num_tokens, hidden_size), on the model's device.
        """
        order = sorted(
            range(len(visuals)),
            key=lambda i: (visuals[i].is_clip, visuals[i].unit, visuals[i].grid.rows),
        )
        packed = [visuals[i] for i in order]
        units = [unit for v in packed for unit in [v.unit] * v.grid.times]
        runs = _runs(units)
        # A few large batches of equal pictures are fastest dense; others go through one kernel,
        # which takes any sizes without having to be planned for each.
        is_even = len(runs) <= MAX_DENSE_RUNS and min(runs)[0] >= MIN_DENSE_PICTURES
        is_dense = not self._has_varlen or (is_even and not self._choice.beats_dense)
        embedded = self._embed(packed)
        positions = torch.cat([self._patch_positions(visual.grid) for visual in packed])
        starts = np.cumsum([0, *units], dtype=np.int32)
        if self.repeats is not None and not is_dense:
            # Rounded up, sizes come back. What fills up belongs to no picture and nobody reads it:
            # pictures of no patches, and patches behind the last picture.
            runs = [(1, power_up(max(units), 256))]
            num_missing = round_up(len(embedded)) - len(embedded)
            embedded = F.pad(embedded, (0, 0, 0, num_missing))
            positions = F.pad(positions, (0, 0, 0, num_missing))
            num_starts = 1 + power_up(len(units), 16)
            starts = np.pad(starts, (0, num_starts - len(starts)), mode="edge")
        see = partial(self._see, tuple(runs), is_dense)
        inputs = embedded, positions, upload(starts, self._device)
        if self.repeats is None:
            features = see(*inputs)
        else:
            features = self.repeats.run((*runs, is_dense, len(embedded), len(starts)), see, *inputs)
        num_tokens = [visual.grid.num_tokens for visual in packed]
        pieces = torch.split(features[: sum(num_tokens)], num_tokens)
        found: list[Tensor] = [features] * len(visuals)
        for index, piece in zip(order, pieces, strict=True):
            found[index] = piece
        return found

    def _see(
        self,
        runs: tuple[tuple[int, int], ...],
        is_dense: bool,
        embedded: Tensor,
        positions: Tensor,
        starts: Tensor,
    ) -> Tensor:
        """The encoder's layers on packed patches: (patches, width) -> (tokens, hidden_size)."""
        context = VisionContext(runs, None if is_dense else starts, self._choice.own)
        grids = torch.tensor([[1, MERGE, len(embedded) // MERGE]])  # asked for, and not read
        with using(context), dense_kernels(self._device):
            return self._visual(  # type: ignore[no-any-return]
                embedded,
                grid_thw=grids,
                position_ids=positions,
                cu_seqlens=starts,
                max_seqlen=max(num_patches for _, num_patches in runs),
            ).pooler_output

    def _patch_positions(self, grid: Grid) -> Tensor:
        """`patch_positions` on the device, kept for the next picture of this size."""
        found = self._positions.get(grid)
        if found is None:
            found = upload(patch_positions(grid), self._device)
            self._positions[grid] = found
            if len(self._positions) > MAX_KNOWN_GRIDS:
                self._positions.popitem(last=False)
        return found

    def _embed(self, packed: Sequence[Visual]) -> Tensor:
        """
        Cut pixels into patches and embed them, all on the device.

        Args:
            packed: pictures before clips, equal sizes together.
        """
        embedded = []
        pixels = self._upload(packed)
        at = 0
        for is_clip, of_kind in groupby(packed, key=lambda visual: visual.is_clip):
            pieces = []
            for shape, group in groupby(of_kind, key=lambda visual: visual.pixels.shape):
                num_frames, height, width, _ = shape
                num = num_frames * len(list(group))
                end = at + num * height * width * 3
                pieces.append(cut_on_device(pixels[at:end].view(num, height, width, 3), is_clip))
                at = end
            patches = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
            weight = self._clip_weight if is_clip else self._still_weight
            centred = centre(patches, MID_PIXEL, weight.shape[1], self._dtype)
            embedded.append(F.linear(centred, weight, self._patch_bias))
        return embedded[0] if len(embedded) == 1 else torch.cat(embedded)

    def _upload(self, packed: Sequence[Visual]) -> Tensor:
        """The pixels of all, one after the other, on the device: (bytes,), uint8."""
        flat = [visual.pixels.view(-1) for visual in packed]
        if self._copies is None:
            return torch.cat(flat).to(self._device)
        # On a stream of its own, so that it runs beside what was queued before.
        computing = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._copies):
            pixels = torch.empty(sum(map(len, flat)), dtype=torch.uint8, device=self._device)
            at = 0
            for piece in flat:
                pixels[at : at + len(piece)].copy_(piece, non_blocking=True)
                at += len(piece)
        computing.wait_stream(self._copies)
        pixels.record_stream(computing)
        return pixels


def _padded(weight: Tensor) -> Tensor:
    """With columns of zeros up to the next multiple of 16: a GPU's fast products want rows aligned."""
    return F.pad(weight, (0, -weight.shape[1] % 16))


def cut_on_device(pixels: Tensor, is_clip: bool) -> Tensor:
    """
    `cut_patches` and `pair_frames` for many pictures of one size, or for the frames of clips.

    Args:
        pixels: (num_frames, height_px, width_px, 3), uint8, any device.

    Returns:
        (patches, 3 * PATCH_PX**2), or for clips (patches, 3 * TEMPORAL * PATCH_PX**2), uint8.
    """
    num_frames, height, width, _ = pixels.shape
    together = TEMPORAL if is_clip else 1
    blocks = pixels.view(
        num_frames // together,
        together,
        height // TOKEN_PX,
        MERGE,
        PATCH_PX,
        width // TOKEN_PX,
        MERGE,
        PATCH_PX,
        3,
    )
    # times, token row, token column, patch row, patch column, channel, frame, pixel row and column
    ordered = blocks.permute(0, 2, 5, 3, 6, 8, 1, 4, 7)
    return ordered.reshape(-1, 3 * together * PATCH_PX**2)


def _runs(units: Sequence[int]) -> list[tuple[int, int]]:
    """(how many, how large) of neighbours of equal size."""
    return [(len(list(group)), size) for size, group in groupby(units)]


def _area_of(processor: Mapping[str, Any]) -> AreaLimits:
    """The limits in either of the two forms in which checkpoints write them."""
    size = processor.get("size") or {}
    default = AreaLimits()
    return AreaLimits(
        processor.get("min_pixels") or size.get("shortest_edge") or default.min_pixels,
        processor.get("max_pixels") or size.get("longest_edge") or default.max_pixels,
    )
