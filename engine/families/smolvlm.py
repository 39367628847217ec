"""
SmolVLM2: Idefics3 with clips, each frame one tile behind its moment.

An introduction says in words how many frames there are, and how long the clip is; an empty line ends
it all. The text around a clip is one text with it: what comes before the number and behind the last
frame is the same for all clips and so stands in the prompt, where it is tokenised with its neighbours.
"""

from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from engine.errors import BadConfig, BadPrompt
from engine.families.idefics3 import (
    LONGEST_PX,
    MEAN,
    MOST_PX,
    STD,
    TILE_PX,
    Idefics3,
    fit_longest,
)
from engine.families.protocol import Description, Plan, Rows, Visual
from engine.families.resizing import check_aspect, resize
from engine.families.tiles import TileEncoder, encode_kinds

USUAL_FRAME_S = 1 / 24  # of frames whose times nobody knows
BEFORE, BEHIND = "You are provided the following series of", "\n\n"
# What SmolVLM2's processor writes a conversation with clips in, whatever its checkpoint brings.
CLIP_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{ message.role | capitalize }}:"
    "{{ '' if message.content[0].type == 'image' else ' ' }}"
    "{% for part in message.content %}"
    "{% if part.type == 'text' %}{{ part.text }}"
    "{% elif part.type in ('image', 'video') %}{{ '<' ~ part.type ~ '>' }}{% endif %}"
    "{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)

ONES = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    *("eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen"),
    "nineteen",
)
TENS = ("", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")


class SmolVLM(Idefics3):
    """A plan's layout, of a clip too, is the width and height of a picture on the way to its tiles."""

    video_placeholder = video_slot = "<video>"
    clip_template = CLIP_TEMPLATE
    video_token_id: int

    def __init__(self, description: Description) -> None:
        super().__init__(description)
        tokenizer = description.tokenizer
        # Its processor looks for the letters. Most of its tokenizers know no such token, and then the
        # text model has none either: it never gets as far.
        tokenizer.add_tokens([self.video_placeholder], special_tokens=True)
        self.video_token_id = tokenizer.convert_tokens_to_ids(self.video_placeholder)
        self._clips = clips = description.clips or description.pictures
        self._clip_size = _read_size(clips)
        self._clip_resample = Image.Resampling(clips.get("resample") or Image.Resampling.LANCZOS)
        tile_px = (clips.get("max_image_size") or {}).get("longest_edge", TILE_PX)
        if tile_px != self._tile_px or not clips.get("do_resize", True):
            raise BadConfig(
                "The model's video_preprocessor_config.json makes other tiles of frames than its "
                "encoder reads. Give the model's own."
            )

    # --- on the host ---------------------------------------------------------------------------------

    def read_text(self, text: str) -> str:
        placeholder = self.video_placeholder
        return text.replace(placeholder, f"{BEFORE}{placeholder}{BEHIND}")

    def plan_clip(
        self,
        width_px: int,
        height_px: int,
        num_frames: int,
        times_s: Sequence[float] | None,
        frame_s: float | None,
        duration_s: float | None,
        area: Any,
    ) -> Plan:
        """Of a clip of unknown length, the moment of the last frame is its length."""
        check_aspect(width_px, height_px)
        if times_s is None:
            times_s = [index * USUAL_FRAME_S for index in range(num_frames)]
        length = timedelta(seconds=int(times_s[-1] if duration_s is None else duration_s))
        text = f" {count_in_words(num_frames)} frames from a {length} [H:MM:SS] video.\n"
        self._check_cut(text)
        rows = Rows(self.image_token_id, self._num_rows)
        pieces: list[Rows | tuple[int, ...]] = []
        for time_s in times_s:
            minutes, seconds = divmod(int(time_s), 60)
            text += f"\nFrame from {minutes:02d}:{seconds:02d}:{self._around}{self._whole}"
            pieces += [self._encode(text), rows]
            text = self._around
        if isinstance(self._clip_size, int):
            first = fit_longest(width_px, height_px, min(self._clip_size, MOST_PX))
        else:
            first = self._clip_size
        return Plan(
            (*pieces, self._encode(text)),
            num_patches=num_frames * self._side**2,
            width_px=self._tile_px,
            height_px=self._tile_px,
            layout=first,
        )

    def _check_cut(self, text: str) -> None:
        """Behind BEFORE this tokenizer must begin anew, or other tokens would stand there."""
        if self._encode(BEFORE) + self._encode(text) != self._encode(BEFORE + text):
            raise BadPrompt(
                "is read by a tokenizer that is not SmolVLM2's, which joins other words",
                where="video",
                remedy="Give the model's own tokenizer.json, or frames as pictures",
            )

    def cut_clip(self, frames: Sequence[Image.Image], plan: Plan) -> Visual:
        """As a picture of one tile."""
        first_width, first_height = plan.layout
        resample = self._clip_resample
        return self._build(
            [
                resize(
                    resize(frame, first_height, first_width, resample),
                    plan.height_px,
                    plan.width_px,
                    resample,
                )
                for frame in frames
            ],
            plan,
            is_clip=True,
        )

    # --- on the device -------------------------------------------------------------------------------

    def attach(self, model: Any) -> None:
        super().attach(model)
        self._clip_encoder = self._encoder
        if self._clips is not self._pictures:
            self._clip_encoder = TileEncoder(
                model.model.vision_model, self._clips, MEAN, STD, tile_patches=self._side**2
            )

    @torch.inference_mode()
    def encode(self, visuals: Sequence[Visual]) -> list[Tensor]:
        encoders = self._encoder, self._clip_encoder
        seen = encode_kinds(visuals, encoders, self._see, self.repeats)
        return [tiles.flatten(0, 1) for tiles in seen]


def _read_size(clips: Mapping[str, Any]) -> int | tuple[int, int]:
    """
    What frames are brought to on the way to their tile: the longer side, or width and height.

    `video_sampling` holds a size too, which is read where there is no other.
    """
    sampled = clips.get("video_sampling") or {}
    size = clips.get("size") or sampled.get("video_size") or {"longest_edge": LONGEST_PX}
    if "longest_edge" in size:
        return int(size["longest_edge"])
    return int(size["width"]), int(size["height"])


def count_in_words(number: int) -> str:
    """A number below a million as English writes it out: one thousand, two hundred and thirty-four."""
    if number < len(ONES):
        return ONES[number]
    if number < 100:
        tens, ones = divmod(number, 10)
        return TENS[tens] + (f"-{ONES[ones]}" if ones else "")
    size, name = (100, "hundred") if number < 1000 else (1000, "thousand")
    count, rest = divmod(number, size)
    words = f"{count_in_words(count)} {name}"
    if not rest:
        return words
    return words + (" and " if rest < 100 else ", ") + count_in_words(rest)
