"""
One clip: encoded bytes, or a list of JPEG frames -> `Frames`.

The only file that opens videos. FFmpeg never sees a name: it reads memory, is told which of four
containers to expect, and may open nothing by itself, since playlists and concat scripts in the
bytes would otherwise make it read files and addresses. PyAV is imported on first use, so that
stills work without it. Animated GIF, WebP and PNG go through Pillow.

Frames of one clip have one size, that of the first: a stream that changes its resolution on the
way is resampled to it. Pixels are as stored: non-square ones are not stretched.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from fractions import Fraction
from io import BytesIO
from itertools import chain, islice
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from PIL import Image

from media.alike import drop_alike
from media.decoded import Frames, Header, RGBImage
from media.errors import (
    DecodeMemoryError,
    FramesDifferError,
    MediaError,
    VideoFormatNotSupportedError,
    VideoHasNoFramesError,
    VideoSupportMissingError,
    VideoTooLargeError,
    VideoTruncatedError,
    VideoUnreadableError,
)
from media.frames import (
    FrameSampling,
    choose_indices,
    choose_untimed,
    estimate_span_s,
)
from media.images import (
    A_VIDEO,
    BOMB_ERRORS,
    DECODER_ERRORS,
    decode_image,
    find_canvas,
    find_format,
    from_pil,
    is_cut_short,
    open_lazily,
)
from media.limits import VIDEO_LIMITS, ImageLimits, VideoLimits

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.packet import Packet
    from av.video.frame import VideoFrame
    from av.video.reformatter import VideoReformatter
    from av.video.stream import VideoStream

CODECS = ("h264", "hevc", "vp8", "vp9", "av1", "mpeg4", "mjpeg")
ANIMATION_FORMATS = ("GIF", "WEBP", "PNG")
DEFAULT_SAMPLING = FrameSampling()

# What a codec holds beside the frames that are kept, which have 4 bytes a pixel in Pillow: up to 16
# frames to which others refer, at 1.5 bytes and up to 3, and the one that is converted.
CODEC_BYTES_PER_PX = 56

LEAST_PROBE_BYTES = 16 * 1024 * 1024
"""Where there is no room for so many, a decoder that fails lacked memory; its size may not be known."""

Admit = Callable[[Header], None]
Source = TypeVar("Source")

_CONTAINERS = (
    (re.compile(rb"....(?:ftyp|moov|mdat|wide|free|skip|pnot)", re.DOTALL), "mov"),
    (re.compile(rb"\x1a\x45\xdf\xa3"), "matroska"),
    (re.compile(rb"RIFF....AVI ", re.DOTALL), "avi"),
    (re.compile(rb"(?:G.{187}){3}", re.DOTALL), "mpegts"),
)
_ACCEPTED = "MP4, MOV, WebM, Matroska, AVI, MPEG-TS, GIF, WebP or PNG"


def decode_video(
    encoded: bytes,
    sampling: FrameSampling = DEFAULT_SAMPLING,
    limits: VideoLimits = VIDEO_LIMITS,
    admit: Admit | None = None,
) -> Frames:
    """
    Decode the wanted frames of one clip held in memory.

    Args:
        encoded: a whole file: MP4, MOV, WebM, Matroska, AVI or MPEG-TS holding one of `CODECS`,
            or an animated GIF, WebP or PNG.
        sampling: which frames; see `media.frames`.
        limits: bytes, frames and seconds are judged before decoding, pixels frame by frame.
        admit: told what is about to be decoded, as far as the file's header says it; what it raises
            ends the decoding.

    Returns:
        The frames, upright, with the times at which the container shows them. A frame that the
        decoder cannot make is passed over, and the next one that it can stands in.

    Raises:
        VideoUnreadableError, VideoTruncatedError: the bytes are no whole video.
        VideoFormatNotSupportedError: a container or codec that is not read here.
        VideoHasNoFramesError: no picture track, or nothing in the window asked for.
        VideoTooLargeError: over a limit.
        DecodeMemoryError: FFmpeg got no memory. All of these are the client's fault.
        VideoSupportMissingError: the extra `video` is not installed. The operator's.
    """
    container = _judge(encoded, limits)
    if container is None:
        with _open_animation(encoded, limits, admit, sampling.num_frames) as clip:
            frames = _read_animation(clip, sampling, limits, admit)
    else:
        frames = _decode_stream(encoded, container, sampling, limits, admit)
    return drop_alike(frames, sampling.min_change)


def plan_frames(
    encoded: bytes,
    sampling: FrameSampling = DEFAULT_SAMPLING,
    limits: VideoLimits = VIDEO_LIMITS,
) -> tuple[int, ...]:
    """
    Return which frames of a clip `decode_video` would decode, by their places in it.

    Fewer are kept where some are damaged, or look alike and that was asked for.

    Raises:
        MediaError: as `decode_video`. Frames that are damaged are found by decoding only.
    """
    container = _judge(encoded, limits)
    if container is None:
        with _open_animation(encoded, limits) as clip:
            return _choose_of_animation(clip, sampling, limits)
    with _open_stream(encoded, container, limits) as (source, stream):
        indices = _choose_indices(_read_track(source, stream, limits), sampling)
        _Keep(limits, len(indices))
        return indices


def count_source_frames(encoded: bytes, limits: VideoLimits = VIDEO_LIMITS) -> int:
    """
    Count the frames of a clip without decoding any.

    Raises:
        MediaError: as `decode_video`. Frames that are damaged are found by decoding only.
    """
    container = _judge(encoded, limits)
    if container is None:
        with _open_animation(encoded, limits) as clip:
            return getattr(clip, "n_frames", 1)
    with _open_stream(encoded, container, limits) as (source, stream):
        return len(_read_track(source, stream, limits).ticks)


def measure_clip(
    encoded: bytes, limits: VideoLimits = VIDEO_LIMITS, admit: Admit | None = None
) -> tuple[float, ...]:
    """
    Find when the frames of a clip are shown; of a container only the times are read, and no frame is decoded.

    Args:
        admit: as `decode_video`, before an animation is drawn, which is the only way to its times.

    Returns:
        A time for each frame, ascending, in seconds from the first one, which has 0.

    Raises:
        MediaError: as `decode_video`. Frames that are damaged are found by decoding only.
    """
    container = _judge(encoded, limits)
    if container is None:
        with _open_animation(encoded, limits, admit, 1) as clip:
            _check_animation(clip, limits)
            if admit:
                admit(_outline(clip.width, clip.height, 1))
            return tuple(_play(clip, getattr(clip, "n_frames", 1), limits))
    with _open_stream(encoded, container, limits) as (source, stream):
        return _read_track(source, stream, limits).times_s


def _judge(encoded: bytes, limits: VideoLimits) -> str | None:
    """Return FFmpeg's name of the container, or None for an animation; raise if it is neither."""
    if len(encoded) > limits.max_bytes:
        raise VideoTooLargeError(
            f"The video has more than the {limits.max_bytes} bytes that one may have. Cut it or "
            "scale it down."
        )
    name = find_format(encoded)
    if name in ANIMATION_FORMATS:
        return None
    # A picture in an MP4 box, such as HEIC, is named and refused instead of played.
    container = _find_container(encoded) if name in (None, A_VIDEO) else None
    if container is None:
        raise _no_container(encoded)
    if container == "mov":
        _check_boxes(encoded)
    return container


def decode_jpeg_frames(
    encoded_frames: Sequence[bytes],
    sampling: FrameSampling = DEFAULT_SAMPLING,
    limits: VideoLimits = VIDEO_LIMITS,
    decode: Callable[[bytes, ImageLimits], RGBImage] = decode_image,
) -> Frames:
    """
    Decode a clip given as JPEG files, one a frame, without times.

    Args:
        decode: `decode_image`, or what does the same elsewhere.

    Raises:
        BadFrameSamplingError: `sampling` asks by seconds, which such frames do not have.
        VideoHasNoFramesError, VideoTooLargeError: none, or too many.
        VideoUnreadableError: the frames differ in size.
        MediaError: as `decode_image`, for the first frame that fails.
    """

    def decode_jpeg(encoded: bytes, still: ImageLimits) -> RGBImage:
        return decode(encoded, replace(still, formats=("JPEG",)))

    return gather_frames(encoded_frames, decode_jpeg, sampling, limits)


def gather_frames(
    sources: Sequence[Source],
    decode: Callable[[Source, ImageLimits], RGBImage],
    sampling: FrameSampling = DEFAULT_SAMPLING,
    limits: VideoLimits = VIDEO_LIMITS,
) -> Frames:
    """
    Make a clip of pictures that lie by themselves, one a frame, without times.

    Args:
        sources: of all frames; `decode` makes a picture of those that are kept, within the limits
            that it is given.

    Raises:
        MediaError: as `decode_jpeg_frames`, and whatever `decode` raises.
    """
    num_source = len(sources)
    indices = choose_untimed(num_source, sampling)
    keep = _Keep(limits, len(indices))
    still = ImageLimits(max_bytes=limits.max_bytes, max_pixels=limits.max_pixels)
    images = []
    for index in indices:
        image = decode(sources[index], still)
        keep.check(image.width_px, image.height_px)
        images.append(image)
    if len({(image.width_px, image.height_px) for image in images}) > 1:
        raise FramesDifferError
    frames = Frames(tuple(images), source_num_frames=num_source, indices=indices)
    return drop_alike(frames, sampling.min_change)


def _outline(width_px: int, height_px: int, num_frames: int) -> Header:
    """
    What the header says; a codec may still turn the frames, or change their size on the way.

    A damaged one may say no size, and the frames have one all the same.
    """
    width_px, height_px = max(width_px, 1), max(height_px, 1)
    frame_px = width_px * height_px
    return Header(width_px, height_px, frame_px * (4 * num_frames + CODEC_BYTES_PER_PX), num_frames)


@dataclass(frozen=True, slots=True)
class _Keep:
    """Judges how many frames, and of what size, are kept of one clip."""

    limits: VideoLimits
    num_frames: int

    def __post_init__(self) -> None:
        if self.num_frames < 1:
            raise VideoHasNoFramesError
        if self.num_frames > self.limits.max_frames:
            raise VideoTooLargeError(
                f"{self.num_frames} frames were asked for; at most {self.limits.max_frames} are "
                "kept of one video. Lower num_frames or fps."
            )

    def check(self, width: int, height: int) -> None:
        if width * height > self.limits.max_pixels:
            raise VideoTooLargeError(
                f"The video's frames are {width}x{height}, more than the "
                f"{self.limits.max_pixels} pixels that one may have. Scale the video down."
            )
        if width * height * self.num_frames > self.limits.max_kept_pixels:
            raise VideoTooLargeError(
                f"{self.num_frames} frames of {width}x{height} are more than the "
                f"{self.limits.max_kept_pixels} pixels that are kept of one video. Lower "
                "num_frames or fps, or scale the video down."
            )


def _find_container(encoded: bytes) -> str | None:
    """Return FFmpeg's name of the container, from its first bytes; FFmpeg is not asked to guess."""
    return next((name for magic, name in _CONTAINERS if magic.match(encoded)), None)


def _no_container(encoded: bytes) -> MediaError:
    if not encoded:
        return VideoUnreadableError("Failed to load video: it has 0 bytes. Send the complete file.")
    name = find_format(encoded)
    if name is None:
        return VideoFormatNotSupportedError(
            f"Failed to load video: the bytes are not {_ACCEPTED}. Check the file, or convert the "
            "clip to MP4 with H.264."
        )
    return VideoFormatNotSupportedError(
        f"Failed to load video: the bytes are {name}, not {_ACCEPTED}. Check what the address "
        "leads to."
    )


def _check_boxes(encoded: bytes) -> None:
    """Raise if an MP4 lacks its index or runs past its end: FFmpeg would play what is there."""
    names, at = set(), 0
    while at + 8 <= len(encoded):
        size, name = int.from_bytes(encoded[at : at + 4], "big"), encoded[at + 4 : at + 8]
        if size == 1:
            size = int.from_bytes(encoded[at + 8 : at + 16], "big")
        if name in (b"moov", b"moof", b"mdat") and at + size > len(encoded):
            raise VideoTruncatedError
        names.add(name)
        if size < 8:  # 0: up to the end of the file; the rest is no size
            break
        at += size
    if b"moov" not in names:
        raise VideoTruncatedError(
            "Failed to load video: its index (moov) is missing, as when a recording or an upload "
            "broke off. Send the complete file."
        )


def _decode_stream(
    encoded: bytes,
    container: str,
    sampling: FrameSampling,
    limits: VideoLimits,
    admit: Admit | None,
) -> Frames:
    with _open_stream(encoded, container, limits) as (source, stream):
        track = _read_track(source, stream, limits)
        wanted = [track.ticks[index] for index in _choose_indices(track, sampling)]
        keep = _Keep(limits, len(wanted))
        size = stream.codec_context.width, stream.codec_context.height
        keep.check(*size)
        if admit:
            admit(_outline(*size, len(wanted)))
        runs = _plan_runs(track, wanted, sampling)
        if track.is_timed:
            with suppress(_SeekLostError):
                seeking = _decode(stream, track, runs, _Seeker(source, stream))
                return _keep_frames(seeking, track, wanted, keep)
    # Without times to seek by, or where seeking does not lead to the frames that were read before.
    with _open_stream(encoded, container, limits) as (source, stream):
        scanning = _decode(stream, track, runs, _Scanner(source, stream))
        return _keep_frames(scanning, track, wanted, keep)


@contextmanager
def _open_stream(
    encoded: bytes, container: str, limits: VideoLimits
) -> Iterator[tuple[InputContainer, VideoStream]]:
    av = _load_av()
    # `protocol_whitelist` names no protocol, so that nothing in the bytes can open anything.
    options = {"format_whitelist": container, "protocol_whitelist": "none"}
    is_open = False
    try:
        with av.open(
            BytesIO(encoded), format=container, options=options, metadata_errors="ignore"
        ) as source:
            stream = _find_stream(source)
            # Clips are decoded side by side, so one thread for each. More of FFmpeg's own hang when
            # a damaged clip is closed while PyAV's logging, off by default, is on (18.1, 2026).
            stream.codec_context.thread_count = 1
            # A guard inside the decoder for what the header hides; twice, since codecs round up.
            stream.codec_context.options = {"max_pixels": str(2 * limits.max_pixels)}
            is_open = True
            yield source, stream
    except av.FFmpegError as error:
        # In opening it, that is what a damaged header leads to: sizes that nobody has memory for.
        if is_open and isinstance(error, MemoryError):
            raise DecodeMemoryError from error
        raise VideoUnreadableError from error


def _load_av() -> ModuleType:
    try:
        import av
    except ImportError as error:
        raise VideoSupportMissingError from error
    return av


def _find_stream(source: InputContainer) -> VideoStream:
    """Return the picture track, which is not the cover of an audio file."""
    cover = 0x400  # AV_DISPOSITION_ATTACHED_PIC
    stream = next((s for s in source.streams.video if not s.disposition & cover), None)
    if stream is None:
        raise VideoHasNoFramesError(
            "The file has no picture track, only sound or data. Check that it is a video."
        )
    if stream.codec_context is None or stream.codec_context.codec.canonical_name not in CODECS:
        raise VideoFormatNotSupportedError(
            f"Failed to load video: its codec is not one of {', '.join(CODECS)}. Convert the clip "
            "to MP4 with H.264."
        )
    return stream


@dataclass(frozen=True, slots=True)
class _Start:
    """
    A packet at which decoding may begin: a key frame, or the clip's first packet, whatever it is.

    Attributes:
        place: of the packet in decoding order, from 0.
        pts, dts: in ticks, as the container stores them.
    """

    place: int
    pts: int | None
    dts: int | None
    is_key: bool


@dataclass(frozen=True, slots=True)
class _Track:
    """
    When the frames of one clip are shown, and where they can be entered; none of their data.

    Attributes:
        shown: for each packet, in decoding order, the tick at which it is shown; None where unknown.
        starts: ascending.
        ticks: when frames are shown, ascending, no two the same.
        times_s: the same in seconds since the first frame.
        tick_s: seconds a tick.
        is_timed: False where the container stores no times of showing (AVI); a tick is then the
            frame's place in the order of showing.
    """

    shown: Sequence[int | None]
    starts: Sequence[_Start]
    ticks: tuple[int, ...]
    times_s: tuple[float, ...]
    tick_s: Fraction
    is_timed: bool

    @property
    def has_only_keys(self) -> bool:
        """Whether each frame stands alone, so that frames are shown in the order of their packets."""
        return len(self.starts) == len(self.shown) and all(start.is_key for start in self.starts)

    def find_keys(self) -> dict[int, _Start]:
        """
        The key frames by their ticks.

        Without times that is the packet's place, a few frames early where others are shown first.
        """
        found = (
            (key.pts if self.is_timed else key.place, key) for key in self.starts if key.is_key
        )
        return {tick: key for tick, key in found if tick is not None}


def _read_track(source: InputContainer, stream: VideoStream, limits: VideoLimits) -> _Track:
    """Read all packets and let go of them: a long clip's would be as large as its file."""
    shown: list[int | None] = []
    starts: list[_Start] = []
    ticks: set[int] = set()
    is_timed = source.format.name != "avi"
    for packet in _demux(source, stream):
        pts = packet.pts  # once: each reading makes a number of its own, and there may be very many
        if packet.is_keyframe or not shown:
            starts.append(_Start(len(shown), pts, packet.dts, packet.is_keyframe))
        shown.append(pts)
        if pts is None:
            is_timed = is_timed and packet.is_discard
        elif not packet.is_discard:
            ticks.add(pts)
        if len(shown) > limits.max_source_frames:
            raise VideoTooLargeError(
                f"The video has more than the {limits.max_source_frames} frames that one may "
                "have. Cut it into parts."
            )
    in_order, tick_s = tuple(sorted(ticks)), stream.time_base
    if not is_timed:
        rate = stream.average_rate or stream.guessed_rate
        in_order = tuple(range(len(shown)))
        tick_s = 1 / rate if rate else None
    if not in_order:
        raise VideoHasNoFramesError
    if not tick_s or tick_s <= 0:
        raise VideoUnreadableError("Failed to load video: it has no frame rate. Save it again.")
    # Not by a float, so that 23 tenths of a second are 2.3.
    first, numerator, denominator = in_order[0], tick_s.numerator, tick_s.denominator
    times_s = tuple((tick - first) * numerator / denominator for tick in in_order)
    track = _Track(shown, starts, in_order, times_s, tick_s, is_timed)
    _check_times(track, limits)
    return track


def _demux(source: InputContainer, stream: VideoStream) -> Iterator[Packet[VideoStream]]:
    """The packets that hold something, from where the source stands to its end."""
    try:
        yield from (packet for packet in source.demux(stream) if packet.size)
    except IndexError:  # PyAV 18.1, at the end of a file in which another stream began on the way
        return


def _check_times(track: _Track, limits: VideoLimits) -> None:
    last_s = track.times_s[-1]
    if last_s > limits.max_duration_s:
        raise VideoTooLargeError(
            f"The video is longer than {limits.max_duration_s:g} seconds. Cut it into parts."
        )
    # A few frames in an instant are no flood, so no less than a second is judged; times are rounded.
    if len(track.ticks) - 1 > limits.max_fps * max(last_s + float(track.tick_s), 1):
        raise VideoTooLargeError(
            f"The video has more than {limits.max_fps:g} frames a second. Save it with fewer."
        )


def _choose_indices(track: _Track, sampling: FrameSampling) -> tuple[int, ...]:
    if not sampling.keyframes:
        return choose_indices(track.times_s, sampling)
    keys = track.find_keys()
    return choose_indices(track.times_s, sampling, [tick in keys for tick in track.ticks])


def _keep_frames(
    decoded: Iterator[tuple[int, VideoFrame]], track: _Track, wanted: Sequence[int], keep: _Keep
) -> Frames:
    images: list[RGBImage] = []
    ticks: list[int] = []
    size: tuple[int, int] | None = None
    reformatter = _load_av().video.reformatter.VideoReformatter()
    for tick, frame in _pick(decoded, wanted):
        keep.check(frame.width, frame.height)
        size = size or (frame.width, frame.height)
        images.append(_as_rgb_image(frame, size, reformatter))
        ticks.append(tick)
    if not images:
        raise VideoUnreadableError
    indices = tuple(bisect_left(track.ticks, tick) for tick in ticks)
    return Frames(
        images=tuple(images),
        times_s=tuple(track.times_s[index] for index in indices),
        fps=_mean_fps(track.times_s),
        source_num_frames=len(track.ticks),
        indices=indices,
    )


def _mean_fps(times_s: Sequence[float]) -> float | None:
    span_s = estimate_span_s(times_s, len(times_s))
    return len(times_s) / span_s if span_s > 0 else None


def _pick(
    frames: Iterator[tuple[int, VideoFrame]], wanted: Sequence[int]
) -> Iterator[tuple[int, VideoFrame]]:
    """Yield for each wanted tick the frame at it, or the first after it, each frame once."""
    num_met = 0
    for tick, frame in frames:
        if tick < wanted[num_met]:
            continue
        yield tick, frame
        num_met = bisect_right(wanted, tick)
        if num_met == len(wanted):
            return


@dataclass(frozen=True, slots=True)
class _Run:
    """
    Packets that are decoded in one go.

    Attributes:
        end: the place behind the last packet that may be needed.
        ticks: of the wanted frames; once one of the last tick, or a later one, is there, it ends.
    """

    start: _Start
    end: int
    ticks: tuple[int, ...]


def _plan_runs(track: _Track, wanted: Sequence[int], sampling: FrameSampling) -> list[_Run]:
    """
    Return what to decode for the wanted ticks, each run from a key frame on.

    A key frame and all packets up to the next one form a group. Frames that are shown before their
    group's key frame need the group before it.
    """
    if sampling.keyframes or (not track.is_timed and track.has_only_keys):
        keys = track.find_keys()
        return [_Run(keys[tick], keys[tick].place + 1, (tick,)) for tick in wanted]
    if not track.is_timed:
        return [_Run(track.starts[0], len(track.shown), tuple(wanted))]
    starts = [start.place for start in track.starts]
    ends = [*starts[1:], len(track.shown)]
    among = set(wanted)
    places = {tick: place for place, tick in enumerate(track.shown) if tick in among}
    runs: list[_Run] = []
    reached = -1  # the group in which the run so far ends
    for tick in wanted:
        group = bisect_right(starts, places[tick]) - 1
        pts = track.starts[group].pts
        first = group - 1 if group and pts is not None and tick < pts else group
        if runs and first <= reached:
            end = ends[max(group, reached)]
            runs[-1] = replace(runs[-1], end=end, ticks=(*runs[-1].ticks, tick))
        else:
            runs.append(_Run(track.starts[first], ends[group], (tick,)))
        reached = max(group, reached)
    return runs


PacketReader = Callable[[_Start], "Iterator[Packet[VideoStream]]"]


def _decode(
    stream: VideoStream, track: _Track, runs: Sequence[_Run], read_from: PacketReader
) -> Iterator[tuple[int, VideoFrame]]:
    """Decode the runs, frame by frame, in order of time."""
    for run in runs:
        packets: Iterator[Packet[VideoStream]]
        packets = islice(read_from(run.start), run.end - run.start.place)
        if track.is_timed and stream.codec_context.has_b_frames:
            packets = _pass_over(stream, packets, run.ticks)
        for place, frame in enumerate(_decode_run(stream, packets), run.start.place):
            tick = frame.pts if track.is_timed else place
            if tick is None or tick > track.ticks[-1]:  # of a damaged clip: no packet says so
                continue
            yield tick, frame
            if tick >= run.ticks[-1]:
                break
        stream.codec_context.flush_buffers()


def _pass_over(
    stream: VideoStream, packets: Iterator[Packet[VideoStream]], ticks: Sequence[int]
) -> Iterator[Packet[VideoStream]]:
    """
    Let the decoder leave out frames that nobody wants and to which no other frame refers.

    Not where it takes frames to come in their order: it learns from these that they do not.
    """
    wanted = set(ticks)
    for packet in packets:
        stream.codec_context.skip_frame = "DEFAULT" if packet.pts in wanted else "NONREF"
        yield packet


def _decode_run(
    stream: VideoStream, packets: Iterator[Packet[VideoStream]]
) -> Iterator[VideoFrame]:
    context = stream.codec_context
    probe_bytes = max(context.width * context.height * 4, LEAST_PROBE_BYTES)
    for packet in chain(packets, (None,)):  # None: hand out what the decoder still holds
        try:
            yield from stream.decode(packet)
        except _load_av().FFmpegError:
            # One damaged packet; its neighbours may do. But H.264 also calls one damaged for whose
            # frame it got no memory (FFmpeg 8, 2026-11), and then there is none for this either. It is
            # not written to: that took 2 ms a packet, and a clip may have 216,000 that are damaged.
            np.empty(probe_bytes, np.uint8)


class _SeekLostError(Exception):
    """A packet is not found again by its time."""


@dataclass(frozen=True, slots=True)
class _Seeker:
    """Reads on from any key frame, found by its time and looked at: what is no key frame is lost."""

    source: InputContainer
    stream: VideoStream

    def __call__(self, start: _Start) -> Iterator[Packet[VideoStream]]:
        target = start.pts if start.dts is None else start.dts
        if target is None:
            raise _SeekLostError
        try:
            self.source.seek(target, stream=self.stream)
        except _load_av().FFmpegError as error:
            raise _SeekLostError from error
        packets = _demux(self.source, self.stream)
        for packet in packets:
            if packet.is_keyframe and packet.pts == start.pts:
                return chain((packet,), packets)
            if packet.dts is not None and packet.dts > target:
                break
        raise _SeekLostError


class _Scanner:
    """Reads all packets from the clip's start, in one pass: the starts must come in their order."""

    def __init__(self, source: InputContainer, stream: VideoStream) -> None:
        self._numbered = enumerate(_demux(source, stream))

    def __call__(self, start: _Start) -> Iterator[Packet[VideoStream]]:
        return (packet for place, packet in self._numbered if place >= start.place)


# Rows of FFmpeg's display matrix (a, b, c, d), where x' = a x + c y and y' = b x + d y, y downwards.
_TURNS = {
    (-1, 0, 0, 1): Image.Transpose.FLIP_LEFT_RIGHT,
    (-1, 0, 0, -1): Image.Transpose.ROTATE_180,
    (1, 0, 0, -1): Image.Transpose.FLIP_TOP_BOTTOM,
    (0, 1, 1, 0): Image.Transpose.TRANSPOSE,
    (0, 1, -1, 0): Image.Transpose.ROTATE_270,
    (0, -1, -1, 0): Image.Transpose.TRANSVERSE,
    (0, -1, 1, 0): Image.Transpose.ROTATE_90,
}


_ROTATIONS = {90: (0, -1, 1, 0), 180: (-1, 0, 0, -1), -180: (-1, 0, 0, -1), -90: (0, 1, -1, 0)}


def _as_rgb_image(
    frame: VideoFrame, size_px: tuple[int, int], reformatter: VideoReformatter
) -> RGBImage:
    """Convert one decoded frame, resampled to (width, height) if it differs, and turn it upright."""
    width, height = size_px
    # One thread: by itself each frame would start as many as there are cores, each with its stack.
    rgb = reformatter.reformat(frame, width, height, "rgb24", threads=1)
    image: Image.Image = rgb.to_image()  # type: ignore[no-untyped-call]
    turn = _TURNS.get(_get_turn(frame))
    return RGBImage(image if turn is None else image.transpose(turn))


def _get_turn(frame: VideoFrame) -> tuple[int, int, int, int]:
    # Not `frame.side_data`, which the frame keeps and which keeps the frame, pixels and all.
    from av.sidedata.sidedata import SideDataContainer

    try:
        matrix: Any = SideDataContainer(frame).get("DISPLAYMATRIX")  # type: ignore[call-arg]
    except (
        ValueError
    ):  # a kind of data that PyAV does not know, such as EXIF: no mirror is seen then
        return _ROTATIONS.get(frame.rotation, (1, 0, 0, 1))
    if matrix is None:
        return (1, 0, 0, 1)
    a, b, _, c, d = (int(sign) for sign in np.sign(np.frombuffer(bytes(matrix), np.int32)[:5]))
    return (a, b, c, d)


@contextmanager
def _open_animation(
    encoded: bytes, limits: VideoLimits, admit: Admit | None = None, most: int | None = None
) -> Iterator[Image.Image]:
    """
    Args:
        admit: asked before a WebP is opened, which takes memory for its canvas; of others later.
        most: frames that are kept.
    """
    canvas_px = find_canvas(encoded)
    if canvas_px is not None:
        _Keep(limits, 1).check(*canvas_px)
        if admit:
            num_source = max(encoded.count(b"ANMF"), 1)
            most_px = limits.max_kept_pixels // max(math.prod(canvas_px), 1)
            admit(_outline(*canvas_px, min(num_source, most or num_source, most_px)))
    try:
        with open_lazily(encoded, ANIMATION_FORMATS) as clip:
            yield clip
    except MediaError:
        raise
    except BOMB_ERRORS as error:
        raise VideoTooLargeError from error
    except DECODER_ERRORS as error:
        if is_cut_short(encoded, find_format(encoded) or ""):
            raise VideoTruncatedError from error
        raise VideoUnreadableError from error


def _check_animation(clip: Image.Image, limits: VideoLimits) -> int:
    """The number of its frames; raises where they are too many to be drawn."""
    num_source: int = getattr(clip, "n_frames", 1)
    if (
        num_source > limits.max_source_frames
        or num_source * clip.width * clip.height > limits.max_animation_pixels
    ):
        raise VideoTooLargeError(
            f"The animation has {num_source} frames of {clip.width}x{clip.height}, more than one "
            "may have. Cut it or scale it down, or send it as MP4."
        )
    return num_source


def _choose_of_animation(
    clip: Image.Image, sampling: FrameSampling, limits: VideoLimits
) -> tuple[int, ...]:
    num_source = _check_animation(clip, limits)
    if sampling.needs_times:
        times_s = tuple(_play(clip, num_source, limits))
        if times_s[-1] > limits.max_duration_s:
            raise VideoTooLargeError
        indices = choose_indices(times_s, sampling)
    else:
        indices = choose_untimed(num_source, sampling)
    _Keep(limits, len(indices)).check(clip.width, clip.height)
    return indices


def _read_animation(
    clip: Image.Image, sampling: FrameSampling, limits: VideoLimits, admit: Admit | None
) -> Frames:
    indices = _choose_of_animation(clip, sampling, limits)
    if admit:
        admit(_outline(clip.width, clip.height, len(indices)))
    clip.seek(0)
    canvas = (0, 0, clip.width, clip.height)
    images, played_s = [], []
    for index, time_s in enumerate(_play(clip, indices[-1] + 1, limits)):
        played_s.append(time_s)
        if index in indices:
            images.append(from_pil(clip.crop(canvas) if clip.size != canvas[2:] else clip))
    return Frames(
        images=tuple(images),
        times_s=tuple(played_s[index] for index in indices),
        fps=_mean_fps(played_s),
        source_num_frames=getattr(clip, "n_frames", 1),
        indices=indices,
    )


_UNTIMED_FRAME_MS = 100.0  # what browsers show a frame for that says 0


def _play(clip: Image.Image, num_frames: int, limits: VideoLimits) -> Iterator[float]:
    """Step through the frames, yielding when each starts, in seconds; `clip` stands on it then."""
    start_ms = 0.0
    for index in range(num_frames):
        clip.seek(index)
        # Before `load`: a later frame may overflow the canvas, which then grows to hold it.
        _Keep(limits, 1).check(clip.width, clip.height)
        clip.load()
        yield start_ms / 1000
        start_ms += float(clip.info.get("duration") or _UNTIMED_FRAME_MS)
