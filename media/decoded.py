"""
What decoding gives: one picture or the frames of one clip, in RGB, upright and opaque.

The engine imports this file, so it knows neither files nor formats: `media.images` and
`media.video` make these values from bytes.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image


@dataclass(frozen=True, slots=True, eq=False)
class RGBImage:
    """
    One decoded picture as a person would see it: turned upright, transparency laid on white.

    It wraps a Pillow image because the engine resamples with Pillow, which frees the GIL there.
    Nobody else holds that image and nobody may change it; two values are equal only if they are
    the same object.

    Attributes:
        image: mode RGB, loaded, with no metadata.
    """

    image: Image.Image

    def __post_init__(self) -> None:
        if self.image.mode != "RGB":
            raise ValueError(
                "RGBImage wraps a Pillow image in mode RGB: use media.images.from_pil."
            )

    @property
    def width_px(self) -> int:
        return self.image.width

    @property
    def height_px(self) -> int:
        return self.image.height

    def pixels(self) -> npt.NDArray[np.uint8]:
        """Return a fresh (height_px, width_px, 3) array, uint8, that the caller may write to."""
        return np.array(self.image)


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
    def width_px(self) -> int:
        return self.images[0].width_px

    @property
    def height_px(self) -> int:
        return self.images[0].height_px

    def pixels(self) -> npt.NDArray[np.uint8]:
        """Return a fresh (num_frames, height_px, width_px, 3) array, uint8."""
        return np.stack([image.pixels() for image in self.images])
