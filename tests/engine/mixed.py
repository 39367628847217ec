"""Mixed requests, seeded: none to eight pictures, a clip now and then, other sizes and lengths."""

import random
from dataclasses import dataclass

import numpy as np

from engine import Request, SamplingParams
from engine.reference import Reference
from media.decoded import Frames, RGBImage
from media.images import from_array, from_pil
from models.train import corpus

SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"
CLIP = "<|vision_start|><|video_pad|><|vision_end|>"
ANSWER = "<|im_end|>\n<|im_start|>assistant\n"
QUESTIONS = (*corpus.DESCRIBE, *corpus.DESCRIBE_EACH, *corpus.READ, "Which image shows a red star?")


@dataclass(frozen=True, slots=True)
class Mixed:
    """One request, in a form that the engine and the reference both can be asked."""

    name: str
    prompt: str
    images: list[RGBImage]
    videos: list[Frames]
    max_tokens: int

    def request(self, *, ignore_eos: bool = False) -> Request:
        params = SamplingParams(temperature=0.0, max_tokens=self.max_tokens, ignore_eos=ignore_eos)
        media = {"image": self.images, "video": self.videos}
        given = {modality: items for modality, items in media.items() if items}
        return Request(
            prompt=self.prompt, multi_modal_data=given, params=params, request_id=self.name
        )

    def ask(self, reference: Reference, *, ignore_eos: bool = False) -> list[int]:
        return reference.generate(
            self.prompt,
            images=self.images,
            videos=self.videos,
            max_tokens=self.max_tokens,
            ignore_eos=ignore_eos,
        )


def mixed_requests(
    num: int, seed: str = "mixed", *, first: int = 0, with_times: bool = False
) -> list[Mixed]:
    """
    Args:
        first: number of the first of them; each is the same in any row of numbers.
        with_times: some clips know when their frames are shown.
    """
    numbers = range(first, first + num)
    return [_mixed(random.Random(f"{seed}/{index}"), str(index), with_times) for index in numbers]


def _mixed(rng: random.Random, name: str, with_times: bool) -> Mixed:
    images = [_picture(rng) for _ in range(rng.choice((0, 0, 1, 1, 1, 1, 2, 3, 4, 6, 8)))]
    videos = [_clip(rng)] if rng.random() < 0.15 else []
    if with_times:
        videos = [_timed(rng, clip) for clip in videos]
    marks = [PICTURE] * len(images) + [CLIP] * len(videos)
    rng.shuffle(marks)
    words = " ".join(rng.choice(QUESTIONS) for _ in range(rng.randint(1, 3)))
    if rng.random() < 0.5:
        content = "".join(marks) + words
    else:
        cut = rng.randint(0, len(marks))
        content = "".join(marks[:cut]) + words + "".join(marks[cut:])
    return Mixed(name, SYSTEM + content + ANSWER, images, videos, rng.randint(1, 40))


def _picture(rng: random.Random) -> RGBImage:
    width, height = rng.randint(20, 260), rng.randint(20, 260)
    if rng.random() < 0.3:
        noise = np.random.default_rng(rng.getrandbits(32))
        return from_array(noise.integers(0, 256, (height, width, 3), dtype=np.uint8))
    sample = corpus.scene_sample(rng, (max(56, width), max(56, height)))
    return from_pil(sample.pictures[0])


def _timed(rng: random.Random, clip: Frames) -> Frames:
    """The clip as if its frames had been spread over a longer one, of any rate."""
    source_num_frames, fps = clip.num_frames * rng.randint(1, 40), rng.choice((24.0, 29.97, 60.0))
    step = (source_num_frames - 1) / max(1, clip.num_frames - 1)
    indices = tuple(round(index * step) for index in range(clip.num_frames))
    times_s = tuple(index / fps for index in indices)
    return Frames(clip.images, times_s, fps, source_num_frames, indices)


def _clip(rng: random.Random) -> Frames:
    size = rng.randint(80, 160), rng.randint(80, 160)
    sample = corpus.motion_sample(rng, size, rng.randint(2, 7), is_video=True)
    return Frames(tuple(from_pil(picture) for picture in sample.pictures))
