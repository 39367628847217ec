"""
A request becomes what the runner reads: token ids with placeholders expanded, positions, patches.

Runs in media threads, one request at a time, and knows no device. Prompts of `chat` are built from
segments: what a user typed is tokenised with special tokens switched off, so `<|image_pad|>` in a
text stays thirteen characters and binds no picture.
"""

import re
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from jinja2 import TemplateError
from tokenizers import Tokenizer as BackendTokenizer
from torch import Tensor

from engine.checkpoint import Checkpoint
from engine.config import EngineConfig, parse_area
from engine.errors import (
    BadConfig,
    BadEmbeddings,
    BadPrompt,
    EmptyPrompt,
    ImageTooNarrow,
    MaxTokensTooLarge,
    NoChatTemplate,
    PlaceholderMismatch,
    PromptTooLong,
    TooManyImages,
    TooManyVideos,
)
from engine.families.qwen2_vl import AreaLimits, Grid, ImageTooNarrowError, Visual, square_grid
from engine.inputs import (
    Clip,
    Embeddings,
    Message,
    Picture,
    Request,
    UserText,
    is_token_ids,
    parse_media,
    parse_messages,
    read_clip,
    read_picture,
    unfold,
)
from engine.request import ImageUsed, MediaKind, SamplingParams


@dataclass(frozen=True, slots=True)
class Prepared:
    """
    A request, ready to run.

    Attributes:
        prompt: its text as the tokenizer saw it; None where it came as token ids.
        token_ids: with one id for each feature of a picture.
        positions: (3, num_tokens), int64. rope_delta: see `Qwen2VL.positions`.
        media: for each picture or clip in order: (first placeholder, patches or features).
        max_tokens: at most so many output tokens, the context's end considered.
        preprocess_ms: time spent here, on the host.
    """

    prompt: str | None
    token_ids: list[int]
    positions: npt.NDArray[np.int64]
    rope_delta: int
    media: tuple[tuple[int, Visual | Tensor], ...]
    images: tuple[ImageUsed, ...]
    params: SamplingParams
    max_tokens: int
    preprocess_ms: float


@dataclass(frozen=True, slots=True)
class _Ready:
    """One picture or clip, cut or given as features, and what to report of it."""

    content: Visual | Tensor
    grid: Grid
    width_px: int
    height_px: int
    kind: MediaKind
    num_frames: int | None = None


class Processor:
    """
    Args:
        max_model_len: prompt and output together, in tokens.
        defaults: sampling parameters of a request that names none.
    """

    def __init__(
        self,
        engine: EngineConfig,
        checkpoint: Checkpoint,
        max_model_len: int,
        defaults: SamplingParams,
    ) -> None:
        self.max_model_len = max_model_len
        self.defaults = defaults
        self._limits = engine.limits
        self._family = checkpoint.family
        self._tokenizer = checkpoint.tokenizer
        self._vocab_size: int = checkpoint.config.text_config.vocab_size
        self._template = engine.chat_template
        self._area = {
            "image": _narrowed(self._family.image_area, engine.min_pixels, engine.max_pixels),
            "video": _narrowed(self._family.video_area, engine.min_pixels, engine.max_pixels),
        }
        # Copies of the tokenizer's core: transformers' own calls change its state, threads share it.
        core = checkpoint.tokenizer.backend_tokenizer.to_str()
        self._encoder = BackendTokenizer.from_str(core)
        self._plain_encoder = BackendTokenizer.from_str(core)
        self._plain_encoder.encode_special_tokens = True  # special strings are words here
        for encoder in (self._encoder, self._plain_encoder):
            encoder.no_truncation()
            encoder.no_padding()
        specials = sorted(
            (token.content for token in checkpoint.tokenizer.added_tokens_decoder.values()),
            key=len,
            reverse=True,
        )
        self._special = re.compile("|".join(re.escape(token) for token in specials) or r"(?!)")

    def prepare(self, request: Request) -> Prepared:
        """
        Check, tokenise, decode and cut one request.

        Raises:
            RequestError: anything that is the client's fault; nothing else is affected.
        """
        started = time.perf_counter()
        request = unfold(request)
        params = request.params or self.defaults
        params.check_vocab(self._vocab_size)
        prompt, ids, pictures, clips = self._read(request)
        if not ids:
            raise EmptyPrompt
        self._check_counts(ids, len(pictures), len(clips))
        area = self._request_area(request)
        ready = [self._ready_picture(i, picture, area) for i, picture in enumerate(pictures)]
        ready_clips = [self._ready_clip(clip, area) for clip in clips]
        token_ids, media = self._expand(ids, ready, ready_clips)
        num_media_tokens = sum(item.grid.num_tokens for _, item in media)
        max_tokens = self._room(len(token_ids), num_media_tokens, params)
        positions, delta = self._family.positions(
            len(token_ids), [(start, item.grid) for start, item in media]
        )
        return Prepared(
            prompt,
            token_ids,
            positions,
            delta,
            tuple((start, item.content) for start, item in media),
            _report(media),
            params,
            max_tokens,
            (time.perf_counter() - started) * 1000,
        )

    # --- text --------------------------------------------------------------------------------------

    def _read(
        self, request: Request
    ) -> tuple[str | None, list[int], list[Picture | Embeddings], list[Clip]]:
        if request.messages is not None:
            if request.prompt is not None:
                raise BadPrompt(
                    "comes beside messages", remedy="Give one of the two: a prompt or messages"
                )
            return self._read_chat(request)
        pictures, clips = parse_media(request.multi_modal_data)
        prompt = request.prompt
        if isinstance(prompt, str):
            ids: list[int] = self._encoder.encode(_checked_text(prompt)).ids
            return prompt, ids, pictures, clips
        if not is_token_ids(prompt):
            if prompt == [] or prompt == ():
                raise EmptyPrompt
            raise BadPrompt(
                f"is a {type(prompt).__name__}",
                remedy="Give a text, a list of token ids, or a dict with `prompt`",
            )
        unknown = [index for index in prompt if not 0 <= index < self._vocab_size]
        if unknown:
            raise BadPrompt(
                f"holds the token id {unknown[0]}",
                where="prompt_token_ids",
                remedy=f"Give ids from 0 to {self._vocab_size - 1}",
            )
        return None, list(prompt), pictures, clips

    def _read_chat(
        self, request: Request
    ) -> tuple[str, list[int], list[Picture | Embeddings], list[Clip]]:
        assert request.messages is not None
        messages = parse_messages(request.messages)
        parts = [part for message in messages for part in message.parts]
        pictures = [part for part in parts if isinstance(part, Picture | Embeddings)]
        clips = [part for part in parts if isinstance(part, Clip)]
        if request.multi_modal_data is not None:
            raise BadPrompt(
                "comes beside messages", where="multi_modal_data", remedy="Put pictures into parts"
            )
        self._check_limits(len(pictures), len(clips))
        prompt, ids = self._render(messages, request)
        return prompt, ids, pictures, clips

    def _render(self, messages: Sequence[Message], request: Request) -> tuple[str, list[int]]:
        """
        The conversation in the model's format, as text and ids.

        User texts pass through the template as marks that no text holds, so that afterwards it is
        known which part of the result somebody typed.
        """
        marks: dict[str, str] = {}
        nonce = secrets.token_hex(8)

        def mark(text: str) -> str:
            name = f"\ue000{nonce}:{len(marks)}\ue001"
            marks[name] = _checked_text(text)
            return name

        try:
            rendered = self._tokenizer.apply_chat_template(
                [_for_template(message, mark) for message in messages],
                tokenize=False,
                chat_template=request.chat_template or self._template,
                add_generation_prompt=request.add_generation_prompt,
                continue_final_message=request.continue_final_message,
                **(request.chat_template_kwargs or {}),
            )
        except TemplateError as error:
            raise BadPrompt(
                "does not fit the chat template",
                where="messages",
                remedy="Look at the order of roles: most models want user and assistant in turn",
            ) from error
        except ValueError as error:
            raise NoChatTemplate from error
        pieces = re.split(f"(\ue000{nonce}:\\d+\ue001)", rendered)
        typed = [marks.get(piece) for piece in pieces]
        text = "".join(
            piece if user is None else user for piece, user in zip(pieces, typed, strict=True)
        )
        if not any(user is not None and self._special.search(user) for user in typed):
            return text, self._encoder.encode(text, add_special_tokens=False).ids
        return text, self._encode_segments(pieces, typed)

    def _encode_segments(self, pieces: Sequence[str], typed: Sequence[str | None]) -> list[int]:
        """
        Ids of a text of which some pieces were typed by a user.

        The template's special tokens cut the text, exactly where a tokenizer would cut it; between
        them all is plain, whoever wrote it.
        """
        ids: list[int] = []
        plain = ""
        for piece, user in zip(pieces, typed, strict=True):
            if user is not None:
                plain += user
                continue
            end = 0
            for match in self._special.finditer(piece):
                ids += self._encode_plain(plain + piece[end : match.start()])
                ids.append(self._encoder.token_to_id(match.group()))
                plain, end = "", match.end()
            plain += piece[end:]
        return ids + self._encode_plain(plain)

    def _encode_plain(self, text: str) -> list[int]:
        ids: list[int] = self._plain_encoder.encode(text, add_special_tokens=False).ids
        return ids

    # --- pictures ----------------------------------------------------------------------------------

    def _check_limits(self, num_pictures: int, num_clips: int) -> None:
        if num_pictures > self._limits["image"]:
            raise TooManyImages(limit=self._limits["image"], given=num_pictures)
        if num_clips > self._limits["video"]:
            raise TooManyVideos(limit=self._limits["video"], given=num_clips)

    def _check_counts(self, ids: Sequence[int], num_pictures: int, num_clips: int) -> None:
        self._check_limits(num_pictures, num_clips)
        family = self._family
        for given, token_id, placeholder, modality in (
            (num_pictures, family.image_token_id, family.image_placeholder, "image"),
            (num_clips, family.video_token_id, family.video_placeholder, "video"),
        ):
            found = ids.count(token_id)
            if found != given:
                raise PlaceholderMismatch(
                    num_items=given,
                    num_placeholders=found,
                    placeholder=placeholder,
                    modality=modality,
                )

    def _request_area(self, request: Request) -> dict[str, int]:
        try:
            return parse_area(request.mm_processor_kwargs)
        except BadConfig as error:
            raise BadPrompt(
                "are not all known",
                where="mm_processor_kwargs",
                remedy="Give min_pixels and max_pixels, whole numbers of 1 or more",
            ) from error

    def _ready_picture(
        self, index: int, picture: Picture | Embeddings, area: Mapping[str, int]
    ) -> _Ready:
        if isinstance(picture, Embeddings):
            return self._ready_embeddings(picture)
        image = read_picture(picture)
        limits = _area(self._area["image"], {**area, **picture.area})
        try:
            visual = self._family.cut_picture(image.image, limits)
        except ImageTooNarrowError as error:
            raise ImageTooNarrow(
                width=image.width_px, height=image.height_px, index=index
            ) from error
        return _Ready(visual, visual.grid, image.width_px, image.height_px, MediaKind.IMAGE)

    def _ready_clip(self, clip: Clip, area: Mapping[str, int]) -> _Ready:
        frames = read_clip(clip)
        limits = _area(self._area["video"], {**area, **clip.area})
        try:
            visual = self._family.cut_clip([image.image for image in frames.images], limits)
        except ImageTooNarrowError as error:
            raise ImageTooNarrow(width=frames.width_px, height=frames.height_px) from error
        return _Ready(
            visual,
            visual.grid,
            frames.width_px,
            frames.height_px,
            MediaKind.VIDEO,
            frames.num_frames,
        )

    def _ready_embeddings(self, given: Embeddings) -> _Ready:
        features = given.features
        if features.is_sparse or features.ndim != 2 or features.shape[0] < 1:
            raise BadEmbeddings(
                f"Image embeddings must be dense, (tokens, hidden), got {tuple(features.shape)}."
            )
        if features.shape[1] != self._family.hidden_size:
            raise BadEmbeddings.wrong_width(
                shape=(1, *features.shape), expected=self._family.hidden_size
            )
        if not features.is_floating_point() or not bool(features.isfinite().all()):
            raise BadEmbeddings("Image embeddings must be finite floating-point numbers.")
        grid = square_grid(len(features)) if given.grid is None else Grid(*given.grid)
        return _Ready(features, grid, 0, 0, MediaKind.EMBEDS)

    def _expand(
        self, ids: Sequence[int], pictures: Sequence[_Ready], clips: Sequence[_Ready]
    ) -> tuple[list[int], list[tuple[int, _Ready]]]:
        """One id a feature instead of one a picture, and where each picture starts."""
        waiting = {
            self._family.image_token_id: iter(pictures),
            self._family.video_token_id: iter(clips),
        }
        expanded: list[int] = []
        media = []
        for token_id in ids:
            if token_id not in waiting:
                expanded.append(token_id)
                continue
            item = next(waiting[token_id])
            media.append((len(expanded), item))
            expanded += [token_id] * item.grid.num_tokens
        return expanded, media

    def _room(self, num_tokens: int, num_media_tokens: int, params: SamplingParams) -> int:
        if num_tokens >= self.max_model_len:
            raise PromptTooLong(
                max_model_len=self.max_model_len,
                num_text_tokens=num_tokens - num_media_tokens,
                num_image_tokens=num_media_tokens,
            )
        left = self.max_model_len - num_tokens
        if params.max_tokens is None:
            return left
        if params.max_tokens > self.max_model_len:
            raise MaxTokensTooLarge(
                max_tokens=params.max_tokens,
                max_model_len=self.max_model_len,
                num_prompt_tokens=num_tokens,
            )
        return min(params.max_tokens, left)


def _checked_text(text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadPrompt(
            "holds half of a surrogate pair", remedy="Give text that can be written as UTF-8"
        ) from error
    return text


def _for_template(message: Message, mark: Any) -> dict[str, Any]:
    if message.is_plain_text:
        (text,) = message.parts
        assert isinstance(text, UserText)
        return {"role": message.role, "content": mark(text.text)}
    content: list[dict[str, str]] = []
    for part in message.parts:
        if isinstance(part, UserText):
            content.append({"type": "text", "text": mark(part.text)})
        else:
            content.append({"type": "video" if isinstance(part, Clip) else "image"})
    return {"role": message.role, "content": content}


def _narrowed(area: AreaLimits, min_pixels: int | None, max_pixels: int | None) -> AreaLimits:
    return AreaLimits(min_pixels or area.min_pixels, max_pixels or area.max_pixels)


def _area(default: AreaLimits, given: Mapping[str, int]) -> AreaLimits:
    """The smaller bound gives way where a request moves only one of the two past the other."""
    smallest = given.get("min_pixels", default.min_pixels)
    largest = given.get("max_pixels", default.max_pixels)
    if smallest > largest:
        if "min_pixels" in given and "max_pixels" in given:
            raise BadPrompt(
                f"is {smallest}, over max_pixels={largest}",
                where="min_pixels",
                remedy="Give a min_pixels of at most max_pixels",
            )
        smallest = largest = given.get("max_pixels", smallest)
    return AreaLimits(smallest, largest)


def _report(media: Sequence[tuple[int, _Ready]]) -> tuple[ImageUsed, ...]:
    counts = {MediaKind.IMAGE: 0, MediaKind.VIDEO: 0}
    report = []
    for _, item in media:
        kind = MediaKind.VIDEO if item.kind == MediaKind.VIDEO else MediaKind.IMAGE
        used = (0, 0)
        if isinstance(item.content, Visual):
            used = (item.grid.columns * 14, item.grid.rows * 14)
        report.append(
            ImageUsed(
                index=counts[kind],
                width=item.width_px,
                height=item.height_px,
                used_width=used[0],
                used_height=used[1],
                num_tokens=item.grid.num_tokens,
                kind=item.kind,
                num_frames=item.num_frames,
            )
        )
        counts[kind] += 1
    return tuple(report)
