"""
A request becomes what the runner reads: token ids with placeholders expanded, positions, patches.

Runs in media threads, one request at a time, and knows no device. Prompts of `chat` are built from
segments: what a user typed is tokenised with special tokens switched off, so `<|image_pad|>` in a
text stays thirteen characters and binds no picture.
"""

import json
import re
import secrets
import sys
import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from jinja2 import TemplateError
from tokenizers import Tokenizer as BackendTokenizer
from torch import Tensor

from engine.cache import Cache
from engine.checkpoint import Checkpoint
from engine.config import FRAMES, EngineConfig, MediaOptions
from engine.errors import (
    BadEmbeddings,
    BadPrompt,
    EmptyPrompt,
    ImageTooNarrow,
    MaxTokensTooLarge,
    MediaRefused,
    NoChatTemplate,
    PlaceholderMismatch,
    PromptTooLong,
    TooManyImages,
    TooManyVideos,
    UnsupportedModality,
)
from engine.families.protocol import (
    AreaLimits,
    Family,
    ImageTooNarrowError,
    Plan,
    Sizing,
    TileLimit,
    Visual,
    resize,
)
from engine.inputs import (
    IN_THREAD,
    Clip,
    Embeddings,
    FramesTaken,
    Message,
    Picture,
    Request,
    UserText,
    fetch,
    find_token_ids,
    is_priority,
    media_options,
    parse_media,
    parse_messages,
    read_clip,
    read_picture,
    refused,
    unfold,
)
from engine.prefixes import Key, build_keys
from engine.request import ImageUsed, MediaKind, SamplingParams
from media.decoded import Fit, Header, RGBImage
from media.decoder import Decoder
from media.errors import TooManyFramesError
from media.frames import DEFAULT_NUM_FRAMES

MARK_START, MARK_END = "\ue000", "\ue001"  # private use: around the name of a text somebody typed
MARK = re.compile(f"({MARK_START}[0-9a-f]+:[0-9]+{MARK_END})")

# A template is a program of the model's author or of the caller: whatever it does wrong is its own.
TEMPLATE_ERRORS = (
    TemplateError,
    TypeError,
    ValueError,
    ArithmeticError,
    LookupError,
    AttributeError,
    RecursionError,
)
MAX_RENDERED_BYTES = 4 << 20  # of conversations whose text and ids are kept, pictures left out
MAX_RENDERED_CHARACTERS = 4096  # that users typed in one that is kept
MAX_FORMS_BYTES = 1 << 20  # of templates whose forms are known
TOKEN_BYTES = 36  # of an id in a list of Python's
PIECE_CHARACTERS = 64 * 1024  # of a long text, read at once to see whether there are too many
TOKENS_OF_A_CUT = 16
MOODY_WORDS = ("strftime_now", "random", "now(")  # of templates that say something else each time
OUR_TEMPLATE_WORDS = (
    "conversation",
    "chat_template",
    "tokenize",
    "add_generation_prompt",
    "continue_final_message",
)


@dataclass(frozen=True, slots=True, eq=False)
class Placed:
    """A picture or clip, cut or given as features, and the places of its features in the prompt."""

    rows: npt.NDArray[np.int64]
    content: Visual | Tensor

    def rows_in(self, begin: int, end: int) -> slice:
        """Which of its features stand in this stretch of the prompt."""
        first, last = np.searchsorted(self.rows, (begin, end))
        return slice(int(first), int(last))


@dataclass(frozen=True, slots=True)
class Prepared:
    """
    A request, ready to run.

    Attributes:
        prompt: its text, as given or as the template wrote it; None where it came as token ids.
        token_ids: with all ids of each picture in the place of its placeholder.
        positions: (num_axes, num_tokens), int64. rope_delta: see `Family.positions`.
        media: the pictures and clips in order.
        both_ways: where pictures begin and end whose tokens see those behind them too, in order: no
            cut may go through one. Empty for families whose tokens look back only.
        prefix_keys: of `engine.prefixes`; empty where prefixes are not kept.
        max_tokens: at most so many output tokens, the context's end considered.
        preprocess_ms: time spent here, on the host.
    """

    prompt: str | None
    token_ids: list[int]
    positions: npt.NDArray[np.int64]
    rope_delta: int
    media: tuple[Placed, ...]
    both_ways: tuple[tuple[int, int], ...]
    prefix_keys: tuple[Key, ...]
    images: tuple[ImageUsed, ...]
    params: SamplingParams
    max_tokens: int
    preprocess_ms: float

    @property
    def num_pixel_bytes(self) -> int:
        """What its pictures and clips hold of the host's memory."""
        return sum(
            placed.content.pixels.numel()
            for placed in self.media
            if isinstance(placed.content, Visual)
        )


@dataclass(frozen=True, slots=True)
class _Ready:
    """
    One picture or clip, cut or given as features, and what to report of it.

    Attributes:
        content: None where the context ends before it does: its prompt will be refused, so nothing
            was cut, however large `min_pixels` made it or however many it has beside it.
        area: the limits it was planned with; None where it has none: features, and models that see
            all pictures at one size.
    """

    content: Visual | Tensor | None
    plan: Plan
    kind: MediaKind
    area: Sizing | None = None
    width_px: int = 0
    height_px: int = 0
    frames: FramesTaken | None = None

    @property
    def num_frames(self) -> int | None:
        return None if self.frames is None else self.frames.num_frames


class _Planning:
    """
    What one picture or clip becomes, known as soon as its size is: of a file, before it is decoded.

    Args:
        plan: the family's, for this picture.
        max_tokens: one that takes as many is never cut: its prompt will be refused.
        index: the picture's in its prompt.
        may_draft: see `EngineConfig.draft_jpegs`.
    """

    header: Header
    plan: Plan

    def __init__(
        self,
        family: Family,
        plan: Callable[[Header], Plan],
        max_tokens: int,
        index: int | None = None,
        *,
        may_draft: bool = False,
    ) -> None:
        self._family = family
        self._may_draft = may_draft
        self._plan = plan
        self._max_tokens = max_tokens
        self._index = index
        self._is_asked = False

    def ask(self, header: Header) -> Fit | None:
        """
        What its decoder asks.

        Raises:
            ImageTooNarrow: the family takes no picture of this form.
        """
        size = header.width_px, header.height_px
        try:
            self.header, self.plan = header, self._plan(header)
        except ImageTooNarrowError as error:
            raise ImageTooNarrow(
                width=size[0], height=size[1], max_ratio=error.max_ratio, index=self._index
            ) from error
        self._is_asked = True
        fit = self._family.fit(self.plan) if self._fits else None
        return fit and replace(fit, may_draft=self._may_draft)

    def see(
        self, images: Sequence[RGBImage], header: Header, *, is_clip: bool = False
    ) -> Visual | None:
        """What was decoded, as the encoder takes it; None where it is too long."""
        if not self._is_asked:  # it was no file
            self.ask(header)
        return self._family.see(images, self.plan, is_clip=is_clip) if self._fits else None

    @property
    def _fits(self) -> bool:
        return self.plan.num_tokens < self._max_tokens


@dataclass(frozen=True, slots=True)
class _Forms:
    """
    In which forms a template reads what somebody said.

    Attributes:
        takes_parts: a list of parts. Others take only text.
        takes_text: text. Others look for parts in it, find none, and leave it out without a word.
    """

    takes_parts: bool
    takes_text: bool


class Processor:
    """
    Args:
        engine: for the limits, areas and template that its caller chose.
        checkpoint: for everything else.
        decoder: of files.
        num_cores: threads that decode and cut at once, however many prepare.
    """

    def __init__(
        self,
        engine: EngineConfig,
        checkpoint: Checkpoint,
        decoder: Decoder = IN_THREAD,
        num_cores: int = 1,
    ) -> None:
        self._decoder = decoder
        self._may_draft = engine.draft_jpegs
        self._keeps_prefixes = engine.enable_prefix_caching
        self._cores = threading.BoundedSemaphore(num_cores)
        self._max_model_len = checkpoint.max_model_len
        self._defaults = checkpoint.defaults
        self._eos_token_ids = checkpoint.eos_token_ids
        self._limits = engine.limits
        self._family = checkpoint.family
        self._tokenizer = checkpoint.tokenizer
        self._vocab_size: int = checkpoint.family.text_config.vocab_size
        self._template = engine.chat_template
        self._image_area = resize(self._family.image_area, engine.media.image)
        self._video_area: Sizing | None = None
        if "video" in self._family.modalities:  # min_pixels of no kind is for pictures too
            self._video_area = resize(self._family.video_area, engine.media.video)
        self._clip_area = engine.media.video
        self._sampling = engine.media.sampling
        # Copies of the tokenizer's core: transformers' own calls change its state, threads share it.
        core = checkpoint.tokenizer.backend_tokenizer.to_str()
        self._encoder = BackendTokenizer.from_str(core)
        # Without any added token, special or not: their strings are words here.
        self._plain_encoder = BackendTokenizer.from_str(
            json.dumps({**json.loads(core), "added_tokens": []})
        )
        for encoder in (self._encoder, self._plain_encoder):
            encoder.no_truncation()
            encoder.no_padding()
        started = self._encoder.encode("").ids[:1]
        self._first_ids = [i for i in started if i == checkpoint.tokenizer.bos_token_id]
        self._special_ids: dict[str, int] = {
            token.content: token_id
            for token_id, token in checkpoint.tokenizer.added_tokens_decoder.items()
        }
        added = list(checkpoint.tokenizer.added_tokens_decoder.values())
        self._eats_behind = {token.content for token in added if token.rstrip}
        self._eats_before = {token.content for token in added if token.lstrip}
        longest_first = sorted(self._special_ids, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self._forms: Cache[str, _Forms] = Cache(MAX_FORMS_BYTES)  # by template
        self._rendered: Cache[Hashable, tuple[str, list[int]]] = Cache(MAX_RENDERED_BYTES)
        self._kept_lock = threading.Lock()  # of these two

    def prepare(self, request: Request) -> Prepared:
        """
        Check, tokenise, decode and cut one request.

        Raises:
            RequestError: anything that is the client's fault; nothing else is affected.
        """
        started = time.perf_counter()
        request = unfold(request)
        _check_priority(request.priority)
        params = self._params(request)
        prompt, ids, pictures, clips = self._read(request)
        if not ids:
            raise EmptyPrompt
        if request.messages is None:  # of a conversation they were checked before it was rendered
            self._check_limits(len(pictures), len(clips), self._family.modalities)
        self._check_counts(ids, len(pictures), len(clips))
        num_text_tokens = len(ids) - len(pictures) - len(clips)
        if num_text_tokens > self._max_model_len:  # whatever the pictures are
            raise PromptTooLong(max_model_len=self._max_model_len, num_text_tokens=num_text_tokens)
        options = media_options(request)
        sizing = resize(self._image_area, options.image)  # checked also where there is no picture
        left = self._max_model_len - num_text_tokens  # tokens, once the media so far are counted
        ready = []
        for index, picture in enumerate(pictures):
            with _naming("image", index, len(pictures)):
                ready.append(self._ready_picture(index, picture, len(pictures), sizing, left))
            left -= ready[-1].plan.num_tokens
        ready_clips = []
        for index, clip in enumerate(clips):
            with _naming("video", index, len(clips)):
                ready_clips.append(self._ready_clip(clip, options, left))
            left -= ready_clips[-1].plan.num_tokens
        max_tokens = self._room(num_text_tokens, [*ready, *ready_clips], params)
        token_ids, media = self._expand(ids, ready, ready_clips)
        positions, delta = self._family.positions(
            len(token_ids), [(start, item.plan) for start, item in media]
        )
        placed = tuple(
            Placed(item.plan.rows_from(start), item.content)
            for start, item in media
            if item.content is not None
        )
        both_ways: list[tuple[int, int]] = []
        if self._family.sees_both_ways:
            both_ways = [(int(one.rows[0]), int(one.rows[-1]) + 1) for one in placed]
        return Prepared(
            prompt,
            token_ids,
            positions,
            delta,
            placed,
            tuple(both_ways),
            self._prefix_keys(token_ids, positions, placed, both_ways),
            _report([item for _, item in media]),
            params,
            max_tokens,
            (time.perf_counter() - started) * 1000,
        )

    def _prefix_keys(
        self,
        token_ids: list[int],
        positions: npt.NDArray[np.int64],
        media: Sequence[Placed],
        both_ways: Sequence[tuple[int, int]],
    ) -> tuple[Key, ...]:
        if not self._keeps_prefixes:
            return ()
        contents = [
            (one.rows, one.content.key if isinstance(one.content, Visual) else None)
            for one in media
        ]
        return build_keys(token_ids, positions, contents, both_ways)

    def _params(self, request: Request) -> SamplingParams:
        params = self._defaults if request.params is None else request.params
        if not isinstance(params, SamplingParams):
            raise BadPrompt(
                f"is a {type(params).__name__}",
                where="sampling_params",
                remedy="Give SamplingParams(...)",
            )
        params.check_vocab(self._vocab_size)
        params.check_allowed(self._eos_token_ids)
        return params

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
            self._refuse_endless([prompt])
            text = self._family.read_prompt(_checked_text(prompt))
            ids: list[int] = self._encoder.encode(text).ids
            return prompt, ids, pictures, clips
        token_ids = find_token_ids(prompt)
        if token_ids is None:
            raise BadPrompt(
                f"is a {type(prompt).__name__}",
                remedy="Give a text, a list of token ids, or a dict with `prompt`",
            )
        unknown = [index for index in token_ids if not 0 <= index < self._vocab_size]
        if unknown:
            raise BadPrompt(
                f"holds the token id {unknown[0]}",
                where="prompt_token_ids",
                remedy=f"Give ids from 0 to {self._vocab_size - 1}",
            )
        return None, token_ids, pictures, clips

    def _read_chat(
        self, request: Request
    ) -> tuple[str, list[int], list[Picture | Embeddings], list[Clip]]:
        assert request.messages is not None
        messages = parse_messages(request.messages)
        parts = [part for message in messages for part in message.parts]
        self._refuse_endless([part.text for part in parts if isinstance(part, UserText)])
        pictures, clips = _split(messages)
        if request.multi_modal_data is not None:
            raise BadPrompt(
                "comes beside messages", where="multi_modal_data", remedy="Put pictures into parts"
            )
        known = self._family.modalities
        shows_frames = known == ("image",)
        self._check_limits(len(pictures), len(clips), (*known, "video") if shows_frames else known)
        if clips and shows_frames:
            messages = self._show_frames(messages, len(clips), media_options(request))
            pictures, clips = _split(messages)
        prompt, ids = self._render(messages, request)
        return prompt, ids, pictures, clips

    def _show_frames(
        self, messages: Sequence[Message], num_clips: int, options: MediaOptions
    ) -> list[Message]:
        """Each clip as the pictures of its frames, for a model that sees nothing else."""
        index = 0
        shown = []
        for message in messages:
            parts: list[UserText | Picture | Clip | Embeddings] = []
            for part in message.parts:
                if not isinstance(part, Clip):
                    parts.append(part)
                    continue
                with _naming("video", index, num_clips):
                    parts += self._read_frames(part, options)
                index += 1
            shown.append(replace(message, parts=tuple(parts)))
        return shown

    def _read_frames(self, clip: Clip, options: MediaOptions) -> list[Picture]:
        sampling = self._sample(clip, options)
        source = fetch(clip.source)
        with self._cores:
            frames = read_clip(source, clip.sampling, sampling, self._decoder)
        self._check_num_frames(frames.num_frames)
        area = {**self._clip_area, **options.video, **clip.area}
        taken = FramesTaken.of(frames)
        return [
            Picture(
                image,
                area,
                taken=replace(
                    taken,
                    num_frames=1,
                    times_s=taken.times_s and taken.times_s[place : place + 1],
                    indices=taken.indices and taken.indices[place : place + 1],
                ),
            )
            for place, image in enumerate(frames.images)
        ]

    def _render(self, messages: Sequence[Message], request: Request) -> tuple[str, list[int]]:
        """
        The conversation in the model's format, as text and ids.

        Of many pictures most are asked the same: what was rendered last is kept, since a template is
        a program, and the time that it takes is time in which Python launches nothing.
        """
        chosen = request.chat_template or self._template
        if chosen is None and any(isinstance(p, Clip) for m in messages for p in m.parts):
            chosen = self._family.clip_template
        try:
            template = self._tokenizer.get_chat_template(chosen)
        except ValueError as error:
            raise NoChatTemplate from error
        words = _checked_template_words(request.chat_template_kwargs)
        key = _rendering_key(messages, request, template, words)
        if key is None:
            return self._render_anew(messages, request, template, words)
        with self._kept_lock:
            found = self._rendered.find(key)
        if found is not None:
            return found
        text, ids = self._render_anew(messages, request, template, words)
        num_bytes = _count_bytes((key, text)) + TOKEN_BYTES * len(ids)
        with self._kept_lock:
            self._rendered.put(key, (text, ids), num_bytes)
        return text, ids

    def _render_anew(
        self,
        messages: Sequence[Message],
        request: Request,
        template: str,
        words: Mapping[str, Any],
    ) -> tuple[str, list[int]]:
        """
        User texts pass through the template as marks that no text holds, so that afterwards it is
        known which part of the result somebody typed.
        """
        marks: dict[str, str] = {}
        nonce = secrets.token_hex(8)

        def mark(text: str) -> str:
            # The space around a text is left to the template: some trim it.
            core = _checked_text(text).strip()
            if not core:
                return text
            name = f"{MARK_START}{nonce}:{len(marks)}{MARK_END}"
            marks[name] = core
            before, _, after = text.partition(core)
            return before + name + after

        forms = self._find_forms(template)
        marked = [self._for_template(message, mark, forms) for message in messages]
        try:
            rendered = self._tokenizer.apply_chat_template(
                marked,
                tokenize=False,
                chat_template=template,
                add_generation_prompt=request.add_generation_prompt,
                continue_final_message=request.continue_final_message,
                **words,
            )
        except TEMPLATE_ERRORS as error:
            if request.continue_final_message and isinstance(error, ValueError):
                raise BadPrompt(
                    "is not possible here",
                    where="continue_final_message",
                    remedy="End with a text of the assistant, and set add_generation_prompt=False",
                ) from error
            raise BadPrompt(
                "do not fit the chat template",
                where="messages",
                remedy="Look at the order of roles: most models want user and assistant in turn",
            ) from error
        pieces = MARK.split(rendered)
        typed = [marks.get(piece) for piece in pieces]
        pieces = [
            piece if user is not None else self._family.read_text(piece)
            for piece, user in zip(pieces, typed, strict=True)
        ]
        start = self._family.chat_start
        if not pieces[0].startswith(start):
            pieces[0] = start + pieces[0]
        text, own_specials = "", []
        for piece, user in zip(pieces, typed, strict=True):
            if user is None:
                own_specials += [
                    (len(text) + m.start(), m[0]) for m in self._special.finditer(piece)
                ]
            text += piece if user is None else user
        if own_specials == [(m.start(), m[0]) for m in self._special.finditer(text)]:
            ids: list[int] = self._encoder.encode(text, add_special_tokens=False).ids
        else:
            ids = self._encode_segments(pieces, typed)
        # Most templates write the token that begins a text; some leave it to the tokenizer.
        return text, ids if ids[:1] == self._first_ids else [*self._first_ids, *ids]

    def _find_forms(self, template: str) -> _Forms:
        """What a template reads, by what comes out of it: no form is promised anywhere."""
        with self._kept_lock:
            found = self._forms.find(template)
        if found is not None:
            return found
        probe = f"{MARK_START}{MARK_END}"  # in a list shown as text it would be escaped
        parts = [{"type": "text", "text": probe}]
        takes_parts, takes_text = (
            probe in self._try_rendering(template, content) for content in (parts, probe)
        )
        forms = _Forms(takes_parts, takes_text)
        with self._kept_lock:
            self._forms.put(template, forms, _count_bytes(template))
        return forms

    def _try_rendering(self, template: str, content: object) -> str:
        messages = [{"role": "user", "content": content}]
        try:
            rendered: str = self._tokenizer.apply_chat_template(
                messages, tokenize=False, chat_template=template
            )
        except TEMPLATE_ERRORS:
            return ""
        return rendered

    def _for_template(
        self, message: Message, mark: Callable[[str], str], forms: _Forms
    ) -> dict[str, Any]:
        """A message as templates read it, its texts behind marks."""
        texts = [mark(part.text) for part in message.parts if isinstance(part, UserText)]
        if message.is_plain_text and (forms.takes_text or not forms.takes_parts):
            return {"role": message.role, "content": texts[0]}
        if not forms.takes_parts:  # as vLLM does: what was seen first, then what was said of it
            slots = [self._slot(part) for part in message.parts if not isinstance(part, UserText)]
            return {"role": message.role, "content": "\n".join(slots + texts)}
        following = iter(texts)
        content = [
            {"type": "text", "text": next(following)}
            if isinstance(part, UserText)
            else {"type": "video" if isinstance(part, Clip) else "image"}
            for part in message.parts
        ]
        return {"role": message.role, "content": content}

    def _slot(self, part: Picture | Embeddings | Clip) -> str:
        return self._family.video_slot if isinstance(part, Clip) else self._family.image_slot

    def _encode_segments(self, pieces: Sequence[str], typed: Sequence[str | None]) -> list[int]:
        """
        Ids of a text of which some pieces were typed by a user.

        The template's special tokens cut the text, exactly where a tokenizer would cut it; between
        them all is plain, whoever wrote it.
        """
        ids: list[int] = []
        plain, before = "", ""
        for piece, user in zip(pieces, typed, strict=True):
            if user is not None:
                plain += user
                continue
            end = 0
            for match in self._special.finditer(piece):
                plain += piece[end : match.start()]
                ids += self._encode_plain(self._without_eaten(before, plain, match[0]))
                ids.append(self._special_ids[match[0]])
                plain, before, end = "", match[0], match.end()
            plain += piece[end:]
        return ids + self._encode_plain(self._without_eaten(before, plain, ""))

    def _without_eaten(self, before: str, plain: str, after: str) -> str:
        """A text between two special tokens, less the space that these take along."""
        plain = plain.lstrip() if before in self._eats_behind else plain
        return plain.rstrip() if after in self._eats_before else plain

    def _refuse_endless(self, texts: Sequence[str]) -> None:
        """
        Raise where texts have more tokens than the context long before their end.

        All tokens of 10 MB took half a minute and 2 GB (tokenizers 0.23, 2026). A piece at a time, they
        are counted no further than the context. A cut makes tokens, so some are taken off for each.
        """
        if sum(map(len, texts)) <= PIECE_CHARACTERS:
            return
        num_tokens = 0
        for text in texts:
            for start in range(0, len(text), PIECE_CHARACTERS):
                piece = _checked_text(text[start : start + PIECE_CHARACTERS])
                num_tokens += max(0, len(self._encode_plain(piece)) - TOKENS_OF_A_CUT)
                if num_tokens > self._max_model_len:
                    raise PromptTooLong(
                        max_model_len=self._max_model_len,
                        num_text_tokens=num_tokens,
                        is_at_least=True,
                    )

    def count_tokens(self, text: str) -> int:
        """How many tokens a text of a user's is, by itself; what is no text counts as some."""
        return len(self._encode_plain(text.encode("utf-8", "replace").decode()))

    def _encode_plain(self, text: str) -> list[int]:
        ids: list[int] = self._plain_encoder.encode(text, add_special_tokens=False).ids
        return ids

    # --- pictures ----------------------------------------------------------------------------------

    def _check_limits(self, num_pictures: int, num_clips: int, known: Sequence[str]) -> None:
        for modality, number in (("image", num_pictures), ("video", num_clips)):
            if number and modality not in known:
                raise UnsupportedModality(modality, known)
        if num_pictures > self._limits["image"]:
            raise TooManyImages(limit=self._limits["image"], given=num_pictures)
        if num_clips > self._limits["video"]:
            raise TooManyVideos(limit=self._limits["video"], given=num_clips)

    def _check_counts(self, ids: Sequence[int], num_pictures: int, num_clips: int) -> None:
        family = self._family
        image_placeholder = family.image_written or family.image_placeholder
        for given, token_id, placeholder, modality in (
            (num_pictures, family.image_token_id, image_placeholder, "image"),
            (num_clips, family.video_token_id, family.video_placeholder, "video"),
        ):
            found = 0 if token_id is None else ids.count(token_id)
            if found != given:
                assert placeholder is not None, "what has no placeholder was refused above"
                raise PlaceholderMismatch(
                    num_items=given,
                    num_placeholders=found,
                    placeholder=placeholder,
                    modality=modality,
                )

    def _ready_picture(
        self,
        index: int,
        picture: Picture | Embeddings,
        number: int,
        limits: Sizing | None,
        left: int,
    ) -> _Ready:
        if isinstance(picture, Embeddings):
            return self._ready_embeddings(picture)
        if picture.is_low and limits is not None:
            limits = limits.smallest
        limits = resize(limits, picture.area)

        def plan(header: Header) -> Plan:
            return self._family.plan_one_of(number, header.width_px, header.height_px, limits)

        planning = _Planning(self._family, plan, left, index, may_draft=self._may_draft)
        source = fetch(picture.source)
        with self._cores:
            image = read_picture(source, self._decoder, planning.ask)
            visual = planning.see([image], image.header)
        header = planning.header
        size = header.width_px, header.height_px
        return _Ready(visual, planning.plan, MediaKind.IMAGE, limits, *size, picture.taken)

    def _ready_clip(self, clip: Clip, options: MediaOptions, left: int) -> _Ready:
        limits = resize(resize(self._video_area, options.video), clip.area)

        def plan(header: Header) -> Plan:
            self._check_num_frames(header.num_frames)
            return self._family.plan_clip(
                header.width_px,
                header.height_px,
                header.num_frames,
                header.times_s,
                header.frame_s,
                header.duration_s,
                limits,
            )

        planning = _Planning(self._family, plan, left)
        sampling = self._sample(clip, options)
        source = fetch(clip.source)
        with self._cores:
            frames = read_clip(source, clip.sampling, sampling, self._decoder, planning.ask)
            visual = planning.see(frames.images, frames.header, is_clip=True)
        taken = FramesTaken.of(frames)
        size = planning.header.width_px, planning.header.height_px
        return _Ready(visual, planning.plan, MediaKind.VIDEO, limits, *size, taken)

    def _sample(self, clip: Clip, options: MediaOptions) -> dict[str, Any]:
        """How a clip is sampled where its part does not say."""
        sampling = {**self._sampling, **options.sampling}
        most = self._limits.get(FRAMES)
        is_asked = not {"num_frames", "fps"}.isdisjoint((*sampling, *clip.sampling))
        if most is not None and not is_asked:  # what nobody asked for gives way
            sampling["num_frames"] = min(DEFAULT_NUM_FRAMES, most)
        return sampling

    def _check_num_frames(self, num_frames: int) -> None:
        most = self._limits.get(FRAMES, num_frames)
        if num_frames > most:
            raise refused(TooManyFramesError(limit=most, given=num_frames))

    def _ready_embeddings(self, given: Embeddings) -> _Ready:
        features = given.features
        if features.is_sparse or features.ndim != 2 or features.shape[0] < 1:
            raise BadEmbeddings(
                f"Image embeddings must be dense, (tokens, hidden), got {tuple(features.shape)}."
            )
        if features.shape[1] != self._family.feature_size:
            raise BadEmbeddings.wrong_width(
                shape=(1, *features.shape), expected=self._family.feature_size
            )
        if not features.is_floating_point() or not bool(features.isfinite().all()):
            raise BadEmbeddings("Image embeddings must be finite floating-point numbers.")
        plan = self._family.plan_embeddings(len(features), given.grid)
        return _Ready(features, plan, MediaKind.EMBEDS)

    def _expand(
        self, ids: Sequence[int], pictures: Sequence[_Ready], clips: Sequence[_Ready]
    ) -> tuple[list[int], list[tuple[int, _Ready]]]:
        """All ids of a picture instead of one, and where each picture starts."""
        waiting: dict[int | None, Iterator[_Ready]] = {
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
            expanded += item.plan.token_ids()
        return expanded, media

    def _room(self, num_text_tokens: int, media: Sequence[_Ready], params: SamplingParams) -> int:
        num_media_tokens = sum(item.plan.num_tokens for item in media)
        num_tokens = num_text_tokens + num_media_tokens
        left = self._max_model_len - num_tokens
        if left < 1:
            raise PromptTooLong(
                max_model_len=self._max_model_len,
                num_text_tokens=num_text_tokens,
                num_image_tokens=num_media_tokens,
                max_pixels=self._find_max_pixels(media, self._max_model_len - 1 - num_text_tokens),
                num_crops=self._find_num_crops(media, self._max_model_len - 1 - num_text_tokens),
                has_frames=any(item.frames is not None for item in media),
            )
        if params.max_tokens is None:
            return left
        if params.max_tokens > self._max_model_len:
            raise MaxTokensTooLarge(
                max_tokens=params.max_tokens,
                max_model_len=self._max_model_len,
                num_prompt_tokens=num_tokens,
            )
        return min(params.max_tokens, left)

    def _find_max_pixels(self, media: Sequence[_Ready], max_tokens: int) -> int | None:
        """The largest `max_pixels` with which all media would fit; None where none would do."""

        pixels_a_token = self._family.pixels_a_token

        def num_tokens(tokens_each: int) -> int:
            most = tokens_each * pixels_a_token
            return sum(self._plan_within(item, most).num_tokens for item in media)

        if not pixels_a_token:
            return None
        tokens_each = bisect_right(range(1, max_tokens + 1), max_tokens, key=num_tokens)
        return tokens_each * pixels_a_token or None

    def _find_num_crops(self, media: Sequence[_Ready], max_tokens: int) -> int | None:
        """The largest `num_crops` with which all pictures would fit; None where none would do."""

        def num_tokens(num_crops: int) -> int:
            plans = (
                self._family.plan_picture(
                    item.width_px, item.height_px, TileLimit(min(item.area.num_crops, num_crops))
                )
                if isinstance(item.area, TileLimit)
                else item.plan
                for item in media
            )
            return sum(plan.num_tokens for plan in plans)

        most = [item.area.num_crops for item in media if isinstance(item.area, TileLimit)]
        return bisect_right(range(1, max(most, default=0)), max_tokens, key=num_tokens) or None

    def _plan_within(self, item: _Ready, max_pixels: int) -> Plan:
        """The plan of a picture or clip if it were no larger; its own where it has no size."""
        if not isinstance(item.area, AreaLimits):
            return item.plan
        size = item.width_px, item.height_px
        area = AreaLimits(min(item.area.min_pixels, max_pixels), max_pixels)
        if item.frames is None or item.kind == MediaKind.IMAGE:
            return self._family.plan_picture(*size, area)
        taken = item.frames
        return self._family.plan_clip(
            *size, taken.num_frames, taken.times_s, taken.frame_s, taken.duration_s, area
        )


@contextmanager
def _naming(modality: str, index: int, count: int) -> Iterator[None]:
    """Say in the error of one picture or clip which one it is, where there are several."""
    place = f" It is {modality} {index} of this prompt (counted from 0)." if count > 1 else ""
    try:
        yield
    except MediaRefused as error:
        raise MediaRefused(
            f"{error}{place}", code=error.code, retryable=error.retryable, param=modality
        ) from error
    except BadPrompt as error:
        raise BadPrompt.worded(f"{error}{place}", where=error.param or modality) from error


def _split(messages: Sequence[Message]) -> tuple[list[Picture | Embeddings], list[Clip]]:
    """The pictures of a conversation, and its clips."""
    parts = [part for message in messages for part in message.parts]
    return (
        [part for part in parts if isinstance(part, Picture | Embeddings)],
        [part for part in parts if isinstance(part, Clip)],
    )


def _check_priority(priority: object) -> None:
    """Here, since requests of other callers are compared with it: it must not fail in their queue."""
    if not is_priority(priority):
        raise BadPrompt(
            f"is a {type(priority).__name__}",
            where="priority",
            remedy="Give a whole number, lower runs first",
        )


def _checked_template_words(given: object) -> Mapping[str, Any]:
    if given is None:
        return {}
    where = "chat_template_kwargs"
    if not isinstance(given, Mapping) or not all(isinstance(word, str) for word in given):
        raise BadPrompt("is no dict of words", where=where, remedy="Give names and their values")
    for word in OUR_TEMPLATE_WORDS:
        if word in given:
            raise BadPrompt(
                f"has the word {word!r}", where=where, remedy="Give it as an argument, if it is one"
            )
    return given


def _rendering_key(
    messages: Sequence[Message], request: Request, template: str, words: Mapping[str, Any]
) -> Hashable | None:
    """Equal where the same is rendered; None where that may change from one time to the next."""
    if (
        any(word in template for word in MOODY_WORDS)
        or sum(len(part.text) for m in messages for part in m.parts if isinstance(part, UserText))
        > MAX_RENDERED_CHARACTERS
    ):
        return None
    turns = tuple(
        (
            message.role,
            message.is_plain_text,
            tuple(
                part.text if isinstance(part, UserText) else isinstance(part, Clip)
                for part in message.parts
            ),
        )
        for message in messages
    )
    given = tuple(words.items())
    if not all(isinstance(value, str | int | float | None) for value in words.values()):
        return None
    types = tuple(type(value) for value in words.values())  # True is not 1 to a template
    asked = (request.add_generation_prompt, request.continue_final_message)
    return template, asked, given, types, turns


def _count_bytes(value: object) -> int:
    """What texts and numbers take, in tuples in tuples."""
    inner = sum(map(_count_bytes, value)) if isinstance(value, tuple) else 0
    return sys.getsizeof(value) + inner


def _checked_text(text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadPrompt(
            "holds half of a surrogate pair", remedy="Give text that can be written as UTF-8"
        ) from error
    return text


def _report(media: Sequence[_Ready]) -> tuple[ImageUsed, ...]:
    counts = {MediaKind.IMAGE: 0, MediaKind.VIDEO: 0}
    report = []
    for item in media:
        counted_as = MediaKind.VIDEO if item.kind == MediaKind.VIDEO else MediaKind.IMAGE
        report.append(
            ImageUsed(
                index=counts[counted_as],
                width=item.width_px,
                height=item.height_px,
                used_width=item.plan.width_px,
                used_height=item.plan.height_px,
                num_tokens=item.plan.num_tokens,
                kind=item.kind,
                num_frames=item.num_frames,
                times_s=item.frames.times_s if item.frames else None,
                frame_indices=item.frames.indices if item.frames else None,
                num_frames_dropped=item.frames.num_dropped if item.frames else None,
            )
        )
        counts[counted_as] += 1
    return tuple(report)
