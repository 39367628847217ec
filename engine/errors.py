# ruff: noqa: N818 - a name that says what is wrong (TooManyImages) needs no "Error" behind it
"""
Why a prompt got no text: one small tree, each class with a stable word as its `code`.

Every class answers two questions: whose fault is it, and does trying again help? The texts go to
clients as they are. Where vLLM has a text for the case, its first sentence stands first, word for
word, so that searches and tests for it still hit; then comes ours: what was given, and what to do.

No text holds a path, a host, a header, a memory address or the words of a decoder: a class takes
numbers and names, not free text, wherever that is possible.
"""

import inspect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from engine.request import Result

MAX_QUOTE_CHARS = 80  # of a client's own words in an error text


class Fault(StrEnum):
    """Who can put it right."""

    CLIENT = "client"
    OPERATOR = "operator"
    ENGINE = "engine"


class EngineError(Exception):
    """The engine could not do what was asked."""

    code: str = "engine_error"
    fault: Fault = Fault.ENGINE
    retryable: bool = False
    param: str | None = None
    """The request's field that is to blame, as OpenAI's error envelope names it."""

    def __init__(self, message: str | None = None) -> None:
        super().__init__(message or inspect.cleandoc(self.__doc__ or self.code))

    def __reduce__(self) -> tuple[Any, ...]:
        # Exceptions are pickled as "class and args"; most of ours take other arguments than the
        # message, and would fail on the way out of a worker process without this.
        return _rebuild, (type(self), self.args, self.__dict__)


def _rebuild(
    kind: type[EngineError], args: tuple[Any, ...], attributes: dict[str, Any]
) -> EngineError:
    error = kind.__new__(kind, *args)
    error.__dict__.update(attributes)
    return error


@dataclass(frozen=True, slots=True)
class ResultError:
    """
    Why a result holds no text; what is left of an `EngineError` once it has been caught.

    Args:
        code: a stable word, e.g. `too_many_images`.
        message: for people; safe to show to the client.
        retryable: whether the same request may succeed later.
        param: the field that is to blame, where one is.
    """

    code: str
    message: str
    retryable: bool
    param: str | None = None


def to_result_error(error: EngineError) -> ResultError:
    return ResultError(error.code, str(error), error.retryable, error.param)


class EngineFailure(EngineError):
    """The engine failed while it worked on this prompt. The prompt is not to blame: try again."""

    code = "engine_failure"
    retryable = True


class EngineClosed(EngineError):
    """The engine was closed before this prompt was answered. Start another one and ask again."""

    code = "engine_closed"
    fault = Fault.OPERATOR
    retryable = True


class BadConfig(EngineError, ValueError):
    """A setting of the engine makes no sense here. Correct it and start again."""

    code = "bad_config"
    fault = Fault.OPERATOR


class DecodersAway(BadConfig):
    """Decoder processes do not start. Look into the log, or decode in threads, which need none."""

    code = "decoders_away"
    retryable = True  # the machine may lack something just now


class PromptFailedError(EngineError):
    """
    A prompt failed, and the caller asked to hear of it as an exception.

    Code, retryable and param are those of the first prompt that failed.

    Args:
        results: of all prompts, in their order; one or more hold an error.

    Attributes:
        result: of the first prompt that failed.
    """

    code = "prompt_failed"

    def __init__(self, results: "Sequence[Result]") -> None:
        self.results = tuple(results)
        self.result = next(result for result in self.results if result.error is not None)
        error = self.result.error
        assert error is not None
        self.code, self.retryable, self.param = error.code, error.retryable, error.param
        super().__init__(error.message)

    @classmethod
    def of(cls, results: "Sequence[Result]") -> "PromptFailedError":
        """A ValueError where it is the client who has to change something."""
        failed = cls(results)
        return failed if failed.retryable else PromptRefusedError(results)


class PromptRefusedError(PromptFailedError, ValueError):
    """A prompt failed by its own fault. Arguments as for `PromptFailedError`."""

    code = "prompt_refused"
    fault = Fault.CLIENT


class RequestError(EngineError, ValueError):
    """The request cannot be served as it is. Correct it and send it again."""

    code = "bad_request"
    fault = Fault.CLIENT


# How many


class TooManyImages(RequestError):
    """
    A prompt has more images than the limit.

    Args:
        limit: images allowed in one prompt; 0 means that images are switched off.
        given: images in this prompt.
        is_model_limit: the limit is the model's own, so raising the setting would not help.
    """

    code = "too_many_images"
    param = "image"
    modality = "image"
    job_remedy = ", or image_policy=truncate, sample or split in a job"

    def __init__(self, *, limit: int, given: int, is_model_limit: bool = False) -> None:
        self.limit = limit
        self.given = given
        super().__init__(
            f"At most {limit} {self.modality}(s) may be provided in one prompt. Set "
            "`--limit-mm-per-prompt` to increase this limit. " + self._advice(is_model_limit)
        )

    def _advice(self, is_model_limit: bool) -> str:
        raised = (
            f"use {self.modality}={self.given}, or "
            f'limit_mm_per_prompt={{"{self.modality}": {self.given}}} in Python'
        )
        if is_model_limit:
            return (
                f"This prompt has {self.given}, and the model itself takes no more than "
                f"{self.limit}: send fewer{self.job_remedy}."
            )
        if self.limit == 0:
            return (
                f"This prompt has {self.given}, and {self.modality} input is switched off here "
                f"({self.modality}=0); to switch it on, {raised}."
            )
        return f"This prompt has {self.given}; {raised}{self.job_remedy}."


class TooManyVideos(TooManyImages):
    """A prompt has more videos than the limit. Arguments as for `TooManyImages`."""

    code = "too_many_videos"
    param = "video"
    modality = "video"
    job_remedy = ""


# How long


class EmptyPrompt(RequestError):
    """The decoder prompt cannot be empty. Give at least one token of text, or one image."""

    code = "empty_prompt"
    param = "prompt"


class PromptTooLong(RequestError):
    """
    Text and images together leave no room in the context for a single output token.

    Args:
        max_model_len: the context's length, in tokens.
        num_text_tokens: tokens of the prompt that are text.
        num_image_tokens: tokens that its images and video frames expand to.
        max_pixels: the largest `max_pixels`, in pixels an image, with which the same images would
            fit; None where there are no images, or no size would do.
        num_crops: the same for a model that cuts images into tiles.
        has_frames: whether some of them are frames of a clip.
        is_at_least: the text was read no further than to `num_text_tokens`.
    """

    code = "prompt_too_long"

    def __init__(
        self,
        *,
        max_model_len: int,
        num_text_tokens: int,
        num_image_tokens: int = 0,
        max_pixels: int | None = None,
        num_crops: int | None = None,
        has_frames: bool = False,
        is_at_least: bool = False,
    ) -> None:
        self.max_model_len = max_model_len
        self.is_at_least = is_at_least
        self.num_text_tokens = num_text_tokens
        self.num_image_tokens = num_image_tokens
        self.max_pixels = max_pixels
        self.num_crops = num_crops
        if num_text_tokens > max_model_len:
            self.param = "input_tokens"
        fewer = " Of a clip, num_frames says how many frames are looked at." if has_frames else ""
        super().__init__(f"{self._verdict()} {self._advice()}{fewer}")

    def _verdict(self) -> str:
        limit = self.max_model_len
        length = self.num_text_tokens + self.num_image_tokens
        at_least = "at least " if self.is_at_least else ""
        if self.num_text_tokens > limit:
            return (
                f"This model's maximum context length is {limit} tokens. However, your prompt "
                f"contains {at_least}{self.num_text_tokens} input tokens, which exceeds this limit even "
                "without any output tokens. Please reduce the length of the input prompt."
            )
        if length > limit:
            return (
                f"The decoder prompt (length {length}) is longer than the maximum model length of "
                f"{limit}. Make sure that `max_model_len` is no smaller than the number of text "
                "tokens plus multimodal tokens. For image inputs, the number of image tokens "
                "depends on the number of images, and possibly their aspect ratios as well."
            )
        return (
            f"The decoder prompt (length {length}) plus the number of requested output tokens (at "
            f"least 1) is longer than the maximum model length of {limit}. Make sure that "
            "`max_model_len` is no smaller than the number of text tokens (prompt + requested "
            "output tokens)."
        )

    def _advice(self) -> str:
        counts = (
            f"This prompt has {self.num_text_tokens} text tokens and "
            f"{self.num_image_tokens} image tokens"
        )
        longest = self.max_model_len - 1  # one output token must fit behind the prompt
        room = longest - self.num_text_tokens
        if not self.num_image_tokens or room <= 0:
            return f"{counts}; at most {longest} would fit: shorten the text."
        would_fit = f"{counts}; beside this text at most {room} image tokens would fit"
        for word, most in (("max_pixels", self.max_pixels), ("num_crops", self.num_crops)):
            if most is not None:
                return f"{would_fit}: use {word}={most} or less, or fewer images."
        return f"{would_fit}, and no size makes these images so few: send fewer, or less text."


class MaxTokensTooLarge(RequestError):
    """
    More output tokens are asked for than the context can ever hold.

    Args:
        max_tokens: as given, in tokens.
        max_model_len: the context's length, in tokens.
        num_prompt_tokens: text and image tokens of the prompt.
    """

    code = "max_tokens_too_large"
    param = "max_tokens"

    def __init__(self, *, max_tokens: int, max_model_len: int, num_prompt_tokens: int) -> None:
        room = max(0, max_model_len - num_prompt_tokens)
        super().__init__(
            f"max_tokens={max_tokens} cannot be greater than max_model_len={max_model_len}. "
            f"Please request fewer output tokens. The prompt has {num_prompt_tokens} tokens, so at "
            f"most {room} would fit; max_tokens=None means: what is left."
        )


# What stands in the prompt


class BadPrompt(RequestError):
    """
    A prompt or message has the wrong type, keys or values.

    Args:
        problem: what is wrong, e.g. "is a float".
        where: the place, e.g. "prompts[3]"; it opens the sentence.
        remedy: what to give instead, as a sentence without its full stop.
    """

    code = "bad_prompt"

    def __init__(self, problem: str, *, where: str = "prompt", remedy: str) -> None:
        self.param = where
        super().__init__(f"{where} {problem}. {remedy}.")

    @classmethod
    def worded(cls, message: str, *, where: str) -> Self:
        """The same fault in a setting's own words, which say all of this."""
        error = cls("", where=where, remedy="")
        error.args = (message,)
        return error


class MediaNotGiven(RequestError):
    """
    A picture or clip is named by its UUID alone.

    Args:
        modality: "image" or "video".
        index: which of the prompt's, from 0.
    """

    code = "media_not_given"
    param = "multi_modal_data"

    def __init__(self, *, modality: str, index: int) -> None:
        super().__init__(
            f"Cache miss for {modality} at index {index} but data is not provided. Nothing is kept "
            "from one prompt to the next: give the data beside its UUID."
        )


class PlaceholderMismatch(RequestError):
    """
    The prompt has not one placeholder for each image or video.

    Args:
        num_items: images (or videos) given.
        num_placeholders: placeholders found in the prompt.
        placeholder: how the model writes one, e.g. `<|image_pad|>`.
        modality: "image" or "video".
    """

    code = "placeholder_mismatch"
    param = "prompt"

    def __init__(
        self,
        *,
        num_items: int,
        num_placeholders: int,
        placeholder: str,
        modality: str = "image",
    ) -> None:
        if num_placeholders > num_items:
            verdict = (
                f"Found more '{placeholder}' placeholders in input prompt than actual multimodal "
                "data items."
            )
        else:
            verdict = (
                f"Expected there to be {num_items} prompt updates corresponding to {num_items} "
                f"{modality} items, but instead found {num_placeholders} prompt updates!"
            )
        super().__init__(
            f"{verdict} This prompt has {num_items} {modality}(s) and {num_placeholders} "
            f"placeholder(s) `{placeholder}`: write one for each, in order, or use chat, which "
            "places them itself."
        )

    @classmethod
    def out_of_order(cls, numbers: Sequence[int], *, first: str, second: str) -> Self:
        """
        The placeholders carry numbers, and these are not 1, 2, 3 and so on, in order.

        Args:
            numbers: as they stand in the prompt.
            first, second: how the model writes the first two.
        """
        error = cls(num_items=len(numbers), num_placeholders=len(numbers), placeholder=first)
        listed = ", ".join(map(str, numbers[:10])) + (", …" if len(numbers) > 10 else "")
        error.args = (
            f"This prompt numbers its images {listed}. Number them in order from 1, each once: "
            f"`{first}`, `{second}` and so on; or use chat, which places them itself.",
        )
        return error


class UnsupportedModality(RequestError):
    """
    `multi_modal_data` has a key that is no modality of ours.

    Args:
        modality: the key.
        supported: the keys that would do.
    """

    code = "unsupported_modality"
    param = "multi_modal_data"

    def __init__(self, modality: object, supported: Iterable[str] = ("image", "video")) -> None:
        name = _cut(modality) if isinstance(modality, str) else type(modality).__name__
        known = " or ".join(supported)
        advice = f"Use {known}." if known else "This model reads text alone."
        super().__init__(f"Unsupported modality: {name}. {advice}")


class UnsupportedPart(RequestError):
    """
    A chat message has a content part of a type that we do not know.

    Args:
        part_type: as given.
        supported: the types that would do, in the order to show them.
    """

    code = "unsupported_part"
    param = "type"

    def __init__(self, part_type: object, supported: Iterable[str]) -> None:
        super().__init__(
            f"Unsupported chat content part type: {_quote(part_type)}. "
            f"Supported types: {', '.join(supported)}."
        )


class NoChatTemplate(RequestError):
    """
    As of transformers v4.44, default chat template is no longer allowed, so you must provide a
    chat template if the tokenizer does not define one. Pass chat_template=..., start with
    `--chat-template FILE`, or use generate() with the model's own markers in the prompt.
    """

    code = "no_chat_template"
    param = "chat_template"

    def __init__(self) -> None:
        super().__init__(" ".join((type(self).__doc__ or "").split()))


# What an image is


class ImageTooNarrow(RequestError):
    """
    One side of an image is so much longer than the other that the model cannot take it.

    Args:
        width, height: of the image, in pixels.
        max_ratio: the longest side over the shortest, at most.
        index: which image of the prompt, from 0.
    """

    code = "image_too_narrow"
    param = "image"

    def __init__(
        self, *, width: int, height: int, max_ratio: int = 200, index: int | None = None
    ) -> None:
        super().__init__(
            f"Image dimensions {width}x{height}: one side is over {max_ratio} times the other, "
            f"more than the model takes. Crop {_name(index)} or cut it into several."
        )


class MediaRefused(RequestError):
    """
    What `media` refused, in its own words: its texts are written for clients too.

    Args:
        message, code: of media's error.
        retryable: whether the same bytes may do later.
        param: "image" or "video".
    """

    def __init__(
        self, message: str, *, code: str, retryable: bool = False, param: str | None = None
    ) -> None:
        self.code = code
        self.retryable = retryable
        self.param = param
        super().__init__(message)


class BadEmbeddings(RequestError):
    """Embeddings given in place of an image do not fit the model. Check their shape."""

    code = "bad_embeddings"
    param = "multi_modal_data"

    @classmethod
    def wrong_width(cls, *, shape: Sequence[int], expected: int) -> Self:
        """`shape`: of the tensor, hidden size last; `expected`: the model's hidden size."""
        advice = "Give embeddings as (images, tokens, hidden)."
        if len(shape) == 3:
            advice = (
                "A 3-D tensor is read as embeddings: to give one picture as a tensor (channels, "
                "height, width), put it into a list."
            )
        return cls(
            f"Image embedding hidden dimension mismatch: got {shape[-1] if shape else 0}, but "
            f"model expects {expected}. Embedding shape: {tuple(shape)}. {advice}"
        )

    @classmethod
    def missing_fields(cls, *, required: Iterable[str], found: Iterable[str]) -> Self:
        return cls(
            f"The data should contain the fields: {_as_set(required)}, but only found the "
            f"following keys: {_as_set(found)}. Give the missing ones, or pictures instead."
        )


# How to answer


class BadSamplingParams(RequestError):
    """
    A sampling parameter has a value that is not allowed, or is not supported.

    Args:
        message: what was given and what is allowed.
        param: the parameter's name.
    """

    code = "bad_sampling_params"

    def __init__(self, message: str, *, param: str) -> None:
        self.param = param
        super().__init__(message)


class NothingAllowed(BadSamplingParams):
    """
    Every token that may be chosen would end the output, and `min_tokens` forbids to end it.

    Args:
        min_tokens: as given.
    """

    code = "nothing_allowed"

    def __init__(self, *, min_tokens: int) -> None:
        super().__init__(
            f"allowed_token_ids holds only ids that end the output, and min_tokens={min_tokens} "
            "forbids these. Allow one more, or leave min_tokens out.",
            param="allowed_token_ids",
        )


def _cut(text: str) -> str:
    return text if len(text) <= MAX_QUOTE_CHARS else text[: MAX_QUOTE_CHARS - 3] + "..."


def _quote(given: object) -> str:
    # An object's own repr may hold an address, so anything but plain values is named by its type.
    if isinstance(given, str):
        return repr(_cut(given))
    return repr(given) if isinstance(given, int | float | None) else type(given).__name__


def _as_set(names: Iterable[str]) -> str:
    return "{" + ", ".join(_quote(name) for name in sorted(names)) + "}"


def _name(index: int | None) -> str:
    return "the image" if index is None else f"image {index} of this prompt (counted from 0)"
