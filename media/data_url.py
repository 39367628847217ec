"""
Media inside a URL: `data:image/jpeg;base64,...` -> bytes. No network, and no other scheme.

One form is read, the one that OpenAI's clients write: a media type, `;base64`, and standard
base64 without line breaks. Percent-encoding, `charset=` and other parameters are refused by name
instead of being half understood. Sizes are judged from the text's length, before decoding it.
"""

import base64

from media.errors import BadDataUrlError, ImageTooLargeError, MediaError, VideoTooLargeError
from media.limits import ImageLimits, VideoLimits

FRAMES_MEDIA_TYPE = "video/jpeg"
"""Not a container: the payload is JPEG files, each in base64, separated by commas."""

_MAX_HEADER_CHARS = 128
_KINDS = ("image/", "video/")


def is_data_url(url: str) -> bool:
    """Tell whether this is a data URL at all; it may still be a bad one."""
    return url[:5].lower() == "data:"


def decode_data_url(url: str, limits: ImageLimits | VideoLimits) -> tuple[bytes, str]:
    """
    Return the bytes of one file and the media type that the URL claims, in lower case.

    The claim is only a claim: the decoders look at the bytes. `video/jpeg` holds several files
    and is refused here: see `decode_frames_url`.

    Raises:
        BadDataUrlError: another form, another media type, broken base64, or nothing in it.
        ImageTooLargeError, VideoTooLargeError: more than `limits.max_bytes`.
    """
    media_type, start = _split_header(url)
    if media_type == FRAMES_MEDIA_TYPE:
        raise BadDataUrlError(
            "The data URL holds a list of frames (video/jpeg) where one file is expected. Send "
            "it as a video."
        )
    if _decoded_num_bytes(url, start) > limits.max_bytes:
        raise _too_many_bytes(limits)
    return _decode_base64(url[start:]), media_type


def decode_frames_url(url: str, limits: VideoLimits) -> tuple[bytes, ...]:
    """
    Return the JPEG files of `data:video/jpeg;base64,F1,F2,...`, in order.

    Raises:
        BadDataUrlError: another form, broken base64, or an empty frame.
        VideoTooLargeError: more than `limits.max_frames` frames or `limits.max_bytes` together.
    """
    media_type, start = _split_header(url)
    if media_type != FRAMES_MEDIA_TYPE:
        raise BadDataUrlError(
            "The data URL holds one file where a list of frames is expected. The form of a list "
            "is data:video/jpeg;base64,<frame>,<frame>."
        )
    check_num_frames(url.count(",", start) + 1, limits)
    if _decoded_num_bytes(url, start) > limits.max_bytes:
        raise _too_many_bytes(limits)
    return tuple(_decode_base64(frame) for frame in url[start:].split(","))


def count_listed_frames(url: str) -> int | None:
    """Return how many frames a data URL lists; None where it is no list, or no good URL."""
    if not is_data_url(url):
        return None
    try:
        media_type, start = _split_header(url)
    except BadDataUrlError:  # whoever decodes it says so
        return None
    return url.count(",", start) + 1 if media_type == FRAMES_MEDIA_TYPE else None


def check_num_frames(num_frames: int, limits: VideoLimits) -> None:
    """Raise VideoTooLargeError where a list has more than `limits.max_frames`."""
    if num_frames > limits.max_frames:
        raise VideoTooLargeError(
            f"The data URL holds {num_frames} frames; at most {limits.max_frames} are taken. Send "
            "fewer."
        )


def media_type_of(url: str) -> str:
    """Return the media type that a data URL claims, in lower case, without decoding it."""
    return _split_header(url)[0]


def num_bytes_of(url: str) -> int:
    """Return how many bytes a data URL of one file holds, without decoding it."""
    return _decoded_num_bytes(url, _split_header(url)[1])


def _split_header(url: str) -> tuple[str, int]:
    """Return the media type and where the payload starts. Copies nothing of the payload."""
    comma = url.find(",", 0, _MAX_HEADER_CHARS)
    if not is_data_url(url) or comma < 0:
        raise BadDataUrlError
    media_type, *parameters = url[5:comma].lower().split(";")
    if parameters[-1:] != ["base64"]:
        raise BadDataUrlError(
            "The data URL is not marked as base64; percent-encoded data is not read. Its form is "
            "data:image/jpeg;base64,<data>."
        )
    if len(parameters) > 1:
        raise BadDataUrlError(
            "The data URL has parameters beside base64, such as charset. Leave them out: "
            "data:image/jpeg;base64,<data>."
        )
    if not media_type.startswith(_KINDS) or media_type in _KINDS:
        raise BadDataUrlError(
            "The data URL names no image or video type. Start it with data:image/... or "
            "data:video/..., whatever the file is."
        )
    return media_type, comma + 1


def _decoded_num_bytes(url: str, start: int) -> int:
    """Return how many bytes the payload stands for: three for each four characters."""
    return (len(url) - start) * 3 // 4 - url.count("=", max(start, len(url) - 2))


def _decode_base64(payload: str) -> bytes:
    if not payload:
        raise BadDataUrlError(
            "The data URL, or one frame in it, holds no data. Send the complete file."
        )
    if "%" in payload[:4096] or "%" in payload[-8:]:
        raise BadDataUrlError(
            "The base64 in the data URL is percent-encoded as well. Send it as it is, with +, / "
            "and = in plain."
        )
    broken = BadDataUrlError(
        "The base64 in the data URL is broken. Use A to Z, a to z, 0 to 9, + and /, padded with = "
        "and without spaces or line breaks."
    )
    if len(payload) % 4:  # Python forgives some wrong padding
        raise broken
    try:
        return base64.b64decode(payload, validate=True)
    except ValueError as error:
        raise broken from error


def _too_many_bytes(limits: ImageLimits | VideoLimits) -> MediaError:
    message = f"The data URL holds more than the {limits.max_bytes} bytes that it may. "
    if isinstance(limits, VideoLimits):
        return VideoTooLargeError(message + "Cut the video or scale it down.")
    return ImageTooLargeError(message + "Scale the image down, or send it as JPEG.")
