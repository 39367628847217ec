"""
Drawn scenes: one to four shapes on a plain background, with a caption and questions about them.

Everything a sentence says is known from the drawing, so an answer is right or wrong to the letter.
"""

import io
import math
import random
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from engine.families.qwen2_vl import target_size
from models.train.settings import AREA

SHAPES = ("circle", "square", "triangle", "star", "cross")
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 36, 36),
    "orange": (246, 134, 28),
    "yellow": (246, 220, 50),
    "green": (40, 156, 66),
    "blue": (40, 88, 216),
    "purple": (132, 52, 172),
    "pink": (246, 138, 190),
    "brown": (118, 72, 36),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (248, 248, 248),
    "grey": (150, 150, 150),
    "black": (16, 16, 16),
    "beige": (232, 214, 180),
}
NUMBERS = ("none", "one", "two", "three", "four", "five", "six", "seven", "eight")
ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "centre", "right")

MAX_ASPECT_OF_GRID = 2.2  # beyond it the picture has one row (or one column) of places
MIN_SHAPE_PX = 9  # smallest shape in the picture as it is drawn
MIN_SHAPE_SEEN_PX = 13  # and after it was resampled for the model
SMALL, LARGE = (0.17, 0.21), (0.28, 0.33)  # diameter as a share of the picture's side
SMALL_STRIP, LARGE_STRIP = (0.40, 0.50), (0.74, 0.86)  # the same, where there is one row of places
COLOUR_JITTER = 10
NOISE_POOL = np.random.default_rng(7).normal(0, 1, (1600, 1600)).astype(np.float32)

Turn = tuple[str, str]  # question, answer


def place_name(row: int, column: int) -> str:
    """The words for one of the nine places, as they stand after "at the"."""
    if row == 1:
        return ("left", "centre", "right")[column]
    return f"{ROWS[row]} {COLUMNS[column]}" if column != 1 else ROWS[row]


@dataclass(frozen=True, slots=True)
class Thing:
    """One shape. `x` and `y` are its centre and `diameter` its size, in pixels of the picture."""

    shape: str
    colour: str
    size: str
    row: int
    column: int
    x: float = 0.0
    y: float = 0.0
    diameter: float = 0.0

    @property
    def noun(self) -> str:
        return f"{self.colour} {self.shape}"

    @property
    def phrase(self) -> str:
        return with_article(f"{self.size} {self.noun}")

    @property
    def place(self) -> str:
        return place_name(self.row, self.column)


@dataclass(frozen=True, slots=True)
class Scene:
    """What a picture shows. Things stand in reading order."""

    width_px: int
    height_px: int
    background: str
    things: tuple[Thing, ...]


def with_article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def listed(phrases: list[str]) -> str:
    if len(phrases) == 1:
        return phrases[0]
    return f"{', '.join(phrases[:-1])} and {phrases[-1]}"


# --- what is in it -------------------------------------------------------------------------------


def random_size(rng: random.Random) -> tuple[int, int]:
    """Width and height, 56 to 1280 pixels a side; most are small, since most of the time goes there."""
    if rng.random() < 0.12:
        return log_uniform(rng, 56, 1280), log_uniform(rng, 56, 1280)
    side = log_uniform(rng, 72, 360)
    aspect = math.exp(rng.uniform(-0.7, 0.7))
    width, height = side * math.sqrt(aspect), side / math.sqrt(aspect)
    return max(56, min(1280, round(width))), max(56, min(1280, round(height)))


def log_uniform(rng: random.Random, low: float, high: float) -> int:
    return round(math.exp(rng.uniform(math.log(low), math.log(high))))


def places(width_px: int, height_px: int) -> list[tuple[int, int]]:
    """The places, as (row, column), that a picture of this size has room for."""
    if width_px > MAX_ASPECT_OF_GRID * height_px:
        return [(1, column) for column in range(3)]
    if height_px > MAX_ASPECT_OF_GRID * width_px:
        return [(row, 1) for row in range(3)]
    return [(row, column) for row in range(3) for column in range(3)]


def sizes_that_can_be_seen(width_px: int, height_px: int) -> list[str]:
    """`small` only where a small shape still has enough pixels to be told apart."""
    strip = max(width_px, height_px) > MAX_ASPECT_OF_GRID * min(width_px, height_px)
    smallest = (SMALL_STRIP if strip else SMALL)[0] * min(width_px, height_px)
    seen = smallest * target_size(height_px, width_px, AREA)[0] / height_px
    if smallest < MIN_SHAPE_PX or seen < MIN_SHAPE_SEEN_PX:
        return ["large"]
    return ["small", "large"]


def random_scene(
    rng: random.Random, width_px: int, height_px: int, num_things: int | None = None
) -> Scene:
    free = places(width_px, height_px)
    num_things = min(num_things or rng.randint(1, 4), len(free))
    spots = sorted(rng.sample(free, num_things))
    sizes = sizes_that_can_be_seen(width_px, height_px)
    things = tuple(
        put(
            rng,
            width_px,
            height_px,
            Thing(rng.choice(SHAPES), rng.choice(list(COLOURS)), rng.choice(sizes), row, column),
        )
        for row, column in spots
    )
    return Scene(width_px, height_px, rng.choice(list(BACKGROUNDS)), things)


def put(rng: random.Random, width_px: int, height_px: int, thing: Thing) -> Thing:
    """Give a thing its pixels: size, and a centre somewhere inside its place."""
    strip = max(width_px, height_px) > MAX_ASPECT_OF_GRID * min(width_px, height_px)
    small, large = (SMALL_STRIP, LARGE_STRIP) if strip else (SMALL, LARGE)
    diameter = rng.uniform(*(small if thing.size == "small" else large)) * min(width_px, height_px)
    across, down = width_px / 3, height_px / 3
    x = _inside(rng, thing.column * across, across, diameter, width_px)
    y = (
        _inside(rng, thing.row * down, down, diameter, height_px)
        if not (strip and width_px > height_px)
        else _inside(rng, 0, height_px, diameter, height_px)
    )
    if strip and height_px > width_px:
        x = _inside(rng, 0, width_px, diameter, width_px)
    return replace(thing, x=x, y=y, diameter=diameter)


def _inside(rng: random.Random, start: float, room: float, diameter: float, limit: float) -> float:
    """A centre that keeps a shape inside its place, or in the middle of a place that is too tight."""
    slack = max(0.0, room - diameter) / 2
    middle = start + room / 2 + rng.uniform(-slack, slack)
    return min(max(middle, diameter / 2 + 1), limit - diameter / 2 - 1)


# --- pixels --------------------------------------------------------------------------------------


def draw_scene(rng: random.Random, scene: Scene) -> Image.Image:
    """A clean picture of the scene, smoothed at the edges most of the time."""
    zoom = 2 if scene.width_px * scene.height_px < 200_000 and rng.random() < 0.75 else 1
    size = (scene.width_px * zoom, scene.height_px * zoom)
    image = Image.new("RGB", size, jitter(rng, BACKGROUNDS[scene.background], 6))
    pen = ImageDraw.Draw(image)
    for thing in scene.things:
        draw_thing(pen, thing, jitter(rng, COLOURS[thing.colour], COLOUR_JITTER), zoom)
    return image.reduce(2) if zoom == 2 else image


def jitter(rng: random.Random, colour: tuple[int, int, int], amount: int) -> tuple[int, int, int]:
    red, green, blue = (
        min(255, max(0, channel + rng.randint(-amount, amount))) for channel in colour
    )
    return red, green, blue


def draw_thing(
    pen: ImageDraw.ImageDraw, thing: Thing, fill: tuple[int, int, int], zoom: int
) -> None:
    x, y, half = thing.x * zoom, thing.y * zoom, thing.diameter * zoom / 2
    if thing.shape == "circle":
        pen.ellipse((x - half, y - half, x + half, y + half), fill=fill)
    elif thing.shape == "square":
        side = half * 0.86
        pen.rectangle((x - side, y - side, x + side, y + side), fill=fill)
    elif thing.shape == "cross":
        arm = half * 0.32
        pen.rectangle((x - half, y - arm, x + half, y + arm), fill=fill)
        pen.rectangle((x - arm, y - half, x + arm, y + half), fill=fill)
    else:
        pen.polygon(_corners(thing.shape, x, y, half), fill=fill)


def _corners(shape: str, x: float, y: float, half: float) -> list[tuple[float, float]]:
    if shape == "triangle":
        return [(x, y - half), (x + half, y + half * 0.8), (x - half, y + half * 0.8)]
    return [
        (
            x + half * (1.0 if point % 2 == 0 else 0.42) * math.sin(point * math.pi / 5),
            y - half * (1.0 if point % 2 == 0 else 0.42) * math.cos(point * math.pi / 5),
        )
        for point in range(10)
    ]


def weather(rng: random.Random, image: Image.Image) -> Image.Image:
    """What happens to pictures on their way: noise, JPEG, a change of brightness, or nothing."""
    if rng.random() < 0.5:
        image = add_noise(rng, image, rng.uniform(1, 9))
    if rng.random() < 0.35:
        image = through_jpeg(image, rng.randint(45, 95))
    return image


def add_noise(rng: random.Random, image: Image.Image, sigma: float) -> Image.Image:
    width, height = image.size
    top, left = rng.randrange(1600 - height + 1), rng.randrange(1600 - width + 1)
    noise = NOISE_POOL[top : top + height, left : left + width, None] * sigma
    pixels: npt.NDArray[np.float32] = np.asarray(image, dtype=np.float32) + noise
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def through_jpeg(image: Image.Image, quality: int) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file).convert("RGB")


# --- words ---------------------------------------------------------------------------------------


def caption(scene: Scene) -> str:
    if not scene.things:
        return sentence(f"nothing on a {scene.background} background")
    parts = [f"{thing.phrase} at the {thing.place}" for thing in scene.things]
    return sentence(f"{listed(parts)} on a {scene.background} background")


def short_caption(scene: Scene) -> str:
    return listed([with_article(thing.noun) for thing in scene.things])


def questions(rng: random.Random, scene: Scene) -> list[Turn]:
    """One question of every kind that has exactly one right answer for this scene."""
    return [turn for ask in _ASKERS for turn in ask(rng, scene)]


def _ask_colour(rng: random.Random, scene: Scene) -> list[Turn]:
    unique = [t for t in scene.things if _count(scene, shape=t.shape) == 1]
    return [(f"What colour is the {t.shape}?", sentence(t.colour)) for t in _one_of(rng, unique)]


def _ask_size(rng: random.Random, scene: Scene) -> list[Turn]:
    unique = [t for t in scene.things if _count(scene, shape=t.shape) == 1]
    return [(f"What size is the {t.shape}?", sentence(t.size)) for t in _one_of(rng, unique)]


def _ask_place(rng: random.Random, scene: Scene) -> list[Turn]:
    unique = [t for t in scene.things if _count(scene, shape=t.shape, colour=t.colour) == 1]
    return [
        (
            f"Where is the {t.shape if _count(scene, shape=t.shape) == 1 else t.noun}?",
            sentence(f"at the {t.place}"),
        )
        for t in _one_of(rng, unique)
    ]


def _ask_what_is_at(rng: random.Random, scene: Scene) -> list[Turn]:
    taken = {(t.row, t.column): t for t in scene.things}
    free = [spot for spot in places(scene.width_px, scene.height_px) if spot not in taken]
    spot = rng.choice(free) if free and rng.random() < 0.25 else rng.choice(list(taken))
    answer = taken[spot].phrase if spot in taken else "nothing"
    return [(f"What is at the {place_name(*spot)}?", sentence(answer))]


def _ask_count(rng: random.Random, scene: Scene) -> list[Turn]:
    shape = rng.choice([t.shape for t in scene.things] + [rng.choice(SHAPES)])
    colour = rng.choice([t.colour for t in scene.things] + [rng.choice(list(COLOURS))])
    plural = {"cross": "crosses"}.get(shape, f"{shape}s")
    return [
        ("How many shapes are there?", sentence(NUMBERS[len(scene.things)])),
        (f"How many {plural} are there?", sentence(NUMBERS[_count(scene, shape=shape)])),
        (
            f"How many {colour} shapes are there?",
            sentence(NUMBERS[_count(scene, colour=colour)]),
        ),
    ]


def _ask_presence(rng: random.Random, scene: Scene) -> list[Turn]:
    thing = rng.choice(scene.things)
    shape, colour = thing.shape, thing.colour
    if rng.random() < 0.5:
        shape, colour = rng.choice(SHAPES), rng.choice(list(COLOURS))
    answer = "yes" if _count(scene, shape=shape, colour=colour) else "no"
    return [(f"Is there {with_article(f'{colour} {shape}')}?", sentence(answer))]


def _ask_neighbour(rng: random.Random, scene: Scene) -> list[Turn]:
    anchors = [t for t in scene.things if _count(scene, shape=t.shape) == 1]
    turns: list[Turn] = []
    for anchor in _one_of(rng, anchors):
        for words, beyond in _SIDES:
            found = [t for t in scene.things if beyond(t, anchor)]
            if len(found) <= 1:
                answer = found[0].phrase if found else "nothing"
                turns.append((f"What is {words} the {anchor.shape}?", sentence(answer)))
    return rng.sample(turns, min(2, len(turns)))


_SIDES = (
    ("left of", lambda t, anchor: t.column < anchor.column),
    ("right of", lambda t, anchor: t.column > anchor.column),
    ("above", lambda t, anchor: t.row < anchor.row),
    ("below", lambda t, anchor: t.row > anchor.row),
)


def _ask_background(_: random.Random, scene: Scene) -> list[Turn]:
    return [("What colour is the background?", sentence(scene.background))]


_ASKERS = (
    _ask_colour,
    _ask_size,
    _ask_place,
    _ask_what_is_at,
    _ask_count,
    _ask_presence,
    _ask_neighbour,
    _ask_background,
)


def _count(scene: Scene, shape: str | None = None, colour: str | None = None) -> int:
    return sum(
        (shape is None or t.shape == shape) and (colour is None or t.colour == colour)
        for t in scene.things
    )


def _one_of(rng: random.Random, things: list[Thing]) -> list[Thing]:
    return [rng.choice(things)] if things else []
