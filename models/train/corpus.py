"""
Samples of every kind, and the micro-batches that training reads.

A sample is a list of pictures (or the frames of one clip) and several turns about them. In a
micro-batch the turns share the pictures: each turn is a branch that sees the pictures and itself,
never another turn, so one drawing teaches several answers at the price of one.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer
from torch.utils.data import IterableDataset, get_worker_info

from engine.families.qwen2_vl import (
    MERGE,
    PATCH_PX,
    Grid,
    cut_patches,
    next_position,
    resample,
    target_size,
    token_positions,
)
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

PATCHES_IN_MICRO_BATCH = 131_072  # of the encoder; also bounds the tokens of the text model
MAX_TURNS = 5
IGNORED = -100
# the kinds in the order in which micro-batches are drawn, over and over
SCHEDULE = (
    "scene",
    "motion",
    "word",
    "images",
    "scene",
    "video",
    "word",
    "images",
    "scene",
    "photo",
)
TEXT_ONLY_EVERY = 17


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
    rng: random.Random, size: tuple[int, int], names: tuple[str, ...] = photos.TRAINING_PHOTOS
) -> Sample:
    picture = photos.random_photo(rng, *size, names)
    if rng.random() < 0.3:
        picture = scenes.through_jpeg(picture, rng.randint(60, 95))
    seen = photos.look(picture)
    turns = [(rng.choice(DESCRIBE), photos.statement(seen)), *photos.questions(rng, seen)]
    return Sample("photo", [picture], turns, [None])


def images_sample(rng: random.Random, sizes: list[tuple[int, int]]) -> Sample:
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
            picture, marks = photos.random_photo(rng, *size, photos.TRAINING_PHOTOS), None
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


# --- micro-batches -----------------------------------------------------------------------------------


@dataclass(slots=True)
class MicroBatch:
    """
    Tensors of one forward and backward pass; every sample has the same pictures' sizes in order.

    Attributes:
        groups: for each distinct grid: patches (num, patches, 3, frames, PATCH_PX**2) uint8, with
            one or two frames a temporal patch, and (rows, columns) in patches.
        placeholder_rows: flat indices into (samples * length) of the tokens that take the groups'
            features, in the groups' order.
        ids: (samples, length).
        learnt_rows: flat indices into (samples * length) of the tokens whose next token is learnt.
        learnt_ids, answer: for each of them, that next token, and the number of its answer.
        marked_rows: rows of the groups' features, in order, that belong to drawings.
        marks: (marks, 2): row into `marked_rows`, label.
        positions: (3, samples, length). branch: (samples, length), 0 for what all turns share, the
            turn's number for its own tokens, -1 for padding.
    """

    kind: str
    groups: list[tuple[torch.Tensor, tuple[int, int]]]
    placeholder_rows: torch.Tensor
    ids: torch.Tensor
    positions: torch.Tensor
    branch: torch.Tensor
    learnt_rows: torch.Tensor
    learnt_ids: torch.Tensor
    answer: torch.Tensor
    marked_rows: torch.Tensor
    marks: torch.Tensor

    def each(self, move: Callable[[torch.Tensor], torch.Tensor]) -> "MicroBatch":
        """The same micro-batch with every tensor moved."""
        return MicroBatch(
            self.kind,
            [(move(patches), grid) for patches, grid in self.groups],
            *(move(getattr(self, field)) for field in _TENSORS),
        )

    def pin_memory(self) -> "MicroBatch":
        return self.each(torch.Tensor.pin_memory)

    @property
    def num_pictures(self) -> int:
        return sum(patches.shape[0] for patches, _ in self.groups)


_TENSORS = (
    "placeholder_rows",
    "ids",
    "positions",
    "branch",
    "learnt_rows",
    "learnt_ids",
    "answer",
    "marked_rows",
    "marks",
)


class Encoder:
    """Text to ids; the special tokens that a micro-batch needs."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.image_pad = self._id_of("<|image_pad|>")
        self.video_pad = self._id_of("<|video_pad|>")
        self.vision_start = self._id_of("<|vision_start|>")
        self.vision_end = self._id_of("<|vision_end|>")
        self.end = self._id_of("<|im_end|>")

    def _id_of(self, token: str) -> int:
        found = self.tokenizer.token_to_id(token)
        assert found is not None, f"the tokenizer has no {token}"
        return found

    def __call__(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids


@dataclass(frozen=True, slots=True)
class Plan:
    """
    What to draw.

    Attributes:
        kinds: in the order in which micro-batches are drawn, over and over.
        num_easy: over so many micro-batches the share of easy ones falls from all to none: small
            pictures, short words and clips, from which the hard ones are then soon learnt.
        num_patches: of a micro-batch, about.
    """

    kinds: tuple[str, ...] = SCHEDULE
    num_easy: int = 0
    num_patches: int = PATCHES_IN_MICRO_BATCH

    def kind(self, index: int) -> str:
        return "text" if index % TEXT_ONLY_EVERY == 0 else self.kinds[index % len(self.kinds)]

    def is_easy(self, index: int, seed: str) -> bool:
        return random.Random(f"{seed}/easy/{index}").random() < 1 - index / max(1, self.num_easy)


def micro_batch(
    encoder: Encoder,
    seed: str,
    kind: str,
    is_easy: bool = False,
    num_patches: int = PATCHES_IN_MICRO_BATCH,
) -> MicroBatch:
    """Draw one micro-batch of a kind; a pure function of its arguments."""
    rng = random.Random(seed)
    question_first = rng.random() < 0.2
    samples = _draw(rng, kind, is_easy, num_patches)
    return _assemble(rng, encoder, kind, samples, question_first)


def _draw(rng: random.Random, kind: str, is_easy: bool, num_patches: int) -> list[Sample]:
    if kind == "text":
        return [text_sample(rng) for _ in range(64)]
    if kind == "word":
        size = (rng.randint(70, 150), rng.randint(56, 84)) if is_easy else words.random_size(rng)
        most = rng.randint(1, 3) if is_easy else words.MAX_CHARACTERS
        num = _num_samples([size], 80, num_patches)
        return [word_sample(rng, size, most) for _ in range(num)]
    if kind in ("scene", "photo"):
        size = _easy_size(rng) if is_easy else scenes.random_size(rng)
        num = _num_samples([size], 200, num_patches)
        if kind == "photo":
            return [photo_sample(rng, size) for _ in range(num)]
        return [scene_sample(rng, size, 2 if is_easy else 4) for _ in range(num)]
    if kind == "images":
        count = rng.choice((1, 2, 3) if is_easy else (1, 2, 2, 3, 3, 4, 5, 6, 7, 8))
        pick = _easy_size if is_easy else scenes.random_size
        choices = [pick(rng) for _ in range(rng.choice((1, 1, 2, 3)))]
        sizes = [rng.choice(choices) for _ in range(count)]
        num = _num_samples(sizes, 160, num_patches)
        return [images_sample(rng, sizes) for _ in range(num)]
    easy_lengths, lengths = (2, 3, 4), (2, 2, 3, 4, 4, 5, 6, 7, 8, 8, 9, 10, 12, 14, 16)
    num_frames = rng.choice(easy_lengths if is_easy else lengths)
    size = _easy_size(rng) if is_easy else clip_size(rng, num_frames)
    is_video = kind == "video"
    num_seen = num_frames // 2 + 1 if is_video else num_frames
    num = _num_samples([size] * num_seen, 150, num_patches)
    return [motion_sample(rng, size, num_frames, is_video) for _ in range(num)]


def _easy_size(rng: random.Random) -> tuple[int, int]:
    return rng.randint(104, 150), rng.randint(104, 150)


def clip_size(rng: random.Random, num_frames: int) -> tuple[int, int]:
    high = 360 if num_frames <= 8 or rng.random() < 0.3 else 200
    side = scenes.log_uniform(rng, 84, high)
    aspect = rng.uniform(0.6, 1.7)
    return max(72, round(side * aspect**0.5)), max(72, round(side / aspect**0.5))


def grid_of(size: tuple[int, int]) -> Grid:
    height, width = target_size(size[1], size[0], AREA)
    return Grid(1, height // PATCH_PX, width // PATCH_PX)


def _num_samples(sizes: list[tuple[int, int]], text_tokens: int, num_patches: int) -> int:
    patches = sum(grid_of(size).num_patches for size in sizes)
    tokens = sum(grid_of(size).num_tokens + 2 for size in sizes) + text_tokens
    return max(4, min(num_patches // patches, num_patches // tokens, 768))


def _patches(sample: Sample) -> list[tuple[np.ndarray, Grid, list[Mark] | None]]:
    """Patches, grid and marks of each picture, or of each pair of frames."""
    cut = []
    for picture, marks in zip(sample.pictures, sample.marks, strict=True):
        grid = grid_of(picture.size)
        resized = resample(picture, grid.rows * PATCH_PX, grid.columns * PATCH_PX)
        patches = cut_patches(np.asarray(resized)).reshape(-1, 3, 1, PATCH_PX**2)
        cut.append((patches, grid, marks))
    if not sample.is_video:
        return cut
    if len(cut) % 2:
        cut.append(cut[-1])
    return [
        (np.concatenate((first, second), axis=2), grid, [*(marks or ()), *(more or ())])
        for (first, grid, marks), (second, _, more) in zip(cut[::2], cut[1::2], strict=True)
    ]


def _assemble(
    rng: random.Random, encoder: Encoder, kind: str, samples: list[Sample], question_first: bool
) -> MicroBatch:
    groups: dict[tuple[int, int, int], list[np.ndarray]] = {}
    rows_of: dict[tuple[int, int, int], list[np.ndarray]] = {}
    marks_of: dict[tuple[int, int, int], list[list[Mark] | None]] = {}
    sequences = []
    for sample in samples:
        cut = _patches(sample)
        if question_first:
            sample.turns[:] = [rng.choice(sample.turns)]
        sequence = _sequence(rng, encoder, sample, [grid for _, grid, _ in cut], question_first)
        sequences.append(sequence)
        for (patches, grid, marks), rows in zip(cut, sequence.rows, strict=True):
            key = (grid.rows, grid.columns, patches.shape[2])
            groups.setdefault(key, []).append(patches)
            marks_of.setdefault(key, []).append(marks)
            rows_of.setdefault(key, []).append(np.asarray(rows) + (len(sequences) - 1) * 1_000_000)
    length = -(-max(len(s.ids) for s in sequences) // 16) * 16
    ids = np.zeros((len(samples), length), dtype=np.int64)
    labels = np.full((len(samples), length), IGNORED, dtype=np.int64)
    branch = np.full((len(samples), length), -1, dtype=np.int64)
    positions = np.zeros((3, len(samples), length), dtype=np.int64)
    for index, s in enumerate(sequences):
        ids[index, : len(s.ids)] = s.ids
        labels[index, : len(s.ids)] = s.labels
        branch[index, : len(s.ids)] = s.branch
        positions[:, index, : len(s.ids)] = np.concatenate(s.positions, axis=1)
    all_rows = [np.concatenate(rows_of[key]) for key in groups]
    flat = np.concatenate(all_rows) if all_rows else np.zeros(0, dtype=np.int64)
    owner, token = np.nonzero(labels[:, 1:] != IGNORED)
    return MicroBatch(
        kind,
        [(torch.from_numpy(np.stack(g)), key[:2]) for key, g in groups.items()],
        torch.from_numpy(flat // 1_000_000 * length + flat % 1_000_000),
        torch.from_numpy(ids),
        torch.from_numpy(positions),
        torch.from_numpy(branch),
        torch.from_numpy(owner * length + token),
        torch.from_numpy(labels[owner, token + 1]),
        torch.from_numpy(owner * 100 + branch[owner, token + 1]),
        *_place_marks(marks_of),
    )


def _place_marks(
    marks_of: dict[tuple[int, int, int], list[list[Mark] | None]],
) -> tuple[torch.Tensor, torch.Tensor]:
    """`MicroBatch.marked_rows` and `MicroBatch.marks`, for features in the groups' order."""
    rows: list[int] = []
    marks: list[tuple[int, int]] = []
    start = 0
    for (patch_rows, patch_columns, _), pictures in marks_of.items():
        down, across = patch_rows // MERGE, patch_columns // MERGE
        for found in pictures:
            for mark in found or ():
                row = min(down - 1, int(mark.down * down))
                token = row * across + min(across - 1, int(mark.across * across))
                marks += [(len(rows) + token, label) for label in mark.labels]
            if found is not None:
                rows += range(start, start + down * across)
            start += down * across
    return torch.tensor(rows, dtype=torch.long), torch.tensor(marks, dtype=torch.long).view(-1, 2)


@dataclass(slots=True)
class _Sequence:
    ids: list[int]
    labels: list[int]
    branch: list[int]
    positions: list[np.ndarray]
    rows: list[range]
    at: int = 0

    def text(self, ids: list[int], branch: int, learnt: bool = False) -> None:
        self.ids += ids
        self.labels += ids if learnt else [IGNORED] * len(ids)
        self.branch += [branch] * len(ids)
        self.positions.append(np.tile(np.arange(self.at, self.at + len(ids)), (3, 1)))
        self.at += len(ids)


def _sequence(
    rng: random.Random, encoder: Encoder, sample: Sample, grids: list[Grid], question_first: bool
) -> _Sequence:
    s = _Sequence([], [], [], [], [])
    s.text(encoder(f"{system_turn(rng)}<|im_start|>user\n"), 0)
    if question_first:
        s.text(encoder(spoken(rng, sample.turns[0][0])), 0)
    numbered = not sample.is_video and len(grids) > 1 and rng.random() < 0.2
    spans = [Grid(len(grids), grids[0].rows, grids[0].columns)] if sample.is_video else grids
    for index, grid in enumerate(spans):
        if numbered:
            s.text(encoder(f"Picture {index + 1}: "), 0)
        s.text([encoder.vision_start], 0)
        start = len(s.ids)
        pad = encoder.video_pad if sample.is_video else encoder.image_pad
        s.ids += [pad] * grid.num_tokens
        s.labels += [IGNORED] * grid.num_tokens
        s.branch += [0] * grid.num_tokens
        s.positions.append(token_positions(grid, s.at))
        s.at = next_position(grid, s.at)
        per_picture = grid.num_tokens // grid.times
        s.rows += [
            range(start + i * per_picture, start + (i + 1) * per_picture) for i in range(grid.times)
        ]
        s.text([encoder.vision_end], 0)
    shared = s.at
    for number, (question, answer) in enumerate(sample.turns, start=1):
        s.at = shared
        asked = "" if question_first else spoken(rng, question)
        s.text(encoder(f"{asked}<|im_end|>\n<|im_start|>assistant\n"), number)
        s.text([*encoder(answer), encoder.end], number, learnt=True)
    return s


class MicroBatches(IterableDataset[MicroBatch]):
    """An endless stream, the same for the same seed and plan, however many workers draw it."""

    def __init__(self, tokenizer_json: str, seed: str, plan: Plan, indices: range) -> None:
        self.tokenizer_json, self.seed, self.plan, self.indices = (
            tokenizer_json,
            seed,
            plan,
            indices,
        )

    def __iter__(self) -> Iterator[MicroBatch]:
        torch.set_num_threads(1)
        encoder = Encoder(Tokenizer.from_str(self.tokenizer_json))
        worker = get_worker_info()
        mine = self.indices[worker.id :: worker.num_workers] if worker else self.indices
        for index in mine:
            yield micro_batch(
                encoder,
                f"{self.seed}/{index}",
                self.plan.kind(index),
                self.plan.is_easy(index, self.seed),
                self.plan.num_patches,
            )
