"""
Attention among the patches of each picture, many pictures of any sizes in one call.

Axes: T patches, heads, dim; pictures. Every patch sees all of its own picture and nothing else.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from engine.kernels import has_kernels, is_hopper
from engine.kernels.timing import chooses_by_time, time_ms
from engine.kernels.trials import left_out_if_broken, unless_memory_is_short

logger = logging.getLogger(__name__)

DIMS = (64, 80, 96, 128)  # widths of heads that the kernel takes
HOPPER_DIMS = (*DIMS, 72)  # that the one for GPUs of the Hopper generation takes, in 16 bits
CALLS = ((40, 576), (20, 1564))  # pictures and patches each, on which kernels are compared
SHORT = 1024  # patches of a picture at most; between those of the two calls
BETTER = 0.95  # of the other's time: less is no reason to leave what is known
APART = 0.02  # of two attentions in 16 bits


@dataclass(frozen=True, slots=True)
class Cut:
    """Query rows of a program, and what Triton makes of it."""

    rows: int = 128
    num_warps: int = 8
    num_stages: int = 3


@dataclass(frozen=True, slots=True)
class HopperCut:
    """Of the kernel for the Hopper generation: groups of 64 query rows, and keys of a tile."""

    groups: int = 2
    tile: int = 128


CUTS = (Cut(), Cut(64, 4, 2), Cut(128, 4, 3))
HOPPER_CUTS = (HopperCut(), HopperCut(3, 64))
WINDOW_CUT = Cut(64, 4, 2)  # of small pictures, where the kernel for Hopper is used for others

Way = Cut | HopperCut | str  # how attention is computed: by ours, by torch's of that name
Ours = TypeVar("Ours", bound=Cut | HopperCut)


@dataclass(frozen=True, slots=True)
class Choice:
    """
    Which kernel attends fastest to pictures on a device.

    Attributes:
        own: which of our kernels, and how it is cut; None where torch's own for any sizes is as fast.
        beats_dense: whether ours is faster than dense batches of equal pictures too.
        windows: the same as `own` for pictures of some 64 patches, of which the kernel for Hopper
            would leave most of its rows empty.
        short: the same as `own` for calls whose pictures have at most SHORT patches; None for `own`.
    """

    own: Cut | HopperCut | None = None
    beats_dense: bool = False
    windows: Cut | None = None
    short: Cut | HopperCut | None = None

    def find_own(self, most_patches: int) -> Cut | HopperCut | None:
        """For a call whose largest picture has so many."""
        return (self.short or self.own) if most_patches <= SHORT else self.own


def takes(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether `attend` does: the three are views of one projection, or lie as if they were."""
    return query.stride(1) == key.stride(1) == value.stride(1) and key.stride() == value.stride()


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts: Tensor,
    max_len: int,
    scale: float,
    cut: Cut | HopperCut = CUTS[0],
    factors: Tensor | None = None,
) -> Tensor:
    """
    Args:
        query, key, value: (T, heads, dim), dense in dim, and as `takes` asks.
        starts: (pictures + 1,), int32, device: where each picture begins, and the last one ends.
        max_len: no picture has more patches.
        scale: what the scores are multiplied by; over 0.
        cut: changes speed, and how sums are rounded.
        factors: (heads * dim,), float32: kernels give fp8, the result times these; see attended.py.

    Returns:
        (T, heads, dim), dense. Rows behind the last picture mean nothing.
    """
    call = query, key, value, starts, max_len, scale
    if isinstance(cut, HopperCut) and has_kernels(query):
        from engine.kernels.gpu import pictures_hopper

        return pictures_hopper.attend(*call, groups=cut.groups, tile=cut.tile, factors=factors)
    if isinstance(cut, Cut) and has_kernels(query) and query.shape[2] in DIMS:
        from engine.kernels.gpu import pictures

        return pictures.attend(
            *call,
            rows=cut.rows,
            num_warps=cut.num_warps,
            num_stages=cut.num_stages,
            factors=factors,
        )
    sizes = starts.diff().tolist()
    out = torch.zeros_like(query, memory_format=torch.contiguous_format)
    queries, keys, values = (
        torch.split(x[: sum(sizes)].transpose(0, 1), sizes, dim=1) for x in (query, key, value)
    )
    attended = [
        F.scaled_dot_product_attention(q, k, v, scale=scale)
        for q, k, v in zip(queries, keys, values, strict=True)
    ]
    out[: sum(sizes)] = torch.cat(attended, dim=1).transpose(0, 1)
    return out


def choose(
    device: torch.device,
    dtype: torch.dtype,
    heads: int,
    dim: int,
    calls: tuple[tuple[int, int], ...] = CALLS,
) -> Choice:
    """
    Compare our kernels with torch's, once for each device and shape of heads; takes some seconds.

    Where kernels are not chosen by time, the first is used that says what torch's says: see `take`.

    NOTE: not while a CUDA graph is captured, and only where torch's varlen kernel runs.

    Args:
        calls: on which they are compared: pictures and patches each.
    """
    if device.type != "cuda":
        return Choice()
    by_time = chooses_by_time()
    return unless_memory_is_short(
        lambda: _choose(device, dtype, heads, dim, calls, by_time), Choice()
    )


@cache
def _choose(
    device: torch.device,
    dtype: torch.dtype,
    heads: int,
    dim: int,
    calls: tuple[tuple[int, int], ...],
    by_time: bool,
) -> Choice:
    """
    Raises:
        OutOfMemoryError: so that they are compared again.
    """
    if not has_kernels(torch.empty(1, device=device)):
        return Choice()
    for cuts in find_cuts(dtype, dim, has_hopper=is_hopper(device)):
        with left_out_if_broken("pictures_kernel", device):
            choice = _compare(device, dtype, heads, dim, calls, cuts, by_time=by_time)
            logger.info(
                "pictures_kernel heads=%s dim=%s own=%s short=%s beats_dense=%s windows=%s by_time=%s",
                heads,
                dim,
                choice.own,
                choice.short,
                choice.beats_dense,
                choice.windows,
                by_time,
            )
            return choice
    return Choice()


def find_cuts(
    dtype: torch.dtype, dim: int, *, has_hopper: bool
) -> list[tuple[Cut | HopperCut, ...]]:
    """
    What to compare; each of these if what stands before it cannot be used.

    Few at a time: a kernel's first call is seconds of Triton's compiler, until its cache on disk has it.
    """
    plain: tuple[Cut | HopperCut, ...] = CUTS if dim in DIMS else ()
    ours = [plain] if plain else []
    if has_hopper and dim in HOPPER_DIMS and dtype in (torch.float16, torch.bfloat16):
        ours.insert(0, (*HOPPER_CUTS, *(cut for cut in plain if cut == WINDOW_CUT)))
    return ours


@torch.inference_mode()
def _compare(
    device: torch.device,
    dtype: torch.dtype,
    heads: int,
    dim: int,
    calls: Sequence[tuple[int, int]],
    cuts: Sequence[Cut | HopperCut],
    *,
    by_time: bool,
) -> Choice:
    times: dict[int, dict[Way, float]] = {}  # by patches of a picture
    taken = take(cuts)
    if not by_time:
        cuts = [cut for cut in cuts if cut in (taken.own, taken.windows)]
    for num, patches in calls:
        merged = torch.randn((num * patches, 3 * heads, dim), dtype=dtype, device=device)
        q, k, v = torch.split(merged, heads, dim=1)
        starts = torch.arange(num + 1, dtype=torch.int32, device=device) * patches
        ways = _ways(q, k, v, starts, num, patches, cuts)
        expected = ways["varlen"]()
        times[patches] = {}
        for name, way in ways.items():
            # Turned around: what is not a number is nonsense too.
            if not (way().reshape(expected.shape) - expected).abs().max().item() <= APART:
                raise RuntimeError(f"{name} computes nonsense")
            if by_time:
                times[patches][name] = time_ms(way)
    return pick_by_size(times) if by_time else taken


def take(cuts: Sequence[Cut | HopperCut]) -> Choice:
    """Without a stopwatch: the first, and the first plain one for windows."""
    own = cuts[0]
    small = next((cut for cut in cuts if isinstance(cut, Cut)), None)
    return Choice(own, beats_dense=isinstance(own, HopperCut), windows=small)


def pick(totals: Mapping[Way, float]) -> Choice:
    """From what each way took: torch's two, `varlen` and `dense`, and ours, the preferred ones first."""
    ours = {way: took for way, took in totals.items() if not isinstance(way, str)}
    plain = {way: took for way, took in ours.items() if isinstance(way, Cut)}
    own, small = _fastest(ours), _fastest(plain) if plain else None
    return Choice(
        own=own if ours[own] < BETTER * totals["varlen"] else None,
        beats_dense=ours[own] < BETTER * min(totals["dense"], totals["varlen"]),
        windows=small if small and plain[small] < BETTER * totals["varlen"] else None,
    )


def pick_by_size(times: Mapping[int, Mapping[Way, float]]) -> Choice:
    """`pick` over all calls, and for short pictures over the call of short ones alone."""
    short, *_ = sorted(times)
    choice = pick({way: sum(of_call[way] for of_call in times.values()) for way in times[short]})
    if choice.own is None or short > SHORT:
        return choice
    return replace(choice, short=pick(times[short]).own)


def _fastest(totals: Mapping[Ours, float]) -> Ours:
    """The first, but for one that is clearly faster: a tie must not decide how sums are rounded."""
    best, *others = totals
    for way in others:
        if totals[way] < BETTER * totals[best]:
            best = way
    return best


def _ways(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor,
    num: int,
    patches: int,
    cuts: Sequence[Cut | HopperCut],
) -> dict[Way, Callable[[], Tensor]]:
    """The same attention by every kernel."""
    heads, dim = q.shape[1:]
    scale = dim**-0.5
    dense_q, dense_k, dense_v = (
        x.view(num, patches, heads, dim).transpose(1, 2) for x in (q, k, v)
    )

    def varlen() -> Tensor:
        out, *_ = torch.ops.aten._flash_attention_forward(
            q, k, v, starts, starts, patches, patches, 0.0, False, False, scale=scale
        )
        return out  # type: ignore[no-any-return]

    def dense() -> Tensor:
        order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]
        with sdpa_kernel(order, set_priority=True):
            out = F.scaled_dot_product_attention(dense_q, dense_k, dense_v, scale=scale)
        return out.transpose(1, 2)

    ways: dict[Way, Callable[[], Tensor]] = {"varlen": varlen, "dense": dense}
    for cut in cuts:
        ways[cut] = lambda cut=cut: attend(q, k, v, starts, patches, scale, cut)  # type: ignore[misc]
    return ways
