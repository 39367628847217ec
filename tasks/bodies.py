"""
What stands in one line of a manifest: checked when a job is expanded, read again when it runs.

Both go through the same functions, so that what was accepted can be run. Pictures are counted and
their addresses looked at; no byte of them is fetched or decoded here. Nothing that would change the
answer is ever ignored: a field that is not known is refused by its name.
"""

import json
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import lru_cache
from typing import Any, Final
from uuid import UUID

from engine.config import (
    AREA_KEYS,
    DETAILS,
    IMAGE_KEYS,
    KEEP_ALL,
    SAMPLING_KEYS,
    parse_part_options,
)
from engine.errors import BadConfig, BadSamplingParams, TooManyImages, TooManyVideos
from engine.request import SamplingParams
from media.data_url import check_num_frames, count_listed_frames
from media.errors import BadSegmentsError, BadUrlError, MediaError, TooManyFramesError
from media.limits import VIDEO_LIMITS
from media.s3_url import is_s3_url, parse_s3_url
from media.segments import Cut
from storage.ids import FileId
from tasks.config import MediaLimits
from tasks.errors import BadLineError

METHOD: Final = "POST"
CHAT_ENDPOINT: Final = "/v1/chat/completions"
MAX_CUSTOM_ID_CHARS: Final = 256
MAX_DEPTH: Final = 32
MAX_SPLIT_IMAGES: Final = 256
"""Of one item with the policy `split`: they are all held until the last of them was looked at."""

MAX_INTEGER: Final = 2**64

_LINE_KEYS: Final = frozenset({"custom_id", "method", "url", "body"})
_ROLES: Final = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
}
_FILE_ID: Final = re.compile(r"file-([0-9a-f]{32})")

_SAMPLING: Final = frozenset(
    {
        "n",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "seed",
        "stop",
        "max_tokens",
        "min_tokens",
        "presence_penalty",
        "frequency_penalty",
        "repetition_penalty",
        "repetition_detection",
        "stop_token_ids",
        "allowed_token_ids",
        "logit_bias",
        "ignore_eos",
        "skip_special_tokens",
        "spaces_between_special_tokens",
        "include_stop_str_in_output",
    }
)
# Said for the server's or the client's own sake: the answer is the same without them.
_UNHEARD: Final = frozenset(
    {
        "user",
        "metadata",
        "store",
        "service_tier",
        "stream_options",
        "safety_identifier",
        "prompt_cache_key",
    }
)
# Accepted only where they ask for nothing.
_NEUTRAL: Final[Mapping[str, tuple[Any, ...]]] = {
    "stream": (False,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "add_generation_prompt": (True,),
}
_OWN: Final = frozenset({"model", "messages", "max_completion_tokens", "image_policy"})

PART_OPTIONS: Final = (*IMAGE_KEYS, *SAMPLING_KEYS)
"""How a part's picture or clip is sized and sampled; the engine says what they mean."""
_PART_KEYS: Final[Mapping[str, frozenset[str]]] = {
    "text": frozenset({"text"}),
    "image_url": frozenset({"image_url", "uuid", *IMAGE_KEYS}),
    "image_file": frozenset({"image_file", "uuid", *IMAGE_KEYS}),
    "video_url": frozenset({"video_url", "uuid", "segments", *AREA_KEYS, *SAMPLING_KEYS}),
}
IMAGE_PARTS: Final = frozenset({"image_url", "image_file"})


class ImagePolicy(StrEnum):
    """What to do with a prompt that holds more images than the model takes."""

    REJECT = "reject"
    TRUNCATE = "truncate"
    SAMPLE = "sample"
    SPLIT = "split"


@dataclass(frozen=True, slots=True)
class Body:
    """
    One item's request, checked.

    Args:
        messages: as given; roles and parts are known ones.
        sampling: the sampling parameters that were given, by `SamplingParams`' names.
        num_images: that will be used, after the policy.
    """

    model: str
    messages: Sequence[Mapping[str, Any]]
    sampling: Mapping[str, Any]
    image_policy: ImagePolicy
    num_images: int
    num_videos: int


# JSON


def parse_json(content: bytes) -> Any:
    """
    Read one JSON text, strictly.

    Raises:
        BadLineError: not UTF-8, no JSON, a key twice, NaN or Infinity, numbers that lose digits.
    """
    try:
        return _DECODER.decode(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadLineError("invalid_json_line", "This line is not UTF-8.") from error
    except json.JSONDecodeError as error:
        raise BadLineError(
            "invalid_json_line",
            f"This line is not parseable as valid JSON: {error.msg} (column {error.colno}).",
        ) from error
    except RecursionError as error:
        raise BadLineError("invalid_json_line", _TOO_DEEP) from error


_TOO_DEEP: Final = f"This line is nested more than {MAX_DEPTH} levels deep."


def _build_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    built = dict(pairs)
    if len(built) != len(pairs):
        raise BadLineError("invalid_json_line", "This line has an object with one key twice.")
    return built


def _parse_integer(digits: str) -> int:
    if len(digits) > 20 or abs(number := int(digits)) > MAX_INTEGER:
        raise BadLineError("invalid_json_line", "This line holds a number that is too large.")
    return number


def _parse_float(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):  # 1e999
        raise BadLineError("invalid_json_line", "This line holds a number that is too large.")
    return number


def _refuse_constant(name: str) -> Any:
    raise BadLineError("invalid_json_line", f"This line holds {name}, which is not JSON.")


_DECODER: Final = json.JSONDecoder(
    object_pairs_hook=_build_object,
    parse_int=_parse_integer,
    parse_float=_parse_float,
    parse_constant=_refuse_constant,
)


def _check_depth(value: Any, depth: int = 1) -> None:
    if depth > MAX_DEPTH:
        raise BadLineError("invalid_json_line", _TOO_DEEP)
    if isinstance(value, dict):
        for inner in value.values():
            if isinstance(inner, dict | list):
                _check_depth(inner, depth + 1)
    elif isinstance(value, list):
        for inner in value:
            if isinstance(inner, dict | list):
                _check_depth(inner, depth + 1)


# The line


def read_line(content: bytes, endpoint: str) -> tuple[str, dict[str, Any]]:
    """
    Read a line as far as it is not about the model.

    Returns:
        Its `custom_id` and its body.

    Raises:
        BadLineError: with the line's `custom_id` where it has a usable one.
    """
    if not content.strip():
        raise BadLineError("blank_line", "This line is blank. Leave it out.")
    line = parse_json(content)
    if not isinstance(line, dict):
        raise BadLineError("invalid_json_line", "This line is not a JSON object.")
    custom_id = line.get("custom_id")
    if not isinstance(custom_id, str) or not 1 <= len(custom_id) <= MAX_CUSTOM_ID_CHARS:
        raise BadLineError(
            "invalid_custom_id",
            f"custom_id must be a string of 1 to {MAX_CUSTOM_ID_CHARS} characters.",
            param="custom_id",
        )
    if "\0" in custom_id or not _is_encodable(custom_id):
        raise BadLineError(
            "invalid_custom_id",
            "custom_id holds a character that no text may hold.",
            param="custom_id",
        )
    try:
        return custom_id, _read_envelope(line, endpoint)
    except BadLineError as error:
        error.custom_id = custom_id
        raise


def _is_encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        return False
    return True


def _read_envelope(line: Mapping[str, Any], endpoint: str) -> dict[str, Any]:
    _check_depth(line)
    if line.get("method") != METHOD:
        raise BadLineError("invalid_method", f"method must be {METHOD}.", param="method")
    if line.get("url") != endpoint:
        raise BadLineError(
            "invalid_url", f"url must be {endpoint}, the endpoint of the batch.", param="url"
        )
    unknown = sorted(line.keys() - _LINE_KEYS)
    if unknown:
        raise BadLineError(
            "unknown_field",
            f"{_quote(unknown[0])} is no field of a line. Its fields are custom_id, method, url "
            "and body.",
            param=unknown[0][:64],
        )
    body = line.get("body")
    if not isinstance(body, dict):
        raise BadLineError("invalid_body", "body must be an object.", param="body")
    return body


# The body


def check_body(
    body: Mapping[str, Any],
    *,
    model: str,
    limits: MediaLimits,
    image_policy: ImagePolicy = ImagePolicy.REJECT,
    opened: Collection[str] = ("s3", "file"),
) -> Body:
    """
    Check a chat completion's body.

    Args:
        model: of the job; a line may name no other.
        opened: of s3 and file, those that are read at all; which of it may be read, the worker says.
        image_policy: the job's; a line's own goes before it.

    Raises:
        BadLineError: what is wrong first.
    """
    if body.get("model") != model:
        raise BadLineError(
            "mismatched_model",
            f"model must be {_quote(model)}, as in the rest of the file.",
            param="model",
        )
    policy = _read_policy(body.get("image_policy"), image_policy)
    sampling = _read_sampling(body)
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise BadLineError(
            "invalid_messages", "messages must be a list of at least one.", param="messages"
        )
    num_images = num_videos = num_cut = 0
    for index, message in enumerate(messages):
        for part in _check_message(message, f"messages[{index}]"):
            num_images += part["type"] in IMAGE_PARTS
            num_videos += part["type"] == "video_url"
            num_cut += part.get("segments") is not None
            if part["type"] == "video_url":
                _check_frames(part, limits.frames, policy, f"messages[{index}]")
            scheme = read_source(part)[:8].partition("://")[0].lower()
            if scheme in _OPENED_WITH and scheme not in opened:
                raise _bad_address(
                    f"messages[{index}]",
                    f"{scheme}:// is not read here. Upload the file, or ask the operator to set "
                    f"{_OPENED_WITH[scheme]}.",
                )
    is_over = num_images > limits.image
    # Asked in groups; with segments there is one prompt for each of these, and all images in it.
    is_shared_out = policy is ImagePolicy.SPLIT and is_over and limits.image > 0 and not num_cut
    may_leave_out = policy in (ImagePolicy.TRUNCATE, ImagePolicy.SAMPLE)
    if is_over and not (is_shared_out or may_leave_out):
        raise BadLineError(
            TooManyImages.code,
            str(TooManyImages(limit=limits.image, given=num_images)),
            param="messages",
        )
    if num_cut and num_videos > 1:
        raise _bad_messages("messages", "may hold no other video beside one with segments")
    _check_split(sampling, num_cut > 0, num_images if is_shared_out else 0)
    if num_videos > limits.video:
        raise BadLineError(
            TooManyVideos.code,
            str(TooManyVideos(limit=limits.video, given=num_videos)),
            param="messages",
        )
    num_used = num_images if is_shared_out else min(num_images, limits.image)
    return Body(model, messages, sampling, policy, num_used, num_videos)


def _check_frames(
    part: Mapping[str, Any], limit: int | None, policy: ImagePolicy, where: str
) -> None:
    """
    Refuse a clip of which more frames are asked for than one prompt may hold, and a list of more than
    are ever taken.

    Where that depends on how long the clip is, the worker finds out.
    """
    num_listed = count_listed_frames(read_source(part))
    try:
        if num_listed is not None:
            check_num_frames(num_listed, VIDEO_LIMITS)
            num_asked = count_asked_of_list(part, num_listed)
        else:
            num_asked = 0 if part.get("fps") is not None else part.get("num_frames") or 0
        if limit is not None and num_asked > limit and policy is ImagePolicy.REJECT:
            raise TooManyFramesError(limit=limit, given=num_asked)
    except MediaError as error:
        raise BadLineError(error.code, f"{where}: {error}", param="messages") from error


def count_asked_of_list(options: Mapping[str, Any], num_listed: int) -> int:
    """How many frames of a list its part's options ask for; without any, the default gives way to limits."""
    given = options.get("num_frames")
    if given is None:
        return num_listed if options.get("fps") is not None else 0
    return num_listed if given == KEEP_ALL else min(given, num_listed)


def _check_split(sampling: Mapping[str, Any], has_segments: bool, num_images: int) -> None:
    """Refuse what cannot be asked in parts: a clip with segments, or so many images in groups."""
    if num_images > MAX_SPLIT_IMAGES:
        raise BadLineError(
            TooManyImages.code,
            f"image_policy=split takes at most {MAX_SPLIT_IMAGES} images in one prompt, and this one has "
            f"{num_images}. Hand them in as several lines.",
            param="messages",
        )
    if (has_segments or num_images) and sampling.get("n", 1) != 1:
        raise BadLineError(
            "unsupported_parameter",
            "n must be 1 for a prompt that is asked in parts: they are joined into one text.",
            param="n",
        )


def _read_policy(given: object, default: ImagePolicy) -> ImagePolicy:
    if given is None:
        return default
    if given not in list(ImagePolicy):
        raise BadLineError(
            "invalid_image_policy",
            f"image_policy must be one of {', '.join(ImagePolicy)}.",
            param="image_policy",
        )
    return ImagePolicy(str(given))


def _read_sampling(body: Mapping[str, Any]) -> dict[str, Any]:
    sampling: dict[str, Any] = {}
    for name, value in body.items():
        if value is None or name in _OWN or name in _UNHEARD:
            continue
        if name in _SAMPLING:
            sampling[name] = value
        elif name not in _NEUTRAL:
            raise BadLineError(
                "unsupported_parameter",
                f"{_quote(name)} is not supported. Leave it out.",
                param=name[:64],
            )
        elif value not in _NEUTRAL[name]:
            raise BadLineError(
                "unsupported_parameter",
                f"This value of {name} is not supported in a batch. Leave it out.",
                param=name,
            )
    if body.get("max_completion_tokens") is not None:
        sampling["max_tokens"] = body["max_completion_tokens"]
    build_params(_PLAIN, sampling)
    return sampling


_PLAIN: Final = SamplingParams(max_tokens=None)


def build_params(defaults: SamplingParams, sampling: Mapping[str, Any]) -> SamplingParams:
    """
    The parameters of one request: what it gives, and the defaults for the rest.

    Raises:
        BadLineError: a value is not allowed.
    """
    try:
        return _build_params(defaults, json.dumps(sampling, sort_keys=True))
    except BadSamplingParams as error:
        raise BadLineError(error.code, str(error), param=error.param) from error


@lru_cache(maxsize=1024)
def _build_params(defaults: SamplingParams, sampling: str) -> SamplingParams:
    # The lines of a job mostly say the same, and checking it took half of the time of a line.
    return replace(defaults, **json.loads(sampling))


def _check_message(message: object, where: str) -> Iterator[Mapping[str, Any]]:
    """Check one message; yield its parts that are not text."""
    role = message.get("role") if isinstance(message, dict) else None
    if not isinstance(message, dict) or not isinstance(role, str) or role not in _ROLES:
        raise _bad_messages(where, f"must be an object with a role: {', '.join(_ROLES)}")
    unknown = sorted(message.keys() - {"role", "content", "name"})
    if unknown:
        raise _bad_messages(where, f"has the field {_quote(unknown[0])}, which is not supported")
    content = message.get("content")
    if isinstance(content, str):
        return
    if not isinstance(content, list) or not content:
        raise _bad_messages(where, "must have a content: a text, or a list of parts")
    for index, part in enumerate(content):
        place = f"{where}.content[{index}]"
        _check_part(part, place)
        if part["type"] != "text":
            yield part


def _check_part(part: object, where: str) -> None:
    if not isinstance(part, dict):
        raise _bad_messages(where, 'must be an object such as {"type": "text", "text": "…"}')
    kind = part.get("type")
    if kind in ("input_image", "input_text", "input_file"):
        raise _bad_messages(
            where,
            f'is {_quote(kind)}, a form of /v1/responses. In {CHAT_ENDPOINT} an image is {{"type": '
            '"image_url", "image_url": {"url": "…"}}, and {"type": "input_image", "image_url": '
            '"…"} belongs to the other',
        )
    if not isinstance(kind, str) or kind not in _PART_KEYS:
        raise _bad_messages(where, f"must have a type: {', '.join(_PART_KEYS)}")
    unknown = sorted(part.keys() - _PART_KEYS[kind] - {"type"})
    if unknown:
        raise _bad_messages(where, f"has the field {_quote(unknown[0])}, which is not supported")
    if kind == "text":
        if not isinstance(part.get("text"), str):
            raise _bad_messages(where, "must have a text")
        return
    read_source(part, where)
    try:
        parse_part_options(part, PART_OPTIONS, where)
    except BadConfig as error:
        raise BadLineError("invalid_messages", str(error), param="messages") from error
    read_cut(part, where)


_CUT_KEYS: Final[Mapping[str, str]] = {
    "seconds": "seconds",
    "count": "count",
    "overlap": "overlap_s",
    "min_seconds": "min_s",
}


def read_cut(part: Mapping[str, Any], where: str = "messages") -> Cut | None:
    """
    How a video is to be cut into segments; None where it is not.

    Raises:
        BadLineError: it cannot be cut so.
    """
    given = part.get("segments")
    if given is None:
        return None
    if not isinstance(given, dict):
        raise _bad_messages(where, 'must have segments such as {"seconds": 10} or {"count": 30}')
    unknown = sorted(given.keys() - _CUT_KEYS.keys())
    if unknown:
        raise _bad_messages(where, f"has segments.{_quote(unknown[0])}, which is not supported")
    values = {_CUT_KEYS[key]: value for key, value in given.items() if value is not None}
    for key, value in values.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or (key == "count" and not isinstance(value, int)):
            raise _bad_messages(where, "must have segments of numbers, and a whole one for count")
    try:
        return Cut(**values)
    except BadSegmentsError as error:
        raise BadLineError(error.code, f"{where}: {error}", param="messages") from error


def read_source(part: Mapping[str, Any], where: str = "messages") -> str:
    """
    Where an image or video comes from: a data or http URL, an object of s3, a file:// URL, or `file-…`.

    Raises:
        BadLineError: none of these.
    """
    kind = str(part["type"])
    given = part.get(kind)
    if isinstance(given, str) and kind != "image_file":
        given = {"url": given}
    name = "file_id" if kind == "image_file" else "url"
    source = given.get(name) if isinstance(given, dict) else None
    if not isinstance(source, str) or not source:
        raise _bad_messages(where, f"must have {kind}.{name}")
    assert isinstance(given, dict)
    known = {name, "detail"} if kind in IMAGE_PARTS else {name}
    unknown = sorted(given.keys() - known)
    if unknown:
        raise _bad_messages(where, f"has {kind}.{_quote(unknown[0])}, which is not supported")
    if given.get("detail") not in (None, *DETAILS):
        raise _bad_messages(where, f"must have a {kind}.detail of {', '.join(DETAILS)}")
    if _FILE_ID.fullmatch(source):
        return source
    if name == "file_id" or not source[:8].lower().startswith(_SCHEMES):
        raise _bad_address(
            where,
            "give a data: URL, an http or https URL, an s3:// reference, or the id of an uploaded "
            "file.",
        )
    if is_s3_url(source):
        try:
            parse_s3_url(source)
        except BadUrlError as error:
            raise _bad_address(where, str(error)) from error
    return source


def find_detail(part: Mapping[str, Any]) -> str | None:
    """How closely a picture is to be looked at, as its part says; None where it says nothing."""
    given = part[part["type"]]
    return given.get("detail") if isinstance(given, dict) else None


_SCHEMES: Final = ("data:", "http://", "https://", "s3://", "file://")
_OPENED_WITH: Final = {"s3": "DARKROOM_MEDIA_S3_BUCKETS", "file": "DARKROOM_MEDIA_ROOT"}


def _bad_address(where: str, problem: str) -> BadLineError:
    return BadLineError("invalid_media_url", f"{where}: {problem}", param="messages")


def parse_file_id(source: str) -> FileId | None:
    """The file that `file-…` names; None for anything else."""
    found = _FILE_ID.fullmatch(source)
    return None if found is None else FileId(UUID(found[1]))


def choose_images(num_images: int, limit: int, policy: ImagePolicy) -> frozenset[int]:
    """Which images of a prompt are used, by index: the first ones, or evenly spaced ones."""
    if num_images <= limit or policy in (ImagePolicy.REJECT, ImagePolicy.SPLIT):
        return frozenset(range(num_images))
    if policy is ImagePolicy.TRUNCATE or limit <= 1:
        return frozenset(range(limit))
    return frozenset(round(index * (num_images - 1) / (limit - 1)) for index in range(limit))


def _bad_messages(where: str, problem: str) -> BadLineError:
    return BadLineError("invalid_messages", f"{where} {problem}.", param="messages")


def _quote(text: str) -> str:
    return repr(text if len(text) <= 64 else text[:61] + "...")
