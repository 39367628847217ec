"""
Phi-3.5-vision one request at a time, written down from the description of its published code.

It shares no line with the engine's adapter: pictures are cut with loops, the two halves are
transformers' own Phi-3 and CLIP with the weights under their published names, and the answer comes
from `Phi3ForCausalLM.generate` on embeddings. Slow, and there to be believed.

The description: a picture is laid down (mirrored at its diagonal if upright) and resampled, bilinear, to
`scale * 336` wide, the largest scale for which scale * ceil(scale / ratio) tiles are allowed; white fills its
height up to whole tiles, half above; it is turned back. Normalised, it is cut into tiles; the
whole is resampled to one tile, bicubic. CLIP's states before its last layer, without the class token,
are merged 2 x 2. The prompt's pieces around `<|image_n|>` are tokenised one by one.
"""

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import gelu, interpolate, linear
from transformers import (
    AutoTokenizer,
    CLIPVisionConfig,
    CLIPVisionModel,
    Phi3Config,
    Phi3ForCausalLM,
)

from media.decoded import Frames, RGBImage

VISION = "model.vision_embed_tokens."
TOWER = VISION + "img_processor.vision_model."


class Phi3VReference:
    def __init__(self, folder: Path, num_crops: int | None = None) -> None:
        config = json.loads((folder / "config.json").read_text())
        pictures = json.loads((folder / "preprocessor_config.json").read_text())
        self.weights = load_file(folder / "model.safetensors")
        self.num_crops: int = num_crops or pictures["num_crops"]
        self.mean, self.std = pictures["image_mean"], pictures["image_std"]
        # As any: transformers annotates its models for itself, not for callers.
        vision: Any = CLIPVisionConfig(**config["vision_config"])
        self.tile_px: int = vision.image_size
        self.side: int = vision.image_size // vision.patch_size
        text = _text_config(config)
        self.tower: Any = CLIPVisionModel(vision)
        self.tower.load_state_dict(_below(TOWER, self.weights))
        self.text: Any = Phi3ForCausalLM(text)
        self.text.load_state_dict({k: v for k, v in self.weights.items() if VISION not in k})
        self.tower.train(False)
        self.text.train(False)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, config=text)
        # What ends a turn of its template, and what its author's example gives to `generate`.
        self.eos_ids = self.tokenizer.convert_tokens_to_ids(["<|end|>", "<|endoftext|>"])
        self.pad_id: int = config["pad_token_id"]

    @torch.inference_mode()
    def generate(
        self,
        prompt: str,
        *,
        images: Sequence[RGBImage] = (),
        videos: Sequence[Frames] = (),
        max_tokens: int,
        ignore_eos: bool = False,
    ) -> list[int]:
        assert not videos, "it sees no clips"
        embeds = torch.cat(self.embed(prompt, [image.image for image in images]))[None]
        made = self.text.generate(
            inputs_embeds=embeds,
            attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long),
            max_new_tokens=max_tokens,
            do_sample=False,
            eos_token_id=None if ignore_eos else self.eos_ids,
            pad_token_id=self.pad_id,
        )
        new_ids: list[int] = made[0].tolist()
        return new_ids

    def embed(self, prompt: str, images: Sequence[Image.Image]) -> list[Tensor]:
        """(tokens, hidden) of each piece of a prompt, texts and pictures in turn."""
        texts = re.split(r"<\|image_\d+\|>", prompt)
        assert len(texts) == len(images) + 1
        table = self.weights["model.embed_tokens.weight"]
        pieces = []
        for index, text in enumerate(texts):
            pieces.append(table[torch.tensor(self.tokenizer(text)["input_ids"])])
            if index < len(images):
                pieces.append(self.see(images[index]))
        return pieces

    def see(self, image: Image.Image) -> Tensor:
        """(tokens, hidden) of one picture."""
        whole = self.normalise(hd_transform(image, self.num_crops, self.tile_px))
        rows, columns = (side // self.tile_px for side in whole.shape[1:])
        small = interpolate(whole[None], (self.tile_px, self.tile_px), mode="bicubic")[0]
        line_end = self.weights[VISION + "sub_GN"].view(-1)
        lines = []
        merged = [[self.read(self.tile(whole, r, c)) for c in range(columns)] for r in range(rows)]
        for of_row in merged:
            for line in range(self.side // 2):
                for cells in of_row:
                    lines.append(cells[line])
                lines.append(line_end[None])
        lines.append(self.weights[VISION + "glb_GN"].view(1, -1))
        cells = self.read(small)
        for line in range(self.side // 2):
            lines += [cells[line], line_end[None]]
        x = torch.cat(lines)
        for number, activate in (("0", gelu), ("2", None)):
            name = f"{VISION}img_projection.{number}."
            x = linear(x, self.weights[name + "weight"], self.weights[name + "bias"])
            x = activate(x) if activate else x
        return x

    def normalise(self, image: Image.Image) -> Tensor:
        """(3, height_px, width_px), float32."""
        levels = torch.from_numpy(np.asarray(image).copy()).float() / 255
        channels = [(levels[..., i] - self.mean[i]) / self.std[i] for i in range(3)]
        return torch.stack(channels)

    def tile(self, whole: Tensor, row: int, column: int) -> Tensor:
        top, left = row * self.tile_px, column * self.tile_px
        return whole[:, top : top + self.tile_px, left : left + self.tile_px]

    def read(self, tile: Tensor) -> Tensor:
        """(side / 2, side / 2, 4 * width) of one tile: its patches from left to right, two by two."""
        states = self.tower(tile[None], output_hidden_states=True).hidden_states[-2][0, 1:]
        patches = states.view(self.side, self.side, -1)
        lines = []
        for row in range(0, self.side, 2):
            line = []
            for column in range(0, self.side, 2):
                line.append(patches[row : row + 2, column : column + 2].reshape(-1))
            lines.append(torch.stack(line))
        return torch.stack(lines)


def hd_transform(image: Image.Image, num_crops: int, tile_px: int) -> Image.Image:
    """The resampled and padded picture, both sides whole tiles."""
    is_upright = image.width < image.height
    if is_upright:
        image = image.transpose(Image.Transpose.TRANSPOSE)
    ratio = image.width / image.height
    scale = 1
    while scale * math.ceil(scale / ratio) <= num_crops:
        scale += 1
    scale -= 1
    width, height = scale * tile_px, int(scale * tile_px / ratio)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    missing = math.ceil(height / tile_px) * tile_px - height
    above = np.full((missing // 2, width, 3), 255, np.uint8)
    below = np.full((missing - missing // 2, width, 3), 255, np.uint8)
    padded = Image.fromarray(np.concatenate([above, np.asarray(image), below]))
    return padded.transpose(Image.Transpose.TRANSPOSE) if is_upright else padded


def num_tokens(width_px: int, height_px: int) -> int:
    """The published formula for a picture that was padded to whole tiles of 336 px."""
    rows, columns = height_px // 336, width_px // 336
    return (rows * columns + 1) * 144 + 1 + (rows + 1) * 12


def _text_config(published: dict[str, Any]) -> Phi3Config:
    """By hand, word by word: nothing that reads it for the engine is asked."""
    scaling = published["rope_scaling"]
    rope = {
        "rope_type": "longrope",
        "rope_theta": published["rope_theta"],
        "short_factor": scaling["short_factor"],
        "long_factor": scaling["long_factor"],
        "original_max_position_embeddings": published["original_max_position_embeddings"],
    }
    same = (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
        "num_key_value_heads max_position_embeddings original_max_position_embeddings "
        "rms_norm_eps pad_token_id"
    )
    return Phi3Config(**{name: published[name] for name in same.split()}, rope_parameters=rope)


def _below(prefix: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
