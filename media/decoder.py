"""
What turns encoded bytes into pixels: `Threads` here, or processes in `media.pool`.

Both give the same pixels by the same functions. Threads cost nothing to start and are for files of
one's own; whoever decodes what strangers send takes processes.
"""

from dataclasses import replace
from typing import Protocol

from media.decoded import Ask, Fit, Frames, RGBImage
from media.frames import FrameSampling
from media.images import decode_image
from media.limits import IMAGE_LIMITS, VIDEO_LIMITS, ImageLimits, VideoLimits
from media.video import DEFAULT_SAMPLING, decode_video, measure_clip


class Decoder(Protocol):
    """Several threads may ask at once."""

    def decode_image(
        self, encoded: bytes, limits: ImageLimits | None = None, ask: Ask | None = None
    ) -> RGBImage:
        """As `media.images.decode_image`; without `limits` within those that it was made with."""

    def decode_video(
        self,
        encoded: bytes,
        sampling: FrameSampling = DEFAULT_SAMPLING,
        limits: VideoLimits = VIDEO_LIMITS,
        ask: Ask | None = None,
    ) -> Frames:
        """As `media.video.decode_video`; `ask` is asked once, when the frames are there."""

    def measure_clip(self, encoded: bytes) -> tuple[float, ...]:
        """As `media.video.measure_clip`: when its frames are shown."""

    def close(self) -> None: ...


class Threads:
    """
    Decodes in the thread that asks.

    Args:
        image_limits: of images for which a call brings none.
    """

    def __init__(self, image_limits: ImageLimits = IMAGE_LIMITS) -> None:
        self._image_limits = image_limits

    def decode_image(
        self, encoded: bytes, limits: ImageLimits | None = None, ask: Ask | None = None
    ) -> RGBImage:
        return decode_image(encoded, limits or self._image_limits, ask)

    def decode_video(
        self,
        encoded: bytes,
        sampling: FrameSampling = DEFAULT_SAMPLING,
        limits: VideoLimits = VIDEO_LIMITS,
        ask: Ask | None = None,
    ) -> Frames:
        return fit_frames(decode_video(encoded, sampling, limits), ask)

    def measure_clip(self, encoded: bytes) -> tuple[float, ...]:
        return measure_clip(encoded)

    def close(self) -> None:
        """Nothing is open."""


def fit_frames(frames: Frames, ask: Ask | None) -> Frames:
    """Resample a clip's frames to the size that is wanted."""
    fit = ask(frames.header) if ask else None
    if fit is None or (fit.width_px, fit.height_px) == (frames.width_px, frames.height_px):
        return frames
    return replace(frames, images=tuple(_resample(image, fit) for image in frames.images))


def _resample(image: RGBImage, fit: Fit) -> RGBImage:
    return RGBImage(image.image.resize((fit.width_px, fit.height_px), fit.resample))
