"""
Measure a checkpoint on held-out drawings, through the engine: `make eval`.

Every case is one prompt; it counts as right only if the whole text is the true sentence, to the
letter. A statement about a photograph is right if every clause of it is true of the pixels, with the
margins of models/train/photos.py. Seeds, and the photographs, are never those of the training.
"""

import argparse
import json
import random
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from engine import LLM, Request, SamplingParams
from models.train import corpus, motion, photos, scenes, words
from models.train.corpus import Sample
from models.train.scenes import Turn

HELD_OUT = "held-out"
GREEDY = SamplingParams(temperature=0.0, max_tokens=160)
GOALS = {
    "scene": 0.97,
    "images": 0.95,
    "frames": 0.95,
    "frames reversed": 0.95,
    "video": 0.95,
    "video reversed": 0.95,
    "word": 0.95,
    "photo": 0.90,
}


@dataclass(frozen=True, slots=True)
class Case:
    """One prompt, and how to judge its text."""

    kind: str
    pictures: list[Image.Image]
    is_video: bool
    question: str
    answer: str
    is_right: Callable[[str], bool]


def cases(kind: str, num: int, seed: str = HELD_OUT) -> Iterator[Case]:
    for index in range(num):
        yield _MAKERS[kind](random.Random(f"{seed}/{kind.split()[0]}/{index}"), kind)


def _exact(kind: str, sample: Sample, turn: Turn) -> Case:
    question, answer = turn
    return Case(
        kind, sample.pictures, sample.is_video, question, answer, lambda text: text == answer
    )


def _scene(rng: random.Random, kind: str) -> Case:
    sample = corpus.scene_sample(rng, scenes.random_size(rng))
    return _exact(kind, sample, rng.choice(sample.turns))


def _images(rng: random.Random, kind: str) -> Case:
    sizes = [scenes.random_size(rng) for _ in range(rng.randint(1, 2))]
    chosen = [rng.choice(sizes) for _ in range(rng.randint(1, 8))]
    sample = corpus.images_sample(rng, chosen, photos.HELD_OUT_PHOTOS)
    return _exact(kind, sample, rng.choice(sample.turns))


def _clip(rng: random.Random, kind: str) -> Case:
    """The same clip forwards and, for a kind that says so, backwards, with the reversed answer."""
    num_frames = rng.randint(2, 16)
    size = corpus.clip_size(rng, num_frames)
    clip = motion.random_clip(rng, *size)
    frames = corpus.weathered_frames(rng, motion.draw_clip(rng, clip, num_frames))
    question = rng.choice(corpus.DESCRIBE_CLIP)
    if kind.endswith("reversed"):
        clip, frames = motion.reverse(clip), frames[::-1]
    sample = Sample(kind, frames, [], [], is_video=kind.startswith("video"))
    return _exact(kind, sample, (question, motion.describe(clip)))


def _word(rng: random.Random, kind: str) -> Case:
    sample = corpus.word_sample(rng, words.random_size(rng))
    return _exact(kind, sample, sample.turns[0])


def _photo(rng: random.Random, kind: str) -> Case:
    """A piece of a real photograph, in other light; never an invented one."""
    sample = corpus.photo_sample(
        rng, scenes.random_size(rng), photos.HELD_OUT_PHOTOS, share_real=1.0
    )
    seen = photos.look(sample.pictures[0])
    question, answer = sample.turns[0]
    return Case(
        kind,
        sample.pictures,
        False,
        question,
        answer,
        lambda text: not photos.untrue_clauses(text, seen),
    )


_MAKERS: dict[str, Callable[[random.Random, str], Case]] = {
    "scene": _scene,
    "images": _images,
    "frames": _clip,
    "frames reversed": _clip,
    "video": _clip,
    "video reversed": _clip,
    "word": _word,
    "photo": _photo,
}


def evaluate(llm: LLM, kind: str, num: int, show: int = 0, seed: str = HELD_OUT) -> dict[str, Any]:
    """Share of right texts of one kind, and of each question's first words."""
    asked: dict[str, Case] = {}  # while a case is under way; its pictures go with its result
    by_question: dict[str, list[bool]] = defaultdict(list)
    wrong = []

    def requests() -> Iterator[Request]:
        for index, case in enumerate(cases(kind, num, seed)):
            asked[str(index)] = case
            yield Request(messages=conversation(case), params=GREEDY, request_id=str(index))

    for result in llm.stream(requests()):
        case = asked.pop(result.request_id)
        text = str(result.error) if result.error else result.outputs[0].text
        right = result.error is None and case.is_right(text)
        by_question[" ".join(case.question.split()[:3])].append(right)
        if not right:
            wrong.append({"question": case.question, "said": text, "true": case.answer})
    total = sum(len(found) for found in by_question.values())
    report: dict[str, Any] = {
        "kind": kind,
        "cases": total,
        "right": round((total - len(wrong)) / total, 4),
        "goal": GOALS[kind],
        "by_question": {
            words: f"{sum(found)}/{len(found)}" for words, found in sorted(by_question.items())
        },
    }
    if show:
        report["wrong"] = wrong[:show]
    return report


def conversation(case: Case) -> list[dict[str, Any]]:
    media: list[dict[str, Any]] = [{"type": "image", "image": p} for p in case.pictures]
    if case.is_video:
        media = [{"type": "video", "video": case.pictures}]
    return [{"role": "user", "content": [*media, {"type": "text", "text": case.question}]}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="darkroom-tiny")
    parser.add_argument("--cases", type=int, default=2000, help="of each kind")
    parser.add_argument("--kinds", nargs="*", default=list(_MAKERS), choices=list(_MAKERS))
    parser.add_argument("--seed", default=HELD_OUT, help="which cases; training uses others")
    parser.add_argument("--show", type=int, default=0, help="wrong texts to print, of each kind")
    parser.add_argument("--out", type=Path, help="file for the report, as JSON lines")
    options = parser.parse_args()
    llm = LLM(options.model, limit_mm_per_prompt={"image": 16})
    lines = []
    for kind in options.kinds:
        lines.append(json.dumps(evaluate(llm, kind, options.cases, options.show, options.seed)))
        print(lines[-1], flush=True)
    if options.out:
        options.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
