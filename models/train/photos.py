"""
Photographs: what so small a model can know about one, measured from its pixels.

`look` measures; `statement` says it in words; `untrue_clauses` judges one with a margin, since a
photograph on the border between two words may be called by either.
"""

import colorsys
import functools
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from models.train.scenes import Turn, sentence

VIEW_PX = 48  # a photograph is judged on a box-filtered view of this many pixels a side
DARK_BELOW, BRIGHT_ABOVE = 85.0, 150.0  # mean luma, 0 to 255
NIGHT_BELOW, DAY_ABOVE = 58.0, 95.0
LOW_CONTRAST_BELOW, HIGH_CONTRAST_ABOVE = 30.0, 60.0  # standard deviation of luma
BUSY_ABOVE = 11.0  # mean absolute luma difference of neighbouring pixels of the view
MARGIN = 0.12  # a word is true while the measure is within this share of its border
CLAUSES = (1, 2, 5, 8, 9, 13, 18)  # where the words of a statement vary
COLOUR_MARGIN = 0.75  # a colour is true while it covers this share of what the commonest covers
NAMES = (
    "black",
    "white",
    "grey",
    "red",
    "orange",
    "yellow",
    "green",
    "blue",
    "purple",
    "pink",
    "brown",
)


@dataclass(frozen=True, slots=True)
class Look:
    """Measures of one photograph. Shares: (3 thirds from the top, len(NAMES)), each row sums to 1."""

    luma: float
    contrast: float
    detail: float
    shares: npt.NDArray[np.float64]
    left_minus_right: float

    def colour(self, third: int) -> str:
        return NAMES[int(self.shares[third].argmax())]

    @property
    def main_colour(self) -> str:
        return NAMES[int(self.shares.sum(axis=0).argmax())]


@functools.cache
def _name_table() -> npt.NDArray[np.uint8]:
    """The colour word of each colour, on a grid of 32 steps a channel."""
    table = np.zeros((32, 32, 32), dtype=np.uint8)
    for red in range(32):
        for green in range(32):
            for blue in range(32):
                table[red, green, blue] = NAMES.index(
                    _name((red + 0.5) / 32, (green + 0.5) / 32, (blue + 0.5) / 32)
                )
    return table


def _name(red: float, green: float, blue: float) -> str:
    hue, saturation, value = colorsys.rgb_to_hsv(red, green, blue)
    degrees = hue * 360
    if value < 0.2:
        return "black"
    if saturation < 0.17:
        return "white" if value > 0.78 else "black" if value < 0.25 else "grey"
    if degrees < 14 or degrees >= 340:
        return "pink" if saturation < 0.5 and value > 0.7 else "red" if value > 0.4 else "brown"
    if degrees < 42:
        return "orange" if value > 0.7 and saturation > 0.5 else "brown"
    if degrees < 68:
        return "yellow" if value > 0.55 else "brown" if degrees < 50 else "green"
    if degrees < 165:
        return "green"
    if degrees < 258:
        return "blue"
    return "purple" if degrees < 300 else "pink" if value > 0.6 else "purple"


def look(image: Image.Image) -> Look:
    view = np.asarray(image.resize((VIEW_PX, VIEW_PX), Image.Resampling.BOX), dtype=np.uint8)
    luma = view.astype(np.float64) @ np.array([0.299, 0.587, 0.114])
    steps = (np.abs(np.diff(luma, axis=0)).mean() + np.abs(np.diff(luma, axis=1)).mean()) / 2
    names = _name_table()[view[..., 0] >> 3, view[..., 1] >> 3, view[..., 2] >> 3]
    thirds = [np.bincount(third.ravel(), minlength=len(NAMES)) for third in np.split(names, 3)]
    shares = np.stack([third / third.sum() for third in thirds])
    halves = luma[:, : VIEW_PX // 2].mean() - luma[:, VIEW_PX // 2 :].mean()
    return Look(float(luma.mean()), float(luma.std()), float(steps), shares, float(halves))


def brightness(seen: Look) -> str:
    if seen.luma < DARK_BELOW:
        return "dark"
    return "bright" if seen.luma > BRIGHT_ABOVE else "medium-bright"


def daytime(seen: Look) -> str:
    return "night" if seen.luma < NIGHT_BELOW else "day" if seen.luma > DAY_ABOVE else "dusk"


def contrast(seen: Look) -> str:
    if seen.contrast < LOW_CONTRAST_BELOW:
        return "low"
    return "high" if seen.contrast > HIGH_CONTRAST_ABOVE else "medium"


def detail(seen: Look) -> str:
    return "busy" if seen.detail > BUSY_ABOVE else "plain"


def statement(seen: Look) -> str:
    """The whole description: every clause of it is a measure, none a guess at what is shown."""
    return sentence(
        f"a {brightness(seen)}, {detail(seen)} photo with {contrast(seen)} contrast, "
        f"by {daytime(seen)}: {seen.colour(0)} at the top, {seen.colour(1)} in the middle "
        f"and {seen.colour(2)} at the bottom"
    )


def questions(rng: random.Random, seen: Look) -> list[Turn]:
    """Questions about single measures, each with the word that the measure falls under."""
    third = rng.randrange(3)
    where = ("at the top", "in the middle", "at the bottom")[third]
    turns = [
        ("How bright is the photo?", sentence(brightness(seen))),
        ("Is the photo busy or plain?", sentence(detail(seen))),
        ("How high is the contrast?", sentence(contrast(seen))),
        ("Is it day or night?", sentence(daytime(seen))),
        (f"What colour is it {where}?", sentence(seen.colour(third))),
        ("What is the main colour?", sentence(seen.main_colour)),
    ]
    if abs(seen.left_minus_right) > 8:
        side = "left" if seen.left_minus_right > 0 else "right"
        turns.append(("Which side is brighter?", sentence(f"the {side}")))
    return rng.sample(turns, 4)


def untrue_clauses(text: str, seen: Look) -> list[str]:
    """
    The clauses of a statement that are false of a photograph, each judged with its margin.

    Returns:
        The names of the false clauses; ["form"] when the text is no statement at all.
    """
    words = text.rstrip(".").replace(",", "").replace(":", "").split()
    expected = statement(seen).rstrip(".").replace(",", "").replace(":", "").split()
    if len(words) != len(expected):
        return ["form"]
    said = {
        "brightness": words[1],
        "detail": words[2],
        "contrast": words[5],
        "daytime": words[8],
        "top": words[9],
        "middle": words[13],
        "bottom": words[18],
    }
    false = [name for name, allowed in _allowed(seen).items() if said[name] not in allowed]
    frame = [w for i, w in enumerate(words) if i not in CLAUSES]
    right = [w for i, w in enumerate(expected) if i not in CLAUSES]
    return false if frame == right else ["form"]


def _allowed(seen: Look) -> dict[str, set[str]]:
    """For each clause, the words that are true of the photograph within the margin."""

    def near(value: float, border: float) -> bool:
        return abs(value - border) <= MARGIN * border

    def between(value: float, words: tuple[str, ...], borders: tuple[float, ...]) -> set[str]:
        right = {words[sum(value > border for border in borders)]}
        for index, border in enumerate(borders):
            if near(value, border):
                right |= {words[index], words[index + 1]}
        return right

    allowed = {
        "detail": between(seen.detail, ("plain", "busy"), (BUSY_ABOVE,)),
        "brightness": between(
            seen.luma, ("dark", "medium-bright", "bright"), (DARK_BELOW, BRIGHT_ABOVE)
        ),
        "contrast": between(
            seen.contrast, ("low", "medium", "high"), (LOW_CONTRAST_BELOW, HIGH_CONTRAST_ABOVE)
        ),
        "daytime": between(seen.luma, ("night", "dusk", "day"), (NIGHT_BELOW, DAY_ABOVE)),
    }
    for third, name in enumerate(("top", "middle", "bottom")):
        most = seen.shares[third].max()
        allowed[name] = {
            NAMES[index]
            for index, share in enumerate(seen.shares[third])
            if share >= COLOUR_MARGIN * most
        }
    return allowed


# --- photo-like pictures to learn from -------------------------------------------------------------

TRAINING_PHOTOS = (
    "china.jpg",
    "flower.jpg",
    "hubble_deep_field.jpg",
    "ihc.png",
    "motorcycle_left.png",
    "retina.jpg",
    "grass.png",
    "gravel.png",
    "brick.png",
)
SHARE_REAL = 0.4  # of the photographs in training; there are few, and they would be learnt by heart
HELD_OUT_PHOTOS = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg")


def photo_folders() -> list[Path]:
    """Where packages keep photographs: scikit-image and scikit-learn."""
    import skimage
    import sklearn

    return [
        Path(skimage.__file__).parent / "data",
        Path(sklearn.__file__).parent / "datasets" / "images",
    ]


@functools.cache
def load_photos(names: tuple[str, ...]) -> list[Image.Image]:
    found = []
    for name in names:
        for folder in photo_folders():
            if (folder / name).is_file():
                found.append(Image.open(folder / name).convert("RGB"))
    return found


def random_photo(
    rng: random.Random,
    width_px: int,
    height_px: int,
    names: tuple[str, ...],
    share_real: float = SHARE_REAL,
) -> Image.Image:
    """A piece of a real photograph or, for the rest, an invented landscape or texture."""
    photos = load_photos(names)
    if photos and rng.random() < share_real:
        image = _piece(rng, rng.choice(photos), width_px, height_px)
    else:
        image = _invented(rng, width_px, height_px)
    return _graded(rng, image)


def _piece(rng: random.Random, photo: Image.Image, width_px: int, height_px: int) -> Image.Image:
    most = min(photo.width / width_px, photo.height / height_px)
    scale = most * rng.uniform(0.25, 1.0)
    width, height = max(1, int(width_px * scale)), max(1, int(height_px * scale))
    left, top = rng.randint(0, photo.width - width), rng.randint(0, photo.height - height)
    piece = photo.resize(
        (width_px, height_px), Image.Resampling.BILINEAR, (left, top, left + width, top + height)
    )
    return piece.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else piece


def _graded(rng: random.Random, image: Image.Image) -> Image.Image:
    """Another light: exposure, contrast, saturation and, now and then, other colours."""
    if rng.random() < 0.25:
        return image
    pixels = np.asarray(image, dtype=np.float32)
    if rng.random() < 0.35:
        pixels = pixels[..., rng.sample(range(3), 3)]
    grey = pixels.mean(axis=2, keepdims=True)
    pixels = grey + (pixels - grey) * rng.uniform(0.2, 1.7)
    mean = pixels.mean()
    pixels = (pixels - mean) * rng.uniform(0.3, 1.4) + mean
    if rng.random() < 0.7:
        pixels = pixels + (rng.uniform(15, 235) - mean) * rng.uniform(0.0, 1.0)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


@functools.cache
def _clouds() -> npt.NDArray[np.float32]:
    """Fields of 1/f noise, (num_fields, 128, 128), zero mean and unit deviation, of varied roughness."""
    source = np.random.default_rng(11)
    frequency = np.hypot(np.fft.fftfreq(128)[:, None], np.fft.rfftfreq(128)[None, :])
    frequency[0, 0] = 1.0
    fields = []
    for index in range(96):
        spectrum = np.fft.rfft2(source.normal(size=(128, 128))) / frequency ** (
            0.7 + index % 6 * 0.3
        )
        spectrum[0, 0] = 0
        field = np.fft.irfft2(spectrum, s=(128, 128))
        fields.append(field / field.std())
    return np.stack(fields).astype(np.float32)


def _cloud(rng: random.Random) -> npt.NDArray[np.float32]:
    field = _clouds()[rng.randrange(96)]
    return np.roll(field, (rng.randrange(128), rng.randrange(128)), (0, 1))[:: rng.choice((1, -1))]


def _invented(rng: random.Random, width_px: int, height_px: int) -> Image.Image:
    """Bands of colour with rough borders and cloudy light, as landscapes and tables have."""
    canvas = np.empty((128, 128, 3), dtype=np.float32)
    canvas[:] = _colour(rng)
    down = np.arange(128, dtype=np.float32)[:, None]
    for _ in range(rng.randint(0, 3)):
        border = rng.uniform(10, 118) + _cloud(rng)[0][None, :] * rng.uniform(0, 14)
        canvas = np.where((down > border)[..., None], _colour(rng), canvas)
    for _ in range(rng.randint(0, 3)):
        patch = _cloud(rng) > rng.uniform(0.3, 2.2)
        canvas = np.where(patch[..., None], _colour(rng), canvas)
    light = _cloud(rng) * rng.uniform(0, 38) + (down - 64) * rng.uniform(-0.7, 0.7)
    tint = _cloud(rng)[..., None] * np.array([rng.uniform(-14, 14) for _ in range(3)])
    pixels = np.clip(canvas + light[..., None] + tint, 0, 255).astype(np.uint8)
    return Image.fromarray(pixels).resize((width_px, height_px), Image.Resampling.BILINEAR)


def _colour(rng: random.Random) -> npt.NDArray[np.float32]:
    if rng.random() < 0.3:
        return np.full(3, rng.uniform(0, 255), dtype=np.float32)
    hue, saturation, value = rng.random(), rng.random() ** 0.7, rng.uniform(0.1, 1.0)
    return np.array(colorsys.hsv_to_rgb(hue, saturation, value), dtype=np.float32) * 255
