"""
Attention among the patches of each picture, many pictures of any sizes in one call.

Axes: T patches, heads, dim; pictures. Every patch sees all of its own picture and nothing else.
"""

import logging
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from engine.kernels import has_kernels

logger = logging.getLogger(__name__)

DIMS = (64, 80, 96, 128)  # widths of heads that the kernel takes
CALLS = ((40, 576), (20, 1564))  # pictures and patches each, on which kernels are compared
REPEATS, WARM_UP, IN_A_ROW = 7, 2, 4  # calls are launched while others run, as in an encoder
BETTER = 0.95  # of the other's time: less is no reason to leave what is known
APART = 0.02  # of two attentions in 16 bits


@dataclass(frozen=True, slots=True)
class Cut:
    """Query rows of a program, and what Triton makes of it."""

    rows: int = 128
    num_warps: int = 8
    num_stages: int = 3


CUTS = (Cut(), Cut(64, 4, 2), Cut(128, 4, 3))


@dataclass(frozen=True, slots=True)
class Choice:
    """
    Which kernel attends fastest to pictures on a device.

    Attributes:
        own: how our kernel is cut; None where torch's own for any sizes is as fast.
        beats_dense: whether ours is faster than dense batches of equal pictures too.
    """

    own: Cut | None = None
    beats_dense: bool = False


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
    cut: Cut = CUTS[0],
) -> Tensor:
    """
    Args:
        query, key, value: (T, heads, dim), dense in dim, and as `takes` asks.
        starts: (pictures + 1,), int32, device: where each picture begins, and the last one ends.
        max_len: no picture has more patches.
        scale: what the scores are multiplied by; over 0.
        cut: changes speed, and how sums are rounded.

    Returns:
        (T, heads, dim), dense. Rows behind the last picture mean nothing.
    """
    if has_kernels(query) and query.shape[2] in DIMS:
        from engine.kernels.gpu import pictures

        return pictures.attend(
            query,
            key,
            value,
            starts,
            max_len,
            scale,
            rows=cut.rows,
            num_warps=cut.num_warps,
            num_stages=cut.num_stages,
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


@cache
def choose(device: torch.device, dtype: torch.dtype, heads: int, dim: int) -> Choice:
    """
    Compare our kernel with torch's, once for each device and shape of heads; takes some seconds.

    NOTE: not while a CUDA graph is captured, and only where torch's varlen kernel runs.
    """
    if device.type != "cuda" or dim not in DIMS or not has_kernels(torch.empty(1, device=device)):
        return Choice()
    try:
        choice = _compare(device, dtype, heads, dim)
    except Exception as error:  # noqa: BLE001 - a vendor's compiler: it raises whatever it likes
        logger.warning("pictures_kernel_unusable device=%s error=%s", device, error)
        return Choice()
    logger.info("pictures_kernel own=%s beats_dense=%s", choice.own, choice.beats_dense)
    return choice


@torch.inference_mode()
def _compare(device: torch.device, dtype: torch.dtype, heads: int, dim: int) -> Choice:
    totals: dict[Cut | str, float] = {}
    for num, patches in CALLS:
        merged = torch.randn((num * patches, 3 * heads, dim), dtype=dtype, device=device)
        q, k, v = torch.split(merged, heads, dim=1)
        starts = torch.arange(num + 1, dtype=torch.int32, device=device) * patches
        ways = _ways(q, k, v, starts, num, patches)
        expected = ways["varlen"]()
        for name, way in ways.items():
            if (way().reshape(expected.shape) - expected).abs().max().item() > APART:
                raise RuntimeError(f"{name} computes nonsense")
            totals[name] = totals.get(name, 0.0) + _time_ms(way)
    own = min(CUTS, key=totals.__getitem__)
    return Choice(
        own if totals[own] < BETTER * totals["varlen"] else None,
        totals[own] < BETTER * min(totals["dense"], totals["varlen"]),
    )


def _ways(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, num: int, patches: int
) -> dict[Cut | str, Callable[[], Tensor]]:
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

    ways: dict[Cut | str, Callable[[], Tensor]] = {"varlen": varlen, "dense": dense}
    for cut in CUTS:
        ways[cut] = lambda cut=cut: attend(q, k, v, starts, patches, scale, cut)  # type: ignore[misc]
    return ways


def _time_ms(call: Callable[[], Tensor]) -> float:
    times = []
    for repeat in range(WARM_UP + REPEATS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        for _ in range(IN_A_ROW):
            call()
        end.record()
        end.synchronize()
        if repeat >= WARM_UP:
            times.append(begin.elapsed_time(end))
    return float(statistics.median(times))
