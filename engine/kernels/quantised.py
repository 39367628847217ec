"""
Matrix products in fp8: each row of both sides has a scale of its own, sums are float32. (Rows of what
attention gives share factors of their columns instead, which weights take back: attended.py.)

What comes before a product quantises its result in the same pass, so the numbers in 16 bits are
never written: `rms_norm` and the others here are those of norms.py and activations.py with rows in
fp8 as their result. Kernels quantise what they have in float32, the plain forms what was rounded to
16 bits. Weights are quantised once, at load.

Axes: any leading ones, then width; num_rows is the product of the leading ones.
"""

from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.kernels import activations, has_kernels, norms

FP8 = torch.float8_e4m3fn
MOST = 448.0  # the largest of its numbers
LEAST_SCALE = 1e-12  # of a row of zeros
STEP = 16  # widths are multiples of it, or the product does not exist


class Fp8Rows(NamedTuple):
    """
    Numbers that are values * scales.

    Attributes:
        values: (..., width), float8_e4m3fn.
        scales: (num_rows, 1), float32.
    """

    values: Tensor
    scales: Tensor

    def flatten(self) -> "Fp8Rows":
        """The same with values of (num_rows, width)."""
        return Fp8Rows(self.values.flatten(0, -2), self.scales)

    def read(self) -> Tensor:
        """(num_rows, width): what they are, in float32."""
        return self.flatten().values.float() * self.scales


def can_multiply(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether products in fp8 run here: on Ada, Hopper or later, between layers in bfloat16."""
    return (
        device.type == "cuda"
        and dtype == torch.bfloat16
        and hasattr(torch, "_scaled_mm")
        and torch.cuda.get_device_capability(device) >= (8, 9)
    )


def quantise(x: Tensor) -> Fp8Rows:
    """(..., width): each row by its largest number."""
    if has_kernels(x):
        from engine.kernels.gpu import quantised

        return Fp8Rows(*quantised.quantise(x))
    exact = x.float().flatten(0, -2)
    scales = exact.abs().amax(-1, keepdim=True).div(MOST).clamp(min=LEAST_SCALE)
    values = (exact * (1.0 / scales)).clamp(-MOST, MOST).to(FP8)
    return Fp8Rows(values.view(x.shape), scales)


def as_rows(x: Tensor | Fp8Rows) -> Fp8Rows:
    """In fp8: as they are where they are that already."""
    return x if isinstance(x, Fp8Rows) else quantise(x)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Fp8Rows:
    """As `norms.rms_norm`."""
    if has_kernels(x):
        from engine.kernels.gpu import norms as gpu_norms

        return Fp8Rows(*gpu_norms.norm_in_fp8(x, weight, None, eps))
    return quantise(norms.rms_norm(x, weight, eps))


def add_rms_norm_(delta: Tensor, x: Tensor, weight: Tensor, eps: float) -> Fp8Rows:
    """As `norms.add_rms_norm_`."""
    if has_kernels(x):
        from engine.kernels.gpu import norms as gpu_norms

        return Fp8Rows(*gpu_norms.add_norm_in_fp8_(delta, x, weight, None, eps))
    return quantise(norms.add_rms_norm_(delta, x, weight, eps))


def add_parts_rms_norm(
    parts: Tensor, x: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Fp8Rows]:
    """As `norms.add_parts_rms_norm`."""
    if has_kernels(x):
        from engine.kernels.gpu import norms as gpu_norms

        total, normed = gpu_norms.add_parts_norm_in_fp8(parts, x, weight, None, eps)
        return total, Fp8Rows(*normed)
    total, plain = norms.add_parts_rms_norm(parts, x, weight, eps)
    return total, quantise(plain)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Fp8Rows:
    """As `norms.layer_norm`."""
    if has_kernels(x):
        from engine.kernels.gpu import norms as gpu_norms

        return Fp8Rows(*gpu_norms.norm_in_fp8(x, weight, bias, eps))
    return quantise(norms.layer_norm(x, weight, bias, eps))


def add_layer_norm_(delta: Tensor, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Fp8Rows:
    """As `norms.add_layer_norm_`."""
    if has_kernels(x):
        from engine.kernels.gpu import norms as gpu_norms

        return Fp8Rows(*gpu_norms.add_norm_in_fp8_(delta, x, weight, bias, eps))
    return quantise(norms.add_layer_norm_(delta, x, weight, bias, eps))


def silu_mul(gate_up: Tensor) -> Fp8Rows:
    """As `activations.silu_mul`."""
    if has_kernels(gate_up):
        from engine.kernels.gpu import quantised

        return Fp8Rows(*quantised.silu_mul(gate_up))
    return quantise(activations.silu_mul(gate_up))


def quick_gelu(x: Tensor) -> Fp8Rows:
    """As `activations.quick_gelu_`; whether `x` is written over is left open."""
    if has_kernels(x):
        from engine.kernels.gpu import quantised

        return Fp8Rows(*quantised.quick_gelu(x))
    return quantise(activations.quick_gelu_(x))


class Fp8Linear(nn.Module):
    """
    A Linear whose weights are fp8, with a scale for each output.

    Args:
        linear: the one it replaces; both widths multiples of STEP.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        if not self.takes(linear):
            raise ValueError(
                f"a product in fp8 needs widths that are multiples of {STEP}, not "
                f"{linear.in_features} and {linear.out_features}"
            )
        weight = quantise(linear.weight.detach())
        self.weight = nn.Buffer(weight.values, persistent=False)
        self.scales = nn.Buffer(weight.scales, persistent=False)
        self.bias = linear.bias
        self.dtype = linear.weight.dtype

    @staticmethod
    def takes(linear: nn.Linear) -> bool:
        """Whether its widths allow it."""
        return linear.in_features % STEP == 0 and linear.out_features % STEP == 0

    @classmethod
    def find(cls, linear: nn.Linear) -> Self | None:
        """None where the widths do not allow it."""
        return cls(linear) if cls.takes(linear) else None

    @property
    def rows(self) -> Fp8Rows:
        """Of the weight, each with the scale of its output."""
        return Fp8Rows(self.weight, self.scales)

    def forward(self, x: Tensor | Fp8Rows) -> Tensor:
        rows = as_rows(x)
        shape = (*rows.values.shape[:-1], len(self.weight))
        values = rows.flatten().values
        if values.is_cuda:
            product: Tensor = torch._scaled_mm(
                values,
                self.weight.t(),
                rows.scales,
                self.scales.t(),
                bias=self.bias,
                out_dtype=self.dtype,
                use_fast_accum=True,
            )
            return product.view(shape)
        exact = F.linear(values.float(), self.weight.float()) * rows.scales * self.scales.t()
        if self.bias is not None:
            exact = exact + self.bias.float()
        return exact.to(self.dtype).view(shape)
