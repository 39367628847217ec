"""From bytes to patches, as the engine does it, against transformers' PIL image processor."""

import functools
import random
from io import BytesIO

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageOps
from transformers import Qwen2VLImageProcessorPil

from engine.families.protocol import AreaLimits, ImageTooNarrowError
from engine.families.qwen2_vl import (
    MERGE,
    PATCH_PX,
    Grid,
    cut_patches,
    double_frames,
    resample,
    target_size,
)
from media.decoded import RGBImage
from media.images import decode_image, from_pil

# One level of 255 is what we promise. Both resample with Pillow, so only float rounding is left.
TOLERANCE = 1e-6  # of a channel that runs from 0 to 1
NUM_PER_MODE = 22
OPAQUE = ("RGB", "L", "1", "P", "CMYK")
TRANSPARENT = ("RGBA", "LA", "PA", "P with a key")
MODES = (*OPAQUE, *TRANSPARENT, "I;16")
FORMATS = {  # None: never encoded, handed over as a Pillow image
    "RGB": ("JPEG", "PNG", "WEBP", "BMP", None),
    "L": ("JPEG", "PNG", None),
    "1": ("PNG", "BMP", None),
    "P": ("PNG", "GIF", None),
    "CMYK": ("JPEG", None),
    "RGBA": ("PNG", "WEBP", None),
    "LA": ("PNG", None),
    "PA": (None,),
    "P with a key": ("PNG", "GIF", None),
    "I;16": ("PNG", None),
}
KEEP_EXIF = ("JPEG", "PNG", "WEBP", None)
AREAS = (
    AreaLimits(),
    AreaLimits(56 * 56, 28 * 28 * 16),
    AreaLimits(28 * 28 * 12, 28 * 28 * 80),
    AreaLimits(28 * 28, 28 * 28 * 4),
)


def test_200_random_images_equal_the_pil_processor_pixel_for_pixel() -> None:
    largest, worst, num_images = 0.0, "", 0
    for seed, (mode, picture) in enumerate(random_pictures()):
        rng = random.Random(seed)
        area = rng.choice(AREAS)
        encoded_as = rng.choice(FORMATS[mode])
        original = picture if encoded_as is None else _reopened(picture, encoded_as)
        ours = (
            from_pil(picture) if encoded_as is None else decode_image(_encoded(picture, encoded_as))
        )
        patches = _cut(ours, area)

        for oracle in (ours.image, *_as_transformers_sees(original, mode)):
            expected, grid = _cut_by_processor(oracle, area)
            assert len(patches) == len(expected) == grid.num_patches
            difference = float(np.abs(patches - expected).max())
            if difference > largest:
                largest = difference
                worst = f"seed {seed}: {mode} as {encoded_as}, {picture.size}, {area}"
        num_images += 1

    assert num_images >= 200
    assert largest <= TOLERANCE, (
        f"of {num_images} images, {worst} differs by {largest * 255} levels"
    )


def _as_transformers_sees(original: Image.Image, mode: str) -> list[Image.Image]:
    """What to hand its processor, in the original's own mode wherever that one can read it."""
    upright = ImageOps.exif_transpose(original)
    if mode == "I;16":  # the exception that docs/vllm.md names: its processor clips at 255
        levels = np.asarray(upright).astype(np.uint16)
        return [Image.fromarray((levels >> 8).astype(np.uint8)).convert("RGB")]
    if mode in OPAQUE:
        return [upright.convert("RGB")]
    return [upright] if _lays_on_white() else []


@functools.cache
def _lays_on_white() -> bool:
    """transformers 5.17 drops transparency; 5.23 lays it on white."""
    clear = Image.new("RGBA", (28, 28), (0, 0, 0, 0))
    patches, _ = _cut_by_processor(clear, AreaLimits(28 * 28, 28 * 28))
    return bool(patches.min() > 0.99)


def test_16_bit_grey_keeps_its_high_byte_where_the_processor_clips() -> None:
    levels = np.repeat([[0, 255, 256, 30_000, 65_535]], 5, axis=0).astype(np.uint16)
    picture = Image.fromarray(levels)

    assert [0, 0, 1, 117, 255] == from_pil(picture).pixels()[0, :, 0].tolist()
    assert [0, 255, 255, 255, 255] == np.asarray(picture.convert("L"))[0].tolist()


def _cut(picture: RGBImage, area: AreaLimits) -> npt.NDArray[np.float64]:
    height_px, width_px = target_size(picture.height_px, picture.width_px, area)
    pixels = np.asarray(resample(picture.image, height_px, width_px))
    return double_frames(cut_patches(pixels)).reshape(-1, 3, 2 * PATCH_PX**2) / 255


def _cut_by_processor(
    picture: Image.Image, area: AreaLimits
) -> tuple[npt.NDArray[np.float64], Grid]:
    """Its patches with the normalisation undone, so that differences count in pixels."""
    processor = _processor(area)
    cut = processor([picture], return_tensors="np")
    mean, std = (
        np.array(values)[:, None] for values in (processor.image_mean, processor.image_std)
    )
    patches = cut["pixel_values"].reshape(-1, 3, 2 * PATCH_PX**2) * std + mean
    return patches, Grid(*cut["image_grid_thw"][0].tolist())


def _processor(area: AreaLimits) -> Qwen2VLImageProcessorPil:
    size = {"shortest_edge": area.min_pixels, "longest_edge": area.max_pixels}
    return Qwen2VLImageProcessorPil(size=size)


@functools.cache
def random_pictures() -> list[tuple[str, Image.Image]]:
    """The mode asked for, and a picture in it."""
    modes = enumerate(MODES * NUM_PER_MODE)
    return [(mode, _draw(random.Random(f"picture {seed}"), mode)) for seed, mode in modes]


def _draw(rng: random.Random, mode: str) -> Image.Image:
    """Blurred blocks with noise, in the mode, with one of EXIF's eight orientations."""
    width_px, height_px = _random_size(rng)
    noise = np.random.default_rng(rng.getrandbits(32))
    blocks = noise.integers(0, 256, (height_px // 24 + 1, width_px // 24 + 1, 4), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(blocks).resize((width_px, height_px)), dtype=np.float64)
    pixels = np.clip(smooth + noise.normal(0, 12, smooth.shape), 0, 255).astype(np.uint8)
    picture = _in_mode(Image.fromarray(pixels), mode)
    picture.getexif()[ExifTags.Base.Orientation] = rng.randint(1, 8)
    return picture


def _in_mode(rgba: Image.Image, mode: str) -> Image.Image:
    if mode == "I;16":
        levels = np.asarray(rgba.convert("L")).astype(np.uint16) * 257
        return Image.fromarray(levels)
    if mode == "P":
        return rgba.convert("RGB").quantize(60)
    if mode == "PA":
        palette = rgba.convert("RGB").quantize(60).convert("PA")
        palette.putalpha(rgba.getchannel("A"))
        return palette
    if mode == "P with a key":
        palette = rgba.convert("RGB").quantize(60)
        palette.info["transparency"] = 7
        return palette
    return rgba.convert("RGB").convert(mode) if mode in OPAQUE else rgba.convert(mode)


def _random_size(rng: random.Random) -> tuple[int, int]:
    chance = rng.random()
    if chance < 0.1:
        sides = [1, rng.randint(1, 200)]
    elif chance < 0.25:  # up to the longest that is still allowed
        shorter = rng.randint(1, 6)
        sides = [shorter, rng.randint(shorter * 60, shorter * 200)]
    elif chance < 0.4:  # where rounding to whole tokens tips over
        sides = [28 * rng.randint(1, 9) + rng.choice((-1, 0, 13, 14, 15)) for _ in range(2)]
    else:
        sides = [rng.randint(2, 420) for _ in range(2)]
    rng.shuffle(sides)
    return sides[0], sides[1]


def _encoded(picture: Image.Image, encoded_as: str) -> bytes:
    file = BytesIO()
    options = {"exif": picture.getexif()} if encoded_as in KEEP_EXIF else {}
    picture.save(file, encoded_as, **options)
    return file.getvalue()


def _reopened(picture: Image.Image, encoded_as: str) -> Image.Image:
    return Image.open(BytesIO(_encoded(picture, encoded_as)))


def test_random_images_cover_what_the_test_above_promises() -> None:
    pictures = [picture for _, picture in random_pictures()]
    sizes = [picture.size for picture in pictures]
    orientations = {picture.getexif()[ExifTags.Base.Orientation] for picture in pictures}

    assert {"RGB", "L", "1", "P", "PA", "CMYK", "RGBA", "LA", "I;16"} == {p.mode for p in pictures}
    assert set(range(1, 9)) == orientations
    assert 10 <= sum(1 in size for size in sizes)
    assert 10 <= sum(max(size) >= 60 * min(size) for size in sizes)


def _sides() -> st.SearchStrategy[tuple[int, int]]:
    side = st.integers(1, 8000) | st.integers(1, 60)
    return st.tuples(side, side)


@given(sides=_sides(), area=st.sampled_from(AREAS))
def test_number_of_placeholders_is_the_processors(sides: tuple[int, int], area: AreaLimits) -> None:
    assume(max(sides) <= 200 * min(sides))
    height_px, width_px = target_size(*sides, area)
    grid = Grid(1, height_px // PATCH_PX, width_px // PATCH_PX)

    assert _processor(area).get_number_of_image_patches(*sides) // MERGE**2 == grid.num_tokens


@pytest.mark.parametrize("sides", [(1, 201), (601, 3), (10, 2001), (9000, 40)])
def test_more_than_200_to_1_is_refused_by_both(sides: tuple[int, int]) -> None:
    with pytest.raises(ImageTooNarrowError):
        target_size(*sides, AreaLimits())
    with pytest.raises(ValueError, match="aspect ratio"):
        _processor(AreaLimits()).get_number_of_image_patches(*sides)


@pytest.mark.parametrize("sides", [(1, 200), (200, 1), (35, 7000)])
def test_200_to_1_is_taken_by_both(sides: tuple[int, int]) -> None:
    height_px, width_px = target_size(*sides, AreaLimits())

    assert height_px * width_px // PATCH_PX**2 == _processor(
        AreaLimits()
    ).get_number_of_image_patches(*sides)
