"""Work to measure: the same pictures for the same numbers, as JPEG bytes, so that decoding counts."""

import io
import json
import os
import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

NOISE_SIGMA = 8.0
JPEG_QUALITY = 88
CELL_PX = 32  # of the colour grid that a picture is blown up from
QUESTION = "Describe."


@dataclass(frozen=True, slots=True)
class Line:
    """
    What one prompt of a workload asks.

    Attributes:
        sizes: (width, height) in pixels of each of its pictures, which stand before the text.
    """

    sizes: tuple[tuple[int, int], ...]
    max_tokens: int
    text: str = QUESTION


@dataclass(frozen=True, slots=True)
class Prompt:
    """A line with its pictures, as JPEG bytes."""

    line: Line
    pictures: tuple[bytes, ...]


def _shuffled(*parts: tuple[int, int]) -> list[Line]:
    """So many prompts of one small picture with so many tokens, in an order that is always the same."""
    lines = [Line(((336, 336),), tokens) for num, tokens in parts for _ in range(num)]
    random.Random(0).shuffle(lines)
    return lines


def _mixed(num: int) -> list[Line]:
    """Pictures of 256 to 1280 pixels a side with 16 to 256 tokens, all equally likely."""
    source = random.Random(0)
    return [
        Line(((source.randint(256, 1280), source.randint(256, 1280)),), source.randint(16, 256))
        for _ in range(num)
    ]


# Lines that are repeated, and how many prompts a run has. `tail` and `even` have as many tokens.
WORKLOADS = {
    "caption": ([Line(((640, 480),), 64)], 1024),
    "frames": ([Line(((336, 336),) * 16, 128)], 192),
    "large": ([Line(((1024, 768),), 100)], 320),
    "mixed": (_mixed(1024), 1024),
    "tail": (_shuffled((2280, 16), (120, 512)), 2400),
    "even": (_shuffled((480, 40), (1920, 41)), 2400),
}


def read_work(name: str) -> tuple[list[Line], int]:
    """
    A named workload, or a file of JSON lines: `{"sizes": [[640, 480]], "max_tokens": 64}`, and
    `"text"` where it matters.

    Returns:
        Its lines, and the number of prompts in one run of it.

    Raises:
        ValueError: a line that cannot be read; it is named.
    """
    if name in WORKLOADS:
        return WORKLOADS[name]
    lines = []
    for number, text in enumerate(Path(name).read_text("utf-8").splitlines(), 1):
        if text.strip():
            try:
                lines.append(_parse_line(json.loads(text)))
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(
                    f'{name}, line {number}: want {{"sizes": [[width, height], ...], '
                    f'"max_tokens": n}}, got {text[:80]}'
                ) from error
    if not lines:
        raise ValueError(f"{name} has no lines")
    return lines, len(lines)


def _parse_line(given: Any) -> Line:
    sizes = tuple((int(width), int(height)) for width, height in given["sizes"])
    if any(side < 1 for size in sizes for side in size) or int(given["max_tokens"]) < 1:
        raise ValueError("sizes and max_tokens are 1 or more")
    return Line(sizes, int(given["max_tokens"]), str(given.get("text", QUESTION)))


def build_prompts(lines: Sequence[Line], num: int, first: int) -> list[Prompt]:
    """`num` prompts, the lines again and again, with pictures numbered from `first` on."""
    asked = list(islice(cycle(lines), num))
    wanted = [size for line in asked for size in line.sizes]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        made = iter(
            list(
                pool.map(
                    lambda each: picture_jpeg(each[0], *each[1]), enumerate(wanted, start=first)
                )
            )
        )
    return [Prompt(line, tuple(next(made) for _ in line.sizes)) for line in asked]


def picture_jpeg(number: int, width_px: int, height_px: int) -> bytes:
    """
    Picture `number` of a size: smooth colours with noise, so that a JPEG of it costs what one of a
    photograph costs (84 kB at 640 x 480).
    """
    source = np.random.default_rng(number)
    cells = source.integers(
        0, 256, (height_px // CELL_PX + 1, width_px // CELL_PX + 1, 3), dtype=np.uint8
    )
    smooth = Image.fromarray(cells).resize((width_px, height_px), Image.Resampling.BICUBIC)
    noisy = np.asarray(smooth, np.float32) + source.normal(0, NOISE_SIGMA, (height_px, width_px, 3))
    file = io.BytesIO()
    Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8)).save(
        file, "JPEG", quality=JPEG_QUALITY
    )
    return file.getvalue()
