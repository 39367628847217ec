"""
Encoders that read the patches of many pictures of any sizes in one row, without padding.

What their families share: pixels go up on a stream of their own, one kernel attends to pictures of any
sizes or a few dense batches to equal ones, and on a GPU a call whose sizes were seen before is one
CUDA graph.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.attention import VisionContext, can_use_flash, dense_kernels, using
from engine.families.protocol import Visual
from engine.kernels.pictures import Choice, choose
from engine.repeats import Repeats
from engine.rounding import power_up, round_up
from engine.uploads import Uploads, upload

MAX_DENSE_RUNS, MIN_DENSE_PICTURES = 4, 8  # of an encoder call that may be dense batches

See = Callable[..., Tensor]


@dataclass(frozen=True, slots=True)
class Packing:
    """
    How the patches of one encoder call lie.

    Attributes:
        runs: (how many, how large) of neighbours of equal size, in patches.
        is_dense: whether they are dense batches; otherwise one kernel reads `starts`.
        starts: (pictures + 1,), int32, host: where each picture begins.
        num_patches: of the call, rounded up where sizes shall come back.
    """

    runs: tuple[tuple[int, int], ...]
    is_dense: bool
    starts: npt.NDArray[np.int32]
    num_patches: int

    @property
    def max_patches(self) -> int:
        """Of one picture, at most."""
        return max(size for _, size in self.runs)

    def fill(self, rows: Tensor) -> Tensor:
        """Rows for the patches of the call, the missing ones zero: they belong to no picture."""
        return F.pad(rows, (0, 0, 0, self.num_patches - len(rows)))


class PackedEncoder:
    """
    Args:
        num_heads, head_dim: of the encoder's attention.
    """

    def __init__(
        self, device: torch.device, dtype: torch.dtype, num_heads: int, head_dim: int
    ) -> None:
        self.device = device
        self.uploads = Uploads(device)
        self.has_varlen = can_use_flash(device, dtype, head_dim)
        self.choice = Choice()
        if self.has_varlen:
            self.choice = choose(device, dtype, num_heads, head_dim)

    def pack(
        self, units: Sequence[int], *, rounds_up: bool, window_patches: int | None = None
    ) -> Packing:
        """
        Args:
            units: patches that attend to each other, for each picture or pair of frames in order.
            rounds_up: whether the call is one for `Repeats`.
            window_patches: where units are windows, of so many patches at most.
        """
        runs = [(len(list(group)), size) for size, group in groupby(units)]
        # A few large batches of equal pictures may be fastest dense; others go through one kernel,
        # which takes any sizes without having to be planned for each.
        is_even = len(runs) <= MAX_DENSE_RUNS and min(runs)[0] >= MIN_DENSE_PICTURES
        is_even = is_even and window_patches is None  # too small to be worth their own shapes
        is_dense = not self.has_varlen or (is_even and not self.choice.beats_dense)
        starts = np.cumsum([0, *units], dtype=np.int32)
        num_patches = int(starts[-1])
        if rounds_up and not is_dense and not is_even:
            # Rounded up, sizes come back, as those of equal pictures do by themselves. What fills up
            # belongs to no picture and nobody reads it: pictures of no patches, and patches behind
            # the last picture.
            runs = [(1, window_patches or power_up(max(units), 256))]
            num_patches = round_up(num_patches)
            num_starts = 1 + power_up(len(units), 16)
            starts = np.pad(starts, (0, num_starts - len(starts)), mode="edge")
        return Packing(tuple(runs), is_dense, starts, num_patches)

    def run(
        self,
        packing: Packing,
        repeats: Repeats | None,
        see: See,
        *inputs: Tensor,
        windows: Packing | None = None,
    ) -> Tensor:
        """
        Call the encoder's layers, or replay that call.

        Args:
            see: (starts, *inputs) -> features; it reads nothing else that changes. Attention knows
                whose the patches are.
            inputs: of `packing.num_patches` rows, on the device.
            windows: where some layers look at a window of each picture only: `see` is given their
                starts behind the others, and these layers hand them on.
        """
        packings = [packing] if windows is None else [packing, windows]
        cuts = self.choice.find_own(packing.max_patches), self.choice.windows
        all_starts = [upload(each.starts, self.device) for each in packings]

        def call(*given: Tensor) -> Tensor:
            context, *of_windows = (
                VisionContext(each.runs, None if each.is_dense else starts, cut)
                for each, starts, cut in zip(packings, given, cuts, strict=False)
            )
            if of_windows:
                context = replace(context, windows=(given[1], of_windows[0]))
            with using(context), dense_kernels(self.device):
                return see(*given)

        if repeats is None:
            return call(*all_starts, *inputs)
        key = tuple((*each.runs, each.is_dense, len(each.starts)) for each in packings)
        return repeats.run((packing.num_patches, *key), call, *all_starts, *inputs)


def in_packing_order(visuals: Sequence[Visual]) -> list[int]:
    """Indices such that pictures come before clips, and equal sizes stand together."""

    def size_of(index: int) -> tuple[bool, int, int]:
        _, height_px, width_px, _ = visuals[index].pixels.shape
        return visuals[index].is_clip, height_px * width_px, height_px

    return sorted(range(len(visuals)), key=size_of)


def split_rows(features: Tensor, visuals: Sequence[Visual], order: Sequence[int]) -> list[Tensor]:
    """What a call gave, for each of the visuals that were packed in this order."""
    num_rows = [visuals[index].plan.num_rows for index in order]
    found: list[Tensor] = [features] * len(visuals)
    for index, piece in zip(order, torch.split(features[: sum(num_rows)], num_rows), strict=True):
        found[index] = piece
    return found
