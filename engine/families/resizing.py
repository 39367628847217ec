"""How checkpoints write the size that pictures are brought to, and bringing them there."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from PIL import Image

from engine.families.protocol import ImageTooNarrowError
from media.decoded import Fit

MAX_SQUARE_PIXELS = 40_000_000  # of a picture with its border, while it is resampled
MAX_ASPECT = 200  # a longer strip would be resampled to something far larger than what is seen

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)  # of the pictures that CLIP was trained on
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
# What its image processor does where the checkpoint does not say: CLIP's and LLaVA's own, or SigLIP's.
CLIP_DEFAULT: Mapping[str, Any] = {
    "do_resize": True,
    "do_center_crop": True,
    "do_rescale": True,
    "do_pad": False,
    "size": {"shortest_edge": 224},
    "crop_size": {"height": 224, "width": 224},
    "resample": Image.Resampling.BICUBIC,
    "image_mean": CLIP_MEAN,
    "image_std": CLIP_STD,
}
SIGLIP_DEFAULT: Mapping[str, Any] = {
    **CLIP_DEFAULT,
    "do_center_crop": False,
    "size": {"height": 224, "width": 224},
    "image_mean": (0.5, 0.5, 0.5),
    "image_std": (0.5, 0.5, 0.5),
}


@dataclass(frozen=True, slots=True)
class Resizing:
    """
    Every picture to one size: squashed, or brought to it by its shorter side and cropped.

    Attributes:
        shortest_px: that the shorter side becomes; None where both sides are given.
        height_px, width_px: of the result.
        pads_with: colour of a border that makes a picture square first; None for no border.
        resample: Pillow's number of the filter.
    """

    shortest_px: int | None
    height_px: int
    width_px: int
    pads_with: tuple[int, ...] | None
    resample: Image.Resampling

    @classmethod
    def read(cls, told: Mapping[str, Any]) -> Self:
        """
        Of a preprocessor_config.json over what its image processor does otherwise.

        Raises:
            ValueError: pictures would come out in different sizes.
        """
        if not (told["do_resize"] and told["do_rescale"]):
            raise ValueError("pictures come in all sizes, and colours from 0 to 255")
        size, crop = read_sides(told["size"]), read_sides(told.get("crop_size") or {})
        shortest = size if isinstance(size, int) else None
        if told["do_center_crop"]:
            height_px, width_px = crop if isinstance(crop, tuple) else (crop, crop)
        elif isinstance(size, tuple):
            height_px, width_px = size
        else:
            raise ValueError("the shorter side alone is no size")
        if isinstance(size, tuple) and told["do_center_crop"] and size != (height_px, width_px):
            raise ValueError("squashed to one size and cropped to another")
        pad = tuple(int(255 * level) for level in told["image_mean"]) if told["do_pad"] else None
        return cls(shortest, height_px, width_px, pad, Image.Resampling(told["resample"]))

    def fit(self) -> Fit | None:
        """The whole of it, where a picture is squashed."""
        if self.shortest_px is not None or self.pads_with is not None:
            return None
        return Fit(self.width_px, self.height_px, self.resample)

    def run(self, image: Image.Image) -> Image.Image:
        """A picture in that size; `check_aspect` comes before."""
        if self.pads_with is not None:
            sides = (self.shortest_px or self.height_px, self.shortest_px or self.width_px)
            image = resize_padded(image, *sides, self.pads_with, self.resample)
        if self.shortest_px is None:
            return resize(image, self.height_px, self.width_px, self.resample)
        shorter, longer = min(image.size), max(image.size)
        longer_px = int(self.shortest_px * longer / shorter)
        is_upright = image.width <= image.height
        sides = (longer_px, self.shortest_px) if is_upright else (self.shortest_px, longer_px)
        return crop_centre(resize(image, *sides, self.resample), self.height_px, self.width_px)


def check_aspect(width_px: int, height_px: int) -> None:
    """
    Raises:
        ImageTooNarrowError: one side is over MAX_ASPECT times the other.
    """
    if max(width_px, height_px) > MAX_ASPECT * min(width_px, height_px):
        raise ImageTooNarrowError(f"{width_px}x{height_px}")


def read_sides(size: Mapping[str, int] | int) -> int | tuple[int, int]:
    """(height, width) of a size in any of its forms, or the shorter side where only that is given."""
    if isinstance(size, int):
        return size
    if "height" in size and "width" in size:
        return size["height"], size["width"]
    return size["shortest_edge"]


def resize(
    image: Image.Image, height_px: int, width_px: int, resample: Image.Resampling
) -> Image.Image:
    """The picture itself where it already has the size."""
    if image.size == (width_px, height_px):
        return image
    return image.resize((width_px, height_px), resample)


def crop_centre(image: Image.Image, height_px: int, width_px: int) -> Image.Image:
    """What lies outside of a picture that is too small is black."""
    left, top = (image.width - width_px) // 2, (image.height - height_px) // 2
    return image.crop((left, top, left + width_px, top + height_px))


def resize_padded(
    image: Image.Image,
    height_px: int,
    width_px: int,
    colour: tuple[int, ...],
    resample: Image.Resampling,
) -> Image.Image:
    """
    Resample a picture that a border makes square first.

    The square of a long strip would be a hundred times the strip. Where it is over MAX_SQUARE_PIXELS, the
    longer side is resampled before there is a border: the same up to how the other side is rounded.
    """
    side = max(image.size)
    canvas = side, side
    if side**2 > MAX_SQUARE_PIXELS:
        if image.width >= image.height:
            image, canvas = resize(image, image.height, width_px, resample), (width_px, side)
        else:
            image, canvas = resize(image, height_px, image.width, resample), (side, height_px)
    if image.size != canvas:
        padded = Image.new("RGB", canvas, colour)
        padded.paste(image, ((canvas[0] - image.width) // 2, (canvas[1] - image.height) // 2))
        image = padded
    return resize(image, height_px, width_px, resample)
