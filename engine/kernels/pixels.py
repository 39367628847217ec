"""From uint8 pixels to what the first matrix product reads."""

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.kernels import has_kernels


def centre(patches: Tensor, middle: int, width: int, dtype: torch.dtype) -> Tensor:
    """
    Patches less the middle of their range, with zeros behind each.

    Args:
        patches: (num_patches, pixels), uint8, dense.
        middle: taken from each pixel.
        width: at least `pixels`. Matrix products want a multiple of 8 and, in fp8, of 16.
        dtype: of the result; whole numbers below 256 are exact in every float type of 16 bits.

    Returns:
        (num_patches, width).
    """
    if has_kernels(patches):
        from engine.kernels.gpu import pixels

        return pixels.centre(patches, middle, width, dtype)
    return F.pad(patches.to(dtype) - middle, (0, width - patches.shape[1]))
