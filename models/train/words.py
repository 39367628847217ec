"""Printed words and numbers of one to eight characters, in a few fonts that packages carry."""

import functools
import random
from pathlib import Path

import matplotlib
from PIL import Image, ImageDraw, ImageFont

from engine.families.qwen2_vl import target_size
from models.train.marks import Mark, character_mark
from models.train.scenes import BACKGROUNDS, COLOURS, jitter
from models.train.settings import AREA

FONTS = (
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSerif",
    "DejaVuSerif-Bold",
    "DejaVuSansMono",
    "STIXGeneral",
    "STIXGeneralBol",
)
FONT_FOLDER = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
MAX_CHARACTERS = 8
MIN_GLYPH_SEEN_PX = 13  # height of the font, in pixels, after resampling for the model

LOWER = "abcdefghijklmnopqrstuvwxyz"
DIGITS = "0123456789"
TELLING_LOWER = set("abdefghijmnqrty")  # letters that look different in the other case
VOWELS, CONSONANTS = "aeiou", "bcdfghjklmnprstvwz"
INKS = ("black", "white", *COLOURS)


@functools.cache
def font(name: str, size_px: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(FONT_FOLDER / f"{name}.ttf"), size_px)


def random_word(rng: random.Random, most: int = MAX_CHARACTERS) -> str:
    """A word in one case or a number; never one whose case or kind cannot be told by looking."""
    while True:
        length = rng.randint(1, most)
        kind = rng.random()
        if kind < 0.3:
            word = "".join(rng.choice(DIGITS) for _ in range(length))
            if set(word) - {"0", "1"}:
                return word
            continue
        if kind < 0.6:
            pairs = (rng.choice(CONSONANTS) + rng.choice(VOWELS) for _ in range(4))
            word = "".join(pairs)[rng.randint(0, 1) :][:length]
        else:
            word = "".join(rng.choice(LOWER) for _ in range(length))
        if set(word) & TELLING_LOWER and word not in ("i", "j"):
            return word.upper() if rng.random() < 0.5 else word


def random_size(rng: random.Random) -> tuple[int, int]:
    """Width and height of a sign: wider than high, as text is."""
    height = rng.choice((56, 64, 80, 96, 112, 140, 168, 200, 240))
    aspect = rng.uniform(1.0, 4.5)
    if rng.random() < 0.08:
        height, aspect = rng.randint(240, 500), rng.uniform(0.9, 2.5)
    return max(56, min(1280, round(height * aspect))), height


def draw_word(
    rng: random.Random, word: str, width_px: int, height_px: int
) -> tuple[Image.Image, list[Mark]]:
    """
    The word in one line on a plain ground; large enough to be read after resampling.

    Returns:
        The picture, and where its characters are.
    """
    ground, ink = _contrast(rng)
    image = Image.new("RGB", (width_px, height_px), ground)
    pen = ImageDraw.Draw(image)
    face = rng.choice(FONTS)
    seen = target_size(height_px, width_px, AREA)[0] / height_px
    largest = _largest_size(face, word, width_px, height_px)
    smallest = min(largest, max(9.0, MIN_GLYPH_SEEN_PX / seen * 1.1))
    size = round(rng.uniform(smallest, largest))
    left, top, right, bottom = pen.textbbox((0, 0), word, font=font(face, size))
    x = rng.uniform(2, max(2.0, width_px - (right - left) - 2)) - left
    y = rng.uniform(2, max(2.0, height_px - (bottom - top) - 2)) - top
    pen.text((x, y), word, font=font(face, size), fill=ink)
    middle = (y + (top + bottom) / 2) / height_px
    marks = []
    for index, character in enumerate(word):
        before = font(face, size).getlength(word[:index])
        half = font(face, size).getlength(character) / 2
        marks.append(character_mark(character, (x + before + half) / width_px, middle))
    return image, marks


def _largest_size(face: str, word: str, width_px: int, height_px: int) -> float:
    left, top, right, bottom = font(face, 40).getbbox(word)
    wide, high = max(1.0, right - left), max(1.0, bottom - top)
    return max(9.0, min(40 * (width_px - 6) / wide, 40 * (height_px - 6) / high, height_px * 0.9))


def fits(word: str, width_px: int, height_px: int) -> bool:
    """Whether the word can be drawn large enough to be read in a picture of this size."""
    seen = target_size(height_px, width_px, AREA)[0] / height_px
    return min(_largest_size(face, word, width_px, height_px) for face in FONTS) * seen >= (
        MIN_GLYPH_SEEN_PX * 1.1
    )


def _contrast(rng: random.Random) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    palette = {**BACKGROUNDS, **COLOURS}
    while True:
        ground = jitter(rng, palette[rng.choice(list(palette))], 10)
        ink = jitter(rng, palette[rng.choice(INKS)], 10)
        if abs(_luma(ground) - _luma(ink)) > 70:
            return ground, ink


def _luma(colour: tuple[int, int, int]) -> float:
    return 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]


def reading(word: str) -> str:
    return f'The text reads "{word}".'
