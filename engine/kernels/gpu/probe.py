"""
Whether kernels work here: some of each kind are run once on a few numbers and compared with their
twins. Not those for fp8, angles and pixels; pictures.py, prompts.py, in_one.py, split.py and draw.py
try their own before they use them.

Triton may lack a compiler for its launchers, or meet a device that it does not know. It is better
to find out at the start, and run the twins, than in the middle of somebody's job.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from engine.kernels import activations as plain_activations
from engine.kernels import decode as plain_decode
from engine.kernels import greedy as plain_greedy
from engine.kernels import norms as plain_norms
from engine.kernels import rope as plain_rope
from engine.kernels.gpu import activations, decode, greedy, norms, rope

APART = 0.05  # of each number, in bfloat16; a wrong index or mask is off by far more
EPS, SPLIT_ROWS, SCALE = 1e-6, 128, 0.25

Call = Callable[..., Tensor | None]


def run(device: torch.device) -> None:
    """
    Raises:
        RuntimeError: a kernel computes nonsense. Whatever else Triton raises goes through.
    """
    numbers = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=numbers).bfloat16()

    x, delta, weight, bias = drawn(3, 48), drawn(3, 48), drawn(48), drawn(48)
    angles = torch.rand(3, 8, generator=numbers)
    rows, starts = torch.tensor([17, 3, 300]), torch.tensor([0, 304, 16], dtype=torch.int32)
    lens = torch.tensor([5, 0, 280], dtype=torch.int32)
    kv = drawn(320, 2, 16), drawn(320, 2, 16)
    checks: dict[str, tuple[Call, Call, tuple[Tensor, ...]]] = {
        "rms_norm": (
            lambda x, w: norms.norm(x, w, None, EPS),
            lambda x, w: plain_norms.rms_norm(x, w, EPS),
            (x, weight),
        ),
        "add_rms_norm": (
            lambda d, x, w: norms.add_norm_(d, x, w, None, EPS),
            lambda d, x, w: plain_norms.add_rms_norm_(d, x, w, EPS),
            (delta, x, weight),
        ),
        "add_layer_norm": (
            lambda d, x, w, b: norms.add_norm_(d, x, w, b, EPS),
            lambda d, x, w, b: plain_norms.add_layer_norm_(d, x, w, b, EPS),
            (delta, x, weight, bias),
        ),
        "silu_mul": (activations.silu_mul, plain_activations.silu_mul, (x,)),
        "quick_gelu": (activations.quick_gelu_, plain_activations.quick_gelu_, (x,)),
        "rotate": (rope.rotate_, plain_rope.rotate_, (drawn(3, 5, 16), angles.cos(), angles.sin())),
        "rotate_and_store": (
            rope.rotate_and_store_,
            plain_rope.rotate_and_store_,
            (drawn(3, 8, 16), angles.cos(), angles.sin(), *kv, rows),
        ),
        "attend": (
            lambda *args: decode.attend(*args, 320, SCALE, SPLIT_ROWS),
            lambda *args: plain_decode.attend(*args, 320, SCALE),
            (drawn(3, 4, 16), *kv, starts, lens),
        ),
        "argmax": (greedy.argmax, plain_greedy.argmax, (drawn(3, 5000),)),
    }
    with torch.cuda.device(device):
        for name, (kernel, twin, given) in checks.items():
            there, here = [t.to(device) for t in given], [t.clone() for t in given]
            found, expected = kernel(*there), twin(*here)
            if found is not None and expected is not None:  # else it wrote over what it was given
                there, here = [*there, found], [*here, expected]
            for ours, theirs in zip(there, here, strict=True):
                apart = (ours.cpu().double() - theirs.double()).abs()
                if not (apart <= APART * (1 + theirs.double().abs())).all():  # NaN is apart too
                    raise RuntimeError(f"the kernel {name} computes nonsense")
