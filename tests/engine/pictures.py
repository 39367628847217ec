"""Small pictures, clips and prompts for the engine's tests, different for each seed."""

import base64
from collections.abc import Sequence
from io import BytesIO

import numpy as np
import numpy.typing as npt
from PIL import Image
from torch import Tensor

from engine import LLM, Result, SamplingParams
from engine.families.protocol import Family, Visual
from media.decoded import Frames
from media.images import from_pil

PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"
CLIP = "<|vision_start|><|video_pad|><|vision_end|>"
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


def draw(seed: int, width_px: int = 84, height_px: int = 84) -> Image.Image:
    """A picture of large blurred blocks of random colours."""
    shape = (height_px // 16 + 1, width_px // 16 + 1, 3)
    blocks = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    return Image.fromarray(blocks).resize((width_px, height_px))


def draw_clip(
    seed: int, num_frames: int, width_px: int = 84, height_px: int = 56
) -> list[Image.Image]:
    return [draw(1000 * seed + index, width_px, height_px) for index in range(num_frames)]


def as_frames(images: Sequence[Image.Image]) -> Frames:
    return Frames(tuple(from_pil(image) for image in images))


def as_array(image: Image.Image) -> npt.NDArray[np.uint8]:
    """(height_px, width_px, 3), uint8."""
    return np.asarray(image)


def encode(image: Image.Image, file_format: str = "PNG") -> bytes:
    file = BytesIO()
    image.save(file, file_format)
    return file.getvalue()


def encode_base64(image: Image.Image, file_format: str = "PNG") -> str:
    return base64.b64encode(encode(image, file_format)).decode()


def data_url(image: Image.Image, file_format: str = "PNG") -> str:
    return f"data:image/{file_format.lower()};base64,{encode_base64(image, file_format)}"


def features_of(llm: LLM, *images: Image.Image) -> tuple[list[Tensor], list[list[int]]]:
    """What the model's encoder makes of pictures: (tokens, hidden) each, and their grids."""
    family = llm.engine.checkpoint.family
    cut = [cut_picture(family, image) for image in images]
    grids = [visual.plan.layout for visual in cut]
    return family.encode(cut), [[grid.times, grid.rows, grid.columns] for grid in grids]


def cut_picture(family: Family, image: Image.Image) -> Visual:
    """A picture, by its plan."""
    return family.cut_picture(image, family.plan_picture(*image.size, family.image_area))


def cut_clip(family: Family, frames: Sequence[Image.Image]) -> Visual:
    """A clip of frames without moments, by its plan."""
    plan = family.plan_clip(*frames[0].size, len(frames), None, None, None, family.video_area)
    return family.cut_clip(frames, plan)


def texts(results: Sequence[Result]) -> list[str]:
    assert [] == [result.error for result in results if result.error]
    return [result.outputs[0].text for result in results]


def token_ids(results: Sequence[Result]) -> list[list[int]]:
    assert [] == [result.error for result in results if result.error]
    return [list(result.outputs[0].token_ids) for result in results]


def error_of(results: Sequence[Result]) -> str:
    """The text of the error that the only result ended in."""
    (result,) = results
    assert result.error is not None
    assert "error" == result.outputs[0].finish_reason
    assert "" == result.outputs[0].text
    return result.error.message
