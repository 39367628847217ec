"""Whether Triton can compile and start a kernel here."""

import torch
import triton
import triton.language as tl


@triton.jit
def _double(x_ptr, out_ptr, num, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    inside = at < num
    tl.store(out_ptr + at, 2 * tl.load(x_ptr + at, mask=inside, other=0), mask=inside)


def run(device: torch.device) -> None:
    """Raises whatever goes wrong."""
    with torch.cuda.device(device):
        x = torch.arange(5, device=device)
        out = torch.empty_like(x)
        _double[(1,)](x, out, 5, BLOCK=8)
        if out.tolist() != [0, 2, 4, 6, 8]:
            raise RuntimeError("a kernel ran and computed nonsense")
