"""
Each fused piece against its plain twin at the shapes of real work: `python -m bench.kernels`.

Needs a GPU with Triton. One JSON line a measurement: microseconds of one call inside a CUDA graph,
so that the time to launch it does not count, and the share of memory traffic it reaches. Then a
sweep of how decode attention is cut into tiles and splits, and whole layers before and after.
"""

import argparse
import copy
import json
import math
import random
import statistics
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from engine import fuse, kernels
from engine.attention import (
    TEXT_ATTENTION,
    VISION_ATTENTION,
    TextContext,
    VisionContext,
    can_use_flash,
    dense_kernels,
    using,
)
from engine.kernels import (
    activated,
    activations,
    added,
    draw,
    folded,
    greedy,
    has_kernels,
    in_one,
    norms,
    pictures,
    prompts,
    quantised,
    rope,
    rotated,
    split,
)
from engine.kernels.activated import Activation
from engine.kernels.in_one import Product
from engine.kernels.pictures import Cut, HopperCut
from engine.sampler import Sampler

REPEATS, WARM_UP, CALLS = 20, 3, 4  # replays that are timed, replays before them, calls in a graph
PREFILL, PATCHES, DECODE = 16_384, 32_768, 256  # rows of a call of each kind
TEXT_WIDTH, TEXT_MLP = 1536, 8960  # Qwen2-VL-2B
VISION_WIDTH, VISION_MLP = 1280, 5120
VOCAB = 151_936
MAX_APART = 0.02  # of two attentions in bfloat16
DTYPE = torch.bfloat16
# name: (sequences, query heads, KV heads, dim, least rows, most rows, the bound of the graph)
DECODES = {
    "caption": (256, 12, 2, 128, 421, 485, 1024),
    "caption_512": (512, 12, 2, 128, 421, 485, 1024),
    "frames": (192, 12, 2, 128, 2364, 2492, 4096),
    "ragged": (256, 12, 2, 128, 545, 1090, 4096),
    "few": (16, 12, 2, 128, 2364, 2492, 4096),
    "llava": (140, 32, 32, 128, 335, 670, 1024),
}
# name, activation, (rows, depth, width of the weight), whether there is a bias
ACTIVATED: list[tuple[str, Activation, tuple[int, int, int], bool]] = [
    ("encoder of Qwen2-VL", "quick_gelu", (31_280, VISION_WIDTH, VISION_MLP), True),
    ("encoder of Qwen2.5-VL", "silu_mul", (31_280, VISION_WIDTH, 6848), True),
    ("CLIP", "quick_gelu", (32 * 577, 1024, 4096), True),
    ("SigLIP", "gelu_tanh", (40 * 729, 1152, 4304), True),
    ("LLaVA", "silu_mul", (8192, 4096, 22_016), False),
    *(
        ("text of Qwen2-VL", "silu_mul", (rows, TEXT_WIDTH, 2 * TEXT_MLP), False)
        for rows in (PREFILL, 2048, 1024, 512)
    ),
]
# heads, KV heads, dim, prompts: tokens of a call, and rows with those before them
PROMPTS: dict[str, tuple[int, int, int, list[tuple[int, int]]]] = {
    "captions": (12, 2, 128, [(421, 421)] * 38),
    "frames": (12, 2, 128, [(2364, 2364)] * 7),
    "a clip": (12, 2, 128, [(2364, 2364)]),
    "large pictures": (12, 2, 128, [(1029, 1029)] * 16),
    "captions of 7B": (28, 4, 128, [(421, 421)] * 38),
    "captions of Qwen3-VL": (16, 8, 128, [(421, 421)] * 38),
    "llava": (32, 32, 128, [(604, 604)] * 27),
    "a piece": (12, 2, 128, [(4096, 12_288)]),
    "heads of 64": (32, 8, 64, [(421, 421)] * 38),
}
SWEEP = [
    (split, tile, warps, stages)
    for split in (256, 512, 1024)
    for tile in (32, 64, 128)
    for warps in (2, 4, 8)
    for stages in (2, 3)
]
PICTURE_CUTS: list[Cut | HopperCut] = [
    *(HopperCut(groups, tile) for groups, tile in ((2, 128), (2, 64), (3, 64))),
    *(
        Cut(rows, warps, stages)
        for rows, warps in ((128, 8), (128, 4), (64, 4))
        for stages in (2, 3)
    ),
]
DRAWS: dict[str, dict[str, float]] = {
    "temperature": {},
    "top_k": {"top_k": 50},
    "top_k and top_p": {"top_k": 50, "top_p": 0.9},
    "top_p": {"top_p": 0.9},
    "min_p": {"min_p": 0.05},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", choices=PARTS, default=list(PARTS))
    only = parser.parse_args().only
    if not (torch.cuda.is_available() and has_kernels(torch.empty(1, device="cuda"))):
        raise SystemExit("bench.kernels needs a CUDA device and a Triton that works there.")
    torch.manual_seed(0)
    _print(device=torch.cuda.get_device_name(), torch=torch.__version__)
    with torch.inference_mode():
        for part in only:
            PARTS[part]()


def measure_pieces() -> None:
    for rows in (PREFILL, DECODE):
        _text_pieces(rows)
    _vision_pieces()
    logits = _random(DECODE, VOCAB)
    sampler = Sampler(VOCAB, "cuda")
    _line("argmax kernel", lambda: greedy.argmax(logits), moved=logits.nbytes)
    _line("argmax sampler", lambda: sampler.sample_plain(logits).token_ids, moved=logits.nbytes)


def measure_draw() -> None:
    """
    A token of each row of a step, by what it is drawn with, beside the likeliest.

    Of logits that are nearly all the same, as random weights give them, top_p keeps most of a
    vocabulary; of those with a few high ones, as a trained model's, a few ids.
    """
    flat = _random(DECODE, VOCAB)
    high = 12 * (torch.rand(DECODE, VOCAB, device="cuda") < 2e-4).to(DTYPE)
    for shape, logits in (("flat", flat), ("peaked", 2 * flat + high)):
        _line(f"{shape} argmax", partial(greedy.argmax, logits), moved=logits.nbytes)
        for name, words in DRAWS.items():
            asked = {"temperature": 0.7, "top_k": 0, "top_p": 1.0, "min_p": 0.0, **words}
            rows = [draw.numbers(seed, 0, **asked) for seed in range(DECODE)]  # type: ignore[arg-type]
            table = torch.from_numpy(draw.table(rows, [0] * DECODE, DECODE)).cuda()
            _line(f"{shape} {name}", partial(draw.draw, logits, table), moved=logits.nbytes)


def _text_pieces(rows: int) -> None:
    x, delta, weight = _random(rows, TEXT_WIDTH), _random(rows, TEXT_WIDTH), _random(TEXT_WIDTH)
    _piece(f"rms_norm {rows}", 2 * x.nbytes, lambda: norms.rms_norm(x, weight, 1e-6))
    _piece(
        f"add_rms_norm {rows}", 4 * x.nbytes, lambda: norms.add_rms_norm_(delta, x, weight, 1e-6)
    )
    gate_up = _random(rows, 2 * TEXT_MLP)
    _piece(f"silu_mul {rows}", gate_up.nbytes * 3 // 2, lambda: activations.silu_mul(gate_up))
    heads, angles = _random(rows, 12 + 2 + 2, 128), torch.rand(rows, 64, device="cuda")
    _piece(
        f"rope text {rows}",
        2 * heads[:, :14].nbytes,
        lambda: rope.rotate_(heads[:, :14], angles, angles),
    )
    keys, values = _random(rows, 2, 128), _random(rows, 2, 128)
    to = torch.randperm(rows, device="cuda")
    _piece(
        f"rope and store {rows}",
        2 * heads.nbytes,
        lambda: rope.rotate_and_store_(heads, angles, angles, keys, values, to),
    )
    positions = torch.randint(0, 4096, (3, rows), device="cuda")
    axis_of = torch.arange(64, device="cuda") % 3
    table = torch.rand(32_768, 64, device="cuda")
    _piece(
        f"look_up {rows}",
        4 * angles.nbytes,
        lambda: rope.look_up(positions, axis_of, table, table),
    )


def _vision_pieces() -> None:
    x, delta = _random(PATCHES, VISION_WIDTH), _random(PATCHES, VISION_WIDTH)
    weight, bias = _random(VISION_WIDTH), _random(VISION_WIDTH)
    _piece("layer_norm", 2 * x.nbytes, lambda: norms.layer_norm(x, weight, bias, 1e-6))
    _piece(
        "add_layer_norm",
        4 * x.nbytes,
        lambda: norms.add_layer_norm_(delta, x, weight, bias, 1e-6),
    )
    inner = _random(PATCHES, VISION_MLP)
    _piece("quick_gelu", 2 * inner.nbytes, lambda: activations.quick_gelu_(inner))
    heads, angles = _random(PATCHES, 48, 80), torch.rand(PATCHES, 80, device="cuda")
    _piece(
        "rope vision",
        2 * heads[:, :32].nbytes,
        lambda: rope.rotate_(heads[:, :32], angles, angles),
    )


def measure_merged() -> None:
    """One product instead of several."""
    for rows in (PREFILL, DECODE):
        _merged("qkv", rows, [1536, 256, 256])
        _merged("gate_up", rows, [TEXT_MLP, TEXT_MLP])


def _merged(name: str, rows: int, widths: list[int]) -> None:
    x, parts = _random(rows, TEXT_WIDTH), [_random(width, TEXT_WIDTH) for width in widths]
    merged = torch.cat(parts)
    flops = 2 * rows * TEXT_WIDTH * sum(widths)
    _line(f"{name} apart {rows}", lambda: [F.linear(x, part) for part in parts], flops=flops)
    _line(f"{name} merged {rows}", lambda: F.linear(x, merged), flops=flops)


def measure_activated() -> None:
    """A product and its activation in one kernel and in two: (rows, depth, width of the weight)."""
    for name, activation, shape, has_bias in ACTIVATED:
        _activated(name, activation, *shape, has_bias=has_bias)


def _activated(
    name: str, activation: Activation, rows: int, depth: int, width: int, *, has_bias: bool
) -> None:
    product = Product(torch.device("cuda"), DTYPE, depth, width, has_bias)
    x, linear = in_one.draw_in_16_bits(product, rows)
    name, flops = f"{name} {activation} {rows}", 2 * rows * depth * width
    _line(f"{name} product alone", lambda: linear(x), flops=flops)
    for way, least_rows in (("apart", in_one.NEVER), ("in one", 0)):
        run = partial(activated.multiply, x, linear, activation, least_rows)
        _line(f"{name} {way}", run, flops=flops)
        _line(f"{name} {way}, launched", run, flops=flops, in_graph=False)
    _print_choice(name, activated.choose(linear, activation))
    rows_in_fp8, small = in_one.draw(product._replace(dtype=quantised.FP8), rows)
    assert isinstance(rows_in_fp8, quantised.Fp8Rows)
    assert isinstance(small, quantised.Fp8Linear)
    bound = activated.find_bound(small, activation)
    name = f"{name} fp8"
    _line(f"{name} product alone", lambda: small(rows_in_fp8), flops=flops)
    for way, least_rows in (("apart", in_one.NEVER), ("in one", 0)):
        args = rows_in_fp8, small, activation, bound, least_rows
        _line(f"{name} {way}", partial(activated.multiply_in_fp8, *args), flops=flops)
    _print_choice(name, activated.choose(small, activation))


def measure_rotated() -> None:
    """Queries, keys and values of the encoder, rotated in one kernel with their product and in two."""
    device, widths = torch.device("cuda"), (VISION_WIDTH, 3 * VISION_WIDTH)
    for name, dtype in {"bf16": DTYPE, "fp8": quantised.FP8}.items():
        for rows in (PATCHES, 8192, 2048, 512):
            x, linear = in_one.draw(Product(device, dtype, *widths, has_bias=True), rows)
            angles = torch.rand(rows, 80, device=device)
            flops = 2 * rows * math.prod(widths)
            _line(f"rotated {name} {rows} product alone", partial(linear, x), flops=flops)
            for way, least_rows in (("apart", in_one.NEVER), ("in one", 0)):
                run = partial(rotated.multiply, x, linear, angles, angles, 80, 32, least_rows)
                _line(f"rotated {name} {rows} {way}", run, flops=flops)
        _print_choice(f"rotated {name}", rotated.choose(linear, 80, 32))


def measure_added() -> None:
    """Products that end half a layer, and the norm behind them, in which one or the other adds."""
    for name, rows, widths, is_rms in (
        ("encoder out", PATCHES, (VISION_WIDTH, VISION_WIDTH), False),
        ("encoder down", PATCHES, (VISION_MLP, VISION_WIDTH), False),
        ("text out", PREFILL, (TEXT_WIDTH, TEXT_WIDTH), True),
        ("text down", PREFILL, (TEXT_MLP, TEXT_WIDTH), True),
        ("LLaVA out", 8192, (4096, 4096), True),
        ("LLaVA down", 8192, (11_008, 4096), True),
    ):
        dtypes = ((DTYPE, False), (DTYPE, True), (quantised.FP8, True))
        for dtype, gives_fp8 in dtypes:
            product = Product(torch.device("cuda"), dtype, *widths, has_bias=not is_rms)
            run = added.draw(product, is_rms, gives_fp8, rows)
            way = f"added {name} {dtype} {'fp8' if gives_fp8 else '16 bits'} behind"
            flops = 2 * rows * math.prod(widths)
            _line(f"{way} norm adds", partial(run, in_one.NEVER), flops=flops)
            _line(f"{way} in one", partial(run, 0), flops=flops)
            _, linear = in_one.draw(product, 1)
            _print_choice(way, added.choose(linear, is_rms=is_rms, gives_fp8=gives_fp8))


def measure_folded() -> None:
    """Two products and the norm between them: a pass of its own, or left to the products."""
    device, usual = torch.device("cuda"), in_one.ROWS[-1]
    turned = folded.Behind(dim=80, num_heads=32, least_rows=usual)
    gelu = folded.Behind("quick_gelu", least_rows=usual)
    gated = folded.Behind("silu_mul", least_rows=usual)
    for name, rows, widths, behind, is_rms in (
        ("encoder down, qkv", PATCHES, (VISION_MLP, VISION_WIDTH, 3 * VISION_WIDTH), turned, False),
        ("encoder out, up", PATCHES, (VISION_WIDTH, VISION_WIDTH, VISION_MLP), gelu, False),
        ("text down, qkv", PREFILL, (TEXT_MLP, TEXT_WIDTH, 2048), folded.Behind(), True),
        ("text out, gates", PREFILL, (TEXT_WIDTH, TEXT_WIDTH, 2 * TEXT_MLP), gated, True),
        ("LLaVA down, qkv", 8192, (11_008, 4096, 12_288), folded.Behind(), True),
        ("LLaVA out, gates", 8192, (4096, 4096, 22_016), gated, True),
    ):
        depth, width, out = widths
        first, second = (
            Product(device, DTYPE, *pair, has_bias=not is_rms)
            for pair in ((depth, width), (width, out))
        )
        flops = 2 * rows * width * (depth + out)
        for way, added_rows in (("norm adds", in_one.NEVER), ("product adds", 0)):
            run = folded.draw(first, second, behind, is_rms, added_rows, rows)
            _line(f"{name} {way}", partial(run, in_one.NEVER), flops=flops)
        _line(f"{name} folded", partial(run, 0), flops=flops)


def measure_split() -> None:
    """Products of few rows with the addition and norm behind them: whole and in parts."""
    for name, depth, width in (
        ("text down", TEXT_MLP, TEXT_WIDTH),
        ("text out", TEXT_WIDTH, TEXT_WIDTH),
        ("LLaVA down", 11_008, 4096),
        ("LLaVA out", 4096, 4096),
    ):
        for dtype in (DTYPE, quantised.FP8):
            gives_fp8 = dtype == quantised.FP8
            product = Product(torch.device("cuda"), dtype, depth, width, has_bias=False)
            _, linear = in_one.draw(product, 1)
            for rows in (512, 448, 256, 128, 64, 16):
                run = split.draw(product, gives_fp8, rows)
                flops, moved = 2 * rows * depth * width, linear.weight.nbytes
                way = f"{name} {dtype} {rows}"
                _line(f"{way} whole", partial(run, in_one.NEVER), flops=flops, moved=moved)
                _line(f"{way} in parts", partial(run, 0), flops=flops, moved=moved)
            _print(name=f"{name} {dtype}", rows=split.choose(linear, gives_fp8=gives_fp8))


def _print_choice(name: str, least_rows: int) -> None:
    _print(name=name, least_rows=None if least_rows == in_one.NEVER else least_rows)


def measure_fp8() -> None:
    """Products and what comes before them, in bfloat16 and in fp8: (rows, width in, width out)."""
    for rows, width, out in [
        (PATCHES, VISION_WIDTH, 3 * VISION_WIDTH),
        (PATCHES, VISION_WIDTH, VISION_WIDTH),
        (PATCHES, VISION_WIDTH, VISION_MLP),
        (PATCHES, VISION_MLP, VISION_WIDTH),
        (PREFILL, TEXT_WIDTH, 2048),
        (PREFILL, TEXT_WIDTH, 2 * TEXT_MLP),
        (PREFILL, TEXT_MLP, TEXT_WIDTH),
        (DECODE, TEXT_WIDTH, 2048),
        (DECODE, TEXT_WIDTH, 2 * TEXT_MLP),
        (DECODE, TEXT_MLP, TEXT_WIDTH),
    ]:
        _fp8_product(rows, width, out)
    x, weight = _random(PATCHES, VISION_WIDTH), _random(VISION_WIDTH)
    inner, gate_up = _random(PATCHES, VISION_MLP), _random(PREFILL, 2 * TEXT_MLP)
    _line("quantise", lambda: quantised.quantise(x), moved=x.nbytes * 3 // 2)
    _line(
        "layer_norm in fp8",
        lambda: quantised.layer_norm(x, weight, weight, 1e-6),
        moved=x.nbytes * 3 // 2,
    )
    _line("quick_gelu in fp8", lambda: quantised.quick_gelu(inner), moved=inner.nbytes * 3 // 2)
    _line("silu_mul in fp8", lambda: quantised.silu_mul(gate_up), moved=gate_up.nbytes * 5 // 4)


def _fp8_product(rows: int, width: int, out: int) -> None:
    linear = nn.Linear(width, out, device="cuda", dtype=DTYPE)
    x, small = _random(rows, width), quantised.Fp8Linear(linear)
    quantised_x = quantised.quantise(x)
    flops = 2 * rows * width * out
    name = f"{rows} x {width} x {out}"
    _line(f"bf16 {name}", lambda: linear(x), flops=flops)
    _line(f"fp8 {name}", lambda: small(quantised_x), flops=flops)


def measure_pictures() -> None:
    """Attention in the encoder: our kernel with every way of cutting, torch's varlen, cuDNN."""
    for num, patches in ((56, 576), (20, 1564), (8, 3996), (4, 1564), (1, 1564), (400, 64)):
        _pictures(f"{num} x {patches}", [patches] * num)
    rng = random.Random(0)
    _pictures("ragged", [4 * rng.randint(81, 1000) for _ in range(16)])
    _pictures("56 x 577 of CLIP", [577] * 56, dim=64)
    _pictures("44 x 729 of SigLIP", [729] * 44, dim=72)


def _pictures(name: str, sizes: list[int], *, heads: int = 16, dim: int = 80) -> None:
    most = max(sizes)
    query, key, value = torch.split(_random(sum(sizes), 3 * heads, dim), heads, dim=1)
    starts = torch.tensor([0, *torch.tensor(sizes).cumsum(0)], dtype=torch.int32, device="cuda")
    flops = 4 * heads * dim * sum(size**2 for size in sizes)
    scale = dim**-0.5

    def varlen() -> Tensor:
        out, *_ = torch.ops.aten._flash_attention_forward(
            query, key, value, starts, starts, most, most, 0.0, False, False, scale=scale
        )
        return out  # type: ignore[no-any-return]

    def dense() -> Tensor:
        q, k, v = (
            x.view(len(sizes), most, heads, dim).transpose(1, 2) for x in (query, key, value)
        )
        with sdpa_kernel([SDPBackend.CUDNN_ATTENTION]):
            return F.scaled_dot_product_attention(q, k, v, scale=scale)

    expected = varlen()
    _line(f"pictures {name} varlen", varlen, flops=flops)
    if len(set(sizes)) == 1:
        _line(f"pictures {name} cudnn", dense, flops=flops)
    best: tuple[float, dict[str, Any]] | None = None
    for cut in PICTURE_CUTS:
        if isinstance(cut, Cut) and dim not in pictures.DIMS:
            continue
        facts = {"cut": type(cut).__name__, **asdict(cut)}
        run = partial(pictures.attend, query, key, value, starts, most, scale, cut)
        took = _line(f"pictures {name} kernel", run, flops=flops, facts=facts)
        if took is None:
            continue
        apart = (run() - expected).abs().max().item()
        if apart > MAX_APART:
            _print(name=f"pictures {name} kernel", error=f"{apart} apart from varlen", **facts)
        elif best is None or took < best[0]:
            best = took, facts
    if best is not None:
        _print(best=f"pictures {name}", us=round(best[0], 2), **best[1])


def measure_prompts() -> None:
    """Attention of prompts over their slabs: torch's FlashAttention, and our kernel for Hopper."""
    for name, (heads, kv_heads, dim, sizes) in PROMPTS.items():
        _prompts(name, sizes, heads, kv_heads, dim)
    rng = random.Random(0)
    ragged = [(size, size) for size in (rng.randint(100, 2400) for _ in range(12))]
    _prompts("ragged", ragged, 12, 2, 128)
    # As an engine's graph has it: room for more and longer prompts than there are.
    _prompts("captions in a graph", [(421, 421)] * 38 + [(0, 0)] * 26, 12, 2, 128, most=1024)


def _prompts(
    name: str,
    sizes: list[tuple[int, int]],
    heads: int,
    kv_heads: int,
    dim: int,
    most: int | None = None,
) -> None:
    """Sizes: tokens of a prompt in this call, and its rows."""
    lens = [length for _, length in sizes]
    query = _random(sum(size for size, _ in sizes), heads + 2 * kv_heads, dim)[:, :heads]
    keys, values = (_random(sum(lens), kv_heads, dim) for _ in range(2))
    spans = [
        torch.tensor(x, dtype=torch.int32, device="cuda")
        for x in (
            [sum(size for size, _ in sizes[:index]) for index in range(len(sizes) + 1)],
            [sum(lens[:index]) for index in range(len(lens) + 1)],
            lens,
        )
    ]
    query_starts, slab_starts, lengths = spans
    scale = dim**-0.5
    longest = most or max(size for size, _ in sizes)
    flops = 4 * heads * dim * sum(n * (rows - n) + n * (n + 1) // 2 for n, rows in sizes)

    def flash() -> Tensor:
        out, *_ = torch.ops.aten._flash_attention_forward(
            query, keys, values, query_starts, slab_starts, longest, max(longest, *lens), 0.0, True,
            False, scale=scale, seqused_k=lengths,
        )  # fmt: skip
        return out  # type: ignore[no-any-return]

    def own() -> Tensor:
        return prompts.attend(
            query, keys, values, query_starts, slab_starts, lengths, longest, scale
        )

    _line(f"prompts {name} flash", flash, flops=flops)
    if not prompts.is_usable(query.device, query.dtype, dim):
        return
    if _line(f"prompts {name} kernel", own, flops=flops) is not None:
        apart = (own() - flash()).abs().max().item()
        _print(name=f"prompts {name}", apart=round(apart, 4))


def measure_decode() -> None:
    for name, shape in DECODES.items():
        _decode(name, *shape)


def _decode(
    name: str, num: int, heads: int, kv_heads: int, dim: int, least: int, most: int, bound: int
) -> None:
    """torch's FlashAttention, then our kernel with every way of cutting."""
    from engine.kernels.gpu.decode import attend

    rng = random.Random(num)
    lens = [rng.randint(least, most) for _ in range(num)]
    slab = -(-most // 16) * 16
    starts = [16 + slab * place for place in rng.sample(range(num), num)]
    keys, values = (_random(16 + num * slab, kv_heads, dim) for _ in range(2))
    query = _random(num, heads, dim)
    start, length = (torch.tensor(x, dtype=torch.int32, device="cuda") for x in (starts, lens))
    padded = torch.cat([start, start[:1]])
    ones = torch.arange(num + 1, dtype=torch.int32, device="cuda")
    moved = 2 * sum(lens) * kv_heads * dim * keys.element_size()
    scale = dim**-0.5

    def flash() -> Tensor:
        out, *_ = torch.ops.aten._flash_attention_forward(
            query, keys, values, ones, padded, 1, bound, 0.0, True, False,
            scale=scale, seqused_k=length,
        )  # fmt: skip
        return out  # type: ignore[no-any-return]

    expected = flash()
    _line(f"decode {name} flash", flash, moved=moved)
    small = keys.to(torch.float8_e4m3fn), values.to(torch.float8_e4m3fn)
    best: tuple[float, dict[str, Any]] | None = None
    for rows_apart, tile, warps, stages in SWEEP:
        how = {"tile": tile, "num_warps": warps, "num_stages": stages}
        run = partial(
            attend, query, keys, values, start, length, bound, scale, rows_apart,
            tile=tile, num_warps=warps, num_stages=stages,
        )  # fmt: skip
        facts: dict[str, Any] = {"split": rows_apart, **how}
        took = _line(f"decode {name} kernel", run, moved=moved, facts=facts)
        if took is None:
            continue
        apart = (run() - expected).abs().max().item()
        if apart > MAX_APART:
            _print(name=f"decode {name} kernel", error=f"{apart} apart from flash", **facts)
        elif best is None or took < best[0]:
            best = took, facts
    if best is None:
        return
    took, facts = best
    _print(best=f"decode {name}", us=round(took, 2), **facts)
    run = partial(
        attend, query, *small, start, length, bound, scale, facts["split"],
        tile=facts["tile"], num_warps=facts["num_warps"], num_stages=facts["num_stages"],
    )  # fmt: skip
    _line(f"decode {name} kernel fp8 KV", run, moved=moved // 2, facts=facts)


def measure_layers() -> None:
    """Two encoder blocks and two text layers of Qwen2-VL-2B, as transformers has them and fused."""
    config: Any = Qwen2VLConfig()
    config.text_config.update(
        {
            "hidden_size": TEXT_WIDTH,
            "intermediate_size": TEXT_MLP,
            "num_hidden_layers": 2,
            "num_attention_heads": 12,
            "num_key_value_heads": 2,
            "vocab_size": 1024,
            "layer_types": ["full_attention"] * 2,
            "max_position_embeddings": 32_768,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": [16, 24, 24],
            },
        }
    )
    config.vision_config.update({"depth": 2, "hidden_size": TEXT_WIDTH})
    torch.set_default_dtype(DTYPE)
    with torch.device("cuda"):
        model: Any = Qwen2VLForConditionalGeneration(config)
    model.eval().requires_grad_(False)
    torch.set_default_dtype(torch.float32)
    model.config.text_config._attn_implementation = TEXT_ATTENTION
    model.config.vision_config._attn_implementation = VISION_ATTENTION
    model.model.visual.patch_embed = nn.Identity()
    exact = copy.deepcopy(model)
    for kind, fusions in (
        ("plain", None),
        ("fused", fuse.Fusions()),
        ("fused fp8", fuse.Fusions(fp8=True)),
    ):
        model = copy.deepcopy(exact)
        if fusions is not None:
            fuse.apply(model, fusions)
        for name, run in (_encoder_run(model), _prefill_run(model), _decode_run(model)):
            _line(f"2 layers {name} {kind}, launched", run, in_graph=False)
            _line(f"2 layers {name} {kind}", run)


def _encoder_run(model: Any) -> tuple[str, Callable[[], Tensor]]:
    num, rows, columns = 20, 34, 46
    patches = _random(num * rows * columns, VISION_WIDTH)
    grids = torch.tensor([[1, rows, columns]] * num)
    positions = torch.randint(0, 46, (len(patches), 2), device="cuda")
    starts = torch.arange(num + 1, dtype=torch.int32, device="cuda") * rows * columns

    def run() -> Tensor:
        with using(VisionContext([(num, rows * columns)])), dense_kernels(patches.device):
            return model.model.visual(  # type: ignore[no-any-return]
                patches,
                grid_thw=grids,
                position_ids=positions,
                cu_seqlens=starts,
                max_seqlen=rows * columns,
            ).pooler_output

    return f"encoder {len(patches)}", run


def _text_run(model: Any, num: int, tokens: int, rows: int) -> Callable[[], Tensor]:
    slab = -(-rows // 16) * 16
    total = num * tokens
    keys, values = ([_random(num * slab, 2, 128) for _ in range(2)] for _ in range(2))
    starts = [slab * n for n in range(num)]
    write = torch.tensor(
        [start + rows - tokens + i for start in starts for i in range(tokens)], device="cuda"
    )
    spans = [
        torch.tensor(x, dtype=torch.int32, device="cuda")
        for x in ([tokens * n for n in range(num + 1)], [*starts, 0], [rows] * num)
    ]
    assert can_use_flash(torch.device("cuda"), DTYPE, 128)
    context = TextContext(
        keys, values, write, starts, [rows] * num, [tokens] * num, (spans[0], spans[1], spans[2])
    )
    x = _random(1, total, TEXT_WIDTH)
    positions = torch.arange(total, device="cuda").remainder(rows).expand(3, 1, total)

    def run() -> Tensor:
        with using(context):
            return model.model.language_model(  # type: ignore[no-any-return]
                inputs_embeds=x, position_ids=positions, use_cache=False
            ).last_hidden_state

    return run


def _prefill_run(model: Any) -> tuple[str, Callable[[], Tensor]]:
    return "prefill 38 x 421", _text_run(model, 38, 421, 421)


def _decode_run(model: Any) -> tuple[str, Callable[[], Tensor]]:
    return "decode 256 x 450", _text_run(model, 256, 1, 450)


def _piece(name: str, moved: int, run: Callable[[], Any]) -> None:
    """The kernel, then its twin: the same function with the kernels hidden."""
    _line(f"{name} kernel", run, moved=moved)
    modules = [activations, norms, rope]
    kept = kernels.has_kernels
    for module in modules:
        module.has_kernels = lambda _: False  # type: ignore[attr-defined]
    try:
        _line(f"{name} twin", run, moved=moved)
    finally:
        for module in modules:
            module.has_kernels = kept  # type: ignore[attr-defined]


def _line(
    name: str,
    run: Callable[[], Any],
    *,
    moved: int | None = None,
    flops: int | None = None,
    in_graph: bool = True,
    facts: dict[str, Any] | None = None,
) -> float | None:
    """Measure and print; what cannot run is said so and costs nothing else. Microseconds a call."""
    facts = dict(facts or {})
    try:
        took = _time_us(run, in_graph)
    except Exception as error:  # noqa: BLE001 - a kernel that does not compile must not end the rest
        _print(name=name, error=f"{type(error).__name__}: {error}"[:300], **facts)
        return None
    if moved is not None:
        facts["gb_s"] = round(moved / took / 1e3)
    if flops is not None:
        facts["tflop_s"] = round(flops / took / 1e6)
    _print(name=name, us=round(took, 2), **facts)
    return took


def _time_us(run: Callable[[], Any], in_graph: bool) -> float:
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            run()
    torch.cuda.synchronize()
    replay: Callable[[], Any] = run
    calls = 1
    if in_graph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(CALLS):
                run()
        replay, calls = graph.replay, CALLS
    times = []
    for repeat in range(WARM_UP + REPEATS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        replay()
        end.record()
        end.synchronize()
        if repeat >= WARM_UP:
            times.append(begin.elapsed_time(end) * 1000 / calls)
    return float(statistics.median(times))


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.float32).to(DTYPE)


def _print(**facts: Any) -> None:
    print(json.dumps(facts), flush=True)


PARTS: dict[str, Callable[[], None]] = {
    "pieces": measure_pieces,
    "draw": measure_draw,
    "merged": measure_merged,
    "activated": measure_activated,
    "rotated": measure_rotated,
    "added": measure_added,
    "folded": measure_folded,
    "split": measure_split,
    "layers": measure_layers,
    "fp8": measure_fp8,
    "pictures": measure_pictures,
    "prompts": measure_prompts,
    "decode": measure_decode,
}

if __name__ == "__main__":
    main()
