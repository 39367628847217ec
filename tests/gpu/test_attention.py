"""torch's own FlashAttention over our slabs says what the plain loops over them say."""

import random
from dataclasses import replace

import pytest
import torch

from engine import attention
from engine.attention import TextContext

pytestmark = pytest.mark.gpu

NUM_ROWS = 4096
HEADS = [(4, 2, 64), (12, 2, 128), (8, 8, 32), (16, 16, 80), (6, 1, 256)]


def context_of(
    starts: list[int], lens: list[int], num_queries: list[int], kv_heads: int, dim: int
) -> TextContext:
    shape = (NUM_ROWS, kv_heads, dim)
    keys, values = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    rows = torch.cat(
        [
            torch.arange(start + length - n, start + length)
            for start, length, n in zip(starts, lens, num_queries, strict=True)
        ]
    )
    spans = tuple(
        torch.tensor(x, dtype=torch.int32, device="cuda")
        for x in ([0, *torch.tensor(num_queries).cumsum(0).tolist()], [*starts, 0], lens)
    )
    return TextContext([keys], [values], rows.cuda(), starts, lens, num_queries, spans)  # type: ignore[arg-type]


def ragged(rng: random.Random, num_seqs: int) -> tuple[list[int], list[int]]:
    """Slabs in an order other than the sequences', and lengths of 1 to 200."""
    starts = [16 + 208 * slot for slot in rng.sample(range(NUM_ROWS // 208 - 1), num_seqs)]
    return starts, [rng.randint(1, 200) for _ in range(num_seqs)]


@pytest.mark.parametrize("window", [None, 1, 40])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), HEADS)
def test_flash_decode_equals_the_loop_over_slabs(
    heads: int, kv_heads: int, dim: int, window: int | None
) -> None:
    torch.manual_seed(heads)
    starts, lens = ragged(random.Random(dim), 12)
    context = context_of(starts, lens, [1] * 12, kv_heads, dim)
    query = torch.randn(1, heads, 12, dim, device="cuda", dtype=torch.bfloat16)

    rows = context.keys[0], context.values[0]

    flash = attention._attend_flash(query, *rows, context, dim**-0.5, window)
    loop = attention._attend_decode(query, *rows, context, dim**-0.5, window)

    assert (flash.float() - loop.float()).abs().max().item() < 0.02


@pytest.mark.parametrize("window", [None, 1, 40])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), HEADS)
def test_flash_prefill_equals_the_loop_over_prompts(
    heads: int, kv_heads: int, dim: int, window: int | None
) -> None:
    torch.manual_seed(heads)
    starts, lens = ragged(random.Random(dim + 1), 7)
    context = context_of(starts, lens, lens, kv_heads, dim)
    num_tokens = sum(lens)
    query = torch.randn(1, heads, num_tokens, dim, device="cuda", dtype=torch.bfloat16)
    rows = context.keys[0], context.values[0]

    flash = attention._attend_flash(query, *rows, context, dim**-0.5, window)
    loop = attention._attend_prefill(query, *rows, context, dim**-0.5, window)

    assert (flash.float() - loop.float()).abs().max().item() < 0.02


@pytest.mark.parametrize("window", [None, 1, 40])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), HEADS)
def test_flash_over_pieces_of_prompts_equals_the_loop(
    heads: int, kv_heads: int, dim: int, window: int | None
) -> None:
    """Queries are the last tokens of their rows: what flash does not show must not be seen early."""
    torch.manual_seed(heads)
    rng = random.Random(dim + 2)
    starts, lens = ragged(rng, 9)
    num_queries = [rng.randint(1, length) for length in lens]
    context = context_of(starts, lens, num_queries, kv_heads, dim)
    query = torch.randn(1, heads, sum(num_queries), dim, device="cuda", dtype=torch.bfloat16)
    rows = context.keys[0], context.values[0]

    flash = attention._attend_flash(query, *rows, context, dim**-0.5, window)
    loop = attention._attend_prefill(query, *rows, context, dim**-0.5, window)

    assert (flash.float() - loop.float()).abs().max().item() < 0.02


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), HEADS)
def test_flash_over_rows_in_fp8_equals_the_loop(
    heads: int, kv_heads: int, dim: int, window: int | None
) -> None:
    """Flash reads them from where they were gathered, the loop where they lie."""
    torch.manual_seed(heads)
    rng = random.Random(dim + 3)
    starts, lens = ragged(rng, 9)
    num_queries = [rng.randint(1, length) for length in lens]
    context = context_of(starts, lens, num_queries, kv_heads, dim)
    query = torch.randn(1, heads, sum(num_queries), dim, device="cuda", dtype=torch.bfloat16)
    keys, values = (x[0].to(torch.float8_e4m3fn) for x in (context.keys, context.values))
    read_rows = [torch.arange(a, a + n) for a, n in zip(starts, lens, strict=True)]
    assert context.device_spans is not None
    query_starts, _, lens_there = context.device_spans
    places = torch.tensor([0, *lens]).cumsum(0).to(torch.int32).cuda()
    gathered = replace(
        context,
        read_rows=torch.cat(read_rows).cuda(),
        device_spans=(query_starts, places, lens_there),
    )

    flash = attention._attend_flash(query, keys, values, gathered, dim**-0.5, window)
    loop = attention._attend_prefill(query, keys, values, context, dim**-0.5, window)

    assert (flash.float() - loop.float()).abs().max().item() < 0.02
