"""
What decoding gives: one picture or the frames of one clip, in RGB, upright and opaque.

The engine imports this file, so it knows neither files nor formats: `media.images` and
`media.video` make these values from bytes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt
from PIL import Image


@dataclass(frozen=True, slots=True)
class Header:
    """
    What is known of a picture or clip before its pixels are there.

    Attributes:
        width_px, height_px: of the picture or of each frame, turned upright.
        work_bytes: what decoding it may hold at a time, roughly and rather too much.
        num_frames: that will be kept; 1 for a picture.
        times_s, frame_s, duration_s: as in `Frames`.
    """

    width_px: int
    height_px: int
    work_bytes: int = 0
    num_frames: int = 1
    times_s: tuple[float, ...] | None = None
    frame_s: float | None = None
    duration_s: float | None = None


@dataclass(frozen=True, slots=True)
class Fit:
    """
    The size to which pictures are resampled as soon as they are decoded, and by which filter.

    Attributes:
        may_draft: whether a JPEG of twice the size or more may be decoded at a half, a quarter or an
            eighth, and resampled from there: faster, with slightly other pixels.
    """

    width_px: int
    height_px: int
    resample: Image.Resampling = Image.Resampling.BICUBIC
    may_draft: bool = False

    def __post_init__(self) -> None:
        if self.width_px < 1 or self.height_px < 1:
            raise ValueError("Fit takes sides of 1 pixel or more.")


Ask = Callable[[Header], Fit | None]
"""Called before pixels are decoded; None wants them as they are. What it raises ends the decoding."""


class RGBImage:
    """
    One decoded picture as a person would see it: turned upright, transparency laid on white.

    It wraps a Pillow image, because the engine resamples with Pillow, which frees the GIL there; or
    the pixels alone, where another process has decoded them. Nobody else holds either and nobody may
    change it; two values are equal only if they are the same object.

    Args:
        image: mode RGB, loaded, with no metadata.
    """

    __slots__ = ("_image", "_pixels")

    _image: Image.Image | None
    _pixels: npt.NDArray[np.uint8] | None

    def __init__(self, image: Image.Image) -> None:
        if image.mode != "RGB":
            raise ValueError(
                "RGBImage wraps a Pillow image in mode RGB: use media.images.from_pil."
            )
        self._image, self._pixels = image, None

    @classmethod
    def of_pixels(cls, pixels: npt.NDArray[np.uint8]) -> Self:
        """Wrap (height_px, width_px, 3), uint8, which is not copied."""
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or not pixels.size:
            raise ValueError("RGBImage.of_pixels takes (height, width, 3), uint8.")
        made = cls.__new__(cls)
        made._image, made._pixels = None, pixels
        return made

    @property
    def is_bare(self) -> bool:
        """Whether it is pixels alone."""
        return self._pixels is not None

    @property
    def image(self) -> Image.Image:
        """As a Pillow image; of bare pixels a copy is made, once."""
        if self._image is None:
            self._image = Image.fromarray(self.view())
        return self._image

    @property
    def width_px(self) -> int:
        return self._image.width if self._image is not None else self.view().shape[1]

    @property
    def height_px(self) -> int:
        return self._image.height if self._image is not None else self.view().shape[0]

    def view(self) -> npt.NDArray[np.uint8]:
        """Return (height_px, width_px, 3), uint8, to be read only; bare pixels are not copied."""
        return np.asarray(self._image) if self._pixels is None else self._pixels

    @property
    def header(self) -> Header:
        return Header(self.width_px, self.height_px)

    def pixels(self) -> npt.NDArray[np.uint8]:
        """Return a fresh (height_px, width_px, 3) array, uint8, that the caller may write to."""
        return np.array(self.view())


@dataclass(frozen=True, slots=True, eq=False)
class Frames:
    """
    The frames kept of one clip, in the order of time.

    Attributes:
        images: one or more pictures, all of one size.
        times_s: when each is shown, in seconds from the clip's first frame, exact where the
            container says so; None for bare frames that never had a time.
        fps: frames a second of the source, on average; None where unknown.
        source_num_frames: how many frames the source has; None where unknown.
        indices: the place of each kept frame in the source, from 0; None where unknown.
        num_dropped: frames that were left out since they look like the one before; None where
            nobody asked for that.
    """

    images: tuple[RGBImage, ...]
    times_s: tuple[float, ...] | None = None
    fps: float | None = None
    source_num_frames: int | None = None
    indices: tuple[int, ...] | None = None
    num_dropped: int | None = None

    def __post_init__(self) -> None:
        sizes = {(image.width_px, image.height_px) for image in self.images}
        if len(sizes) != 1:
            raise ValueError("Frames takes one picture or more, all of one size.")
        for per_frame in (self.times_s, self.indices):
            if per_frame is not None and len(per_frame) != len(self.images):
                raise ValueError("Frames takes one time and one index for each picture, or none.")

    @property
    def num_frames(self) -> int:
        return len(self.images)

    @property
    def frame_s(self) -> float | None:
        """Seconds of the source for which each of these frames stands; None where unknown."""
        if self.fps and self.indices is not None:
            return (self.indices[-1] - self.indices[0] + 1) / self.fps / self.num_frames
        if self.times_s is not None and self.num_frames > 1:
            return (self.times_s[-1] - self.times_s[0]) / (self.num_frames - 1)
        return None

    @property
    def duration_s(self) -> float | None:
        """Seconds of the whole source, whichever frames were kept; None where unknown."""
        if self.fps and self.source_num_frames is not None:
            return self.source_num_frames / self.fps
        return None

    @property
    def width_px(self) -> int:
        return self.images[0].width_px

    @property
    def height_px(self) -> int:
        return self.images[0].height_px

    @property
    def header(self) -> Header:
        """What a file's header would say of these frames."""
        return Header(
            self.width_px,
            self.height_px,
            num_frames=self.num_frames,
            times_s=self.times_s,
            frame_s=self.frame_s,
            duration_s=self.duration_s,
        )

    def pixels(self) -> npt.NDArray[np.uint8]:
        """Return a fresh (num_frames, height_px, width_px, 3) array, uint8."""
        return np.stack([image.pixels() for image in self.images])
