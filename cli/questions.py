"""
What is asked about an input: the parts of one user's message, with media that the engine reads.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import partial
from typing import Any, NoReturn

from cli.inputs import ClipReader, Input, load_picture
from media.errors import MediaError
from media.frames import FrameSampling
from media.segments import Cut, Look

PICTURE_PROMPT = "Describe the image."
CLIP_PROMPT = "What happens?"
NUM_FRAMES = 8
FEW_FRAMES = FrameSampling(num_frames=NUM_FRAMES)


class Form(StrEnum):
    """How a clip's frames are shown to the model."""

    VIDEO = "video"
    IMAGES = "images"


@dataclass(frozen=True, slots=True)
class Question:
    """
    One input and what is asked about it.

    Attributes:
        path: names the input in the answer.
        content: the parts of the user's message.
        clip: the source of the frames, where the input is one.
    """

    path: str
    content: Sequence[dict[str, Any]]
    clip: ClipReader | None = None


@dataclass(frozen=True, slots=True)
class Segmented:
    """
    A clip, and how it is cut.

    Attributes:
        prompt: what is asked about each segment.
        measure: its segments; reads the clip.
        ask: the question about one of them.
    """

    path: str
    prompt: str
    measure: Callable[[], Sequence[Look]]
    ask: Callable[[Look], Question]


def ask_about_picture(found: Input, prompt: str = PICTURE_PROMPT) -> Question:
    picture = {"type": "image", "image": partial(load_picture, found.path)}
    return Question(found.path, [picture, {"type": "text", "text": prompt}])


def ask_about_clip(
    found: Input,
    prompt: str = CLIP_PROMPT,
    sampling: FrameSampling = FEW_FRAMES,
    form: Form = Form.VIDEO,
) -> Question:
    clip = ClipReader(found, sampling)
    parts = [{"type": "video", "video": clip.load}] if form is Form.VIDEO else _build_stills(clip)
    return Question(found.path, [*parts, {"type": "text", "text": prompt}], clip)


def ask_in_segments(
    found: Input, prompt: str, sampling: FrameSampling, form: Form, cut: Cut
) -> Segmented:
    """As `ask_about_clip`, of each segment; `sampling` counts for each."""

    def ask(segment: Look) -> Question:
        window = replace(sampling, start_s=segment.first_s, end_s=segment.last_s)
        return ask_about_clip(found, prompt, window, form)

    return Segmented(found.path, prompt, partial(ClipReader(found, sampling).plan, cut), ask)


def _build_stills(clip: ClipReader) -> list[dict[str, Any]]:
    """A part for each frame. What goes wrong becomes the error of the only part."""
    try:
        loaders = clip.build_loaders()
    except MediaError as error:
        loaders = [partial(_fail, error)]
    return [{"type": "image", "image": loader} for loader in loaders]


def _fail(error: MediaError) -> NoReturn:
    """Stands for a picture that cannot be read: the engine turns the error into the result's."""
    raise error
