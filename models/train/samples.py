"""
Make samples/: what `darkroom demo` shows, and what a first `darkroom caption samples/` finds.

`python -m models.train.samples` draws scenes, a word and a clip from seeds that training never
uses, so their true sentences are known, and copies photographs out of scikit-image. It writes
`expected.json` beside them. samples/README.md says where the photographs come from.
"""

import argparse
import json
import random
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

from models.train import motion, photos, scenes, words

FOLDER = Path(__file__).parents[2] / "samples"
JPEG_QUALITY = 90
PHOTO = "photo"  # in expected.json: nobody drew it, so no sentence about it is the only true one
CLIP_NAME = "clip.mp4"
CLIP_SIZE_PX = (320, 240)
NUM_FRAMES = 24
FRAMES_PER_S = 10


@dataclass(frozen=True, slots=True)
class Drawing:
    """A scene to draw; `noise` is the standard deviation that a poor camera adds, 0 to 255."""

    name: str
    width_px: int
    height_px: int
    num_things: int
    noise: float = 0.0


DRAWINGS = (
    Drawing("one.png", 160, 120, 1),
    Drawing("two.jpg", 300, 300, 2),
    Drawing("three-noisy.jpg", 280, 210, 3, noise=7.0),
    Drawing("four.png", 320, 240, 4),
    Drawing("small.png", 64, 64, 1),
    Drawing("tall.png", 110, 300, 2),
    Drawing("wide.jpg", 480, 160, 3),
    Drawing("large.jpg", 1280, 800, 3),
)
WORD_NAME, WORD, WORD_SIZE_PX = "word.png", "darkroom", (360, 96)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--out", type=Path, default=FOLDER, help="where to write")
    folder: Path = parser.parse_args().out
    folder.mkdir(parents=True, exist_ok=True)
    expected = {drawing.name: save_scene(folder, drawing) for drawing in DRAWINGS}
    expected[WORD_NAME] = save_word(folder)
    expected[CLIP_NAME] = save_clip(folder)
    expected |= dict.fromkeys(save_photos(folder), PHOTO)
    text = json.dumps(expected, indent=2, ensure_ascii=False)
    (folder / "expected.json").write_text(f"{text}\n", encoding="utf-8")


def save_scene(folder: Path, drawing: Drawing) -> str:
    """Draw one scene and return its true sentence."""
    rng = seeded(drawing.name)
    scene = colourful_scene(rng, drawing)
    picture = scenes.draw_scene(rng, scene)
    if drawing.noise:
        picture = scenes.add_noise(rng, picture, drawing.noise)
    save(folder / drawing.name, picture)
    return scenes.caption(scene)


def colourful_scene(rng: random.Random, drawing: Drawing) -> scenes.Scene:
    """The first scene with no colour twice: these pictures are there to be looked at, too."""
    while True:
        scene = scenes.random_scene(rng, drawing.width_px, drawing.height_px, drawing.num_things)
        if len({thing.colour for thing in scene.things}) == drawing.num_things:
            return scene


def seeded(name: str) -> random.Random:
    return random.Random(f"samples/{name}")


def save(path: Path, picture: Image.Image) -> None:
    if path.suffix == ".png":
        picture.save(path, optimize=True)
    else:
        picture.save(path, quality=JPEG_QUALITY, optimize=True)


def save_word(folder: Path) -> str:
    save(folder / WORD_NAME, words.draw_word(seeded(WORD_NAME), WORD, *WORD_SIZE_PX)[0])
    return words.reading(WORD)


def save_clip(folder: Path) -> str:
    """A red ball rolls from the left to the right, and a star stays where it is."""
    rng = seeded(CLIP_NAME)
    start = scenes.put(rng, *CLIP_SIZE_PX, scenes.Thing("circle", "red", "large", 1, 0))
    end = scenes.put(rng, *CLIP_SIZE_PX, replace(start, column=2))
    star = scenes.put(rng, *CLIP_SIZE_PX, scenes.Thing("star", "blue", "large", 0, 1))
    scene = scenes.Scene(*CLIP_SIZE_PX, "beige", (star,))
    clip = motion.Clip(scene, "moves", start, replace(end, diameter=start.diameter), 0.5)
    encode(folder / CLIP_NAME, motion.draw_clip(rng, clip, NUM_FRAMES))
    return motion.describe(clip)


def encode(path: Path, frames: list[Image.Image]) -> None:
    """MP4 with H.264, as phones write it; one thread, so that the same frames give the same file."""
    with av.open(path, "w") as container:
        stream = container.add_stream("libx264", rate=FRAMES_PER_S)
        stream.width, stream.height = CLIP_SIZE_PX
        stream.pix_fmt = "yuv420p"
        stream.time_base = Fraction(1, FRAMES_PER_S)
        stream.options = {"crf": "20", "threads": "1"}
        for index, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.asarray(picture), format="rgb24")
            frame.pts = index
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def save_photos(folder: Path) -> list[str]:
    """Photographs that training never sees, as JPEG, and their names."""
    names = []
    for name, photo in zip(
        photos.HELD_OUT_PHOTOS, photos.load_photos(photos.HELD_OUT_PHOTOS), strict=True
    ):
        names.append(f"{Path(name).stem}.jpg")
        save(folder / names[-1], photo)
    return names


if __name__ == "__main__":
    main()
