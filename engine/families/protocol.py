"""
What the engine asks of a model family, and what it hands to one.

A request's way through an adapter:

1. `read_text` turns what a prompt or template wrote into text in which each picture is one token,
   `image_token_id`. Only where a family writes it otherwise.
2. `plan_picture`, `plan_clip`: from sizes alone to a `Plan`: rows of features that take the placeholder's
   place, and the text that the family writes between them: breaks at the ends of rows, tile names,
   moments of a clip.
3. `cut_picture`, `cut_clip`, in a media thread: pixels as the encoder wants them, still uint8, in a
   `Visual`: one array of equal frames, tiles or crops. A family that only resamples says so in `fit`:
   then whoever decodes a file does that too, and nothing is cut.
4. `positions`: of the whole prompt, `num_axes` of them, and what generated tokens add.
5. `encode`, on the device: many visuals in one call -> (rows, feature_size) each. Features that go
   into later layers too stand behind the first `hidden_size` columns, so that caches and caller's
   embeddings need not know of them.
6. The text model is called with what `attach` left in `text`, `embed` and `head`: on one row of tokens,
   attention through `engine.attention`. A window comes from the layer by the name `sliding_window`.

Where `sees_both_ways`, a picture's rows attend to those behind them too. Scores with a soft cap are not
built: `check_text` keeps out what needs them.

What is the same for all is in `Family`; an adapter writes what differs.
"""

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor, nn

from engine.errors import BadConfig, BadEmbeddings, BadPrompt
from engine.kv import KVShape
from engine.repeats import Repeats
from media.decoded import Fit, RGBImage

logger = logging.getLogger(__name__)

Pixels = npt.NDArray[np.uint8]
Positions = npt.NDArray[np.int64]

MAX_TILES = 256  # that a request may ask for: far over what models were trained with


# Text models that others may be built on, each compared with transformers: causal attention alone, over
# all rows or a window of them, and rotary positions that do not change with the length of a call.
TEXT_TYPES = ("gemma3_text", "llama", "mistral", "phi3", "qwen2", "qwen3")
CHANGING_ROPES = ("dynamic", "longrope")


def check_text(text_config: Any) -> None:
    """
    For families whose config names its text model.

    Raises:
        BadConfig: one that would run, perhaps, and say something else.
    """
    if text_config.model_type not in TEXT_TYPES:
        raise BadConfig(
            f"The model's text part is of the type {text_config.model_type!r}, which is not supported "
            f"yet here: use {', '.join(TEXT_TYPES)}."
        )
    check_positions(text_config)
    if getattr(text_config, "use_bidirectional_attention", False):
        raise BadConfig(
            "The model's tokens look ahead (use_bidirectional_attention): it makes embeddings and no "
            "answers. Give a model that generates."
        )
    for cap in ("final_logit_softcapping", "attn_logit_softcapping"):
        if getattr(text_config, cap, None) is not None:
            raise BadConfig(f"The model bounds its scores ({cap}), which is not supported.")


def check_positions(text_config: Any) -> None:
    """
    Raises:
        BadConfig: those of one prompt would depend on which run beside it, or a part of each head only
            knows them.
    """
    ropes = getattr(text_config, "rope_parameters", None) or {}
    # Where layers of several kinds turn differently, there is one for each kind.
    for rope in [ropes, *(value for value in ropes.values() if isinstance(value, Mapping))]:
        if rope.get("rope_type") in CHANGING_ROPES:
            raise BadConfig(
                f"The model's positions are of the type {rope['rope_type']!r}, which changes with the "
                "length of a prompt. That is not supported."
            )
        if rope.get("partial_rotary_factor", 1) != 1:
            raise BadConfig(
                "The model's positions turn a part of each head only (partial_rotary_factor), which is "
                "not supported."
            )


class ImageTooNarrowError(ValueError):
    """
    One side is so much longer than the other that no plan is made. The client's fault.

    Args:
        size: of the picture, for whoever debugs.
        max_ratio: the longest side over the shortest, at most.
    """

    def __init__(self, size: str, max_ratio: int = 200) -> None:
        super().__init__(size)
        self.max_ratio = max_ratio


@dataclass(frozen=True, slots=True)
class AreaLimits:
    """Smallest and largest area after resampling, in pixels, both inclusive."""

    min_pixels: int = 56 * 56
    max_pixels: int = 28 * 28 * 1280

    @property
    def smallest(self) -> "AreaLimits":
        """What `detail: "low"` means."""
        return AreaLimits(self.min_pixels, self.min_pixels)

    def changed(self, given: Mapping[str, int]) -> "AreaLimits":
        """
        The smaller bound gives way where a request moves only one of the two past the other.

        Raises:
            BadPrompt: a word that is not for this model, or both bounds, crossed.
        """
        _refuse_others(given, ("min_pixels", "max_pixels"))
        smallest = given.get("min_pixels", self.min_pixels)
        largest = given.get("max_pixels", self.max_pixels)
        if smallest > largest:
            if "min_pixels" in given and "max_pixels" in given:
                raise BadPrompt(
                    f"is {smallest}, over max_pixels={largest}",
                    where="min_pixels",
                    remedy="Give a min_pixels of at most max_pixels",
                )
            smallest = largest = given.get("max_pixels", smallest)
        return AreaLimits(smallest, largest)


@dataclass(frozen=True, slots=True)
class TileLimit:
    """How many tiles of a fixed size a picture may become."""

    num_crops: int

    @property
    def smallest(self) -> "TileLimit":
        """What `detail: "low"` means."""
        return TileLimit(1)

    def changed(self, given: Mapping[str, int]) -> "TileLimit":
        """
        Raises:
            BadPrompt: a word that is not for this model, or more than MAX_TILES.
        """
        _refuse_others(given, ("num_crops",))
        num_crops = given.get("num_crops", self.num_crops)
        if num_crops > MAX_TILES:
            raise BadPrompt(
                f"is {num_crops}", where="num_crops", remedy=f"Give {MAX_TILES} at most"
            )
        return TileLimit(num_crops)


Sizing = AreaLimits | TileLimit


def resize(sizing: Sizing | None, given: Mapping[str, int]) -> Sizing | None:
    """
    How pictures or clips are sized, once a request has said what it wants changed.

    Args:
        sizing: None where a picture's size is not to choose.
        given: the words of `mm_processor_kwargs` and of parts, with whole numbers over 0.

    Raises:
        BadPrompt: as `changed`, or anything given where nothing is to choose.
    """
    if sizing is None:
        _refuse_others(given, ())
        return None
    return sizing.changed(given)


def _refuse_others(given: Mapping[str, int], known: Sequence[str]) -> None:
    unknown = next((word for word in given if word not in known), None)
    if unknown is None:
        return
    if not known:
        raise BadPrompt(
            "is not for this model, which sees every picture at a size of its own",
            where=unknown,
            remedy="Leave it out",
        )
    raise BadPrompt(
        "is not for this model", where=unknown, remedy=f"Use {' and '.join(known)}, or leave it out"
    )


@dataclass(frozen=True, slots=True)
class Description:
    """
    What a checkpoint says of itself, beside its weights.

    Attributes:
        config: transformers' config object.
        tokenizer: transformers' fast tokenizer.
        pictures, clips: of preprocessor_config.json and video_preprocessor_config.json, or of their
            parts in processor_config.json; empty where there are none, and without nulls.
        processor: the rest of processor_config.json, likewise.
    """

    config: Any
    tokenizer: Any
    pictures: Mapping[str, Any] = field(default_factory=dict)
    clips: Mapping[str, Any] = field(default_factory=dict)
    processor: Mapping[str, Any] = field(default_factory=dict)

    def copy_tokenizer(self) -> Tokenizer:
        """Its core, for families that write text: transformers' own calls change what threads share."""
        tokenizer = Tokenizer.from_str(self.tokenizer.backend_tokenizer.to_str())
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer


@dataclass(frozen=True, slots=True)
class Rows:
    """Neighbouring places of a prompt that features take, all under one id."""

    token_id: int
    number: int


@dataclass(frozen=True, slots=True)
class Plan:
    """
    What one picture or clip becomes, known before a pixel is.

    Attributes:
        pieces: what its placeholder expands to: rows for features, in their order, and ids of text
            around and between them. Nothing as long as the prompt: whoever asks for a thousand
            million tokens is refused before they are made.
        num_patches: of the encoder, in all its tiles or frames: what its call costs.
        width_px, height_px: of all that is seen of it; 0 for features that came as they are.
        layout: the family's own, with a repr that tells it from others: how it is cut, where its
            tokens stand. Equal pixels of equal layout have equal features.
    """

    pieces: tuple[Rows | tuple[int, ...], ...]
    num_patches: int = 0
    width_px: int = 0
    height_px: int = 0
    layout: Any = None

    @property
    def num_tokens(self) -> int:
        return sum(_length(piece) for piece in self.pieces)

    @property
    def num_rows(self) -> int:
        """Rows of features, at most num_tokens."""
        return sum(piece.number for piece in self.pieces if isinstance(piece, Rows))

    def token_ids(self) -> list[int]:
        """(num_tokens,): all that stands in the prompt."""
        ids: list[int] = []
        for piece in self.pieces:
            ids += [piece.token_id] * piece.number if isinstance(piece, Rows) else piece
        return ids

    def rows_from(self, start: int) -> Positions:
        """The places of its features in a prompt in which it begins at `start`: (num_rows,)."""
        found = []
        for piece in self.pieces:
            end = start + _length(piece)
            if isinstance(piece, Rows):
                found.append(np.arange(start, end))
            start = end
        return np.concatenate(found).astype(np.int64)


def _length(piece: Rows | tuple[int, ...]) -> int:
    return piece.number if isinstance(piece, Rows) else len(piece)


@dataclass(frozen=True, slots=True, eq=False)
class Visual:
    """
    One picture or clip, resampled and ready for the encoder, which cuts it where it runs.

    Attributes:
        pixels: (frames, tiles or crops; height_px, width_px, 3), uint8, host.
        key: what it is: equal for equal pixels of equal layout; None where nobody asked.
    """

    pixels: Tensor
    plan: Plan
    is_clip: bool = False
    key: bytes | None = None


class Family:
    """
    What is one family's own about running a checkpoint. This class is a text-only model.

    Attributes:
        image_placeholder, image_token_id: how a prompt says that a picture stands here, as a token of
            the tokenizer; None where the model sees none. The same for clips.
        image_written: how a prompt writes the first one, where that is no token; for errors.
        image_slot, video_slot: as its chat template writes one, for templates that take only text.
        clip_template: for conversations with clips, in the place of the checkpoint's own template;
            None where that one writes clips too.
        chat_template: for checkpoints that bring none; None where there is no usual one.
        chat_start: what stands before a conversation, where its template does not write it.
        turn_end: the token that ends an answer, where no file of its checkpoints says so.
        sees_both_ways: whether a picture's tokens attend to those behind them, to the picture's end.
        num_axes: of positions.
        hidden_size: of the text model. feature_size: of a row of features.
        image_area, video_area: limits of the checkpoint; None where a picture's size is not to choose.
        pixels_a_token: about how many pixels cost one token, where the size is to choose.
        uses_keys: whether pictures are told apart, for a cache.
        repeats: given by the runner where there are CUDA graphs.
        text, embed, head: of the loaded model, after `attach`.
    """

    image_placeholder: str | None = None
    video_placeholder: str | None = None
    image_written: str | None = None
    image_slot = video_slot = ""
    chat_template: str | None = None
    clip_template: str | None = None
    chat_start = ""
    turn_end: str | None = None
    image_token_id: int | None = None
    video_token_id: int | None = None
    sees_both_ways = False
    num_axes = 1
    image_area: Sizing | None = None
    video_area: Sizing | None = None
    pixels_a_token = 0

    text: Any  # transformers' modules
    embed: nn.Module
    head: nn.Module

    def __init__(self, description: Description) -> None:
        """
        Raises:
            BadConfig: a checkpoint of this type that is not supported, in words for its user.
            Exception: anything else that is missing or has no meaning.
        """
        self.text_config = description.config.get_text_config()
        self.hidden_size: int = self.text_config.hidden_size
        self.feature_size = self.hidden_size
        self.uses_keys = False
        self.repeats: Repeats | None = None
        self._pins = False

    @property
    def modalities(self) -> tuple[str, ...]:
        """What a prompt may hold beside text, in the words of `multi_modal_data`."""
        seen = (("image", self.image_token_id), ("video", self.video_token_id))
        return tuple(name for name, token_id in seen if token_id is not None)

    def kv_shape(self, dtype: torch.dtype) -> KVShape:
        return KVShape.of(self.text_config, dtype)

    # --- on the host, in media threads -------------------------------------------------------------

    def read_text(self, text: str) -> str:
        """A prompt's text, or what a template wrote, with each placeholder as its one token."""
        return text

    def read_prompt(self, text: str) -> str:
        """
        `read_text` for a whole prompt that a caller wrote.

        Raises:
            PlaceholderMismatch: placeholders that are numbered wrongly.
        """
        return self.read_text(text)

    def plan_picture(self, width_px: int, height_px: int, area: Any) -> Plan:
        """
        Args:
            area: `image_area`, or what a request has in its place, of the same kind.

        Raises:
            ImageTooNarrowError: the family takes no picture of this form.
        """
        raise NotImplementedError

    def plan_one_of(self, number: int, width_px: int, height_px: int, area: Any) -> Plan:
        """`plan_picture` for one of so many pictures of a prompt; most families see each alike."""
        return self.plan_picture(width_px, height_px, area)

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
        """
        The same for a clip.

        Args:
            times_s: the moment of each frame, where they are known.
            frame_s: seconds of the clip for which one frame stands, where they are known.
            duration_s: of all of the clip, whichever of it is looked at, where it is known.
        """
        raise NotImplementedError

    def plan_embeddings(self, num_rows: int, grid: tuple[int, int, int] | None) -> Plan:
        """
        A plan for features that a caller made.

        Args:
            grid: times, rows and columns in patches, where the caller gave `image_grid_thw`.

        Raises:
            BadEmbeddings: no picture has so many.
        """
        if grid is not None:
            raise BadEmbeddings(
                "This model takes no image_grid_thw: give embeddings as a tensor of (images, "
                "tokens, hidden)."
            )
        assert self.image_token_id is not None
        return Plan((Rows(self.image_token_id, num_rows),))

    def cut_picture(self, image: Image.Image, plan: Plan) -> Visual:
        """An RGB picture as the encoder takes it, by its plan."""
        raise NotImplementedError

    def cut_clip(self, frames: Sequence[Image.Image], plan: Plan) -> Visual:
        """The frames of a clip, all of one size."""
        raise NotImplementedError

    def positions(
        self, num_tokens: int, media: Sequence[tuple[int, Plan]]
    ) -> tuple[Positions, int]:
        """
        Args:
            media: for each picture or clip, in order: where its ids start, and its plan.

        Returns:
            positions: (num_axes, num_tokens).
            delta: what generated tokens add to their row in the slab to get their position.

        Raises:
            BadPrompt: the model has no such positions.
        """
        return np.arange(num_tokens, dtype=np.int64)[None], 0

    def fit(self, plan: Plan) -> Fit | None:
        """
        What a picture, or each frame, may be resampled to where it is decoded, so that nothing is left
        to cut; None where `cut_picture` and `cut_clip` need it whole.
        """
        return None

    def see(self, images: Sequence[RGBImage], plan: Plan, *, is_clip: bool = False) -> Visual:
        """A picture or the frames of a clip, whole or as `fit` wanted it, as the encoder takes it."""
        fit = self.fit(plan)
        if fit is not None and all(
            image.is_bare and (image.width_px, image.height_px) == (fit.width_px, fit.height_px)
            for image in images
        ):
            return self._build([image.view() for image in images], plan, is_clip=is_clip)
        if is_clip:
            return self.cut_clip([image.image for image in images], plan)
        return self.cut_picture(images[0].image, plan)

    def _build(
        self, parts: Sequence[Image.Image | Pixels], plan: Plan, *, is_clip: bool = False
    ) -> Visual:
        """A visual of frames, tiles or crops of equal size, in memory that the device reads."""
        pixels = self._gather(parts)
        key = None
        if self.uses_keys:
            digest = hashlib.sha256(f"{is_clip} {pixels.shape} {plan.layout!r} ".encode())
            digest.update(pixels.numpy().data)
            key = digest.digest()
        return Visual(pixels, plan, is_clip, key)

    def _gather(self, parts: Sequence[Image.Image | Pixels]) -> Tensor:
        """(parts, height_px, width_px, 3); a single array that the device can read stays where it is."""
        first = parts[0]
        if isinstance(first, np.ndarray):
            if len(parts) == 1 and not self._pins:
                return torch.from_numpy(first)[None]
            height_px, width_px, _ = first.shape
        else:
            width_px, height_px = first.size
        pixels = self._empty((len(parts), height_px, width_px, 3))
        on_host = pixels.numpy()
        for index, part in enumerate(parts):
            on_host[index] = np.asarray(part)
        return pixels

    def _empty(self, shape: tuple[int, ...]) -> Tensor:
        """Memory of the host; where the device copies from it, in a place that stays."""
        if self._pins:
            try:
                return torch.empty(shape, dtype=torch.uint8, pin_memory=True)
            except RuntimeError:
                logger.warning("pinned_memory_is_out pictures go up more slowly", exc_info=True)
                self._pins = False
        return torch.empty(shape, dtype=torch.uint8)

    # --- on the device -----------------------------------------------------------------------------

    def attach(self, model: Any) -> None:
        """Take the parts of a loaded model; once its layers are swapped and its attention is ours."""
        self.text = getattr(model.model, "language_model", model.model)
        self.embed = self.text.get_input_embeddings()
        self.head = model.lm_head
        self._pins = next(model.parameters()).device.type == "cuda"

    def encode(self, visuals: Sequence[Visual]) -> list[Tensor]:
        """
        Run the encoder once over many pictures and clips, in inference mode.

        Returns:
            For each, (plan.num_rows, feature_size), on the model's device.
        """
        raise NotImplementedError
