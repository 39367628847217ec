"""
The weights of a training run, and how a step moves them: Muon for matrices, Adam for the rest.

The model computes with bfloat16 weights; the exact ones, which a checkpoint is made from, are
float32. Matrices of one shape lie in one stack and everything else in one vector, so that a step is
a few operations on large tensors, none of which waits for the host: it can be recorded with the
forward and backward pass. Muon moves a matrix along the nearest orthogonal one to its averaged
gradient (Jordan et al., 2024), scaled so that it moves as far as Adam would.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

ADAM_BETAS = (0.9, 0.95)
MOMENTUM = 0.95
WEIGHT_DECAY = 0.05
MAX_NORM = 1.0  # of all gradients together
ADAM_LIKE = 0.2  # root mean square of Adam's update, which Muon's is scaled to
NEWTON_SCHULZ = ((3.4445, -4.7750, 2.0315),) * 5


@dataclass(slots=True)
class _Stack:
    """
    Parameters that move together. All tensors have one shape: (num, rows, columns), or (num,) for a
    vector of everything that is no matrix.

    Attributes:
        exact: the weights, float32. rounded: the model's own, bfloat16. grad: bfloat16.
        first, second: averages of the gradient and (Adam alone) of its square.
    """

    exact: Tensor
    rounded: Tensor
    grad: Tensor
    first: Tensor
    second: Tensor | None
    decay: float

    def tensors(self) -> dict[str, Tensor]:
        kept = {"exact": self.exact, "first": self.first}
        return kept if self.second is None else kept | {"second": self.second}


class Weights:
    """
    Takes over the parameters of a model: from here on they are bfloat16 views of a few stacks.

    Attributes:
        rate: learning rate, float32 on the device; `norm`, `num_skipped`: the last step's norm of
            all gradients, and how many steps so far had one that was no number and moved nothing.
    """

    def __init__(self, model: nn.Module, device: torch.device, use_muon: bool = True) -> None:
        self._views: dict[str, Tensor] = {}
        self._stacks: dict[str, _Stack] = {}
        by_stack: dict[str, list[str]] = {}
        parameters = dict(model.named_parameters())
        for name, parameter in parameters.items():
            by_stack.setdefault(_stack_of(name, parameter, use_muon), []).append(name)
        for stack_name, names in by_stack.items():
            self._take_over(model, stack_name, names, device)
        self.rate, self.norm, self.num_skipped, self._num_steps = (
            torch.zeros((), device=device) for _ in range(4)
        )

    def _take_over(
        self, model: nn.Module, stack_name: str, names: list[str], device: torch.device
    ) -> None:
        is_matrices = not stack_name.startswith("vector")
        found = [model.get_parameter(name) for name in names]
        flat = torch.cat([p.detach().float().flatten() for p in found]).to(device)
        exact = flat.view(-1, *_matrix_shape(names[0], found[0])) if is_matrices else flat
        stack = _Stack(
            exact,
            rounded=exact.bfloat16(),
            grad=torch.zeros_like(exact, dtype=torch.bfloat16),
            first=torch.zeros_like(exact),
            second=None if is_matrices else torch.zeros_like(exact),
            decay=0.0 if stack_name == "vector without decay" else WEIGHT_DECAY,
        )
        self._stacks[stack_name] = stack
        start = 0
        for name, parameter in zip(names, found, strict=True):
            end = start + parameter.numel()
            rounded, grad, view = (
                t.view(-1)[start:end].view(parameter.shape)
                for t in (stack.rounded, stack.grad, stack.exact)
            )
            owner, _, field = name.rpartition(".")
            moved = nn.Parameter(rounded)
            moved.grad = grad
            setattr(model.get_submodule(owner), field, moved)
            self._views[name] = view
            start = end

    def clear_grad(self) -> None:
        for stack in self._stacks.values():
            stack.grad.zero_()

    @torch.no_grad()
    def step(self) -> None:
        """Move all weights along their gradients, or none where these are no numbers."""
        stacks = self._stacks.values()
        squares = [stack.grad.float().square().sum() for stack in stacks]
        self.norm.copy_(torch.stack(squares).sum().sqrt())
        is_good = self.norm.isfinite()
        self.num_skipped += (~is_good).float()
        self._num_steps += is_good.float()
        clip = (MAX_NORM / (self.norm + 1e-6)).clamp(max=1.0)
        for stack in stacks:
            grad = torch.where(is_good, stack.grad.float() * clip, 0.0)
            before = [(t, t.clone()) for t in (stack.first, stack.second) if t is not None]
            move = self._muon(stack, grad) if stack.second is None else self._adam(stack, grad)
            for average, kept in before:
                average.copy_(torch.where(is_good, average, kept))
            moved = stack.exact * (1 - self.rate * stack.decay) - self.rate * move
            stack.exact.copy_(torch.where(is_good, moved, stack.exact))
            stack.rounded.copy_(stack.exact)

    def _adam(self, stack: _Stack, grad: Tensor) -> Tensor:
        assert stack.second is not None
        beta, beta_squares = ADAM_BETAS
        stack.first.lerp_(grad, 1 - beta)
        stack.second.lerp_(grad.square(), 1 - beta_squares)
        steps = self._num_steps.clamp(min=1.0)
        first = stack.first / (1 - beta**steps)
        second = stack.second / (1 - beta_squares**steps)
        return first / (second.sqrt() + 1e-8)

    def _muon(self, stack: _Stack, grad: Tensor) -> Tensor:
        stack.first.lerp_(grad, 1 - MOMENTUM)
        direction = orthogonal(grad.lerp(stack.first, MOMENTUM))
        return direction.float() * (ADAM_LIKE * max(grad.shape[1:]) ** 0.5)

    @torch.no_grad()
    def load(self, weights: dict[str, Tensor]) -> None:
        """Take weights by name; those that are not named stay (a checkpoint has no head for marks)."""
        for name, view in self._views.items():
            if name in weights:
                view.copy_(weights[name])
        for stack in self._stacks.values():
            stack.rounded.copy_(stack.exact)

    def named(self) -> dict[str, Tensor]:
        """The exact weights, by the model's names."""
        return dict(self._views)

    def state(self) -> dict[str, Tensor]:
        """All that a later run needs to go on from here."""
        found = {
            f"{name}/{part}": tensor
            for name, stack in self._stacks.items()
            for part, tensor in stack.tensors().items()
        }
        return found | {"num_steps": self._num_steps, "num_skipped": self.num_skipped}

    @torch.no_grad()
    def load_state(self, state: dict[str, Tensor]) -> None:
        for name, tensor in self.state().items():
            tensor.copy_(state[name])
        for stack in self._stacks.values():
            stack.rounded.copy_(stack.exact)


def _stack_of(name: str, parameter: Tensor, use_muon: bool) -> str:
    is_hidden = parameter.ndim == 2 and "embed" not in name and "mark_head" not in name
    if use_muon and is_hidden:
        return "x".join(map(str, _matrix_shape(name, parameter)))
    return "vector" if parameter.ndim > 1 else "vector without decay"


def _matrix_shape(name: str, parameter: Tensor) -> tuple[int, int]:
    """The encoder's joint q, k and v are three matrices."""
    rows, columns = parameter.shape
    return (rows // 3 if name.endswith("qkv.weight") else rows), columns


def orthogonal(matrices: Tensor) -> Tensor:
    """
    About the nearest orthogonal matrices, by Newton and Schulz's iteration, in bfloat16.

    Args:
        matrices: (num, rows, columns), any scale.

    Returns:
        the same shape; singular values between 0.7 and 1.2, about.
    """
    x = matrices.bfloat16()
    is_high = x.shape[1] > x.shape[2]
    if is_high:
        x = x.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for a, b, c in NEWTON_SCHULZ:
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if is_high else x
