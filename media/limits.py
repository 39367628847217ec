"""
How much media one item may bring, in bytes, pixels, seconds and frames: frozen values.

They are judged before the costly step they guard: bytes before parsing, pixels before
decompressing, frames before decoding. An operator may widen them; each says what it is for.
"""

from dataclasses import dataclass

MEBIBYTE = 1024 * 1024

STILL_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "AVIF")
"""Read by default, in Pillow's words. One place to widen, so nobody is handed a rare decoder."""

OPT_IN_FORMATS = ("TIFF", "HEIC")
"""
Read only where an operator asks: TIFF brings a dozen compressions, each with its own past, and HEIC the
extra `heic` with a video codec of its own.
"""

MOST_PIXELS = 178_956_970
"""Twice Pillow's own cap, from where on it decodes nothing. What is no JPEG asks for more memory than one
decoding may have from some 119 megapixels on."""


@dataclass(frozen=True, slots=True)
class ImageLimits:
    """
    What one still image may be.

    There is no cap on the frames of an animated image: only its first frame is ever decoded.

    Attributes:
        max_bytes: encoded. A 40-megapixel camera JPEG has 10 to 25 MB; an 8-bit PNG of a
            photograph that size stays below 100 MB and is refused: send JPEG.
        max_pixels: 40 megapixels are 120 MB as RGB. No supported model looks at more than a
            fraction of it. Pillow itself only warns, and from 89 megapixels on.
        max_side_px: the longest side that JPEG can express; Pillow's resampling tables grow
            with it.
        max_aspect: longer side over shorter side. Qwen-VL's sizing refuses more than 200 as well.
        max_jpeg_scans: a progressive JPEG has some ten scans. Each one more costs a pass over all
            pixels, so that a small file could hold a core for minutes.
        formats: of `STILL_FORMATS` and `OPT_IN_FORMATS`, those that are read.
    """

    max_bytes: int = 64 * MEBIBYTE
    max_pixels: int = 40_000_000
    max_side_px: int = 65_535
    max_aspect: float = 200.0
    max_jpeg_scans: int = 100
    formats: tuple[str, ...] = STILL_FORMATS

    def __post_init__(self) -> None:
        unknown = set(self.formats) - {*STILL_FORMATS, *OPT_IN_FORMATS}
        if unknown or not self.formats:
            known = ", ".join((*STILL_FORMATS, *OPT_IN_FORMATS))
            raise ValueError(f"ImageLimits.formats takes one or more of {known}.")


IMAGE_LIMITS = ImageLimits()


@dataclass(frozen=True, slots=True)
class VideoLimits:
    """
    What one clip may be, and how much of it may be kept.

    Attributes:
        max_bytes: encoded.
        max_duration_s: from the first frame to the last. Longer clips are cut by the sender.
        max_source_frames: frames in the clip, an hour at 60 a second: each may have to be decoded.
        max_fps: frames a second, on average over the clip, or in a second of a shorter one.
        max_pixels: one frame; 8K as cameras have it, 8192 x 4320.
        max_frames: kept of one clip. More than any supported model is trained to look at.
        max_kept_pixels: all kept frames together; three bytes each, so 0.9 GB.
        max_animation_pixels: all frames of an animated GIF, WebP or PNG together. They have no
            key frames to skip to: each frame is drawn, in one thread, some 100 million a second.
    """

    max_bytes: int = 256 * MEBIBYTE
    max_duration_s: float = 3_600.0
    max_source_frames: int = 216_000
    max_fps: float = 240.0
    max_pixels: int = 8192 * 4320
    max_frames: int = 768
    max_kept_pixels: int = 300_000_000
    max_animation_pixels: int = 500_000_000


VIDEO_LIMITS = VideoLimits()


@dataclass(frozen=True, slots=True)
class FetchLimits:
    """
    How long, how often and how wide the fetcher may reach out.

    Attributes:
        connect_timeout_s: look-up and connection; and once more for the TLS handshake.
        whole_timeout_s: one fetch with all its tries, redirects and waits; or as long as one try may
            take, where an operator allows that more.
        min_bytes_per_s: of a body, on average over each `min_rate_window_s`.
        max_header_bytes: of one answer, with the 1xx answers before it.
        max_redirects: of one try; 0: a redirect is an error like any other status.
        max_tries: in one fetch. An item has more of them later.
            A try that ran out of time is the last one: a host that is slow now is slow in a second.
        retry_wait_s: before the second try, doubled for each further one; as much again by chance.
        max_retry_after_s: a server that asks for more patience is left alone in this fetch.
        max_pause_s: so long at most a host is left alone by all fetches when it asks one for patience.
        max_connections_per_host: at once, from this process; an eighth of these, and of all, is kept for
            the fast lane.
        max_connections_per_item: at once, for the media of one item.
        max_connections: at once, to all hosts.
        keep_alive_s: how long a connection waits for more work.
        remember_failures_s: so long the same URL fails again without being asked for.
        remember_passing_s: the same where it may work later, and so long its items are told to wait: or
            each would spend its tries on what is remembered. A host that asks for patience gets it, and
            nothing of it is remembered.
        max_remembered_failures: the oldest is forgotten first.
        max_silences: a host that has let so many fetches in a row run out of time, or could not be
            reached by them, is left alone for `host_rest_s`. Then one fetch asks how it is.
    """

    connect_timeout_s: float = 5.0
    whole_timeout_s: float = 30.0
    min_bytes_per_s: int = 1024
    min_rate_window_s: float = 10.0
    max_header_bytes: int = 64 * 1024
    max_redirects: int = 3
    max_tries: int = 3
    retry_wait_s: float = 0.5
    max_retry_after_s: float = 10.0
    max_pause_s: float = 300.0
    max_connections_per_host: int = 8
    max_connections_per_item: int = 8
    max_connections: int = 160
    keep_alive_s: float = 15.0
    remember_failures_s: float = 60.0
    remember_passing_s: float = 10.0
    max_remembered_failures: int = 10_000
    max_silences: int = 3
    host_rest_s: float = 30.0


FETCH_LIMITS = FetchLimits()
