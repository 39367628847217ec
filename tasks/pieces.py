"""
An item that is asked in parts: into which pieces, and with what prompt each.

A clip with `segments` becomes a prompt for each segment, and more images than the model takes become
groups of as many as it takes. All else in the messages is the same in every piece.
"""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from media.data_url import decode_data_url
from media.errors import VideoHasNoFramesError
from media.limits import VIDEO_LIMITS
from media.segments import Cut, Segment, plan_segments
from media.video import measure_clip
from tasks.summary import Subject

Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Piece:
    """
    What one part is asked with.

    Args:
        number: within its item, from 1.
        start_s, end_s: of a segment.
        images: the first and the last of its images among the item's, from 1.
    """

    number: int
    messages: Messages
    start_s: float | None = None
    end_s: float | None = None
    images: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class Split:
    """
    The pieces of an item.

    Args:
        plan: a digest of what was cut and how. The same item at its next lease has another one where its
            clip, its images or the model's limits are other ones by then.
    """

    subject: Subject
    pieces: tuple[Piece, ...]
    plan: bytes


def split_clip(messages: Messages, clip: Mapping[str, Any], cut: Cut) -> Split:
    """
    Cut a clip into segments.

    Args:
        clip: the part of `messages` that is cut, with its bytes, a data URL or a callable.

    Raises:
        MediaError: it is no clip that has times, or cannot be cut so.
    """
    encoded = _read(clip)
    options = {key: value for key, value in clip.items() if key not in _SOURCES}
    segments = _plan(*measure_clip(encoded), cut, options)
    pieces = []
    for number, segment in enumerate(segments, 1):
        window = {"type": "video", "video": encoded, **options, "start_s": segment.start_s}
        if number < len(segments):  # its end is the next one's; an engine takes the last frame in
            window["end_s"] = math.nextafter(segment.end_s, 0)
        asked = _replace(messages, {id(clip): window})
        pieces.append(Piece(number, asked, segment.start_s, segment.end_s))
    return Split(Subject.VIDEO, tuple(pieces), _digest(encoded, options, segments))


def split_images(messages: Messages, images: Sequence[Mapping[str, Any]], limit: int) -> Split:
    """
    Share out images, in their order.

    Args:
        images: those parts of `messages` that are images, with bytes in the place of addresses.
        limit: of one prompt, 1 or more.
    """
    pieces = []
    for number, first in enumerate(range(0, len(images), limit), 1):
        others = (*images[:first], *images[first + limit :])
        asked = _replace(messages, dict.fromkeys(map(id, others)))
        last = min(first + limit, len(images))
        pieces.append(Piece(number, asked, images=(first + 1, last)))
    return Split(Subject.IMAGES, tuple(pieces), _digest(*images, limit))


_SOURCES = ("type", "video", "video_url")


def _plan(
    duration_s: float, num_frames: int, cut: Cut, options: Mapping[str, Any]
) -> list[Segment]:
    """The segments of the window that the options leave of the clip, in the clip's seconds."""
    start_s = options.get("start_s", 0.0)
    end_s = min(options.get("end_s", duration_s), duration_s)
    if start_s > duration_s:
        raise VideoHasNoFramesError
    share = (end_s - start_s) / duration_s if duration_s else 1.0
    segments = plan_segments(end_s - start_s, max(math.ceil(num_frames * share), 1), cut)
    return [Segment(s.start_s + start_s, s.end_s + start_s) for s in segments]


def _read(clip: Mapping[str, Any]) -> bytes:
    if clip["type"] == "video_url":
        return decode_data_url(clip["video_url"]["url"], VIDEO_LIMITS)[0]
    source: bytes | Callable[[], bytes] = clip["video"]
    return source() if callable(source) else source


def _replace(
    messages: Messages, others: Mapping[int, Mapping[str, Any] | None]
) -> list[dict[str, Any]]:
    """
    The same messages with other parts, or without some; a message without any is left out.

    Args:
        others: what stands in the place of a part, by the part's `id`; None for nothing.
    """
    replaced: list[dict[str, Any]] = []
    for message in messages:
        content = message["content"]
        if isinstance(content, list):
            content = [others.get(id(part), part) for part in content]
            content = [part for part in content if part is not None]
        if content or isinstance(content, str):
            replaced.append({**message, "content": content})
    return replaced


def _digest(*values: object) -> bytes:
    digest = hashlib.sha256()
    for value in values:
        if isinstance(value, bytes):
            digest.update(value)
        elif isinstance(value, Mapping):
            digest.update(_digest(*value.keys(), *value.values()))
        elif not callable(value):  # an uploaded file: its content never changes
            digest.update(repr(value).encode())
    return digest.digest()
