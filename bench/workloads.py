"""Work to measure: the same pictures for the same numbers, as JPEG bytes, so that decoding counts."""

import io

import numpy as np
from PIL import Image

NOISE_SIGMA = 8.0
JPEG_QUALITY = 88
CELL_PX = 32  # of the colour grid that a picture is blown up from


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
