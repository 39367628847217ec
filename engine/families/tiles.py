"""
Encoders that read pictures of one size, or tiles and frames of it: batches, nothing padded.

What CLIP's and SigLIP's families share: normalising on the device, batches within bounds, and a
tower that ends at the last layer that is read.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from engine.attention import VisionContext, can_use_flash, dense_kernels, using
from engine.errors import BadConfig
from engine.families.protocol import Family, Plan, Rows, Visual
from engine.families.resizing import Resizing, check_aspect
from engine.fuse import FusedLayerNorm
from engine.kernels.pictures import Cut, HopperCut, choose
from engine.repeats import Repeats
from engine.rounding import round_up
from engine.uploads import Uploads
from media.decoded import Fit

TOWERS = ("clip_vision_model", "siglip_vision_model")
MAX_BATCH_PATCHES = 32_768  # of one call of the tower
NUM_STEPS = 8  # of tiles, between powers of two: an eighth too many at most

See = Callable[[Tensor], Tensor]


def max_tiles(tile_patches: int) -> int:
    """Of so many patches each, in one call of a tower."""
    return max(1, MAX_BATCH_PATCHES // tile_patches)


def find_cut(tower: nn.Module, tile_patches: int) -> Cut | HopperCut | None:
    """Which of our kernels attends to batches of tiles; None where dense ones are as fast."""
    weight, config = next(tower.parameters()), cast(Any, getattr(tower, "config", None))
    heads: int = getattr(config, "num_attention_heads", 0)
    if not heads:  # a tower of a family's own, which may have no attention at all
        return None
    dim = config.hidden_size // heads
    if not can_use_flash(weight.device, weight.dtype, dim):
        return None
    patches = tile_patches + 1  # most have a class token
    calls = ((max_tiles(patches), patches),)
    choice = choose(weight.device, weight.dtype, heads, dim, calls)
    return choice.own if choice.beats_dense else None


class TileEncoder:
    """
    Args:
        tower: the encoder, for where it lies and in what type it computes.
        pictures: of preprocessor_config.json: what was taken from colours and what they were divided
            by. Where it does not say, the usual ones of the family's own processor.
        mean, std: these.
        tile_patches: of one tile, for the bounds of a batch.
    """

    def __init__(
        self,
        tower: nn.Module,
        pictures: Mapping[str, Any],
        mean: Sequence[float],
        std: Sequence[float],
        *,
        tile_patches: int,
    ) -> None:
        weight = next(tower.parameters())
        device = weight.device
        self._device, self._dtype = device, weight.dtype
        self._uploads = Uploads(device)
        self._most = max_tiles(tile_patches)
        self._cut = find_cut(tower, tile_patches)
        levels = 1 / pictures.get("rescale_factor", 1 / 255)
        mean, std = pictures.get("image_mean") or mean, pictures.get("image_std") or std
        if not pictures.get("do_normalize", True):
            mean, std = (0.0,) * 3, (1.0,) * 3
        self._mean, self._std = (
            torch.tensor(values, device=device).view(1, 3, 1, 1) * levels for values in (mean, std)
        )

    def encode(
        self, visuals: Sequence[Visual], see: See, repeats: Repeats | None = None
    ) -> list[Tensor]:
        """
        Args:
            visuals: all of tiles of one size.
            see: (tiles, 3, height_px, width_px), normalised -> (tiles, rows, width).

        Returns:
            (tiles, rows, width) for each.
        """
        flat = self._uploads.gather([visual.pixels for visual in visuals])
        tiles = flat.view(-1, *visuals[0].pixels.shape[1:])
        seen = [self._see(batch, see, repeats) for batch in torch.split(tiles, self._most)]
        features = seen[0] if len(seen) == 1 else torch.cat(seen)
        return list(torch.split(features, [len(visual.pixels) for visual in visuals]))

    def _see(self, tiles: Tensor, see: See, repeats: Repeats | None) -> Tensor:
        """(tiles, height_px, width_px, 3), uint8, as many as one call takes -> (tiles, rows, width)."""

        def call(tiles: Tensor) -> Tensor:
            colours = tiles.permute(0, 3, 1, 2).float()
            normalised = ((colours - self._mean) / self._std).to(self._dtype)
            with using(VisionContext((), cut=self._cut)), dense_kernels(self._device):
                return see(normalised)

        if repeats is None:
            return call(tiles)
        # Rounded up, numbers come back. What fills a batch of tiles up is seen for nothing.
        num_filling = min(round_up(len(tiles), NUM_STEPS, 1), self._most) - len(tiles)
        filled = F.pad(tiles, (0, 0) * 3 + (0, num_filling))
        # Another encoder of the family, of clips, may take other colours off.
        key = id(self), *filled.shape
        return repeats.run(key, call, filled)[: len(tiles)]


def encode_kinds(
    visuals: Sequence[Visual],
    encoders: tuple[TileEncoder, TileEncoder],
    see: See,
    repeats: Repeats | None = None,
) -> list[Tensor]:
    """
    `TileEncoder.encode` where clips may have an encoder of their own, of other colours.

    Args:
        encoders: of pictures, of clips.
    """
    of_pictures, of_clips = encoders
    if of_pictures is of_clips:
        return of_pictures.encode(visuals, see, repeats)
    found: dict[int, Tensor] = {}
    for encoder, are_clips in ((of_pictures, False), (of_clips, True)):
        of_kind = [visual for visual in visuals if visual.is_clip == are_clips]
        if of_kind:
            seen = encoder.encode(of_kind, see, repeats)
            found |= {id(visual): tiles for visual, tiles in zip(of_kind, seen, strict=True)}
    return [found[id(visual)] for visual in visuals]


class OneTile(Family):
    """
    Every picture at one size, in one tile. An adapter sets what is named here, and writes `_see`.

    Attributes:
        _num_rows, _num_patches: of a picture.
        _encoder: after `attach`.
    """

    image_token_id: int
    _resizing: Resizing
    _num_rows: int
    _num_patches: int
    _encoder: TileEncoder

    def plan_picture(self, width_px: int, height_px: int, area: Any) -> Plan:
        check_aspect(width_px, height_px)
        return Plan(
            (Rows(self.image_token_id, self._num_rows),),
            num_patches=self._num_patches,
            width_px=self._resizing.width_px,
            height_px=self._resizing.height_px,
        )

    def fit(self, plan: Plan) -> Fit | None:
        return self._resizing.fit()

    def cut_picture(self, image: Image.Image, plan: Plan) -> Visual:
        return self._build([self._resizing.run(image)], plan)

    @torch.inference_mode()
    def encode(self, visuals: Sequence[Visual]) -> list[Tensor]:
        return [rows[0] for rows in self._encoder.encode(visuals, self._see, self.repeats)]

    def _see(self, pixels: Tensor) -> Tensor:
        """(pictures, 3, height_px, width_px), normalised -> (pictures, rows, hidden)."""
        raise NotImplementedError


class Tower:
    """
    A CLIP or SigLIP encoder up to the last state that is read; the layers behind are let go.

    transformers' own call keeps every state between layers, and runs layers that nobody reads. Here
    additions and the norms behind them are one pass, across layers too.

    Args:
        model: transformers' vision model. Its layers lose those that are not read.
        states: which of the states between layers are read, 0 being the embeddings and negative ones
            counted from the last; several stand side by side.
        drops_first: whether the first row, a class token, is left out.
        embed: in the place of its embeddings.
    """

    def __init__(
        self,
        model: Any,
        states: int | Sequence[int],
        *,
        drops_first: bool,
        embed: nn.Module | None = None,
    ) -> None:
        inner = getattr(model, "vision_model", model)
        self._embeddings = embed or inner.embeddings
        self._norm = getattr(inner, "pre_layrnorm", nn.Identity())
        self._layers = inner.encoder.layers
        num_states = len(self._layers) + 1
        wanted = [states] if isinstance(states, int) else states
        self._states = [state % num_states for state in wanted]
        self._drops_first = drops_first
        del self._layers[max(self._states) :]

    def __call__(self, pixels: Tensor) -> Tensor:
        """(pictures, 3, height_px, width_px) -> (pictures, rows, width of all states read)."""
        x = self._norm(self._embeddings(pixels))
        states = {0: x}
        delta: Tensor | None = None  # what is still to be added to x
        for number, layer in enumerate(self._layers, 1):
            x, normed = _add(layer.layer_norm1, delta, x)
            attended, _ = layer.self_attn(normed, attention_mask=None)
            x, normed = _add(layer.layer_norm2, attended, x)
            delta = layer.mlp(normed)
            if number in self._states:
                states[number] = x + delta
        picked = [states[state][:, int(self._drops_first) :] for state in self._states]
        return picked[0] if len(picked) == 1 else torch.cat(picked, dim=-1)


def _add(norm: Any, delta: Tensor | None, x: Tensor) -> tuple[Tensor, Tensor]:
    """The sum, which may stand where delta stood, and its norm: in one pass where layers are fused."""
    if delta is None:
        return x, norm(x)
    if isinstance(norm, FusedLayerNorm):
        normed = norm.add_(delta, x)
        assert isinstance(normed, Tensor), "a norm of its own has no reader in fp8"
        return delta, normed
    return delta + x, norm(delta + x)


def count_patches(vision: Any) -> tuple[int, int]:
    """
    Rows of features that a tower of this config gives for a picture, and how many are patches.

    Raises:
        BadConfig: an encoder of another form.
    """
    if vision.model_type not in TOWERS:
        raise BadConfig(
            f"The model's encoder is of the type {vision.model_type!r}, which is not supported yet "
            f"here: use {' or '.join(TOWERS)}."
        )
    patches = (vision.image_size // vision.patch_size) ** 2
    return patches + int(vision.model_type == "clip_vision_model"), patches
