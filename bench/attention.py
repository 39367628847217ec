"""
Which attention kernel is fastest for which shape on this GPU: `python -m bench.attention`.

One JSON line for each shape and kernel, the median of repeats. A kernel that does not take a shape,
or is not there, is said so and costs nothing else.
"""

import json
import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from engine.swaps import find_decode_attention

REPEATS, WARM_UP = 20, 3
# (pictures, patches each): frames, captions and large pictures, in calls of some 32,000 patches.
PICTURES = [(56, 576), (20, 1564), (8, 3996), (1, 1564), (4, 1564)]
VISION_HEADS, VISION_DIM = 16, 80
# (sequences, query heads, KV heads, dim, rows each)
DECODES = [
    (256, 12, 2, 128, 450),
    (192, 12, 2, 128, 2400),
    (32, 12, 2, 128, 2400),
    (140, 32, 32, 128, 700),
]
# (prompts, query heads, KV heads, dim, tokens each)
PREFILLS = [(38, 12, 2, 128, 421), (6, 12, 2, 128, 2364)]


def main() -> None:
    torch.manual_seed(0)
    for shape in PICTURES:
        _vision(*shape)
    for decode in DECODES:
        _decode(*decode)
    for prefill in PREFILLS:
        _prefill(*prefill)


def _vision(num: int, patches: int) -> None:
    heads, dim = VISION_HEADS, VISION_DIM
    q, k, v = _random(num * patches, 3 * heads, dim).view(-1, 3, heads, dim).unbind(1)
    dense_q, dense_k, dense_v = (
        x.view(num, patches, heads, dim).transpose(1, 2) for x in (q, k, v)
    )
    starts = _int32([n * patches for n in range(num + 1)])
    flops = 4 * num * patches**2 * heads * dim

    def with_backend(backend: SDPBackend) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with sdpa_kernel([backend]):
                return F.scaled_dot_product_attention(dense_q, dense_k, dense_v)

        return run

    kernels: dict[str, Callable[[], Tensor]] = {
        "cudnn": with_backend(SDPBackend.CUDNN_ATTENTION),
        "flash": with_backend(SDPBackend.FLASH_ATTENTION),
        "efficient": with_backend(SDPBackend.EFFICIENT_ATTENTION),
        "varlen": lambda: _flash(q, k, v, starts, starts, patches, patches, None, is_causal=False),
    }
    for name, run in kernels.items():
        _report({"vision": [num, patches], "kernel": name}, run, flops=flops)


def _decode(num: int, heads: int, kv_heads: int, dim: int, rows: int) -> None:
    slab = -(-rows // 16) * 16
    keys, values = (_random(num * slab, kv_heads, dim) for _ in range(2))
    query = _random(num, heads, dim)
    slabs = torch.randperm(num).tolist()
    starts = _int32([slab * n for n in slabs] + [0])
    lens = _int32([rows] * num)
    ones = _int32(list(range(num + 1)))
    read = 2 * num * rows * kv_heads * dim * 2
    kernels: dict[str, Callable[[], Tensor]] = {
        "flash": lambda: _flash(query, keys, values, ones, starts, 1, rows, lens, is_causal=True)
    }
    own = find_decode_attention(query.device, query.dtype, dim)
    if own is not None:
        kernels["own"] = lambda: own(query, keys, values, starts[:-1], lens, rows, dim**-0.5)
    for name, run in kernels.items():
        _report({"decode": [num, heads, kv_heads, dim, rows], "kernel": name}, run, num_bytes=read)


def _prefill(num: int, heads: int, kv_heads: int, dim: int, tokens: int) -> None:
    q, k, v = (_random(num * tokens, n, dim) for n in (heads, kv_heads, kv_heads))
    starts = _int32([n * tokens for n in range(num + 1)])
    flops = 2 * num * tokens**2 * heads * dim
    _report(
        {"prefill": [num, heads, kv_heads, dim, tokens], "kernel": "varlen"},
        lambda: _flash(q, k, v, starts, starts, tokens, tokens, None, is_causal=True),
        flops=flops,
    )


def _flash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_starts: Tensor,
    k_starts: Tensor,
    max_q: int,
    max_k: int,
    lens: Tensor | None,
    *,
    is_causal: bool,
) -> Tensor:
    out, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, q_starts, k_starts, max_q, max_k, 0.0, is_causal, False, seqused_k=lens
    )
    return out  # type: ignore[no-any-return]


def _report(
    about: dict[str, Any], run: Callable[[], Tensor], *, flops: int = 0, num_bytes: int = 0
) -> None:
    try:
        ms = _time_ms(run)
    except RuntimeError as error:
        print(json.dumps({**about, "error": str(error).splitlines()[0][:120]}), flush=True)
        return
    rate = (
        {"tflops": round(flops / ms / 1e9, 1)} if flops else {"gb_s": round(num_bytes / ms / 1e6)}
    )
    print(json.dumps({**about, "ms": round(ms, 4), **rate}), flush=True)


def _time_ms(run: Callable[[], Tensor]) -> float:
    for _ in range(WARM_UP):
        run()
    took: list[float] = []
    for _ in range(REPEATS):
        first = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        last = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        first.record()
        run()
        last.record()
        last.synchronize()
        took.append(first.elapsed_time(last))
    return statistics.median(took)


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def _int32(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device="cuda")


if __name__ == "__main__":
    main()
