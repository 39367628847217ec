"""The sampler on known logits: against numpy twins written from the definitions, and alone against in company."""

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor
from transformers import RepetitionPenaltyLogitsProcessor

from engine import sampler as sampler_module
from engine.kernels import draw
from engine.kernels.greedy import NO_TOKEN
from engine.request import SamplingParams
from engine.sampler import (
    Sampler,
    SamplingRow,
    draw_numbers,
    draw_uniform,
    is_plain,
    is_simple,
)

VOCAB = 50
GREEDY = SamplingParams(temperature=0)

Floats = NDArray[np.float64]


def make_logits(num_rows: int, vocab: int = VOCAB, seed: int = 0, scale: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_rows, vocab, generator=generator) * scale


def sample_ids(
    logits: Tensor, rows: Sequence[SamplingRow], max_candidates: int = 1024
) -> list[int]:
    sampler = Sampler(logits.shape[-1], "cpu", max_candidates=max_candidates)
    return sampler.sample(logits, rows).tolist()


def draw_many(logits: Tensor, params: SamplingParams, num_draws: int) -> Counter[int]:
    """One row's logits, drawn from with as many seeds."""
    rows = [SamplingRow(params, seed, 0) for seed in range(num_draws)]
    return Counter(sample_ids(logits.expand(num_draws, -1), rows))


def chi_square(counts: Floats, expected: Floats) -> float:
    return float(((counts - expected) ** 2 / expected).sum())


def chi_square_limit(num_cells: int) -> float:
    """What chi-square exceeds about once in 30,000 times (4 sigma, Wilson and Hilferty, 1931)."""
    degrees = num_cells - 1
    spread = 2 / (9 * degrees)
    return degrees * float((1 - spread + 4 * math.sqrt(spread)) ** 3)


# Greedy


def test_greedy_takes_the_largest_logit() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0], [2.0, -1.0, 0.0]])

    ids = sample_ids(logits, [SamplingRow(GREEDY, 0, 0)] * 2)

    assert [1, 0] == ids


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_greedy_gives_the_lowest_id_of_a_tie_on_the_fast_and_the_slow_path(
    dtype: torch.dtype,
) -> None:
    logits = torch.tensor([[0.0, 5.0, 5.0, -1.0, 5.0]], dtype=dtype)
    slow = SamplingParams(temperature=0, logprobs=0)

    ids = [sample_ids(logits, [SamplingRow(params, 0, 0)]) for params in (GREEDY, slow)]

    assert [[1], [1]] == ids


def test_greedy_ignores_seed_and_position() -> None:
    logits = make_logits(1).expand(20, -1)
    rows = [SamplingRow(GREEDY, seed, seed + 1) for seed in range(20)]

    ids = sample_ids(logits, rows)

    assert 1 == len(set(ids))


def test_plain_rows_may_be_sampled_without_rows() -> None:
    logits = make_logits(4)

    ids = Sampler(VOCAB, "cpu").sample_plain(logits).tolist()

    assert sample_ids(logits, [SamplingRow(GREEDY, 0, 0)] * 4) == ids


@pytest.mark.parametrize(
    "change",
    [
        {"temperature": 1.0},
        {"logprobs": 0},
        {"min_tokens": 1},
        {"allowed_token_ids": (1,)},
        {"logit_bias": {1: 1.0}},
        {"repetition_penalty": 1.1},
        {"presence_penalty": 0.1},
        {"frequency_penalty": 0.1},
        {"logprob_token_ids": (1,)},
    ],
)
def test_params_with_more_to_do_are_not_plain(change: dict[str, object]) -> None:
    params = dataclasses.replace(GREEDY, **change)  # type: ignore[arg-type]

    assert (True, False) == (is_plain(GREEDY), is_plain(params))


@pytest.mark.parametrize("params", [GREEDY, SamplingParams(), SamplingParams(top_p=0.9, min_p=0.1)])
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_row_with_broken_logits_gets_no_token_and_its_neighbours_theirs(
    params: SamplingParams, poison: float
) -> None:
    logits = make_logits(3)
    rows = [SamplingRow(params, seed, 0) for seed in range(3)]
    expected = sample_ids(logits, rows)
    logits[1, 7] = poison

    ids = sample_ids(logits, rows)

    assert [expected[0], NO_TOKEN, expected[2]] == ids


@pytest.mark.parametrize("params", [SamplingParams(top_k=1), SamplingParams(logprobs=1)])
def test_broken_logits_at_the_end_name_no_id_behind_it(params: SamplingParams) -> None:
    """What fills up the last block of a row outranks a NaN that has a sign."""
    logits = make_logits(2, vocab=32_001)
    logits.view(torch.int32)[1, -1] = -(1 << 22)  # 0xFFC00000
    assert logits[1, -1].isnan()
    rows = [SamplingRow(params, seed, 0) for seed in range(2)]

    sampled = Sampler(32_001, "cpu").sample(logits, rows)

    assert sampled.tolist()[0] != NO_TOKEN == sampled.tolist()[1]
    assert 2 == len(sampled.logprobs())


def test_large_top_k_costs_its_neighbours_nothing_but_a_call() -> None:
    """Those of more than the candidates are drawn apart, those of all ids as if there were none."""
    logits = make_logits(6, vocab=3000)
    many = [SamplingParams(top_k=k) for k in (5, 1500, 3000, 10**30, 2999, 0)]
    rows = [SamplingRow(params, 7, 1) for params in many]

    ids = sample_ids(logits, rows)

    assert [sample_ids(logits[i : i + 1], [row])[0] for i, row in enumerate(rows)] == ids
    plain = [SamplingRow(SamplingParams(), 7, 1)] * 6
    assert [sample_ids(logits, plain)[i] for i in (2, 3, 5)] == [ids[i] for i in (2, 3, 5)]


def test_row_in_which_everything_is_forbidden_gets_no_token() -> None:
    params = SamplingParams(allowed_token_ids=[3], stop_token_ids=[3], min_tokens=1)

    ids = sample_ids(make_logits(1), [SamplingRow(params, 0, 0)])

    assert [NO_TOKEN] == ids


def test_logits_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"logits must be \(2, 50\), got \(1, 50\)"):
        sample_ids(make_logits(1), [SamplingRow(GREEDY, 0, 0)] * 2)


def test_logits_given_are_not_changed() -> None:
    logits = make_logits(4)
    before = logits.clone()
    rows = [
        SamplingRow(GREEDY, 0, 0),
        SamplingRow(SamplingParams(logit_bias={3: 5.0}, min_tokens=2), 1, 0, eos_token_ids=[1]),
        SamplingRow(SamplingParams(repetition_penalty=2.0, top_k=3), 2, 0, [1, 2], [3]),
        SamplingRow(SamplingParams(min_p=0.5, top_p=0.5, presence_penalty=1.0), 3, 0, [], [3]),
    ]

    sample_ids(logits, rows)

    assert torch.equal(before, logits)


# Restrictions


def test_only_allowed_ids_are_chosen() -> None:
    params = SamplingParams(allowed_token_ids=[4, 9])

    drawn = draw_many(make_logits(1), params, 200)

    assert {4, 9} == set(drawn)


def test_bias_lifts_and_buries_tokens() -> None:
    logits = make_logits(1).expand(2, -1)
    best = int(logits[0].argmax())
    lifted = SamplingParams(temperature=0, logit_bias={17: 100.0})
    buried = SamplingParams(temperature=0, logit_bias={best: -100.0})

    ids = sample_ids(logits, [SamplingRow(lifted, 0, 0), SamplingRow(buried, 0, 0)])

    assert [17, int(logits[0].topk(2).indices[1])] == ids


def test_ends_of_text_and_stop_ids_wait_for_min_tokens() -> None:
    logits = torch.tensor([[9.0, 8.0, 7.0, 1.0]]).expand(3, -1)
    params = SamplingParams(temperature=0, min_tokens=2, stop_token_ids=[1])
    rows = [SamplingRow(params, 0, position, eos_token_ids=[0, 99]) for position in range(3)]

    ids = sample_ids(logits, rows)

    assert [2, 2, 0] == ids


def test_ignored_end_of_text_is_an_ordinary_token_before_min_tokens() -> None:
    logits = torch.tensor([[9.0, 8.0]])
    params = SamplingParams(temperature=0, min_tokens=2, ignore_eos=True)

    ids = sample_ids(logits, [SamplingRow(params, 0, 0, eos_token_ids=[0])])

    assert [0] == ids


# Penalties


def penalise_by_hand(logits: list[float], row: SamplingRow) -> list[float]:
    """The three penalties, a token at a time, from their definitions."""
    params = row.params
    changed = []
    for token_id, logit in enumerate(logits):
        count = list(row.output_token_ids).count(token_id)
        if count or token_id in row.prompt_token_ids:
            factor = params.repetition_penalty
            logit = logit / factor if logit > 0 else logit * factor
        logit -= params.frequency_penalty * count
        logit -= params.presence_penalty * (count > 0)
        changed.append(logit)
    return changed


@given(
    repetition=st.floats(0.1, 3),
    presence=st.floats(-2, 2),
    frequency=st.floats(-2, 2),
    prompt=st.lists(st.integers(0, 9), max_size=8),
    output=st.lists(st.integers(0, 9), max_size=8),
    seed=st.integers(0, 1000),
)
def test_penalties_equal_the_definition(
    repetition: float,
    presence: float,
    frequency: float,
    prompt: list[int],
    output: list[int],
    seed: int,
) -> None:
    params = SamplingParams(
        temperature=0,
        repetition_penalty=repetition,
        presence_penalty=presence,
        frequency_penalty=frequency,
    )
    row = SamplingRow(params, 0, len(output), prompt, output)
    logits = make_logits(1, vocab=10, seed=seed)

    penalised = sampler_module._penalise(logits, [row])

    expected = torch.tensor([penalise_by_hand(logits[0].tolist(), row)])
    torch.testing.assert_close(expected, penalised)


def test_repetition_penalty_equals_that_of_transformers() -> None:
    logits = make_logits(1)
    prompt, output = [3, 4, 4, 11], [12, 3]
    row = SamplingRow(SamplingParams(repetition_penalty=1.3), 0, 2, prompt, output)

    penalised = sampler_module._penalise(logits, [row])

    reference = RepetitionPenaltyLogitsProcessor(1.3)
    expected = reference(torch.tensor([prompt + output]), logits.clone())
    assert torch.equal(expected, penalised)


def test_placeholders_without_a_logit_are_not_penalised() -> None:
    params = SamplingParams(temperature=0, repetition_penalty=1.5)
    logits = make_logits(1)

    ids = sample_ids(logits, [SamplingRow(params, 0, 0, [-200, VOCAB, 10**9])])

    assert [int(logits.argmax())] == ids


# The shape of the distribution


def kept_by_definition(logits: Floats, params: SamplingParams) -> tuple[Floats, float]:
    """
    Probabilities after temperature, min_p, top_k and top_p, as the definitions say them.

    Returns:
        probabilities: (vocab,), 0 where cut.
        slack: how close a sum came to top_p; where it is tiny, rounding may decide either way.
    """
    scaled = logits / params.temperature
    probs = np.exp(scaled - scaled.max())
    probs /= probs.sum()
    probs[probs < params.min_p * probs.max()] = 0
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    if params.top_k:
        probs[order[params.top_k :]] = 0
    probs /= probs.sum()
    before = 0.0
    slack = 1.0
    for i in order:
        slack = min(slack, abs(before - params.top_p))
        prob = float(probs[i])
        if params.top_p < 1 and before >= params.top_p:
            probs[i] = 0
        before += prob
    return probs / probs.sum(), slack


shapes = st.builds(
    SamplingParams,
    temperature=st.floats(0.1, 2),
    top_p=st.floats(0.05, 1),
    top_k=st.integers(0, 12),
    min_p=st.floats(0, 0.5),
)


@settings(max_examples=60)
@given(params=shapes, seed=st.integers(0, 1000), max_candidates=st.sampled_from([1, 3, 1024]))
def test_draws_come_from_what_the_definitions_keep_and_from_all_of_it(
    params: SamplingParams, seed: int, max_candidates: int
) -> None:
    logits = make_logits(1, vocab=10, seed=seed, scale=1.5)
    probs, slack = kept_by_definition(logits[0].double().numpy(), params)
    assume(slack > 1e-9)

    num_draws = 400
    rows = [SamplingRow(params, 7, position) for position in range(num_draws)]
    drawn = Counter(sample_ids(logits.expand(num_draws, -1), rows, max_candidates))

    assert set(drawn) <= set(np.flatnonzero(probs).tolist())
    # A token that should be drawn 20 times or more is missed once in 10**8.
    assert set(np.flatnonzero(probs * num_draws >= 20).tolist()) <= set(drawn)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=0.7),
        SamplingParams(top_k=5),
        SamplingParams(top_p=0.8),
        SamplingParams(min_p=0.1),
        SamplingParams(temperature=1.3, top_k=12, top_p=0.9, min_p=0.02),
    ],
    ids=["plain", "temperature", "top_k", "top_p", "min_p", "all"],
)
def test_draws_are_as_frequent_as_the_definitions_say(params: SamplingParams) -> None:
    logits = make_logits(1, vocab=20, scale=1.0)
    num_draws = 20_000

    drawn = draw_many(logits, params, num_draws)

    probs, _ = kept_by_definition(logits[0].double().numpy(), params)
    kept = np.flatnonzero(probs)
    counts = np.array([drawn[int(i)] for i in kept], dtype=np.float64)
    assert num_draws == counts.sum()
    assert chi_square(counts, probs[kept] * num_draws) < chi_square_limit(len(kept))


@given(seed=st.integers(0, 1000), max_candidates=st.integers(1, 40), top_p=st.floats(0.05, 1))
def test_number_of_candidates_looked_at_first_changes_nothing(
    seed: int, max_candidates: int, top_p: float
) -> None:
    logits = make_logits(8, vocab=40, seed=seed, scale=1.0)
    params = [SamplingParams(top_p=top_p), SamplingParams(top_p=top_p, top_k=5)]
    rows = [SamplingRow(params[i % 2], seed, i) for i in range(8)]

    ids = sample_ids(logits, rows, max_candidates)

    assert sample_ids(logits, rows, max_candidates=40) == ids


def test_top_k_of_one_is_greedy_even_among_ties() -> None:
    logits = torch.tensor([[0.0, 4.0, 4.0, -0.0, 4.0]])

    drawn = draw_many(logits, SamplingParams(top_k=1, temperature=2), 100)

    assert {1} == set(drawn)


def test_tiny_top_p_is_greedy() -> None:
    logits = torch.tensor([[1.0, 4.0, 4.0, 2.0]])

    drawn = draw_many(logits, SamplingParams(top_p=1e-9), 100)

    assert {1} == set(drawn)


def test_ties_at_the_edge_of_top_k_go_to_the_lowest_ids() -> None:
    logits = torch.tensor([[1.0, 1.0, 5.0, 1.0, 1.0]])

    drawn = draw_many(logits, SamplingParams(top_k=3, temperature=2), 300)

    assert {0, 1, 2} == set(drawn)


def test_min_p_of_one_keeps_every_likeliest_token() -> None:
    logits = torch.tensor([[3.0, 1.0, 3.0, 2.9]])

    drawn = draw_many(logits, SamplingParams(min_p=1.0), 100)

    assert {0, 2} == set(drawn)


# The numbers that draws are made with


def test_uniform_numbers_fill_the_interval_evenly() -> None:
    rows = [SamplingRow(GREEDY, seed, position) for seed in range(200) for position in range(100)]

    uniform = draw_uniform(rows)

    counts, _ = np.histogram(uniform, bins=256, range=(0, 1))
    expected = np.full(256, len(uniform) / 256)
    assert (0 < min(uniform), max(uniform) < 1) == (True, True)
    assert chi_square(counts.astype(np.float64), expected) < chi_square_limit(256)


@pytest.mark.parametrize(
    "neighbour",
    [
        {"seed": 1},
        {"position": 1},
        {"sample_index": 1},
        {"seed": 2**40},
        {"position": 1, "seed": 1},
    ],
    ids=str,
)
def test_numbers_of_neighbouring_draws_are_independent(neighbour: dict[str, int]) -> None:
    rows = [SamplingRow(GREEDY, 2 * seed, 2 * at) for seed in range(200) for at in range(100)]
    others = [
        dataclasses.replace(
            row,
            seed=row.seed + neighbour.get("seed", 0),
            position=row.position + neighbour.get("position", 0),
            sample_index=neighbour.get("sample_index", 0),
        )
        for row in rows
    ]

    first, second = draw_uniform(rows), draw_uniform(others)

    counts, *_ = np.histogram2d(first, second, bins=16, range=((0, 1), (0, 1)))
    expected = np.full((16, 16), len(first) / 256)
    assert chi_square(counts, expected) < chi_square_limit(256)


def test_seed_index_and_position_are_not_interchangeable() -> None:
    parts = [(a, b, c) for a in range(8) for b in range(8) for c in range(8)]
    rows = [SamplingRow(GREEDY, seed, at, sample_index=index) for seed, index, at in parts]

    assert len(parts) == len(set(draw_uniform(rows)))


def mix_by_hand(x: int) -> int:
    """splitmix64 in Python's integers, which never overflow."""
    x = (x + 0x9E3779B97F4A7C15) % 2**64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) % 2**64
    return x ^ (x >> 31)


@given(
    seed=st.integers(-(2**63), 2**64 - 1), index=st.integers(0, 99), position=st.integers(0, 2**20)
)
def test_numbers_are_those_of_the_hash_in_plain_integers(
    seed: int, index: int, position: int
) -> None:
    key = mix_by_hand(mix_by_hand(mix_by_hand(seed % 2**64) ^ index) ^ position)

    (uniform,) = draw_uniform([SamplingRow(GREEDY, seed, position, sample_index=index)])

    assert ((key >> 16) + 0.5) / 2**48 == uniform


@given(
    vocab=st.integers(1, 2000),
    share=st.floats(0, 1, exclude_max=True),
    zeros=st.sampled_from([0.0, 0.5, 0.99]),
    seed=st.integers(0, 1000),
)
def test_picked_id_is_where_the_sum_of_weights_exceeds_its_share(
    vocab: int, share: float, zeros: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weights = (torch.randn(1, vocab, generator=generator) * 5).exp()
    weights[torch.rand(1, vocab, generator=generator) < zeros] = 0.0
    weights[0, seed % vocab] = 1.0
    sums = weights.double().cumsum(-1)[0]
    wanted = min(max(share, 2.0**-49), 1 - 2.0**-49)

    picked = int(sampler_module._pick(weights, torch.tensor([[wanted]], dtype=torch.float64)))

    assert weights[0, picked] > 0
    # Sums in another order: as near as float64 is.
    before = float(sums[picked] - weights[0, picked].double())
    assert before <= wanted * float(sums[-1]) * (1 + 1e-12) + 1e-300
    assert float(sums[picked]) >= wanted * float(sums[-1]) * (1 - 1e-12)


@given(
    vocab=st.integers(1, 3000),
    num=st.integers(1, 60),
    num_levels=st.sampled_from([1, 3, 50, 10_000]),
    seed=st.integers(0, 1000),
)
def test_top_ids_are_those_of_the_whole_order(
    vocab: int, num: int, num_levels: int, seed: int
) -> None:
    """Ties and forbidden ids included."""
    num = min(num, vocab)
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randint(num_levels, (3, vocab), generator=generator) / 7 - 1.0
    logits[torch.rand(3, vocab, generator=generator) < 0.3] = -math.inf
    expected = [sorted(range(vocab), key=lambda i: (-row[i], i))[:num] for row in logits.tolist()]

    assert expected == sampler_module.find_top(logits, num).tolist()


def table_of(rows: Sequence[SamplingRow]) -> Tensor:
    numbers = [draw_numbers(row.params, row.seed, row.sample_index) for row in rows]
    return torch.from_numpy(draw.table(numbers, [row.position for row in rows], len(rows)))


@given(
    seed=st.integers(-(2**63), 2**64 - 1), index=st.integers(0, 99), position=st.integers(0, 2**20)
)
def test_tensors_make_the_same_numbers(seed: int, index: int, position: int) -> None:
    row = SamplingRow(SamplingParams(), seed, position, sample_index=index)
    table = table_of([row])

    assert draw_uniform([row]) == draw._uniform(table[draw.KEY], table[draw.AT]).tolist()


@settings(max_examples=200)
@given(
    vocab=st.integers(1, 400),
    params=st.lists(
        st.builds(
            SamplingParams,
            temperature=st.sampled_from([0.0, 0.01, 0.3, 1.0, 2.0]),
            top_p=st.one_of(st.just(1.0), st.floats(0.0, 1, exclude_min=True)),
            top_k=st.one_of(st.just(0), st.integers(0, 500), st.just(10**30)),
            min_p=st.one_of(st.just(0.0), st.floats(0, 1)),
        ),
        min_size=1,
        max_size=6,
    ),
    num_levels=st.sampled_from([1, 3, 50, 10_000]),
    seed=st.integers(0, 1000),
)
def test_sampler_draws_what_sorting_everything_draws(
    vocab: int, params: list[SamplingParams], num_levels: int, seed: int
) -> None:
    """Ties, forbidden ids and rows that are no numbers included."""
    generator = torch.Generator().manual_seed(seed)
    shape = len(params), vocab
    logits = torch.randint(num_levels, shape, generator=generator) / num_levels * 8 - 2.0
    logits[torch.rand(*shape, generator=generator) < 0.2] = -math.inf
    if seed % 5 == 0:
        logits[0, seed % vocab] = math.nan
    rows = [SamplingRow(each, seed, at, sample_index=at % 2) for at, each in enumerate(params)]

    drawn = draw.plain_draw(logits, table_of(rows))

    assert sample_ids(logits, rows, max_candidates=20) == drawn.tolist()


def test_places_that_are_nobodys_take_the_likeliest() -> None:
    logits = make_logits(4)
    numbers = [draw_numbers(SamplingParams(), 1, 0)] * 2

    drawn = draw.draw(logits, torch.from_numpy(draw.table(numbers, [3, 4], 4)))

    assert logits.argmax(dim=1)[2:].tolist() == drawn[2:].tolist()


@pytest.mark.parametrize(
    ("params", "position", "is_as_they_come"),
    [
        (GREEDY, 0, True),
        (SamplingParams(top_k=3, top_p=0.5, min_p=0.1), 0, True),
        (SamplingParams(min_tokens=3), 2, False),
        (SamplingParams(min_tokens=3), 3, True),
        (SamplingParams(logprobs=0), 0, False),
        (SamplingParams(presence_penalty=0.1), 0, False),
        (SamplingParams(logit_bias={1: 1.0}), 0, False),
        (SamplingParams(allowed_token_ids=[1]), 0, False),
    ],
)
def test_rows_whose_logits_say_all_are_known(
    params: SamplingParams, position: int, is_as_they_come: bool
) -> None:
    assert is_as_they_come == is_simple(params, position)


def test_draws_of_top_k_and_top_p_go_by_id_as_all_others_do() -> None:
    """What is cut weighs nothing, and the rest stands in its place: a seed moves to a neighbour, not away."""
    logits = torch.zeros(8, 1000)
    logits[:, ::2] = -5.0
    rows = [SamplingRow(SamplingParams(top_k=500), 42, position) for position in range(8)]

    ids = sample_ids(logits, rows)

    assert [2 * int(500 * number) + 1 for number in draw_uniform(rows)] == ids


def test_one_draw_is_pinned_so_that_seeds_mean_the_same_in_every_release() -> None:
    rows = [SamplingRow(SamplingParams(), 42, position) for position in range(8)]

    ids = sample_ids(torch.zeros(8, 1000), rows)

    assert [386, 712, 865, 169, 24, 186, 668, 642] == ids


# Neighbours


MIXED = [
    GREEDY,
    SamplingParams(),
    SamplingParams(temperature=0.7, top_k=20, top_p=0.8),
    SamplingParams(top_p=0.95),
    SamplingParams(min_p=0.05, temperature=1.5),
    SamplingParams(temperature=0, repetition_penalty=1.2, min_tokens=3),
    SamplingParams(presence_penalty=0.5, frequency_penalty=-0.5, logit_bias={5: 2.0}),
    SamplingParams(temperature=0, logprobs=3),
    SamplingParams(top_k=2, logprobs=5, allowed_token_ids=list(range(0, 1003, 3))),
]


def make_mixed_rows(num_rows: int) -> list[SamplingRow]:
    return [
        SamplingRow(
            params=MIXED[i % len(MIXED)],
            seed=1000 + i,
            position=i % 5,
            prompt_token_ids=[1, i, 5 * i],
            output_token_ids=[2 * i] * (i % 5),
            eos_token_ids=[0],
            sample_index=i % 2,
        )
        for i in range(num_rows)
    ]


def test_row_alone_equals_the_row_among_63_others_bit_for_bit() -> None:
    vocab = 1003  # no multiple of a vector's width: rows start at odd addresses
    logits = make_logits(64, vocab=vocab)
    rows = make_mixed_rows(64)
    sampler = Sampler(vocab, "cpu", max_candidates=100)

    together = sampler.sample(logits, rows)

    alone = [sampler.sample(logits[i : i + 1].clone(), rows[i : i + 1]) for i in range(64)]
    assert [each.tolist()[0] for each in alone] == together.tolist()
    assert [each.logprobs()[0] for each in alone] == together.logprobs()


@given(st.permutations(range(12)))
def test_order_of_rows_changes_nothing(order: list[int]) -> None:
    logits = make_logits(12, vocab=1003)
    rows = make_mixed_rows(12)

    ids = sample_ids(logits[order], [rows[i] for i in order])

    in_place = sample_ids(logits, rows)
    assert [in_place[i] for i in order] == ids


def test_batch_worked_on_in_blocks_equals_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = make_logits(20, vocab=1003)
    rows = make_mixed_rows(20)
    whole = Sampler(1003, "cpu").sample(logits, rows)
    monkeypatch.setattr(sampler_module, "MAX_BLOCK_LOGITS", 3 * 1003)

    in_blocks = Sampler(1003, "cpu").sample(logits, rows)

    assert whole.tolist() == in_blocks.tolist()
    assert whole.logprobs() == in_blocks.logprobs()


@pytest.mark.gpu
def test_nothing_waits_for_the_device() -> None:
    rows = make_mixed_rows(64)
    sampler = Sampler(1003, "cuda")
    logits = make_logits(len(rows), vocab=1003).cuda()
    sampler.sample(logits, rows)  # what is made once may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        sampled = sampler.sample(logits, rows)
    finally:
        torch.cuda.set_sync_debug_mode("default")

    assert len(rows) == len(sampled.tolist())


@pytest.mark.gpu
def test_draws_on_a_gpu_equal_those_on_the_cpu() -> None:
    logits = make_logits(64, vocab=1003)
    rows = make_mixed_rows(64)

    on_gpu = Sampler(1003, "cuda").sample(logits.cuda(), rows)

    assert sample_ids(logits, rows) == on_gpu.tolist()
    assert draw.is_usable(logits.cuda())  # or another way would have drawn them


# Log-probabilities


def test_logprobs_are_those_of_the_model_whatever_bends_the_draw() -> None:
    logits = make_logits(1)
    params = SamplingParams(temperature=0, logit_bias={17: 100.0}, logprobs=2)
    sampled = Sampler(VOCAB, "cpu").sample(logits, [SamplingRow(params, 0, 0)])

    (found,) = sampled.logprobs()

    raw = logits[0].double().log_softmax(-1)
    order = raw.argsort(descending=True).tolist()
    assert found is not None
    assert [17] == sampled.tolist()
    assert float(raw[17].float()) == found.logprob
    assert order.index(17) + 1 == found.rank
    assert [(order[0], 1), (order[1], 2)] == [(token, rank) for token, _, rank in found.top]
    assert [float(raw[i].float()) for i in order[:2]] == [value for _, value, _ in found.top]


@pytest.mark.parametrize(("asked", "num_top"), [(0, 0), (4, 4), (-1, VOCAB)])
def test_as_many_logprobs_as_asked_come_with_the_chosen_one(asked: int, num_top: int) -> None:
    params = SamplingParams(temperature=0, logprobs=asked)

    (found,) = Sampler(VOCAB, "cpu").sample(make_logits(1), [SamplingRow(params, 0, 0)]).logprobs()

    assert found is not None
    assert num_top == len(found.top)


def test_ranks_of_tied_tokens_go_by_id() -> None:
    params = SamplingParams(temperature=0, logprobs=3, logit_bias={2: 1.0})
    logits = torch.tensor([[1.0, 0.0, 1.0, 1.0]])

    (found,) = Sampler(4, "cpu").sample(logits, [SamplingRow(params, 0, 0)]).logprobs()

    assert found is not None
    assert 2 == found.rank
    assert [(0, 1), (2, 2), (3, 3)] == [(token, rank) for token, _, rank in found.top]


def test_logprobs_of_listed_ids_come_in_their_order() -> None:
    logits = make_logits(1)
    params = SamplingParams(temperature=0, logprob_token_ids=[30, 2])

    (found,) = Sampler(VOCAB, "cpu").sample(logits, [SamplingRow(params, 0, 0)]).logprobs()

    raw = logits[0].double().log_softmax(-1).float().tolist()
    assert found is not None
    assert ((30, raw[30], None), (2, raw[2], None)) == found.top


def test_only_rows_that_asked_have_logprobs() -> None:
    rows = [SamplingRow(GREEDY, 0, 0), SamplingRow(SamplingParams(logprobs=1), 0, 0)]

    found = Sampler(VOCAB, "cpu").sample(make_logits(2), rows).logprobs()

    assert [True, False] == [each is None for each in found]


def test_logprobs_by_id_hold_the_chosen_token_first_and_once() -> None:
    params = SamplingParams(temperature=0, logprobs=2)
    logits = torch.tensor([[0.0, math.log(3.0)]])
    (found,) = Sampler(2, "cpu").sample(logits, [SamplingRow(params, 0, 0)]).logprobs()
    assert found is not None

    by_id = found.by_id(1, decode=str)

    assert [(1, 1, "1"), (0, 2, "0")] == [
        (token_id, entry.rank, entry.decoded_token) for token_id, entry in by_id.items()
    ]
    assert [math.log(0.75), math.log(0.25)] == pytest.approx(
        [entry.logprob for entry in by_id.values()]
    )
