"""
Drawing without sorting: every program looks at a piece of a row, then one at what it has left.

A piece is 128 spans of 32 ids. The first kernel leaves the largest logit of every span, and of a piece
its largest and the sum of its weights. So a row without limits is read again only in the piece that has
its draw, and one with top_k, top_p or min_p only in those spans whose largest logits are the highest: as
many of them as fill a piece. Where they do not hold all that may be drawn, the row is read a few times.

Whatever is kept is said in two numbers: the lowest logit, and how many of those that equal it, of which
the lowest ids go first. That logit is searched for by halving, among the integers in whose order floats
are: those of 16 bits leave the lower bits of a float32 alone, which makes the search shorter.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.draw import (
    AT,
    KEY,
    MIN_P,
    NUM_COLUMNS,
    TEMPERATURE,
    TOP_K,
    TOP_P,
    UNIFORM_BITS,
)
from engine.kernels.gpu import LOG2_E, count_blocks
from engine.kernels.greedy import NO_TOKEN

SPAN, NUM_SPANS = 32, 128  # ids of a span, spans of a piece
# Lowest bits of a float32 that numbers of a type, made wider, have all alike.
UNUSED_BITS = {torch.bfloat16: 16, torch.float16: 13, torch.float32: 0}

_KEY, _AT, _TEMPERATURE, _TOP_K, _TOP_P, _MIN_P = map(
    tl.constexpr, (KEY, AT, TEMPERATURE, TOP_K, TOP_P, MIN_P)
)
_UNUSED_UNIFORM_BITS = tl.constexpr(64 - UNIFORM_BITS)
_UNIFORM_STEP = tl.constexpr(2.0**-UNIFORM_BITS)


@triton.jit
def _load_spans(row_ptr, spans, vocab, SPAN: tl.constexpr):
    """(spans, SPAN): the logits, and their ids; a NaN becomes inf, and what is behind the last -inf."""
    column = spans[:, None] * SPAN + tl.arange(0, SPAN)[None, :]
    x = tl.load(row_ptr + column, mask=column < vocab, other=float("-inf")).to(tl.float32)
    return tl.where(x == x, x, float("inf")), column


@triton.jit
def _weigh(x, largest, slope, min_p):
    """Weights next to the largest logit's, which has 1; 0 under min_p. slope: log2(e) / temperature."""
    weights = tl.exp2((x - largest) * slope)
    return tl.where(weights < min_p, 0.0, weights)


@triton.jit
def _number(draws_ptr, column: tl.constexpr, num_rows, row):
    return tl.load(draws_ptr + column * num_rows + row)


@triton.jit
def _float(draws_ptr, column: tl.constexpr, num_rows, row):
    return _number(draws_ptr, column, num_rows, row).to(tl.float64, bitcast=True)


# One kernel for all sizes of a batch. Behind a table of five rows, draws begin where its size says.
@triton.jit(do_not_specialize=["num_rows"], do_not_specialize_on_alignment=["draws_ptr"])
def _look_at_piece(
    logits_ptr,
    draws_ptr,
    tops_ptr,
    best_ptr,
    index_ptr,
    sum_ptr,
    row_stride,
    vocab,
    num_rows,
    num_pieces,
    LOG2_E: tl.constexpr,
    SPAN: tl.constexpr,
    NUM_SPANS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    piece = tl.program_id(1)
    spans = piece * NUM_SPANS + tl.arange(0, NUM_SPANS)
    x, column = _load_spans(logits_ptr + row * row_stride, spans, vocab, SPAN)
    tops = tl.max(x, axis=1)
    tl.store(tops_ptr + row * num_pieces * NUM_SPANS + spans, tops)
    best = tl.max(tops, axis=0)
    index = tl.min(tl.min(tl.where((x == best) & (column < vocab), column, vocab), axis=1), axis=0)
    at = row * num_pieces + piece
    tl.store(best_ptr + at, best)
    tl.store(index_ptr + at, index)
    temperature = _float(draws_ptr, _TEMPERATURE, num_rows, row).to(tl.float32)
    if temperature > 0:
        largest = tl.where(best == float("-inf"), 0.0, best)
        weights = _weigh(x, largest, LOG2_E / temperature, 0.0).to(tl.float64)
        tl.store(sum_ptr + at, tl.sum(tl.sum(weights, axis=1), axis=0))


@triton.jit
def _order_of(x, UNUSED: tl.constexpr):
    """The integer of a float in the order of floats, int64."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return (tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits) >> UNUSED).to(tl.int64)


@triton.jit
def _float_of(order, UNUSED: tl.constexpr):
    ones: tl.constexpr = (1 << UNUSED) - 1
    bits = ((order << UNUSED) + tl.where(order < 0, ones, 0)).to(tl.int32)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.float32, bitcast=True)


@triton.jit
def _total(values):
    if len(values.shape) == 2:
        values = tl.sum(values, axis=1)
    return tl.sum(values, axis=0)


@triton.jit
def _weight_from(x, weights, least):
    return _total(tl.where(x >= least, weights, 0))


@triton.jit
def _search(x, weights, wanted, low, high, UNUSED: tl.constexpr):
    """
    The highest logit from which on all weigh as much as is wanted, as a place in the order of floats.

    weights: of x, or 1 to count. low, high: places of one that is known to be so, and of one that is not.
    """
    while high - low > 1:
        middle = (low + high) >> 1
        is_low = _weight_from(x, weights, _float_of(middle, UNUSED)) >= wanted
        low = tl.where(is_low, middle, low)
        high = tl.where(is_low, high, middle)
    return low


@triton.jit
def _measure_row(row_ptr, vocab, largest, slope, min_p, least, BLOCK: tl.constexpr):
    """How many of a row are over `least`, how many equal it, and the weights of those over it."""
    over = tl.zeros([BLOCK], tl.int32)
    equal = tl.zeros([BLOCK], tl.int32)
    sums = tl.zeros([BLOCK], tl.float64)
    for start in tl.range(0, vocab, BLOCK, num_stages=3):
        column = start + tl.arange(0, BLOCK)
        inside = column < vocab
        x = tl.load(row_ptr + column, mask=inside, other=float("-inf")).to(tl.float32)
        weights = _weigh(x, largest, slope, min_p)
        over += (x > least).to(tl.int32)
        equal += ((x == least) & inside).to(tl.int32)
        sums += tl.where(x > least, weights, 0.0).to(tl.float64)
    return tl.sum(over, axis=0), tl.sum(equal, axis=0), tl.sum(sums, axis=0)


@triton.jit
def _sum_row(
    row_ptr,
    vocab,
    largest,
    slope,
    min_p,
    one,
    two,
    three,
    WEIGHS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """What those of a row weigh, or how many they are, that are no lower than each of three."""
    kind: tl.constexpr = tl.float64 if WEIGHS else tl.int32
    from_one = tl.zeros([BLOCK], kind)
    from_two = tl.zeros([BLOCK], kind)
    from_three = tl.zeros([BLOCK], kind)
    for start in tl.range(0, vocab, BLOCK, num_stages=3):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(row_ptr + column, mask=column < vocab, other=float("-inf")).to(tl.float32)
        weights = _weigh(x, largest, slope, min_p).to(kind) if WEIGHS else 1
        from_one += tl.where(x >= one, weights, 0)
        from_two += tl.where(x >= two, weights, 0)
        from_three += tl.where(x >= three, weights, 0)
    return tl.sum(from_one, axis=0), tl.sum(from_two, axis=0), tl.sum(from_three, axis=0)


@triton.jit
def _search_row(
    row_ptr, vocab, largest, slope, min_p, wanted, low, high,
    WEIGHS: tl.constexpr, UNUSED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`_search` in a whole row, of which each reading tries three places. WEIGHS: or else counts."""
    while high - low > 1:
        step = tl.maximum((high - low) >> 2, 1)
        one = low + step
        two = tl.minimum(one + step, high - 1)
        three = tl.minimum(two + step, high - 1)
        from_one, from_two, from_three = _sum_row(
            row_ptr, vocab, largest, slope, min_p, _float_of(one, UNUSED), _float_of(two, UNUSED),
            _float_of(three, UNUSED), WEIGHS, BLOCK,
        )  # fmt: skip
        if from_three >= wanted:
            low = three
        elif from_two >= wanted:
            low = two
            high = tl.where(three > two, three, high)
        elif from_one >= wanted:
            low = one
            high = tl.where(two > one, two, high)
        else:
            high = one
    return low


@triton.jit
def _num_ties(wanted, reached, weight):
    """How many of equal weight are kept: while what is reached before one is less than wanted."""
    num = tl.ceil((wanted - reached) / weight)
    num = tl.where(reached + (num - 1.0) * weight >= wanted, num - 1.0, num)
    num = tl.where(reached + num * weight < wanted, num + 1.0, num)
    return tl.minimum(tl.maximum(num, 1.0), 2147483647.0).to(tl.int32)


@triton.jit
def _mix(x):
    """One step of splitmix64, of an uint64."""
    x += 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit(do_not_specialize=["num_rows"], do_not_specialize_on_alignment=["draws_ptr"])
def _choose(
    logits_ptr,
    draws_ptr,
    tops_ptr,
    best_ptr,
    index_ptr,
    sum_ptr,
    picked_ptr,
    out_ptr,
    row_stride,
    vocab,
    num_rows,
    num_pieces,
    NONE: tl.constexpr,
    LOG2_E: tl.constexpr,
    UNUSED: tl.constexpr,
    SPAN: tl.constexpr,
    NUM_SPANS: tl.constexpr,
    MAX_PIECES: tl.constexpr,
):
    PIECE: tl.constexpr = SPAN * NUM_SPANS
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * row_stride
    piece = tl.arange(0, MAX_PIECES)
    is_piece = piece < num_pieces
    bests = tl.load(best_ptr + row * num_pieces + piece, mask=is_piece, other=float("-inf"))
    indices = tl.load(index_ptr + row * num_pieces + piece, mask=is_piece, other=vocab)
    largest = tl.max(bests, axis=0)
    chosen = tl.min(tl.where(bests == largest, indices, vocab), axis=0)
    is_finite = (largest < float("inf")) & (largest > float("-inf"))
    chosen = tl.where(is_finite, chosen, NONE)
    temperature = _float(draws_ptr, _TEMPERATURE, num_rows, row).to(tl.float32)
    if is_finite & (temperature > 0):
        top_k = _number(draws_ptr, _TOP_K, num_rows, row).to(tl.int32)
        top_p = _float(draws_ptr, _TOP_P, num_rows, row)
        min_p = _float(draws_ptr, _MIN_P, num_rows, row).to(tl.float32)
        key = _number(draws_ptr, _KEY, num_rows, row).to(tl.uint64, bitcast=True)
        at = _number(draws_ptr, _AT, num_rows, row).to(tl.uint64, bitcast=True)
        bits = _mix(key ^ at) >> _UNUSED_UNIFORM_BITS
        uniform = (bits.to(tl.float64) + 0.5) * _UNIFORM_STEP
        slope = LOG2_E / temperature
        sums = tl.load(sum_ptr + row * num_pieces + piece, mask=is_piece, other=0.0)
        sums *= tl.exp2((bests - largest) * slope).to(tl.float64)
        total = tl.sum(sums, axis=0)  # of all weights; from here on, of those that are kept
        # What is kept, and the spans to draw from with what was kept before them.
        least = float("-inf")
        ties = vocab
        spans = tl.arange(0, NUM_SPANS)
        reached = tl.zeros([], tl.float64)
        num_equal = 0
        has_top_k = (top_k > 0) & (top_k < vocab)
        if has_top_k | (top_p < 1.0) | (min_p > 0):
            # 1. the spans whose largest logits are the highest, as many as there is room for
            lowest = _order_of(tl.full([], float("-inf"), tl.float32), UNUSED)
            above = _order_of(largest, UNUSED) + 1
            span = tl.arange(0, MAX_PIECES * NUM_SPANS)
            num_tops = num_pieces * NUM_SPANS
            tops = tl.load(
                tops_ptr + row * num_tops + span, mask=span < num_tops, other=float("-inf")
            )
            first = lowest
            if num_tops > NUM_SPANS:
                first = _search(tops, 1, NUM_SPANS + 1, lowest, above, UNUSED) + 1
            from_first = _float_of(first, UNUSED)
            is_picked = (tops >= from_first) & (span < num_tops)
            place = tl.cumsum(is_picked.to(tl.int32), axis=0)
            picked = picked_ptr + row * NUM_SPANS
            tl.store(picked + place - 1, span, mask=is_picked)
            tl.debug_barrier()
            num_picked = tl.sum(is_picked.to(tl.int32), axis=0)
            nth = tl.arange(0, NUM_SPANS)
            listed = tl.load(picked + nth, mask=nth < num_picked, other=num_tops)
            x, column = _load_spans(row_ptr, listed, vocab, SPAN)
            weights = _weigh(x, largest, slope, min_p).to(tl.float64)
            # 2. whether all that may be drawn is there
            num_seen = _total(((x >= from_first) & (column < vocab)).to(tl.int32))
            weight_seen = _weight_from(x, weights, from_first)
            is_all = first == lowest
            if min_p > 0:  # what is lower weighs nothing
                is_all = is_all | (_weigh(from_first, largest, slope, min_p) == 0.0)
            is_enough = is_all
            if has_top_k:
                is_enough = is_enough | (num_seen >= top_k)
            elif (top_p < 1.0) & (min_p == 0):
                is_enough = is_enough | (weight_seen >= top_p * total)
            # 3. the lowest logit that is kept, by number, then by weight
            bottom = lowest
            if is_enough:
                has_top_k = has_top_k & (num_seen >= top_k)
                if is_all:
                    total = _total(weights)
                if has_top_k:
                    bottom = _search(x, 1, top_k, first, above, UNUSED)
                    least = _float_of(bottom, UNUSED)
                    is_over = x > least
                    ties = top_k - _total(is_over.to(tl.int32))
                    total = _total(tl.where(is_over, weights, 0.0))
                    total += ties * _weigh(least, largest, slope, min_p).to(tl.float64)
                if top_p < 1.0:
                    wanted = top_p * total
                    low = bottom
                    if has_top_k == 0:
                        low = first
                    low = _search(x, weights, wanted, low, above, UNUSED)
                    least = _float_of(low, UNUSED)
                    over = _total(tl.where(x > least, weights, 0.0))
                    weight = _weigh(least, largest, slope, min_p).to(tl.float64)
                    kept = _num_ties(wanted, over, weight)
                    ties = tl.where(has_top_k & (low == bottom), tl.minimum(kept, ties), kept)
                    total = over + ties * weight
                spans = listed
            else:
                if has_top_k:
                    # As many spans have a logit of this height, at least, as ids are wanted.
                    bottom = _search(tops, 1, top_k, lowest, first, UNUSED)
                    bottom = _search_row(
                        row_ptr, vocab, largest, slope, min_p, top_k, bottom, first, False, UNUSED,
                        PIECE,
                    )  # fmt: skip
                    least = _float_of(bottom, UNUSED)
                    num_over, _, over = _measure_row(
                        row_ptr, vocab, largest, slope, min_p, least, PIECE
                    )
                    ties = top_k - num_over
                    total = over + ties * _weigh(least, largest, slope, min_p).to(tl.float64)
                elif min_p > 0:
                    _, _, total = _measure_row(
                        row_ptr, vocab, largest, slope, min_p, float("-inf"), PIECE
                    )
                if top_p < 1.0:
                    wanted = top_p * total
                    # All that weigh less than this, were it the whole vocabulary, are not needed.
                    share = ((1.0 - top_p) * total / vocab).to(tl.float32)
                    bound = largest + (tl.log2(share) - 0.01) / slope
                    low = tl.maximum(bottom, _order_of(bound, UNUSED) - 1)
                    high = above
                    if (has_top_k == 0) & (weight_seen < wanted):
                        high = first
                    low = tl.minimum(low, high - 1)
                    low = _search_row(
                        row_ptr, vocab, largest, slope, min_p, wanted, low, high, True, UNUSED, PIECE
                    )  # fmt: skip
                    least = _float_of(low, UNUSED)
                    _, _, over = _measure_row(row_ptr, vocab, largest, slope, min_p, least, PIECE)
                    weight = _weigh(least, largest, slope, min_p).to(tl.float64)
                    kept = _num_ties(wanted, over, weight)
                    ties = tl.where(has_top_k & (low == bottom), tl.minimum(kept, ties), kept)
                    total = over + ties * weight
                # 4. the piece in which the draw is
                share_of_all = uniform * total
                start = 0
                of_piece = tl.zeros([], tl.float64)
                equal_of_piece = 0
                weight_least = _weigh(least, largest, slope, min_p).to(tl.float64)
                is_behind = True
                while is_behind:
                    column_of = start + tl.arange(0, PIECE)
                    is_inside = column_of < vocab
                    y = tl.load(row_ptr + column_of, mask=is_inside, other=float("-inf")).to(
                        tl.float32
                    )
                    w = _weigh(y, largest, slope, min_p).to(tl.float64)
                    equal_of_piece = tl.sum(((y == least) & is_inside).to(tl.int32), axis=0)
                    of_piece = tl.sum(tl.where(y > least, w, 0.0), axis=0)
                    of_piece += tl.maximum(tl.minimum(equal_of_piece, ties - num_equal), 0) * (
                        weight_least
                    )
                    is_behind = (reached + of_piece <= share_of_all) & (start + PIECE < vocab)
                    if is_behind:
                        reached += of_piece
                        num_equal += equal_of_piece
                        start += PIECE
                spans = start // SPAN + tl.arange(0, NUM_SPANS)
        else:
            cumulated = tl.cumsum(sums, axis=0)
            is_before = (cumulated <= uniform * total) & is_piece
            num_before = tl.minimum(tl.sum(is_before.to(tl.int32), axis=0), num_pieces - 1)
            reached = tl.sum(tl.where(piece < num_before, sums, 0.0), axis=0)
            spans = num_before * NUM_SPANS + tl.arange(0, NUM_SPANS)
        # 5. the draw
        drawn, ids = _load_spans(row_ptr, spans, vocab, SPAN)
        is_equal = ((drawn == least) & (ids < vocab)).to(tl.int32)
        of_spans = tl.sum(is_equal, axis=1)
        before = num_equal + tl.cumsum(of_spans, axis=0) - of_spans
        rank = tl.cumsum(is_equal, axis=1) + before[:, None]
        is_kept = (drawn > least) | ((is_equal > 0) & (rank <= ties))
        value = tl.where(is_kept, _weigh(drawn, largest, slope, min_p), 0.0).to(tl.float64)
        span_sums = tl.sum(value, axis=1)
        first_sums = reached + tl.cumsum(span_sums, axis=0) - span_sums
        up_to = tl.cumsum(value, axis=1) + first_sums[:, None]
        hits = tl.where((up_to > uniform * total) & (value > 0), ids, vocab)
        hit = tl.min(tl.min(hits, axis=1), axis=0)
        # Summed up in another order a piece may miss what it reached: then it is its last one.
        last = tl.max(tl.max(tl.where(value > 0, ids, -1), axis=1), axis=0)
        drawn_id = tl.where(hit < vocab, hit, last)
        chosen = tl.where(drawn_id >= 0, drawn_id, chosen)
    tl.store(out_ptr + row, chosen.to(tl.int64))


def draw(logits: Tensor, draws: Tensor) -> Tensor:
    """(num_rows, vocab), (NUM_COLUMNS, num_rows) -> (num_rows,), int64."""
    num_rows, vocab = logits.shape
    assert logits.stride(1) == 1
    assert draws.shape == (NUM_COLUMNS, num_rows)
    assert draws.is_contiguous()
    device = logits.device
    out = torch.empty(num_rows, dtype=torch.int64, device=device)
    if num_rows == 0:
        return out
    num_pieces = count_blocks(vocab, SPAN * NUM_SPANS)
    tops = torch.empty((num_rows, num_pieces, NUM_SPANS), dtype=torch.float32, device=device)
    best = torch.empty((num_rows, num_pieces), dtype=torch.float32, device=device)
    index = torch.empty((num_rows, num_pieces), dtype=torch.int32, device=device)
    sums = torch.empty((num_rows, num_pieces), dtype=torch.float64, device=device)
    picked = torch.empty((num_rows, NUM_SPANS), dtype=torch.int32, device=device)
    _look_at_piece[(num_rows, num_pieces)](
        logits,
        draws,
        tops,
        best,
        index,
        sums,
        logits.stride(0),
        vocab,
        num_rows,
        num_pieces,
        LOG2_E=LOG2_E,
        SPAN=SPAN,
        NUM_SPANS=NUM_SPANS,
        num_warps=8,
    )
    _choose[(num_rows,)](
        logits,
        draws,
        tops,
        best,
        index,
        sums,
        picked,
        out,
        logits.stride(0),
        vocab,
        num_rows,
        num_pieces,
        NONE=NO_TOKEN,
        LOG2_E=LOG2_E,
        UNUSED=UNUSED_BITS[logits.dtype],
        SPAN=SPAN,
        NUM_SPANS=NUM_SPANS,
        MAX_PIECES=triton.next_power_of_2(num_pieces),
        num_warps=8,
        maxnreg=128,  # two programs a processor; the few registers that spill cost less (H100, 2026-11-28)
    )
    return out
