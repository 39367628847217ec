"""
A table of model families, and what transformers makes of the same requests: its own processor, with
Pillow's image processor, and its own `generate`.

tests/engine/test_families.py runs the same checks for each entry. A new family adds one.
"""

import json
import math
import os
import random
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import patch

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from transformers import (
    AutoTokenizer,
    Gemma3Processor,
    GenerationConfig,
    Idefics3Processor,
    InternVLProcessor,
    LlavaNextProcessor,
    LlavaOnevisionProcessor,
    LlavaProcessor,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
    LlavaOnevisionImageProcessorPil,
)
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.smolvlm import processing_smolvlm
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil
from transformers.models.smolvlm.video_processing_smolvlm import SmolVLMVideoProcessor
from transformers.video_utils import VideoMetadata

from engine import Request, SamplingParams
from engine.families import FAMILIES
from tests.engine.pictures import draw
from tests.engine.tiny_llava import (
    GEMMA,
    GEMMA3_OTHER,
    GEMMA_OTHER,
    IDEFICS3_OTHER,
    IDEFICS3_WHOLE,
    INTERNVL_OTHER,
    LLAVA_NEXT_OTHER,
    LLAVA_NEXT_WINDOW,
    LLAVA_ONEVISION_OTHER,
    LLAVA_OTHER,
    LLAVA_PADDED,
    LLAVA_SIGLIP,
    MISTRAL3_OTHER,
    PIXTRAL_OTHER,
    SMOLVLM_OTHER,
    write_tiny_gemma3,
    write_tiny_idefics3,
    write_tiny_internvl,
    write_tiny_llava,
    write_tiny_llava_next,
    write_tiny_llava_onevision,
    write_tiny_mistral3,
    write_tiny_pixtral,
    write_tiny_smolvlm,
    write_tiny_text,
)

# As many of each shape, in place of the suite's few, asked in every way: `make exactness` asks 100.
NUM_ASKED = int(os.environ.get("DARKROOM_TEST_FAMILY_REQUESTS", "0"))
WORDS = ("Describe.", "What is this?", "Which one is red?", "a b", "And now", "Read it aloud.")
Pixels = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Case:
    """
    One shape of one family.

    Attributes:
        write: writes a tiny checkpoint into a folder, by a seed.
        image_processor, processor: transformers' classes; None for text alone.
        picture, clip: how a prompt writes one; no clip where the family sees none.
        read_clips: what the model is given for a prompt with a clip: transformers' own processors
            of clips need torchvision.
        are_nested: whether the processor is told which pictures are of one prompt.
        before, after: what stands around a prompt.
    """

    model_type: str
    write: Callable[..., Path]
    image_processor: Any
    processor: Any
    changes: Any = None
    picture: str = "<image>\n"
    clip: str | None = None
    read_clips: "Callable[[Oracle, Asked], dict[str, Any]] | None" = None
    before: str = "USER: "
    after: str = "\nASSISTANT:"
    max_pictures: int = 4
    are_nested: bool = False
    num_requests: int = 50  # a family has two shapes of so many, or more


class WithoutClips:
    """The part that reads clips is left out: it is looked up where torchvision is missing."""

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
        if argument_name == "video_processor":
            return None
        return super().check_argument_for_proper_class(argument_name, argument)  # type: ignore[misc]


class OnevisionProcessor(WithoutClips, LlavaOnevisionProcessor): ...


class TilesProcessor(WithoutClips, InternVLProcessor):
    def __call__(self, *given: Any, **words: Any) -> Any:
        with warnings.catch_warnings():
            # transformers 5.17, the oldest that is allowed, hands a tensor to NumPy's cumsum, which
            # finds torch's way of wrapping what comes back out of date. Later ones hand it a list.
            warnings.filterwarnings("ignore", "__array_wrap__ must accept", DeprecationWarning)
            return super().__call__(*given, **words)


class PixtralProcessor:
    """
    What transformers' own does, which cannot be imported without torchvision: a token for each token's
    pixels, one behind each row, and another behind the last.
    """

    def __init__(
        self, image_processor: Any, tokenizer: Any, patch_size: int, spatial_merge_size: int
    ) -> None:
        self._read_pictures, self._tokenizer = image_processor, tokenizer
        self._token_px = patch_size * spatial_merge_size

    def __call__(
        self, text: Sequence[str], return_tensors: str, images: Sequence[Image.Image] = ()
    ) -> dict[str, Any]:
        (prompt,) = text
        if not images:
            return dict(self._tokenizer(prompt, return_tensors=return_tensors))
        made = self._read_pictures(
            list(images), patch_size=self._token_px, return_tensors=return_tensors
        )
        first, *pieces = prompt.split("[IMG]")
        written = first
        for (height, width), piece in zip(made["image_sizes"].tolist(), pieces, strict=True):
            row = "[IMG]" * (width // self._token_px)
            written += "[IMG_BREAK]".join([row] * (height // self._token_px)) + "[IMG_END]" + piece
        return {**self._tokenizer(written, return_tensors=return_tensors), **made}


def read_onevision_clips(oracle: "Oracle", asked: "Asked") -> dict[str, Any]:
    """Each frame goes through the processor of pictures, as one that is not cut into tiles."""
    (clip,) = asked.clips
    size = oracle.image_processor.size["height"]
    frames = [frame.resize((size, size), Image.Resampling.BICUBIC) for frame in clip]
    made = oracle.image_processor([frames * 2], return_tensors="pt")  # several, or it is tiled
    pixels = made["pixel_values"][: len(clip), 0]
    side = math.ceil(math.isqrt(oracle.processor.num_image_tokens) / 2)
    count = len(clip) * side**2 + 1  # the model refuses any other number
    assert oracle.case.clip is not None
    # It refuses its own mark of a clip that it does not read: another stands in.
    stand_in: str = oracle.processor.tokenizer.pad_token
    prompt = asked.prompt.replace(oracle.case.clip.strip(), stand_in * count)
    inputs = oracle.read(Asked("", prompt, asked.pictures, [], 1))
    ids = inputs["input_ids"]
    ids[ids == oracle.processor.tokenizer.pad_token_id] = oracle.model.config.video_token_id
    return {**inputs, "pixel_values_videos": pixels[None]}


def read_internvl_clips(oracle: "Oracle", asked: "Asked") -> dict[str, Any]:
    """A frame is one tile, behind its number; placeholders are written out, pictures' too."""
    marks = iter(re.findall("<IMG_CONTEXT>|<video>", asked.prompt))
    pictures, (clip,) = iter(asked.pictures), asked.clips
    pixels = []

    def write(images: Sequence[Image.Image], *, is_tiled: bool) -> list[str]:
        written = []
        for image in images:
            made = oracle.image_processor([image], return_tensors="pt", crop_to_patches=is_tiled)
            pixels.append(made["pixel_values"])
            count = len(made["pixel_values"]) * oracle.processor.image_seq_length
            written.append(f"<img>{'<IMG_CONTEXT>' * count}</img>")
        return written

    pieces = re.split("<IMG_CONTEXT>|<video>", asked.prompt)
    prompt = pieces[0]
    for mark, piece in zip(marks, pieces[1:], strict=True):
        if mark == "<video>":
            frames = write(clip, is_tiled=False)
            prompt += "\n".join(f"Frame{n}: {frame}" for n, frame in enumerate(frames, 1))
        else:
            prompt += write([next(pictures)], is_tiled=True)[0]
        prompt += piece
    inputs = oracle.processor.tokenizer(prompt, return_tensors="pt")
    return {**inputs, "pixel_values": torch.cat(pixels)}


AROUND, WHOLE = "<fake_token_around_image>", "<global-img>"
NUMBERS = {1: "one", 2: "two", 3: "three", 4: "four", 5: "five", 32: "thirty-two"}


def write_smolvlm_clip(image_seq_len: int, num_frames: int, metadata: VideoMetadata) -> str:
    """
    What its processor puts into the place of `<video>`.

    It cannot be made without torchvision and a package that writes numbers out; what writes the text
    can be asked alone, once it is told the few numbers.
    """
    marks = ("image", "<image>"), ("fake_image", AROUND), ("global_image", WHOLE)
    processor = SimpleNamespace(
        image_seq_len=image_seq_len, **{f"{name}_token": mark for name, mark in marks}
    )
    told = {"pixel_values": np.empty((1, num_frames)), "video_metadata": [metadata]}
    with patch.object(processing_smolvlm, "num2words", NUMBERS.__getitem__):
        written: str = processing_smolvlm.SmolVLMProcessor.replace_video_token(
            cast(Any, processor), told, 0
        )
    return written


def read_smolvlm_clips(oracle: "Oracle", asked: "Asked") -> dict[str, Any]:
    """
    A frame is a picture that is not split, sized as its processor of clips says.

    That one can be made without torchvision, and not be asked: how it resamples and normalises is told
    to the processor of pictures. The text is written out, pictures' too.
    """
    told = SmolVLMVideoProcessor.from_pretrained(oracle.folder)
    pictures, clips = iter(asked.pictures), iter(asked.clips)
    num_rows: int = oracle.processor.image_seq_len
    pixels, prompt = [], ""
    for piece in re.split("(<image>|<video>)", asked.prompt):
        if piece == "<video>":
            clip = next(clips)
            for frame in clip:
                made = oracle.image_processor(
                    [[frame]],
                    return_tensors="pt",
                    do_image_splitting=False,
                    size=dict(told.size),
                    max_image_size=dict(told.max_image_size),
                    resample=told.resample,
                    image_mean=told.image_mean,
                    image_std=told.image_std,
                )
                pixels.append(made["pixel_values"][0])
            # As of frames of which nothing else is known.
            bare = VideoMetadata(len(clip), frames_indices=list(range(len(clip))))
            prompt += write_smolvlm_clip(num_rows, len(clip), bare)
        elif piece == "<image>":
            made = oracle.image_processor(
                [[next(pictures)]], return_tensors="pt", return_row_col_info=True
            )
            pixels.append(made["pixel_values"][0])
            (down,), (across,) = made["rows"][0], made["cols"][0]
            prompt += processing_smolvlm.get_image_prompt_string(  # type: ignore[no-untyped-call]
                down, across, num_rows, AROUND, "<image>", WHOLE
            )
        else:
            prompt += piece
    tiles = torch.cat(pixels)[None]
    inputs = oracle.processor.tokenizer(prompt, return_tensors="pt")
    mask = torch.ones_like(tiles[:, :, 0], dtype=torch.int64)
    return {**inputs, "pixel_values": tiles, "pixel_attention_mask": mask}


def text_case(model_type: str, **changes: Any) -> Case:
    changes = {"text": {"model_type": model_type, **changes}}
    return Case(model_type, write_tiny_text, None, None, changes, num_requests=20, max_pictures=0)


CASES: Mapping[str, Case] = {
    "idefics3": Case(
        "idefics3",
        write_tiny_idefics3,
        Idefics3ImageProcessorPil,
        Idefics3Processor,
        are_nested=True,
    ),
    "idefics3, uneven tiles and Qwen2": Case(
        "idefics3",
        write_tiny_idefics3,
        Idefics3ImageProcessorPil,
        Idefics3Processor,
        IDEFICS3_OTHER,
        are_nested=True,
    ),
    "idefics3, whole pictures": Case(
        "idefics3",
        write_tiny_idefics3,
        Idefics3ImageProcessorPil,
        Idefics3Processor,
        IDEFICS3_WHOLE,
        are_nested=True,
        num_requests=20,
    ),
    # SmolVLM's own processor writes the same text for pictures, and wants a package for clips.
    "smolvlm": Case(
        "smolvlm",
        write_tiny_smolvlm,
        SmolVLMImageProcessorPil,
        Idefics3Processor,
        clip="<video>\n",
        read_clips=read_smolvlm_clips,
        are_nested=True,
    ),
    "smolvlm, uneven tiles and Qwen2": Case(
        "smolvlm",
        write_tiny_smolvlm,
        SmolVLMImageProcessorPil,
        Idefics3Processor,
        SMOLVLM_OTHER,
        clip="<video>\n",
        read_clips=read_smolvlm_clips,
        are_nested=True,
    ),
    "internvl": Case(
        "internvl",
        write_tiny_internvl,
        GotOcr2ImageProcessorPil,
        TilesProcessor,
        picture="<IMG_CONTEXT>\n",
        clip="<video>\n",
        read_clips=read_internvl_clips,
    ),
    "internvl, RMSNorm and Llama": Case(
        "internvl",
        write_tiny_internvl,
        GotOcr2ImageProcessorPil,
        TilesProcessor,
        INTERNVL_OTHER,
        picture="<IMG_CONTEXT>\n",
        clip="<video>\n",
        read_clips=read_internvl_clips,
    ),
    "gemma3": Case(
        "gemma3",
        write_tiny_gemma3,
        Gemma3ImageProcessorPil,
        Gemma3Processor,
        picture="<start_of_image>",
        are_nested=True,
    ),
    "gemma3, windows shorter than a picture": Case(
        "gemma3",
        write_tiny_gemma3,
        Gemma3ImageProcessorPil,
        Gemma3Processor,
        GEMMA3_OTHER,
        picture="<start_of_image>",
        are_nested=True,
    ),
    "gemma3, text alone": text_case("gemma3_text", **GEMMA),
    "gemma3, text alone, one KV head": text_case("gemma3_text", **GEMMA_OTHER),
    "llama": text_case("llama", num_key_value_heads=2),
    "mistral, with a window": text_case("mistral", sliding_window=16),
    "phi3": text_case("phi3", sliding_window=20),
    "qwen2": text_case("qwen2", tie_word_embeddings=True),
    "qwen3": text_case("qwen3", head_dim=24, num_key_value_heads=2),
    "llava": Case("llava", write_tiny_llava, CLIPImageProcessorPil, LlavaProcessor),
    "llava, other heads, squashed": Case(
        "llava", write_tiny_llava, CLIPImageProcessorPil, LlavaProcessor, LLAVA_OTHER
    ),
    "llava, padded": Case(
        "llava",
        write_tiny_llava,
        LlavaImageProcessorPil,
        LlavaProcessor,
        LLAVA_PADDED,
        num_requests=20,
    ),
    "llava, SigLIP and Qwen2": Case(
        "llava",
        write_tiny_llava,
        SiglipImageProcessorPil,
        LlavaProcessor,
        LLAVA_SIGLIP,
        num_requests=20,
    ),
    "pixtral": Case(
        "llava",
        write_tiny_pixtral,
        PixtralImageProcessorPil,
        PixtralProcessor,
        picture="[IMG]",
        num_requests=25,
    ),
    "pixtral, a window and other heads": Case(
        "llava",
        write_tiny_pixtral,
        PixtralImageProcessorPil,
        PixtralProcessor,
        PIXTRAL_OTHER,
        picture="[IMG]",
        num_requests=25,
    ),
    "mistral3": Case(
        "mistral3",
        write_tiny_mistral3,
        PixtralImageProcessorPil,
        PixtralProcessor,
        picture="[IMG]",
        num_requests=25,
    ),
    "mistral3, a window and other heads": Case(
        "mistral3",
        write_tiny_mistral3,
        PixtralImageProcessorPil,
        PixtralProcessor,
        MISTRAL3_OTHER,
        picture="[IMG]",
        num_requests=25,
    ),
    "llava next": Case(
        "llava_next", write_tiny_llava_next, LlavaNextImageProcessorPil, LlavaNextProcessor
    ),
    "llava next, SigLIP and Qwen2": Case(
        "llava_next",
        write_tiny_llava_next,
        LlavaNextImageProcessorPil,
        LlavaNextProcessor,
        LLAVA_NEXT_OTHER,
    ),
    "llava next, Mistral with a window": Case(
        "llava_next",
        write_tiny_llava_next,
        LlavaNextImageProcessorPil,
        LlavaNextProcessor,
        LLAVA_NEXT_WINDOW,
        num_requests=20,
    ),
    "llava onevision": Case(
        "llava_onevision",
        write_tiny_llava_onevision,
        LlavaOnevisionImageProcessorPil,
        OnevisionProcessor,
        clip="<video>\n",
        read_clips=read_onevision_clips,
        are_nested=True,
    ),
    "llava onevision, all shrunk": Case(
        "llava_onevision",
        write_tiny_llava_onevision,
        LlavaOnevisionImageProcessorPil,
        OnevisionProcessor,
        LLAVA_ONEVISION_OTHER,
        clip="<video>\n",
        read_clips=read_onevision_clips,
        are_nested=True,
    ),
}


@dataclass(frozen=True, slots=True)
class Asked:
    """One request, for the engine and for transformers."""

    name: str
    prompt: str
    pictures: Sequence[Image.Image]
    clips: Sequence[Sequence[Image.Image]]
    max_tokens: int

    def request(self) -> Request:
        params = SamplingParams(temperature=0, max_tokens=self.max_tokens, ignore_eos=True)
        media = {"image": list(self.pictures), "video": [list(clip) for clip in self.clips]}
        given = {modality: items for modality, items in media.items() if items}
        return Request(
            prompt=self.prompt, multi_modal_data=given, params=params, request_id=self.name
        )


class Oracle:
    """transformers, reading a checkpoint of its own accord."""

    def __init__(self, case: Case, folder: Path) -> None:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        self.processor: Any = tokenizer
        if case.processor is not None:
            told = json.loads((folder / "processor_config.json").read_text())
            self.image_processor = case.image_processor.from_pretrained(folder)
            self.processor = case.processor(
                image_processor=self.image_processor, tokenizer=tokenizer, **told
            )
        self.case, self.folder = case, folder
        model_class = FAMILIES[case.model_type].load_model_class()
        self.model = model_class.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="sdpa"
        ).eval()
        self.model.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]

    def read(self, asked: Asked) -> dict[str, Any]:
        """What the model is given."""
        if asked.clips:
            assert self.case.read_clips is not None
            return self.case.read_clips(self, asked)
        media: dict[str, Any] = {}
        if asked.pictures:
            pictures = list(asked.pictures)
            media["images"] = [pictures] if self.case.are_nested else pictures
        return dict(self.processor(text=[asked.prompt], return_tensors="pt", **media))

    @torch.inference_mode()
    def generate(self, asked: Asked) -> list[int]:
        inputs = self.read(asked)
        made = self.model.generate(
            **inputs,
            max_new_tokens=asked.max_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        ids: list[int] = made[0, inputs["input_ids"].shape[1] :].tolist()
        return ids

    def pixels(self, image: Image.Image) -> Pixels:
        """(tiles, 3, height_px, width_px), normalisation undone: from 0 to 255."""
        made = self.image_processor([image], return_tensors="np")["pixel_values"]
        tiles = np.asarray(made[0] if made[0].ndim == 4 else made, dtype=np.float64)
        mean, std = (
            np.array(getattr(self.image_processor, name))[:, None, None]
            for name in ("image_mean", "image_std")
        )
        levels: Pixels = (tiles * std + mean) * 255
        return levels


def mixed(case: Case, num: int, seed: str) -> list[Asked]:
    """Requests of no, one or several pictures of any form, and of clips where the family sees them."""
    return [_one(case, random.Random(f"{seed}/{index}"), str(index)) for index in range(num)]


def _one(case: Case, rng: random.Random, name: str) -> Asked:
    num = rng.choice((0, 0, 1, 1, 1, 1, 2, 3, 4))
    pictures = [draw(rng.getrandbits(24), *size(rng)) for _ in range(min(num, case.max_pictures))]
    clips = []
    if case.clip is not None and rng.random() < 0.25:
        width, height = rng.randint(20, 120), rng.randint(20, 120)
        clips = [[draw(rng.getrandbits(24), width, height) for _ in range(rng.randint(1, 5))]]
    marks = [case.picture] * len(pictures) + [case.clip or ""] * len(clips)
    rng.shuffle(marks)
    words = " ".join(rng.choice(WORDS) for _ in range(rng.randint(1, 3)))
    cut = rng.randint(0, len(marks)) if rng.random() < 0.5 else len(marks)
    content = "".join(marks[:cut]) + words + "".join(marks[cut:])
    return Asked(name, case.before + content + case.after, pictures, clips, rng.randint(1, 8))


def size(rng: random.Random) -> tuple[int, int]:
    """Width and height in pixels, some of them long strips, some as large as models see at once."""
    chance = rng.random()
    if chance < 0.15:
        sides = [rng.randint(1, 6), rng.randint(60, 200)]
    elif chance < 0.3:
        sides = [rng.choice((48, 56, 64, 96, 112)) + rng.choice((-1, 0, 0, 1)) for _ in range(2)]
    else:
        sides = [rng.randint(8, 260) for _ in range(2)]
    rng.shuffle(sides)
    return sides[0], sides[1]
