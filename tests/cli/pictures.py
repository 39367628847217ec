"""Picture files whose widths tell them apart."""

import os
from pathlib import Path

from PIL import Image


def save_picture(path: str | Path, width: int, height: int = 10) -> None:
    """Write a picture in the format of the name's suffix, with the folders above it."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), "orange").save(target)


def save_pictures(num: int, folder: str = "pics") -> list[str]:
    """Write 0.png, 1.png, ... with widths 10, 11, ... and return their paths."""
    paths = [os.path.join(folder, f"{index}.png") for index in range(num)]  # noqa: PTH118
    for index, path in enumerate(paths):
        save_picture(path, 10 + index)
    return paths
