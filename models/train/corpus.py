"""
Samples of every kind: pictures, or the frames of one clip, and several turns about them.

What is drawn, how large, and what is asked about it; `packing.py` makes batches of them.
"""

import random
from dataclasses import dataclass

from PIL import Image

from engine.families.qwen2_vl import target_size
from models.train import motion, photos, scenes, words
from models.train.marks import Mark, scene_marks
from models.train.scenes import NUMBERS, Turn, listed, sentence, with_article
from models.train.settings import AREA, SYSTEM_PROMPT

DESCRIBE = (
    "Describe the image.",
    "Describe this image.",
    "Describe the picture.",
    "Describe the photo.",
    "Describe.",
    "Caption this image.",
    "Write a caption.",
    "What is in this image?",
    "What's in this image?",
    "What is in the image?",
    "What is in the picture?",
    "What is the content of this image?",
    "What does the image show?",
    "What do you see?",
    "Describe this image in one sentence.",
)
DESCRIBE_EACH = (
    "Describe each image.",
    "Describe the images.",
    "Describe these images.",
    "What is in each image?",
    "What is in these images?",
    "What's in these images?",
    "What is the content of each image?",
)
DESCRIBE_CLIP = (
    "What happens?",
    "What happens in the video?",
    "What happens in this clip?",
    "What happens in these frames?",
    "Describe the video.",
    "Describe this video.",
    "Describe this clip.",
    "Describe what happens.",
    "Describe this set of frames.",
    "Describe this set of frames. Consider the frames to be a part of the same video.",
)
READ = ("What does it say?", "What is written here?", "Read the text.", "What does the text say?")
NO_IMAGE = "There is no image."
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")

MAX_TURNS = 5
# kinds of samples and how often each is drawn: once it sees, and while it learns to
OFTEN = {"scene": 30, "word": 25, "images": 14, "video": 12, "motion": 10, "photo": 8, "text": 1}
OFTEN_EASY = {"scene": 45, "word": 35, "photo": 9, "images": 5, "video": 3, "motion": 2, "text": 1}
EXACT_SHARE = 0.5  # of drawings have a size at once that the model takes: they are drawn fast


@dataclass(frozen=True, slots=True)
class Sample:
    """
    Attributes:
        pictures: RGB; the frames in order when `is_video`.
        turns: questions about them, each with its only right answer.
        marks: for each picture, what stands where; None where it is no drawing.
    """

    kind: str
    pictures: list[Image.Image]
    turns: list[Turn]
    marks: list[list[Mark] | None]
    is_video: bool = False


# --- samples -------------------------------------------------------------------------------------


def scene_sample(rng: random.Random, size: tuple[int, int], most: int = 4) -> Sample:
    scene = scenes.random_scene(rng, *size, num_things=rng.randint(1, most))
    picture = scenes.weather(rng, scenes.draw_scene(rng, scene))
    asked = scenes.questions(rng, scene)
    turns = [(rng.choice(DESCRIBE), scenes.caption(scene))]
    turns += rng.sample(asked, min(MAX_TURNS, len(asked)))
    return Sample("scene", [picture], turns, [scene_marks(scene)])


def word_sample(
    rng: random.Random, size: tuple[int, int], most: int = words.MAX_CHARACTERS
) -> Sample:
    word = fitting_word(rng, size, most)
    picture, marks = words.draw_word(rng, word, *size)
    turn = (rng.choice((*READ, *DESCRIBE)), words.reading(word))
    return Sample("word", [scenes.weather(rng, picture)], [turn], [marks])


def fitting_word(
    rng: random.Random, size: tuple[int, int], most: int = words.MAX_CHARACTERS
) -> str:
    word = words.random_word(rng, most)
    while not words.fits(word, *size):
        word = words.random_word(rng, most)
    return word


def photo_sample(
    rng: random.Random,
    size: tuple[int, int],
    names: tuple[str, ...] = photos.TRAINING_PHOTOS,
    share_real: float = photos.SHARE_REAL,
) -> Sample:
    picture = photos.random_photo(rng, *size, names, share_real)
    if rng.random() < 0.3:
        picture = scenes.through_jpeg(picture, rng.randint(60, 95))
    seen = photos.look(picture)
    turns = [(rng.choice(DESCRIBE), photos.statement(seen)), *photos.questions(rng, seen)]
    return Sample("photo", [picture], turns, [None])


def images_sample(
    rng: random.Random,
    sizes: list[tuple[int, int]],
    names: tuple[str, ...] = photos.TRAINING_PHOTOS,
) -> Sample:
    """One to eight pictures, most of them scenes, and questions about their order."""
    pictures, captions, shorts, drawn = [], [], [], []
    all_marks: list[list[Mark] | None] = []
    for size in sizes:
        chance = rng.random()
        scene = None
        marks: list[Mark] | None
        if chance < 0.12:
            word = fitting_word(rng, size)
            picture, marks = words.draw_word(rng, word, *size)
            caption, short = words.reading(word), f'the text "{word}"'
        elif chance < 0.22:
            picture, marks = photos.random_photo(rng, *size, names), None
            caption, short = photos.statement(photos.look(picture)), "a photo"
        else:
            scene = scenes.random_scene(rng, *size, num_things=rng.choice((1, 1, 2, 3)))
            picture, marks = scenes.draw_scene(rng, scene), scene_marks(scene)
            caption, short = scenes.caption(scene), scenes.short_caption(scene)
        pictures.append(scenes.weather(rng, picture))
        captions.append(caption)
        shorts.append(short)
        drawn.append(scene)
        all_marks.append(marks)
    return Sample("images", pictures, _order_turns(rng, captions, shorts, drawn), all_marks)


def _order_turns(
    rng: random.Random, captions: list[str], shorts: list[str], drawn: list[scenes.Scene | None]
) -> list[Turn]:
    count = len(captions)
    each = " ".join(f"Image {i + 1} shows {short}." for i, short in enumerate(shorts))
    turns = [(rng.choice(DESCRIBE_EACH), each)] if count > 1 else []
    asked: list[Turn] = [("How many images are there?", sentence(NUMBERS[count]))]
    for index in rng.sample(range(count), min(2, count)):
        which = rng.choice((f"image {index + 1}", f"the {ORDINALS[index]} image"))
        verb = rng.choice(("What is in", "What does", "Describe"))
        asked.append(
            (
                {
                    "What is in": f"What is in {which}?",
                    "What does": f"What does {which} show?",
                    "Describe": f"Describe {which}.",
                }[verb],
                captions[index],
            )
        )
    scenes_at = [(i, scene) for i, scene in enumerate(drawn) if scene is not None]
    if scenes_at:
        index, scene = rng.choice(scenes_at)
        asked.append(
            (
                f"What colour is the background of image {index + 1}?",
                sentence(scene.background),
            )
        )
        asked.append(
            (f"How many shapes are in image {index + 1}?", sentence(NUMBERS[len(scene.things)]))
        )
        asked.append(_which_image(rng, scenes_at))
    return turns + rng.sample(asked, min(MAX_TURNS - len(turns), len(asked)))


def _which_image(rng: random.Random, scenes_at: list[tuple[int, scenes.Scene]]) -> Turn:
    thing = rng.choice(rng.choice(scenes_at)[1].things)
    noun = thing.noun
    if rng.random() < 0.12:
        noun = f"{rng.choice(list(scenes.COLOURS))} {rng.choice(scenes.SHAPES)}"
    found = [str(i + 1) for i, scene in scenes_at if any(t.noun == noun for t in scene.things)]
    answer = f"image{'s' if len(found) > 1 else ''} {listed(found)}" if found else "none"
    return f"Which image shows {with_article(noun)}?", sentence(answer)


def motion_sample(
    rng: random.Random, size: tuple[int, int], num_frames: int, is_video: bool
) -> Sample:
    clip = motion.random_clip(rng, *size)
    return Sample(
        "video" if is_video else "motion",
        weathered_frames(rng, motion.draw_clip(rng, clip, num_frames)),
        [(rng.choice(DESCRIBE_CLIP), motion.describe(clip)), *motion.questions(rng, clip)],
        [scene_marks(scene) for scene in motion.frame_scenes(clip, num_frames)],
        is_video,
    )


def weathered_frames(rng: random.Random, frames: list[Image.Image]) -> list[Image.Image]:
    """Every frame through the same kind of weather, as one camera and one encoder would."""
    if rng.random() < 0.4:
        sigma = rng.uniform(1, 7)
        frames = [scenes.add_noise(rng, frame, sigma) for frame in frames]
    if rng.random() < 0.25:
        quality = rng.randint(50, 95)
        frames = [scenes.through_jpeg(frame, quality) for frame in frames]
    return frames


def text_sample(rng: random.Random) -> Sample:
    question = rng.choice((*DESCRIBE, *DESCRIBE_EACH, *DESCRIBE_CLIP, *READ))
    if rng.random() < 0.2:
        return Sample("text", [], [("How many images are there?", "None.")], [])
    return Sample("text", [], [(question, NO_IMAGE)], [])


# --- words as people type them ---------------------------------------------------------------------


def spoken(rng: random.Random, question: str) -> str:
    """The question as somebody may type it: other spelling, no capital, no full stop."""
    if rng.random() < 0.3:
        question = question.replace("colour", "color").replace("centre", "center")
    if rng.random() < 0.08:
        question = question[0].lower() + question[1:]
    if rng.random() < 0.1:
        question = question.rstrip("?.")
    return question


def system_turn(rng: random.Random) -> str:
    chance = rng.random()
    if chance < 0.9:
        return f"<|im_start|>system\n{SYSTEM_PROMPT}<|im_end|>\n"
    if chance < 0.95:
        return ""
    other = rng.choice(("Answer briefly.", "You describe images.", "Be exact."))
    return f"<|im_start|>system\n{other}<|im_end|>\n"


# --- what is drawn, and how large -----------------------------------------------------------------


def random_kind(rng: random.Random, is_easy: bool) -> str:
    often = OFTEN_EASY if is_easy else OFTEN
    return rng.choices(list(often), list(often.values()))[0]


def draw_sample(
    rng: random.Random,
    kind: str,
    is_easy: bool = False,
    names: tuple[str, ...] = photos.TRAINING_PHOTOS,
) -> Sample:
    """
    A sample of one kind; an easy one has small pictures, few things, short words and clips.

    Args:
        names: of the photographs that pieces are cut from.
    """
    pick = _easy_size if is_easy else _size
    if kind == "text":
        return text_sample(rng)
    if kind == "word":
        if is_easy:
            return word_sample(rng, (rng.randint(70, 150), rng.randint(56, 84)), 3)
        size = words.random_size(rng)
        return word_sample(rng, exact(size) if rng.random() < EXACT_SHARE else size)
    if kind == "scene":
        return scene_sample(rng, pick(rng), 2 if is_easy else 4)
    if kind == "photo":
        return photo_sample(rng, pick(rng), names)
    if kind == "images":
        count = rng.choice((1, 2, 3) if is_easy else (1, 2, 2, 3, 3, 4, 5, 6, 7, 8))
        choices = [pick(rng) for _ in range(rng.choice((1, 1, 2, 3)))]
        return images_sample(rng, [rng.choice(choices) for _ in range(count)], names)
    easy_lengths, lengths = (2, 3, 4), (2, 2, 3, 4, 4, 5, 6, 7, 8, 8, 9, 10, 12, 14, 16)
    num_frames = rng.choice(easy_lengths if is_easy else lengths)
    size = _easy_size(rng) if is_easy else clip_size(rng, num_frames)
    if rng.random() < EXACT_SHARE:
        size = exact(size)
    return motion_sample(rng, size, num_frames, is_video=kind == "video")


def _size(rng: random.Random) -> tuple[int, int]:
    size = scenes.random_size(rng)
    return exact(size) if rng.random() < EXACT_SHARE else size


def _easy_size(rng: random.Random) -> tuple[int, int]:
    return exact((rng.randint(104, 150), rng.randint(104, 150)))


def exact(size: tuple[int, int]) -> tuple[int, int]:
    """The size, as (width, height), to which the model would resample a picture of this size."""
    height, width = target_size(size[1], size[0], AREA)
    return width, height


def clip_size(rng: random.Random, num_frames: int) -> tuple[int, int]:
    high = 360 if num_frames <= 8 or rng.random() < 0.3 else 200
    side = scenes.log_uniform(rng, 84, high)
    aspect = rng.uniform(0.6, 1.7)
    return max(72, round(side * aspect**0.5)), max(72, round(side / aspect**0.5))
