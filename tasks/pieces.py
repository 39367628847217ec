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

from engine.config import SAMPLING_KEYS, parse_part_options
from media.data_url import decode_data_url
from media.errors import TooManyFramesError
from media.frames import FrameSampling, build_sampling, count_indices, find_window
from media.limits import VIDEO_LIMITS
from media.segments import MAX_SEGMENTS, Cut, Look, plan_groups, plan_window
from tasks.bodies import ImagePolicy
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


@dataclass(frozen=True, slots=True)
class ClipRule:
    """
    How a clip is looked at in parts, or whether it must be.

    Args:
        cut: the segments that were asked for.
        max_frames: of one prompt.
        policy: what to do with a clip of which more are asked for.
        measure: when the frames of an encoded clip are shown.
    """

    cut: Cut | None
    max_frames: int | None
    policy: ImagePolicy
    measure: Callable[[bytes], tuple[float, ...]]

    def check(self, num_frames: int) -> bool:
        """Whether so many are within the limit; raises where more are refused."""
        if self.max_frames is None or num_frames <= self.max_frames:
            return True
        if self.policy is ImagePolicy.REJECT:
            raise TooManyFramesError(limit=self.max_frames, given=num_frames)
        return False


def split_clip(messages: Messages, clip: Mapping[str, Any], rule: ClipRule) -> Split | None:
    """
    Cut a clip into segments: those that were asked for, or as many as make its frames fit.

    Args:
        clip: the part of `messages` that is cut, with its bytes, a data URL or a callable.

    Returns:
        None where the clip needs no cutting.

    Raises:
        MediaError: it is no clip that has times, cannot be cut so, or has too many frames.
    """
    encoded = _read(clip)
    options = {key: value for key, value in clip.items() if key not in _SOURCES}
    times_s = rule.measure(encoded)
    most = rule.max_frames
    if rule.cut is not None:
        start_s, end_s = options.get("start_s", 0.0), options.get("end_s")
        segments = plan_window(times_s, rule.cut, start_s=start_s, end_s=end_s)
        windows = [_look_at(segment, options) for segment in segments]
        rule.check(max(count_frames_asked(window, times_s) for window in windows))
    else:
        num_frames = count_frames_asked(options, times_s)
        if rule.check(num_frames):
            return None
        assert most is not None, "or all are within the limit"
        count = min(math.ceil(num_frames / most), MAX_SEGMENTS)
        most = min(math.ceil(num_frames / count), most)
        segments, options = _share_out(options, times_s, num_frames, count)
        windows = [_look_at(segment, options) for segment in segments]
    if most is not None:
        windows = [limit_frames(window, most) for window in windows]
    pieces = []
    for number, (segment, window) in enumerate(zip(segments, windows, strict=True), 1):
        part = {"type": "video", "video": encoded, **window}
        asked = _replace(messages, {id(clip): part})
        pieces.append(Piece(number, asked, segment.start_s, segment.end_s))
    return Split(Subject.VIDEO, tuple(pieces), _digest(encoded, *windows))


def _share_out(
    options: Mapping[str, Any], times_s: Sequence[float], num_asked: int, count: int
) -> tuple[tuple[Look, ...], dict[str, Any]]:
    """
    The segments over which the frames that are asked for are spread as the options spread them, and
    the options that count in each.

    A rate spreads them over the seconds. A number spreads them over the frames; and where each of these
    is asked for, segments of equal length would hold too many of them, or all but none.
    """
    sampling = _read_sampling(options)
    start_s, end_s = sampling.start_s, sampling.end_s
    # A rate that asks for each of the frames does not choose among them.
    if sampling.fps is not None and num_asked < len(find_window(times_s, sampling)):
        segments = plan_window(times_s, Cut(count=count), start_s=start_s, end_s=end_s)
        return segments, dict(options)
    # Of a part that holds many frames in a short time a rate would drop some.
    without_rate = {key: value for key, value in options.items() if key != "fps"}
    return plan_groups(times_s, count, start_s=start_s, end_s=end_s), without_rate


def _look_at(segment: Look, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of one segment's prompt."""
    window = {key: value for key, value in options.items() if key != "end_s"}
    window["start_s"] = segment.first_s
    if segment.last_s is not None:
        window["end_s"] = segment.last_s
    return window


def count_frames_asked(options: Mapping[str, Any], times_s: Sequence[float]) -> int:
    """
    How many frames of a clip its part's options ask for, as far as their times tell: key frames, and
    frames that look alike, make them fewer.
    """
    return count_indices(times_s, _read_sampling(options))


def _read_sampling(options: Mapping[str, Any]) -> FrameSampling:
    return build_sampling(parse_part_options(options, SAMPLING_KEYS, "messages").sampling)


def limit_frames(options: Mapping[str, Any], most: int) -> dict[str, Any]:
    """The same options, with no more frames than `most`, evenly spaced."""
    given = options.get("num_frames")
    is_less = given is not None and 0 <= given <= most
    return {**options, "num_frames": given if is_less else most}


def may_be_more(options: Mapping[str, Any], most: int) -> bool:
    """Whether a clip's length decides if its options ask for more frames than `most`."""
    given = options.get("num_frames")
    return given is None or not 0 <= given <= most


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
