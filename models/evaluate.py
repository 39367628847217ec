"""
Measure a checkpoint on held-out drawings, through the engine: `make eval`.

Every case is one prompt; it counts as right only if the whole text is the true sentence, to the
letter. A statement about a photograph is right if every clause of it is true of the pixels, with the
margins of models/train/photos.py. Seeds, and the photographs, are never those of the training.

A clip of kind "mp4" is drawn with more frames than are looked at and encoded as H.264; it goes in as a
`video_url` part, or as the frames that the same sampling takes of it, each an image of its own.
"""

import argparse
import base64
import json
import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from engine import LLM, Request, SamplingParams
from media.frames import FrameSampling
from media.video import decode_video
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
    "mp4": 0.95,
    "mp4 as frames": 0.95,
    "word": 0.95,
    "photo": 0.90,
}


FILE_FRAMES = (20, 40)  # drawn, for a clip that is encoded
FILE_FPS = 12


@dataclass(frozen=True, slots=True)
class Case:
    """
    One prompt, and how to judge its text.

    Attributes:
        pictures: none where the clip goes in as a file.
        file: of a clip that is encoded, with the number of frames that are looked at.
    """

    kind: str
    pictures: list[Image.Image]
    is_video: bool
    question: str
    answer: str
    is_right: Callable[[str], bool]
    file: tuple[bytes, int] | None = None


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


def _file(rng: random.Random, kind: str) -> Case:
    """A clip as a camera's file has it: its sides are even, and frames lie between those looked at."""
    num_frames = rng.randint(2, 16)
    width, height = corpus.clip_size(rng, num_frames)
    clip = motion.random_clip(rng, width // 2 * 2, height // 2 * 2)
    drawn = motion.draw_clip(rng, clip, rng.randint(*FILE_FRAMES))
    encoded = encode(corpus.weathered_frames(rng, drawn))
    question, answer = rng.choice(corpus.DESCRIBE_CLIP), motion.describe(clip)
    if kind == "mp4":
        sample = Sample(kind, [], [], [], is_video=True)
        return replace(_exact(kind, sample, (question, answer)), file=(encoded, num_frames))
    frames = decode_video(encoded, FrameSampling(num_frames))
    pictures = [image.image for image in frames.images]
    return _exact(kind, Sample(kind, pictures, [], []), (question, answer))


def encode(frames: Sequence[Image.Image]) -> bytes:
    """MP4 with H.264, in x264's own quality. The same frames do not always give the same bytes."""
    import av
    from av.video.stream import VideoStream

    file = BytesIO()
    with av.open(file, "w", format="mp4") as target:
        stream = target.add_stream("libx264", rate=FILE_FPS)
        assert isinstance(stream, VideoStream)
        (stream.width, stream.height), stream.pix_fmt = frames[0].size, "yuv420p"
        for frame in frames:
            target.mux(stream.encode(av.VideoFrame.from_ndarray(np.asarray(frame), format="rgb24")))
        target.mux(stream.encode())
    return file.getvalue()


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
    "mp4": _file,
    "mp4 as frames": _file,
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
    if case.file is not None:
        encoded, num_frames = case.file
        url = f"data:video/mp4;base64,{base64.b64encode(encoded).decode()}"
        media = [{"type": "video_url", "video_url": {"url": url}, "num_frames": num_frames}]
    elif case.is_video:
        media = [{"type": "video", "video": case.pictures}]
    return [{"role": "user", "content": [*media, {"type": "text", "text": case.question}]}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="darkroom-tiny")
    parser.add_argument("--cases", type=int, default=2000, help="of each kind")
    parser.add_argument("--kinds", nargs="*", default=list(_MAKERS), choices=list(_MAKERS))
    parser.add_argument("--seed", default=HELD_OUT, help="which cases; training uses others")
    parser.add_argument("--quantization", help="as LLM takes it: fp8")
    parser.add_argument("--kv-cache-dtype", default="auto", help="as LLM takes it: fp8")
    parser.add_argument("--show", type=int, default=0, help="wrong texts to print, of each kind")
    parser.add_argument("--out", type=Path, help="file for the report, as JSON lines")
    options = parser.parse_args()
    llm = LLM(
        options.model,
        limit_mm_per_prompt={"image": 16},
        quantization=options.quantization,
        kv_cache_dtype=options.kv_cache_dtype,
    )
    lines = []
    for kind in options.kinds:
        lines.append(json.dumps(evaluate(llm, kind, options.cases, options.show, options.seed)))
        print(lines[-1], flush=True)
    if options.out:
        options.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
