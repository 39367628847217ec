"""Linear layers of given numbers."""

from torch import Tensor, nn


def as_linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    """weight: (width, depth). bias: (width,)."""
    width, depth = weight.shape
    linear = nn.Linear(depth, width, bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear
