"""uint8 patches to centred numbers, padded."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _centre(patches_ptr, out_ptr, num_pixels, width, middle, BLOCK: tl.constexpr):
    patch = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    is_pixel = column < num_pixels
    x = tl.load(patches_ptr + patch * num_pixels + column, mask=is_pixel, other=0).to(tl.float32)
    x = tl.where(is_pixel, x - middle, 0.0)
    to = out_ptr + patch * width + column
    tl.store(to, x.to(out_ptr.dtype.element_ty), mask=column < width)


def centre(patches: Tensor, middle: int, width: int, dtype: torch.dtype) -> Tensor:
    """(num_patches, pixels) -> (num_patches, width)."""
    patches = patches.contiguous()
    num_patches, num_pixels = patches.shape
    out = torch.empty((num_patches, width), dtype=dtype, device=patches.device)
    if num_patches:
        block = triton.next_power_of_2(width)
        _centre[(num_patches,)](patches, out, num_pixels, width, middle, BLOCK=block, num_warps=4)
    return out
