"""
Frames that look like the one kept before them: found, and left out.

The measure is cheap and has a unit. Both frames are shrunk to 32 x 32 pixels in colour and cut into
16 equal fields; the change is the mean absolute difference of the field that differs most, in levels
of 0 to 255. A field, since a small thing that moves hardly shows in the mean of a whole picture;
colour, since red on grey may be grey on grey. Each frame is compared with the last one that was
kept, so that a slow movement adds up until it is seen.

Drawn clips through H.264 (2026-11): a still scene changes by less than 0.5, with the noise of a
camera (sigma 3) by up to 1.7, and a shape that comes, goes or moves by 3.5 or more in the end.
"""

from dataclasses import replace

import numpy as np
import numpy.typing as npt
from PIL import Image

from media.decoded import Frames, RGBImage

_THUMBNAIL_PX = 32
_FIELDS = 4  # on each side


def drop_alike(frames: Frames, min_change: float | None) -> Frames:
    """
    Leave out each frame whose change from the last kept one is below `min_change`.

    The first frame is always kept. None keeps all, and `num_dropped` is then None as well.
    """
    if min_change is None:
        return frames
    kept, last = [], None
    for place, image in enumerate(frames.images):
        thumbnail = _shrink(image)
        if last is None or _measure_change(last, thumbnail) >= min_change:
            kept.append(place)
            last = thumbnail
    return replace(
        frames,
        images=tuple(frames.images[place] for place in kept),
        times_s=frames.times_s and tuple(frames.times_s[place] for place in kept),
        indices=frames.indices and tuple(frames.indices[place] for place in kept),
        num_dropped=frames.num_frames - len(kept),
    )


def measure_change(before: RGBImage, after: RGBImage) -> float:
    """How much two pictures of one size differ, 0 to 255."""
    return _measure_change(_shrink(before), _shrink(after))


def _shrink(image: RGBImage) -> npt.NDArray[np.int16]:
    size = (_THUMBNAIL_PX, _THUMBNAIL_PX)
    return np.asarray(image.image.resize(size, Image.Resampling.BOX), np.int16)


def _measure_change(before: npt.NDArray[np.int16], after: npt.NDArray[np.int16]) -> float:
    side = _THUMBNAIL_PX // _FIELDS
    fields = np.abs(before - after).reshape(_FIELDS, side, _FIELDS, side, 3)
    return float(fields.mean(axis=(1, 3, 4)).max())
