"""Drawings and the sentences about them: right to the letter, the same for a seed, never ambiguous."""

import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer

from models import evaluate
from models.train import corpus, export, motion, photos, scenes, train, vocabulary, words
from models.train.corpus import Sample
from models.train.packing import KINDS, SMALL_ROOM, Encoder, Plan, packed_batch
from models.train.scenes import Scene, Thing

SIZES = ((96, 96), (160, 120), (300, 100), (60, 180))
DRAWERS: dict[str, Callable[[random.Random], Sample]] = {
    "scene": lambda rng: corpus.scene_sample(rng, rng.choice(SIZES)),
    "photo": lambda rng: corpus.photo_sample(rng, rng.choice(SIZES)),
    "word": lambda rng: corpus.word_sample(rng, (200, 80)),
    "images": lambda rng: corpus.images_sample(rng, [(140, 84)] * rng.randint(2, 8)),
    "motion": lambda rng: corpus.motion_sample(rng, (84, 84), 4, is_video=False),
    "video": lambda rng: corpus.motion_sample(rng, (84, 84), 3, is_video=True),
    "text": corpus.text_sample,
}
PLACES = {
    "top left": (0, 0), "top": (0, 1), "top right": (0, 2),
    "left": (1, 0), "centre": (1, 1), "right": (1, 2),
    "bottom left": (2, 0), "bottom": (2, 1), "bottom right": (2, 2),
}  # fmt: skip
SINGULAR = {f"{shape}s": shape for shape in scenes.SHAPES} | {"crosses": "cross"}
NUMBERS = ("none", "one", "two", "three", "four", "five", "six", "seven", "eight")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(export.FOLDER / "tokenizer.json"))


# --- seeds -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", DRAWERS)
def test_same_seed_gives_the_same_pictures_and_sentences(kind: str) -> None:
    one, again, other = (DRAWERS[kind](random.Random(seed)) for seed in ("a", "a", "b"))

    assert one.turns == again.turns
    assert [p.tobytes() for p in one.pictures] == [p.tobytes() for p in again.pictures]
    if one.pictures:
        assert [p.tobytes() for p in one.pictures] != [p.tobytes() for p in other.pictures]


def test_same_seed_gives_the_same_batch(tokenizer: Tokenizer) -> None:
    one, again, other = (
        packed_batch(Encoder(tokenizer), seed, Plan(room=SMALL_ROOM)) for seed in ("a", "a", "b")
    )

    for tensor, same in zip(one.tensors(), again.tensors(), strict=True):
        assert torch.equal(tensor, same)
    assert not torch.equal(one.ids, other.ids)


def test_batches_have_one_shape_whatever_they_hold(tokenizer: Tokenizer) -> None:
    shapes = {
        tuple(tuple(t.shape) for t in packed_batch(Encoder(tokenizer), seed, plan, easy).tensors())
        for plan in (Plan(room=SMALL_ROOM), Plan(kinds=("text",), room=SMALL_ROOM))
        for seed, easy in (("a", 0.0), ("b", 1.0))
    }

    assert 1 == len(shapes)


@pytest.mark.parametrize("kind", KINDS)
def test_every_token_of_a_batch_stands_in_one_run(tokenizer: Tokenizer, kind: str) -> None:
    batch = packed_batch(Encoder(tokenizer), "runs", Plan(kinds=(kind,), room=SMALL_ROOM))

    for starts, end, longest in (
        (batch.run_starts, SMALL_ROOM.patches, SMALL_ROOM.run),
        (batch.part_starts, len(batch.ids), SMALL_ROOM.sample),
        (batch.sample_starts, SMALL_ROOM.shared, SMALL_ROOM.sample),
        (batch.sample_turn_starts, SMALL_ROOM.turns, SMALL_ROOM.turn * SMALL_ROOM.asked_of_one),
    ):
        sizes = starts.diff()
        assert 0 == starts[0]
        assert end == starts[-1]
        assert sizes.min() >= 0
        assert sizes.max() <= longest


def test_evaluation_cuts_no_pieces_from_photographs_of_the_training(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: set[tuple[str, ...]] = set()
    load = photos.load_photos

    def spy(names: tuple[str, ...]) -> list[Image.Image]:
        asked.add(names)
        return load(names)

    monkeypatch.setattr(photos, "load_photos", spy)
    for kind in ("photo", "images"):
        list(evaluate.cases(kind, 30))

    assert {photos.HELD_OUT_PHOTOS} == asked
    assert set(photos.TRAINING_PHOTOS).isdisjoint(photos.HELD_OUT_PHOTOS)


def test_training_refuses_the_seeds_of_the_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["train", "--out", "x", "--minutes", "0", "--minutes-in-all", "1"]
    monkeypatch.setattr("sys.argv", [*words, "--seed", f"{evaluate.HELD_OUT}/1"])

    with pytest.raises(SystemExit, match="2"):
        train.main()


# --- scenes ----------------------------------------------------------------------------------------


def random_scenes(count: int) -> list[tuple[random.Random, Scene]]:
    rngs = [random.Random(f"scene {index}") for index in range(count)]
    return [(rng, scenes.random_scene(rng, *scenes.random_size(rng))) for rng in rngs]


def test_every_answer_about_a_scene_is_right() -> None:
    asked: Counter[str] = Counter()
    for rng, scene in random_scenes(400):
        for question, answer in scenes.questions(rng, scene):
            kind, expected = answer_by_counting(scene, question)
            asked[kind] += 1
            assert expected == answer, (question, scene.things)

    assert 9 == len(asked)
    assert min(asked.values()) >= 100


def answer_by_counting(scene: Scene, question: str) -> tuple[str, str]:
    """
    Answer a question from the list of things alone.

    Returns:
        The kind of the question, and the answer; it fails where a question has more than one.
    """
    text = question.rstrip("?")
    if text == "What colour is the background":
        return "background", as_answer(scene.background)
    if match := re.fullmatch(r"What (colour|size) is the (\w+)", text):
        (thing,) = matching(scene, match[2])
        return match[1], as_answer(getattr(thing, match[1]))
    if match := re.fullmatch(r"Where is the (.+)", text):
        (thing,) = matching(scene, match[1])
        return "where", as_answer(f"at the {place_of(thing)}")
    if match := re.fullmatch(r"What is at the (.+)", text):
        at = [t for t in scene.things if (t.row, t.column) == PLACES[match[1]]]
        return "what is at", as_answer(only_or_nothing(at))
    if match := re.fullmatch(r"How many (.+) are there", text):
        what = SINGULAR.get(match[1]) or match[1].removesuffix("shapes")
        return "how many", as_answer(NUMBERS[len(matching(scene, what))])
    if match := re.fullmatch(r"Is there an? (.+)", text):
        return "is there", as_answer("yes" if matching(scene, match[1]) else "no")
    if match := re.fullmatch(r"What is (left of|right of|above|below) the (\w+)", text):
        (anchor,) = matching(scene, match[2])
        found = {
            "left of": [t for t in scene.things if t.column < anchor.column],
            "right of": [t for t in scene.things if t.column > anchor.column],
            "above": [t for t in scene.things if t.row < anchor.row],
            "below": [t for t in scene.things if t.row > anchor.row],
        }[match[1]]
        return "side by side" if match[1].endswith("of") else "one above the other", as_answer(
            only_or_nothing(found)
        )
    raise AssertionError(f"a question of a new kind: {question}")


def matching(scene: Scene, description: str) -> list[Thing]:
    """The things that have every word of the description: shape, colour, or both."""
    wanted = set(description.split())
    return [t for t in scene.things if wanted <= {t.shape, t.colour}]


def only_or_nothing(found: list[Thing]) -> str:
    if not found:
        return "nothing"
    (thing,) = found
    return f"{an(thing.size)} {thing.size} {thing.colour} {thing.shape}"


def an(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def place_of(thing: Thing) -> str:
    (name,) = (name for name, spot in PLACES.items() if spot == (thing.row, thing.column))
    return name


def as_answer(words_said: str) -> str:
    return f"{words_said[0].upper()}{words_said[1:]}."


def test_caption_names_every_thing_once_and_where_it_is() -> None:
    for _, scene in random_scenes(200):
        said, background = re.fullmatch(
            r"(.+) on a (\w+) background\.", scenes.caption(scene)
        ).groups()  # type: ignore[union-attr]
        parts = re.split(r", | and ", said[0].lower() + said[1:])

        assert scene.background == background
        assert [
            f"{an(t.size)} {t.size} {t.colour} {t.shape} at the {place_of(t)}" for t in scene.things
        ] == parts


def test_no_two_things_share_a_place_and_all_lie_inside_the_picture() -> None:
    for _, scene in random_scenes(400):
        assert len(scene.things) == len({(t.row, t.column) for t in scene.things})
        for thing in scene.things:
            assert thing.diameter / 2 <= thing.x <= scene.width_px - thing.diameter / 2
            assert thing.diameter / 2 <= thing.y <= scene.height_px - thing.diameter / 2


def test_thing_has_its_colour_in_the_middle_of_its_place() -> None:
    for rng, scene in random_scenes(60):
        pixels = np.asarray(scenes.draw_scene(rng, scene)).astype(int)
        for thing in scene.things:
            seen = pixels[round(thing.y), round(thing.x)]
            distances = {
                name: np.abs(seen - colour).sum()
                for name, colour in (scenes.COLOURS | scenes.BACKGROUNDS).items()
            }
            assert thing.colour == min(distances, key=lambda name: distances[name])


def test_answers_about_several_pictures_agree_with_each_other() -> None:
    num_checked = 0
    for index in range(60):
        sample = DRAWERS["images"](random.Random(f"images {index}"))
        (_, each), *turns = sample.turns
        shown = dict(re.findall(r"Image (\d) shows ([^.]+)\.", each))
        assert [str(i + 1) for i in range(len(sample.pictures))] == list(shown)
        for question, answer in turns:
            if question == "How many images are there?":
                assert as_answer(NUMBERS[len(sample.pictures)]) == answer
            elif match := re.fullmatch(r"How many shapes are in image (\d)\?", question):
                assert as_answer(NUMBERS[len(re.findall(r"\ban? ", shown[match[1]]))]) == answer
            elif match := re.fullmatch(r"Which image shows an? (.+)\?", question):
                found = [number for number, what in shown.items() if match[1] in what]
                numbers = re.findall(r"\d", answer)
                assert found == numbers
                assert found or answer == "None."
            elif "background" not in question:  # which one it is, by number or by word
                (position,) = (
                    i
                    for i, word in enumerate(corpus.ORDINALS)
                    if f"image {i + 1}" in question or f"the {word} image" in question
                )
                for noun in re.findall(r"\w+ \w+(?=,| and|$)", shown[str(position + 1)]):
                    assert noun.removeprefix("a ") in answer
            num_checked += 1

    assert num_checked > 150


# --- clips -----------------------------------------------------------------------------------------


def random_clips(count: int) -> list[tuple[random.Random, motion.Clip]]:
    rngs = [random.Random(f"clip {index}") for index in range(count)]
    return [(rng, motion.random_clip(rng, *rng.choice(SIZES))) for rng in rngs]


def test_reversed_clip_has_the_opposite_event_and_the_other_ends() -> None:
    opposite = {
        "appears": "vanishes",
        "vanishes": "appears",
        "moves": "moves",
        "nothing": "nothing",
    }
    seen = Counter(clip.event for _, clip in random_clips(200))
    assert opposite.keys() == seen.keys()

    for _, clip in random_clips(200):
        backwards = motion.reverse(clip)
        assert opposite[clip.event] == backwards.event
        assert (clip.end, clip.actor) == (backwards.actor, backwards.end)
        assert (motion.describe(clip) == motion.describe(backwards)) == (clip.event == "nothing")
        again = motion.reverse(backwards)
        assert clip == replace(again, change_at=clip.change_at)
        assert clip.change_at == pytest.approx(again.change_at)


def test_reversed_clip_is_drawn_as_the_same_frames_backwards() -> None:
    for index, (_, clip) in enumerate(random_clips(40)):
        clip = replace(clip, change_at=(1 + index % 3) / 4)  # on a border of four frames
        forth = motion.draw_clip(random.Random(index), clip, 4)
        back = motion.draw_clip(random.Random(index), motion.reverse(clip), 4)
        for one, other in zip(forth, back[::-1], strict=True):
            difference = np.abs(np.asarray(one).astype(int) - np.asarray(other))
            assert difference.mean() < 0.5  # an edge may fall on the next pixel


def test_first_and_last_frame_differ_unless_nothing_happens() -> None:
    for rng, clip in random_clips(60):
        frames = motion.draw_clip(rng, clip, rng.randint(2, 16))
        assert (frames[0].tobytes() == frames[-1].tobytes()) == (clip.event == "nothing")


def test_every_answer_about_a_clip_is_right() -> None:
    for rng, clip in random_clips(300):
        actor = f"{clip.actor.colour} {clip.actor.shape}"
        still = [*clip.scene.things, *([clip.actor] if clip.event == "nothing" else [])]
        still.sort(key=lambda thing: (thing.row, thing.column))
        right = {
            "What moves?": f"the {actor}" if clip.event == "moves" else "nothing",
            "What appears?": f"{an(actor)} {actor}" if clip.event == "appears" else "nothing",
            "What vanishes?": f"the {actor}" if clip.event == "vanishes" else "nothing",
            f"Where does the {actor} start?": f"at the {place_of(clip.actor)}",
            f"Where does the {actor} end?": f"at the {place_of(clip.end)}",
            "What stays in place?": " and ".join(f"the {t.colour} {t.shape}" for t in still),
            "What colour is the background?": clip.scene.background,
        }
        for question, answer in motion.questions(rng, clip):
            said = answer.replace(", ", " and ")
            assert as_answer(right[question]) == said
            assert clip.event == "moves" or "Where" not in question


# --- photographs -----------------------------------------------------------------------------------


def random_looks(count: int) -> list[photos.Look]:
    pictures = [
        photos.random_photo(random.Random(f"photo {index}"), 96, 72, photos.TRAINING_PHOTOS)
        for index in range(count)
    ]
    return [photos.look(picture) for picture in pictures]


def test_statement_about_a_photo_is_true_of_it() -> None:
    for seen in random_looks(150):
        assert [] == photos.untrue_clauses(photos.statement(seen), seen)


@pytest.mark.parametrize(("third", "clause"), [(0, "top"), (1, "middle"), (2, "bottom")])
def test_colour_that_is_not_there_makes_a_statement_false(third: int, clause: str) -> None:
    where = ("at the top", "in the middle", "at the bottom")[third]
    for seen in random_looks(80):
        absent = next(n for n, s in zip(photos.NAMES, seen.shares[third], strict=True) if s == 0)
        statement = photos.statement(seen)
        wrong = statement.replace(f"{seen.colour(third)} {where}", f"{absent} {where}")

        assert [clause] == photos.untrue_clauses(wrong, seen)


@pytest.mark.parametrize(
    ("clause", "right", "wrong"),
    [
        ("brightness", "dark", "medium-bright"),
        ("brightness", "dark", "bright"),
        ("detail", "plain", "busy"),
        ("contrast", "low", "medium"),
        ("contrast", "low", "high"),
        ("daytime", "night", "dusk"),
        ("daytime", "night", "day"),
    ],
)
def test_wrong_word_makes_a_statement_false(clause: str, right: str, wrong: str) -> None:
    black = photos.look(Image.new("RGB", (60, 60)))
    statement = photos.statement(black).lower()
    assert [] == photos.untrue_clauses(f"A{statement[1:]}", black)
    assert 1 == statement.count(f" {right}")

    assert [clause] == photos.untrue_clauses(
        f"A{statement[1:].replace(f' {right}', f' {wrong}')}", black
    )


def test_white_and_checkered_photos_are_what_they_are_called() -> None:
    checkered = Image.fromarray(np.indices((48, 48)).sum(axis=0).astype(np.uint8) % 2 * 255)

    assert photos.statement(photos.look(Image.new("RGB", (60, 60), "white"))) == (
        "A bright, plain photo with low contrast, by day: white at the top, white in the middle "
        "and white at the bottom."
    )
    assert photos.statement(photos.look(checkered.convert("RGB"))).startswith(
        "A medium-bright, busy photo with high contrast, by day: "
    )


def test_other_words_are_no_statement() -> None:
    (seen,) = random_looks(1)
    statement = photos.statement(seen)

    for other in (
        statement.replace(" photo", " picture"),
        statement.replace(" at the bottom", ""),
        f"{statement} Really.",
        "A photo.",
        "",
    ):
        assert ["form"] == photos.untrue_clauses(other, seen)


# --- printed words ---------------------------------------------------------------------------------


def test_printed_words_can_be_read_in_one_way_only() -> None:
    rng = random.Random("words")
    seen = {words.random_word(rng) for _ in range(40_000)}
    by_look: dict[str, set[str]] = defaultdict(set)
    for word in seen:
        by_look[look_of(word)].add(word)

    assert all(re.fullmatch(r"[a-z]{1,8}|[A-Z]{1,8}|[0-9]{1,8}", word) for word in seen)
    assert [] == [alike for alike in by_look.values() if len(alike) > 1]
    assert {"l", "I", "1", "0", "o", "O", "s", "S", "10", "11", "ll", "xo", "XO"}.isdisjoint(seen)
    assert {str(digit) for digit in range(2, 10)} <= seen


def look_of(word: str) -> str:
    """The word with one letter for all that look the same when their height cannot be compared."""
    return re.sub("[COSUVWXZKP]", lambda same: same[0].lower(), word).translate(
        str.maketrans("01I", "oll")
    )


def test_printed_word_is_drawn_whole_and_large_enough() -> None:
    for index in range(40):
        rng = random.Random(f"sign {index}")
        size = words.random_size(rng)
        word = corpus.fitting_word(rng, size)
        pixels = np.asarray(words.draw_word(rng, word, *size)[0]).astype(int)
        ink = np.abs(pixels - pixels[0, 0]).sum(axis=2) > 0

        border = [ink[0], ink[-1], ink[:, 0], ink[:, -1]]
        assert not np.concatenate(border).any()
        assert ink.any(axis=1).sum() >= 5


# --- sentences -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def turns() -> list[tuple[str, str]]:
    """Questions and answers of every kind; other seeds than the vocabulary was made from."""
    return [
        turn
        for kind, draw in DRAWERS.items()
        for index in range(60)
        for turn in draw(random.Random(f"sentences {kind} {index}")).turns
    ]


def test_every_answer_is_a_sentence(turns: list[tuple[str, str]]) -> None:
    for question, answer in turns:
        assert re.fullmatch(r"[A-Z].*\.", answer), (question, answer)
        assert ".." not in answer
        assert "  " not in answer
        assert question.endswith(("?", "."))


def test_tokenizer_gives_every_sentence_back(
    tokenizer: Tokenizer, turns: list[tuple[str, str]]
) -> None:
    rng = random.Random("spoken")
    unknown = tokenizer.model.unk_token
    for question, answer in turns:
        for text in (question, corpus.spoken(rng, question), answer, corpus.system_turn(rng)):
            encoding = tokenizer.encode(text, add_special_tokens=False)
            assert text == tokenizer.decode(encoding.ids, skip_special_tokens=False)
            assert unknown is None or unknown not in encoding.tokens


def test_every_word_of_a_sentence_is_one_token(
    tokenizer: Tokenizer, turns: list[tuple[str, str]]
) -> None:
    unquoted = [re.sub(r'"[^"]*"', "", text) for turn in turns for text in turn]
    assert set(vocabulary.words_of(unquoted)) <= tokenizer.get_vocab().keys()


def test_printed_words_are_spelled_letter_by_letter(
    tokenizer: Tokenizer, turns: list[tuple[str, str]]
) -> None:
    signs = {sign for _, answer in turns for sign in re.findall(r'"([^"]*)"', answer)}

    assert len(signs) > 50
    for sign in signs:
        tokens = tokenizer.encode(words.reading(sign), add_special_tokens=False).tokens
        assert [*sign, '"', "."] == tokens[-len(sign) - 2 :]
