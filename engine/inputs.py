"""
What callers hand in, in all the forms that vLLM's users know, as one kind of value: `Request`.

Shapes and keys are checked here, pixels are not: a picture may still be a file's bytes or a callable
that fetches it, and is only decoded in `read_picture` and `read_clip`, in a media thread.

torch is not loaded to build a request; who hands in tensors has loaded it.
"""

import numbers
import re
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np
from PIL import Image

from engine.config import (
    AREA_KEYS,
    DETAILS,
    IMAGE_KEYS,
    SAMPLING_KEYS,
    MediaOptions,
    parse_io_kwargs,
    parse_part_options,
    parse_processor_kwargs,
)
from engine.errors import (
    BadConfig,
    BadEmbeddings,
    BadPrompt,
    EngineError,
    MediaNotGiven,
    MediaRefused,
    UnsupportedModality,
    UnsupportedPart,
)
from engine.request import SamplingParams
from media import data_url, images, video
from media.decoded import Ask, Frames, RGBImage
from media.decoder import Decoder, Threads
from media.errors import MediaError
from media.frames import build_sampling
from media.limits import IMAGE_LIMITS, VIDEO_LIMITS

if TYPE_CHECKING:
    from torch import Tensor

PROMPT_KEYS = (
    "prompt",
    "prompt_token_ids",
    "multi_modal_data",
    "mm_processor_kwargs",
    "multi_modal_uuids",
    "media_io_kwargs",
    "cache_salt",
)
PART_TYPES = (
    "text",
    "input_text",
    "image_url",
    "input_image",
    "image",
    "image_pil",
    "image_embeds",
    "video_url",
    "video",
)
PICTURE_TYPES = ("image_url", "input_image", "image", "image_pil")
MAX_NESTING = 8  # messages, message, content, part, video, frames, frame
IMAGES, CLIPS = "multi_modal_data['image']", "multi_modal_data['video']"
EMBEDS_FIELDS = ("image_embeds", "image_grid_thw")


@dataclass(frozen=True, slots=True)
class FramesTaken:
    """Which frames of a clip were taken, as `Frames` tells it: the pictures themselves are let go."""

    num_frames: int
    times_s: tuple[float, ...] | None
    frame_s: float | None
    duration_s: float | None
    indices: tuple[int, ...] | None
    num_dropped: int | None

    @classmethod
    def of(cls, frames: Frames) -> "FramesTaken":
        return cls(
            frames.num_frames,
            frames.times_s,
            frames.frame_s,
            frames.duration_s,
            frames.indices,
            frames.num_dropped,
        )


@dataclass(frozen=True, slots=True)
class Picture:
    """
    One picture on its way in.

    Attributes:
        source: RGBImage, PIL image, uint8 array, encoded bytes, DataURL, or a callable that returns
            one.
        area: `min_pixels` and `max_pixels` for this picture alone.
        is_low: seen at the smallest size that the model takes, unless `area` says otherwise.
        taken: where it is a frame of a clip, and the model sees pictures only: which one.
    """

    source: Any
    area: Mapping[str, int] = field(default_factory=dict)
    is_low: bool = False
    taken: FramesTaken | None = None


@dataclass(frozen=True, slots=True)
class Clip:
    """
    One clip on its way in.

    Attributes:
        source: Frames, a list of pictures, a 4-D array, an encoded file's bytes, or a callable that
            returns one of them.
        area: `min_pixels` and `max_pixels` of its frames.
        sampling: which frames of an encoded file are taken, by the names of
            `media.frames.FrameSampling`. Frames that are frames already are used as they are.
    """

    source: Any
    area: Mapping[str, int] = field(default_factory=dict)
    sampling: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class DataURL:
    """A picture or clip whose bytes stand in its address; nothing is decoded yet."""

    url: str


@dataclass(frozen=True, slots=True)
class Embeddings:
    """
    Features that the caller made in place of a picture.

    Attributes:
        features: (num_tokens, hidden), on any device.
        grid: (times, rows, columns) in patches, where the caller gave it.
    """

    features: "Tensor"
    grid: tuple[int, int, int] | None = None


@dataclass(frozen=True, slots=True)
class UserText:
    """A text whose special strings are words, not marks: it can never bind or shift a picture."""

    text: str


@dataclass(frozen=True, slots=True)
class Message:
    """One turn: its parts in order; a Picture or Clip stands where its placeholder belongs."""

    role: str
    parts: tuple[UserText | Picture | Clip | Embeddings, ...]
    is_plain_text: bool


@dataclass(frozen=True, slots=True)
class Request:
    """
    One prompt with its pictures, for `LLM.stream`.

    Give a `prompt` (with one placeholder for each picture) and `multi_modal_data`, or give
    `messages`, which place pictures themselves. Nothing is checked here: a request that cannot be
    read becomes its own failed result.

    Attributes:
        prompt: a text in the model's own format, token ids, or a dict of either and its data, in
            any form that vLLM takes.
        params: how to answer; None for the defaults of the call, then of the model.
        request_id: the caller's name for it; "" lets the engine number it.
        mm_processor_kwargs: `min_pixels` and `max_pixels` for this request's pictures and frames,
            `num_frames`, `fps` and the like (`SAMPLING_KEYS`) for its encoded clips; or several such
            dicts, later ones first.
        media_io_kwargs: as `LLM` takes them, for this request.
        priority: lower runs first.
    """

    prompt: Any = None
    messages: Any = None
    multi_modal_data: Any = None
    params: SamplingParams | None = None
    request_id: str = ""
    mm_processor_kwargs: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None
    media_io_kwargs: Mapping[str, Any] | None = None
    chat_template: str | None = None
    chat_template_kwargs: Mapping[str, Any] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    priority: int = 0


def unfold(request: Request) -> Request:
    """
    Read a prompt that came as a dict into the request's own fields; any other is returned as it is.

    Raises:
        BadPrompt: an unknown key.
    """
    form = request.prompt
    if not isinstance(form, Mapping):
        return request
    unknown = [key for key in form if key not in PROMPT_KEYS]
    if unknown:
        raise BadPrompt(
            f"has an unknown key {str(unknown[0])[:40]!r}",
            remedy=f"Use {', '.join(PROMPT_KEYS[:4])}",
        )
    _refuse_uuids_alone(form)
    ids = form.get("prompt_token_ids")
    if ids is not None and find_token_ids(ids) is None:
        raise BadPrompt(
            f"is a {type(ids).__name__} that holds no token ids",
            where="prompt_token_ids",
            remedy="Give a list of whole numbers, or a text under `prompt`",
        )
    return replace(
        request,
        prompt=form.get("prompt") if ids is None else ids,
        multi_modal_data=form.get("multi_modal_data", request.multi_modal_data),
        mm_processor_kwargs=(
            *layers(None, request),
            *([] if form.get("mm_processor_kwargs") is None else [form["mm_processor_kwargs"]]),
        ),
        media_io_kwargs=form.get("media_io_kwargs", request.media_io_kwargs),
    )


def _refuse_uuids_alone(form: Mapping[str, Any]) -> None:
    uuids, given = form.get("multi_modal_uuids"), form.get("multi_modal_data")
    if not isinstance(uuids, Mapping):
        return
    for modality, names in uuids.items():
        is_given = isinstance(given, Mapping) and given.get(modality) is not None
        if names and not is_given:
            raise MediaNotGiven(modality=str(modality)[:40], index=0)


def layers(outer: Mapping[str, Any] | None, request: Request) -> tuple[Mapping[str, Any], ...]:
    """A request's `mm_processor_kwargs`, behind those of the call that it is part of."""
    own = request.mm_processor_kwargs
    inner = own if isinstance(own, list | tuple) else (own,)
    return tuple(layer for layer in (outer, *inner) if layer is not None)


def media_options(request: Request) -> MediaOptions:
    """
    How this request's media are sized and sampled, where it says so.

    Raises:
        BadPrompt: a key or value that cannot be.
    """
    name = "media_io_kwargs"
    try:
        options = parse_io_kwargs(request.media_io_kwargs)
        name = "mm_processor_kwargs"
        for layer in layers(None, request):
            options |= parse_processor_kwargs(layer)
    except BadConfig as error:
        raise BadPrompt.worded(str(error), where=name) from error
    return options


def may_fetch(request: Request) -> bool:
    """Whether a callable stands for one of its pictures or clips: it may take as long as it likes."""
    form = request.prompt
    given = form.get("multi_modal_data") if isinstance(form, Mapping) else None
    return any(map(_holds_callable, (given, request.multi_modal_data, request.messages)))


def _holds_callable(given: object, depth: int = 0) -> bool:
    if depth > MAX_NESTING:
        return False
    if isinstance(given, Mapping):
        return any(_holds_callable(item, depth + 1) for item in given.values())
    if isinstance(given, list | tuple):
        return any(_holds_callable(item, depth + 1) for item in given)
    return callable(given)


def text_of(form: object) -> str | None:
    """The text that stands in a prompt, also beside its token ids; None where there is none."""
    text = form.get("prompt") if isinstance(form, Mapping) else form
    return text if isinstance(text, str) else None


def find_token_ids(form: object) -> list[int] | None:
    """Whole numbers in a list, tuple, array or tensor as a list; None where it is anything else."""
    if _is_array(form) and form.ndim == 1:
        form = form.tolist()
    if not isinstance(form, Sequence) or isinstance(form, str | bytes):
        return None
    if not all(isinstance(item, numbers.Integral) and not isinstance(item, bool) for item in form):
        return None
    return [int(item) for item in form]


def is_token_ids(form: object) -> bool:
    """A bare list of whole numbers is one prompt, not many."""
    return bool(find_token_ids(form))


def is_priority(given: object) -> bool:
    return isinstance(given, numbers.Integral) and not isinstance(given, bool)


def is_conversation(form: object) -> bool:
    """A list of `{"role", "content"}` dicts is one conversation; a list of such lists is many."""
    return (
        isinstance(form, Sequence)
        and not isinstance(form, str | bytes)
        and all(isinstance(message, Mapping) for message in form)
    )


# --- multi_modal_data ------------------------------------------------------------------------------


def parse_media(given: Mapping[str, Any] | None) -> tuple[list[Picture | Embeddings], list[Clip]]:
    """
    Read `multi_modal_data`: pictures (or embeddings in their place) and clips, in order.

    A 3-D torch tensor is embeddings (pictures, tokens, hidden), as in vLLM; one picture as a tensor
    must be in a list, or 4-D.

    Raises:
        UnsupportedModality, BadPrompt, BadEmbeddings: what is there is nothing we know.
    """
    if given is None:
        return [], []
    if not isinstance(given, Mapping):
        raise BadPrompt(
            f"is a {type(given).__name__}",
            where="multi_modal_data",
            remedy='Give a dict such as {"image": image}',
        )
    for modality in given:
        if modality not in ("image", "video"):
            raise UnsupportedModality(modality)
    pictures = [] if given.get("image") is None else _parse_pictures(given["image"])
    clips = [] if given.get("video") is None else _parse_clips(given["video"])
    return pictures, clips


def _parse_pictures(given: Any, where: str = IMAGES) -> list[Picture | Embeddings]:
    if _is_tensor(given) and given.ndim == 3:
        return [Embeddings(given[index]) for index in range(len(given))]
    if _is_array(given) and given.ndim == 4:
        return [Picture(item) for item in given]
    if isinstance(given, list | tuple):
        if given and all(_is_tensor(item) and item.ndim == 2 for item in given):
            return [Embeddings(features) for features in given]
        for index, item in enumerate(given):
            if item is None:
                raise MediaNotGiven(modality="image", index=index)
        return [picture for item in given for picture in _parse_item(item, where)]
    return _parse_item(given, where)


def _parse_item(item: Any, where: str) -> list[Picture | Embeddings]:
    if isinstance(item, Mapping):
        return _parse_picture_dict(item, where)
    if not _is_picture(item):
        raise BadPrompt(
            f"holds a {type(item).__name__}",
            where=where,
            remedy="Give a PIL image, an array of uint8, encoded bytes, or a list of them",
        )
    return [Picture(item)]


def _is_tensor(given: Any) -> "TypeGuard[Tensor]":
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(given, torch.Tensor)


def _is_array(given: Any) -> "TypeGuard[np.ndarray[Any, Any] | Tensor]":
    return isinstance(given, np.ndarray) or _is_tensor(given)


def _is_picture(item: Any) -> bool:
    if _is_array(item):
        return item.ndim in (2, 3)
    return isinstance(item, RGBImage | Image.Image | bytes | bytearray) or callable(item)


def _parse_picture_dict(given: Mapping[str, Any], where: str) -> list[Picture | Embeddings]:
    """The Qwen form of embeddings, or `{"image": picture, "max_pixels": n}` for one picture."""
    if "image" in given:
        _refuse_unknown(given, ("image", *IMAGE_KEYS), where)
        return _with_area(_parse_item(given["image"], where), parse_part_area(given, where), where)
    if any(name not in given for name in EMBEDS_FIELDS):
        raise BadEmbeddings.missing_fields(required=EMBEDS_FIELDS, found=map(str, given))
    _refuse_unknown(given, EMBEDS_FIELDS, where)
    return _split_embeddings(given["image_embeds"], given["image_grid_thw"])


def _with_area(
    found: list[Picture | Embeddings], area: Mapping[str, int], where: str
) -> list[Picture | Embeddings]:
    """The same with the bounds of the dict or part around them, which go first."""
    if not area:
        return found
    sized: list[Picture | Embeddings] = []
    for item in found:
        if isinstance(item, Embeddings):
            raise BadPrompt(
                f"gives {next(iter(area))} to embeddings, which have no size in pixels",
                where=where,
                remedy="Leave it out, or give the picture itself",
            )
        sized.append(replace(item, area={**item.area, **area}))
    return sized


def _refuse_unknown(given: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    """A key that is None is as good as absent: programs write out all that a class has."""
    for key, value in given.items():
        if key not in known and value is not None:
            raise BadPrompt(
                f"has an unknown key {str(key)[:40]!r}",
                where=where,
                remedy=f"Use {', '.join(known)}",
            )


def _split_embeddings(features: Any, grids: Any) -> list[Picture | Embeddings]:
    """(total tokens, hidden) and (pictures, 3) -> one piece for each picture."""
    import torch

    from engine.families.qwen2_vl import MERGE, Grid

    try:
        features, grids = torch.as_tensor(features), torch.as_tensor(grids)
    except (TypeError, ValueError, RuntimeError) as error:
        raise BadEmbeddings(
            "image_embeds and image_grid_thw must be tensors, or lists of numbers of equal length."
        ) from error
    if grids.is_floating_point() or grids.is_complex():
        raise BadEmbeddings(f"image_grid_thw must hold whole numbers, got {grids.dtype}.")
    if features.ndim == 3:  # (pictures of equal size, tokens, hidden)
        features = features.flatten(0, 1)
    if features.ndim != 2 or grids.ndim != 2 or grids.shape[1] != 3:
        raise BadEmbeddings(
            "image_embeds must be (total tokens, hidden) and image_grid_thw (pictures, 3), got "
            f"{tuple(features.shape)} and {tuple(grids.shape)}."
        )
    shapes = [(int(t), int(h), int(w)) for t, h, w in grids.tolist()]
    if any(min(shape) < 1 or shape[1] % MERGE or shape[2] % MERGE for shape in shapes):
        raise BadEmbeddings(
            "image_grid_thw must hold times, rows and columns of 1 or more, rows and columns even: "
            "they count patches, of which 2 x 2 make a token."
        )
    sizes = [Grid(*shape).num_tokens for shape in shapes]
    if sum(sizes) != len(features):
        raise BadEmbeddings(
            f"image_grid_thw stands for {sum(sizes)} tokens, but image_embeds has {len(features)}."
        )
    pieces = features.split(sizes)
    return [Embeddings(piece, shape) for piece, shape in zip(pieces, shapes, strict=True)]


def _parse_clips(given: Any, where: str = CLIPS) -> list[Clip]:
    if _is_clip(given):
        return [Clip(given)]
    if isinstance(given, list | tuple) and given:
        for index, item in enumerate(given):
            if item is None:
                raise MediaNotGiven(modality="video", index=index)
        if all(_is_clip(item) for item in given):
            return [Clip(item) for item in given]
        if all(_is_picture(item) for item in given):
            return [Clip(list(given))]
    raise BadPrompt(
        f"is a {type(given).__name__} that is no clip",
        where=where,
        remedy="Give a list of frames, a 4-D array (frames, height, width, 3), or a list of clips",
    )


def _is_clip(item: Any) -> bool:
    if _is_array(item):
        return item.ndim == 4
    if isinstance(item, tuple) and len(item) == 2 and isinstance(item[1], Mapping):
        return True  # (frames, metadata)
    if isinstance(item, list) and item:
        return all(_is_picture(frame) for frame in item) and not callable(item[0])
    return isinstance(item, Frames | bytes | bytearray) or callable(item)


def parse_part_area(part: Mapping[str, Any], where: str) -> Mapping[str, int]:
    """`min_pixels`, `max_pixels` and `num_crops` of one picture, where its part or dict names them."""
    return _part_options(part, IMAGE_KEYS, where).image


def _part_options(part: Mapping[str, Any], keys: Sequence[str], where: str) -> MediaOptions:
    try:
        return parse_part_options(part, keys, where)
    except BadConfig as error:
        raise BadPrompt.worded(str(error), where=where) from error


# --- conversations ---------------------------------------------------------------------------------


def parse_messages(messages: Sequence[Mapping[str, Any]]) -> list[Message]:
    """
    Read a conversation in OpenAI's form, with data URLs, or with pictures themselves.

    Raises:
        BadPrompt, UnsupportedPart: a message or part that is none.
    """
    if not is_conversation(messages) or not messages:
        raise BadPrompt(
            "is no list of messages",
            where="messages",
            remedy='Give [{"role": "user", "content": "..."}]',
        )
    return [_parse_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def _parse_message(message: Mapping[str, Any], where: str) -> Message:
    _refuse_unknown(message, ("role", "content"), where)
    role, content = message.get("role"), message.get("content")
    # The role stands in the template's own text: no special token must come in that way.
    if not isinstance(role, str) or not re.fullmatch(r"[\w-]+", role):
        raise BadPrompt("has no role", where=where, remedy="Give system, user or assistant")
    if content is None:
        content = ""
    if isinstance(content, str):
        return Message(role, (UserText(content),), is_plain_text=True)
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        raise BadPrompt(
            f"has a content of type {type(content).__name__}",
            where=where,
            remedy="Give a text or a list of parts",
        )
    parts = tuple(_parse_part(part, f"{where}.content[{i}]") for i, part in enumerate(content))
    return Message(role, parts, is_plain_text=False)


def _parse_part(part: Any, where: str) -> UserText | Picture | Clip | Embeddings:
    if isinstance(part, str):
        return UserText(part)
    if not isinstance(part, Mapping):
        raise BadPrompt(
            f"is a {type(part).__name__}", where=where, remedy='Give {"type": "text", ...}'
        )
    kind = part.get("type")
    if kind is None:  # the short form: {"image_url": "..."}
        kind = next((name for name in PART_TYPES if name in part), None)
    if kind not in PART_TYPES:
        raise UnsupportedPart(kind, PART_TYPES)
    if kind in ("text", "input_text"):
        _refuse_unknown(part, ("type", "text"), where)
        text = part.get("text")
        if not isinstance(text, str):
            raise BadPrompt("has no text", where=where, remedy='Give {"type": "text", "text": …}')
        return UserText(text)
    name = "image_url" if kind == "input_image" else kind
    if kind in PICTURE_TYPES:
        options: Sequence[str] = (*IMAGE_KEYS, "detail")
    else:
        options = () if kind == "image_embeds" else (*AREA_KEYS, *SAMPLING_KEYS)
    _refuse_unknown(part, ("type", name, *options, "uuid"), where)
    if part.get(name) is None:
        raise BadPrompt(f"has no {name}", where=where, remedy=f"Give it under {name!r}")
    given = part[name]
    sizes = _part_options(part, [key for key in options if key != "detail"], where)
    if kind == "image_embeds":
        return _one_embedding(given, where)
    if kind == "video_url":
        return Clip(DataURL(_url_of(given, ("url",), where)), sizes.video, sizes.sampling)
    if kind == "video":
        return Clip(_one_clip(given, where), sizes.video, sizes.sampling)
    is_low = _is_low(part, where)
    if kind in ("image_url", "input_image"):
        is_low = is_low or (isinstance(given, Mapping) and _is_low(given, where))
        return Picture(DataURL(_url_of(given, ("url", "detail"), where)), sizes.image, is_low)
    found = _with_area(_parse_item(given, where), sizes.image, where)
    if len(found) != 1:
        raise BadPrompt(
            f"holds {len(found)} pictures", where=where, remedy="Give each a part of its own"
        )
    return replace(found[0], is_low=is_low) if isinstance(found[0], Picture) else found[0]


def _is_low(given: Mapping[str, Any], where: str) -> bool:
    detail = given.get("detail")
    if detail is not None and detail not in DETAILS:
        raise BadPrompt(
            "has a detail that is not known", where=where, remedy=f"Use {', '.join(DETAILS)}"
        )
    return bool(detail == "low")


def _one_clip(given: Any, where: str) -> Any:
    clips = _parse_clips(given, where)
    if len(clips) != 1:
        raise BadPrompt(
            f"holds {len(clips)} clips", where=where, remedy="Give each a part of its own"
        )
    return clips[0].source


def _one_embedding(given: Any, where: str) -> Embeddings:
    found = _parse_pictures(given if not _is_flat(given) else [given], where)
    if len(found) != 1 or not isinstance(found[0], Embeddings):
        raise BadPrompt(
            "is not the embeddings of one picture",
            where=where,
            remedy="Give a tensor of (tokens, hidden) or the dict form with image_grid_thw",
        )
    return found[0]


def _is_flat(given: Any) -> bool:
    return _is_tensor(given) and given.ndim == 2


def _url_of(given: Any, known: Sequence[str], where: str) -> str:
    if isinstance(given, Mapping):
        _refuse_unknown(given, known, where)
    url = given.get("url") if isinstance(given, Mapping) else given
    if not isinstance(url, str) or not url:
        raise BadPrompt("has no url", where=where, remedy='Give {"url": "data:image/…;base64,…"}')
    if not data_url.is_data_url(url):
        raise BadPrompt(
            "is not a data URL",
            where=where,
            remedy="The library opens no address and no file by URL: give data:…;base64,… or the "
            "picture itself as {'type': 'image', 'image': …}",
        )
    return url


# --- pixels ----------------------------------------------------------------------------------------


def fetch(source: Any) -> Any:
    """
    What a callable gives; anything else as it is.

    Raises:
        MediaRefused: the callable was media's, and said no in its own words.
    """
    if not callable(source):
        return source
    try:
        return source()
    except MediaError as error:
        raise refused(error) from error


IN_THREAD = Threads()


def read_picture(source: Any, decoder: Decoder = IN_THREAD, ask: Ask | None = None) -> RGBImage:
    """
    Decode one picture, whatever form it came in; a callable has been called already.

    Args:
        ask: which size is wanted; only asked where bytes are decoded.

    Raises:
        MediaRefused: media said no, in its own words.
        BadPrompt: a callable gave something that is no picture.
    """
    try:
        return _as_rgb_image(source, decoder, ask)
    except MediaError as error:
        raise refused(error) from error


# Pillow decodes a file when its image is first looked at, and two threads that look at once both get
# damaged pixels: one image may stand in many prompts. Few enough locks, and seldom shared by chance.
_PIL_LOCKS = [threading.Lock() for _ in range(64)]


def _as_rgb_image(source: Any, decoder: Decoder, ask: Ask | None = None) -> RGBImage:
    if isinstance(source, RGBImage):
        return source
    if isinstance(source, DataURL):
        encoded, _ = data_url.decode_data_url(source.url, IMAGE_LIMITS)
        return decoder.decode_image(encoded, ask=ask)
    if isinstance(source, Image.Image):
        with _PIL_LOCKS[id(source) // 64 % len(_PIL_LOCKS)]:
            return images.from_pil(source)
    if isinstance(source, bytes | bytearray):
        return decoder.decode_image(bytes(source), ask=ask)
    if _is_tensor(source):
        source = source.detach().cpu().numpy()
    if isinstance(source, np.ndarray):
        return images.from_array(source)
    raise BadPrompt(
        f"came as a {type(source).__name__}",
        where="image",
        remedy="Give a PIL image, an array of uint8, or encoded bytes",
    )


def read_clip(
    source: Any,
    own: Mapping[str, Any],
    inherited: Mapping[str, Any],
    decoder: Decoder = IN_THREAD,
    ask: Ask | None = None,
) -> Frames:
    """
    Decode one clip, whatever form it came in; a callable has been called already.

    Args:
        own: the sampling that its part gave; refused for frames, which are used as they are.
        inherited: the same of its request, which are for encoded clips only.
        ask: as in `read_picture`.

    Raises:
        MediaRefused, BadPrompt: as `read_picture`; also frames that differ in size.
    """
    try:
        if isinstance(source, bytes | bytearray | DataURL):
            return _decode_clip(source, {**inherited, **own}, decoder, ask)
        if own:
            raise BadPrompt(
                "came as frames, which are used as they are",
                where="video",
                remedy=f"Leave out {', '.join(own)}, or give the encoded clip",
            )
        if isinstance(source, tuple) and len(source) == 2 and isinstance(source[1], Mapping):
            source = source[0]
        if isinstance(source, Frames):
            return source
        if _is_tensor(source):
            source = source.detach().cpu().numpy()
        if not isinstance(source, list | tuple | np.ndarray):
            raise BadPrompt(
                f"came as a {type(source).__name__}",
                where="video",
                remedy="Give a list of frames, a 4-D array (frames, height, width, 3), or Frames",
            )
        return Frames(tuple(_as_rgb_image(frame, decoder) for frame in source))
    except MediaError as error:
        raise refused(error) from error
    except EngineError:
        raise
    except ValueError as error:
        raise BadPrompt(
            "has no frames, or frames of different sizes",
            where="video",
            remedy="Give one frame or more, all of one size",
        ) from error


def _decode_clip(
    source: bytes | bytearray | DataURL,
    options: Mapping[str, Any],
    decoder: Decoder,
    ask: Ask | None,
) -> Frames:
    sampling = build_sampling(options)
    if not isinstance(source, DataURL):
        return decoder.decode_video(bytes(source), sampling, ask=ask)
    if data_url.media_type_of(source.url) == data_url.FRAMES_MEDIA_TYPE:
        frames = data_url.decode_frames_url(source.url, VIDEO_LIMITS)
        return video.decode_jpeg_frames(frames, sampling, decode=decoder.decode_image)
    encoded, _ = data_url.decode_data_url(source.url, VIDEO_LIMITS)
    return decoder.decode_video(encoded, sampling, ask=ask)


def refused(error: MediaError) -> MediaRefused:
    return MediaRefused(str(error), code=error.code, retryable=error.retryable)
