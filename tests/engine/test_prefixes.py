"""Prompts that begin alike share the KV rows of that beginning, known by what it is, and say the same."""

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from engine import LLM, Request, SamplingParams
from engine.config import EngineConfig
from engine.errors import BadConfig
from engine.prefixes import BLOCK_TOKENS, Key, Prefixes, build_keys
from engine.scheduler import Scheduler
from engine.sequence import Sequence as Running
from engine.slabs import SlabAllocator
from tests.engine.conftest import LIMITS
from tests.engine.idle import assert_idle, num_free_rows
from tests.engine.pictures import CLIP, GREEDY, PICTURE, draw, draw_clip, features_of, token_ids
from tests.engine.test_engine import ROW_BYTES, by_name, poison_runner, random_request
from tests.engine.test_features import count_encoded
from tests.engine.test_flights import answers
from tests.engine.test_scheduler import Numbers, add
from tests.engine.tiny_llava import GEMMA3_OTHER, write_tiny_gemma3
from tests.engine.ways import in_pieces, read_late

SYSTEM = "You look at pictures closely and say in few words what there is. "

# --- keys ---------------------------------------------------------------------------------------------


def keys_of(ids: Sequence[int], *media: tuple[int, int, bytes | None]) -> dict[int, bytes]:
    positions = np.tile(np.arange(len(ids)), (3, 1))
    pictures = [(np.arange(first, end), key) for first, end, key in media]
    return dict(build_keys(list(ids), positions, pictures))


def shared_ends(one: dict[int, bytes], other: dict[int, bytes]) -> list[int]:
    return [end for end, key in one.items() if other.get(end) == key]


@given(shared=st.integers(0, 100), rests=st.tuples(st.integers(0, 60), st.integers(0, 60)))
def test_keys_are_equal_as_far_as_whole_blocks_are(shared: int, rests: tuple[int, int]) -> None:
    one, other = ([7] * shared + [token] * rest for token, rest in zip((1, 2), rests, strict=True))
    blocks = range(BLOCK_TOKENS, len(one) + 1, BLOCK_TOKENS)
    num_equal = shared if all(rests) else min(len(one), len(other))

    assert list(blocks) == list(keys_of(one))
    assert [end for end in blocks if end <= num_equal] == shared_ends(keys_of(one), keys_of(other))


def test_a_picture_counts_from_the_block_in_which_it_begins_to_its_end() -> None:
    ids = [1] * 100
    seen = keys_of(ids, (40, 60, b"a"))

    assert [16, 32, 48, 60, 64, 80, 96] == list(seen)
    assert [16, 32] == shared_ends(seen, keys_of(ids))
    for other in ((40, 60, b"b"), (41, 60, b"a"), (40, 61, b"a")):
        assert [16, 32] == shared_ends(seen, keys_of(ids, other))
    assert seen == keys_of(ids, (40, 60, b"a"))
    assert [16, 32, 48, 60, 64] == shared_ends(seen, keys_of([1] * 70 + [2] * 30, (40, 60, b"a")))
    assert [16, 32, 48, 60, 64, 80] == shared_ends(
        seen, keys_of(ids, (40, 60, b"a"), (90, 95, b"b"))
    )
    assert [16, 32] == list(keys_of(ids, (40, 60, None)))


def test_no_prefix_ends_where_tokens_see_what_is_behind_them() -> None:
    positions, picture = np.arange(100)[None], (np.arange(10, 70), b"a")
    cut, whole = (
        dict(build_keys([1] * 100, positions, [picture], spans)) for spans in ((), [(10, 70)])
    )

    assert [16, 32, 48, 64, 70, 80, 96] == list(cut)
    assert [70, 80, 96] == list(whole)


def test_equal_ids_at_other_positions_are_another_prompt() -> None:
    positions = np.arange(32)[None]
    one, other = (build_keys([1] * 32, at) for at in (positions, positions + 1))

    assert not set(one) & set(other)


# --- who holds them -----------------------------------------------------------------------------------


def test_rows_of_whoever_ended_are_kept_until_their_place_is_wanted() -> None:
    prefixes = Prefixes()
    prefixes.add(16, blocks(b"a", b"b"))
    prefixes.add(160, [*blocks(b"a", b"c"), (37, b"d")])
    prefixes.add(320, blocks(b"a", b"b"))  # nothing of its own

    assert (160, 37) == prefixes.find([*blocks(b"a", b"c"), (37, b"d"), (48, b"e")])
    assert (16, 16) == prefixes.find(blocks(b"a", b"x", b"y"))
    assert (0, 0) == prefixes.find(blocks(b"x"))
    assert None is prefixes.evict()  # all of them run
    assert [32, 48, 0] == [prefixes.keep(start) for start in (16, 160, 320)]
    assert 80 == prefixes.num_kept_rows
    prefixes.find(blocks(b"a"))
    assert [160, 16, None] == [prefixes.evict() for _ in range(3)]  # 16 was asked for last
    assert 0 == prefixes.num_kept_rows
    assert (0, 0) == prefixes.find(blocks(b"a", b"c"))


def test_what_is_forgotten_is_not_kept_later() -> None:
    prefixes = Prefixes()
    prefixes.add(16, blocks(b"a"))
    prefixes.add(32, blocks(b"b"))
    prefixes.keep(16)

    assert [16] == prefixes.clear()
    assert 0 == prefixes.keep(32)
    assert (0, 0) == prefixes.find(blocks(b"b"))


def blocks(*keys: bytes) -> list[Key]:
    return [(BLOCK_TOKENS * number, key) for number, key in enumerate(keys, 1)]


def prompt(*numbers: int, rest: int = 3, **options: Any) -> Numbers:
    """A prompt of numbered blocks and a few tokens behind them."""
    keys = blocks(*(repr(numbers[: n + 1]).encode() for n in range(len(numbers))))
    return Numbers(BLOCK_TOKENS * len(keys) + rest, prefix_keys=tuple(keys), **options)


def run(scheduler: Any, sequence: Numbers) -> Numbers:
    """Read a prompt, and end it."""
    add(scheduler, sequence)
    assert [sequence] == scheduler.schedule().sequences
    scheduler.keep_prefixes([sequence])
    scheduler.finish([sequence])
    return sequence


def test_only_the_rest_of_a_prompt_counts_for_a_prefill() -> None:
    scheduler: Any = Scheduler(SlabAllocator(10_000), 100, 100)
    run(scheduler, prompt(1, 2, 3, 4, 5))
    many = [prompt(1, 2, 3, 4, 5, rest=10) for _ in range(10)]
    add(scheduler, *many)
    batch = scheduler.schedule()

    assert many == batch.sequences
    assert {(80, 10, 80)} == {(s.num_computed, s.num_scheduled, s.num_cached) for s in many}
    assert {16} == {s.copied_from for s in many}


def test_one_token_is_always_read() -> None:
    scheduler: Any = Scheduler(SlabAllocator(10_000), 100, 100)
    run(scheduler, prompt(1, 2, rest=0))

    assert 16 == run(scheduler, prompt(1, 2, rest=0)).num_cached
    assert 32 == run(scheduler, prompt(1, 2, rest=1)).num_cached


def test_who_begins_as_one_of_the_same_prefill_waits_a_step_for_its_rows() -> None:
    scheduler: Any = Scheduler(SlabAllocator(10_000), 100, 200)
    first, other, alike, last = prompt(1, 2), prompt(7), prompt(1, 2, 3), prompt(8)
    add(scheduler, first, other, alike, last)
    batch = scheduler.schedule()
    scheduler.keep_prefixes(batch.sequences)

    assert [first, other] == batch.sequences
    assert [alike, last] == scheduler.schedule().sequences
    assert (32, 0) == (alike.num_cached, last.num_cached)


def test_rows_that_are_kept_give_way_and_are_not_forgotten_in_vain() -> None:
    slabs = SlabAllocator(16 + 160)
    scheduler: Any = Scheduler(slabs, 10, 1000)
    for number in range(1, 4):
        run(scheduler, prompt(number, number, rest=1, max_tokens=5))
    holder, large = Numbers(10, max_tokens=20), Numbers(130, max_tokens=10)

    assert 96 == scheduler.num_kept_rows
    add(scheduler, holder, large)
    assert [holder] == scheduler.schedule().sequences
    assert not scheduler.schedule().is_prefill  # there is no room, whoever gives way
    assert 96 == scheduler.num_kept_rows
    scheduler.finish([holder])
    assert [large] == scheduler.schedule().sequences
    assert 0 == scheduler.num_kept_rows  # 144 rows in one run: all of them had to go
    scheduler.finish([large])
    assert slabs.largest_slab == slabs.num_free_rows


@given(
    prompts=st.lists(st.lists(st.integers(0, 1), max_size=4), min_size=1, max_size=25),
    choices=st.lists(st.integers(0, 1000), min_size=300, max_size=300),
    max_num_seqs=st.integers(1, 6),
)
def test_copies_are_of_what_was_written_there(
    prompts: list[list[int]], choices: list[int], max_num_seqs: int
) -> None:
    """Rows as a list of who wrote them last: every prompt ends up in its slab."""
    slabs = SlabAllocator(16 + 256)
    scheduler: Any = Scheduler(slabs, max_num_seqs, 40)
    rows: list[Any] = [None] * 272
    sequences = [prompt(*numbers, rest=1 + len(numbers), max_tokens=9) for numbers in prompts]
    add(scheduler, *sequences)

    def content(sequence: Numbers, row: int) -> Any:
        block = row // BLOCK_TOKENS
        keys = sequence.prefix_keys
        return (keys[block][1], row) if block < len(keys) else (id(sequence), row)

    for choice in choices:
        batch = scheduler.schedule()
        if not batch.sequences:
            break
        if not batch.is_prefill:
            scheduler.finish([batch.sequences[choice % len(batch.sequences)]])
            continue
        copies = [
            (s, rows[s.copied_from : s.copied_from + s.num_cached])
            for s in batch.sequences
            if s.copied_from is not None
        ]
        for sequence, copied in copies:
            rows[sequence.start : sequence.start + len(copied)] = copied
            sequence.copied_from = None
        for sequence in batch.sequences:
            for row in range(sequence.num_computed, sequence.num_read):
                rows[sequence.start + row] = content(sequence, row)
        for sequence in [s for s in batch.sequences if s.is_read]:
            length = sequence.num_prompt_tokens
            expected = [content(sequence, row) for row in range(length)]
            assert expected == rows[sequence.start : sequence.start + length]
        if choice % 5:  # else it failed
            scheduler.keep_prefixes([s for s in batch.sequences if s.is_read])

    assert not scheduler.has_work
    assert slabs.largest_slab == slabs.num_free_rows + scheduler.num_kept_rows
    scheduler.forget_prefixes()
    assert slabs.largest_slab == slabs.num_free_rows


# --- the whole engine ---------------------------------------------------------------------------------


@pytest.fixture(params=["read at once", "read late"])
def keeping(request: pytest.FixtureRequest, tiny_folder: Path) -> Iterator[LLM]:
    llm = LLM(str(tiny_folder), limit_mm_per_prompt=LIMITS, enable_prefix_caching=True)
    if request.param == "read late":
        read_late(llm)
    yield llm
    assert_idle(llm.engine)
    llm.close()


def questions(seed: int, num: int) -> list[Request]:
    """Questions about one picture and one clip."""
    media = {"image": draw(seed, 120, 90), "video": draw_clip(seed, 4)}
    return [
        Request(
            prompt=f"{SYSTEM}{PICTURE}{CLIP}{'question ' * (n % 4)}{n}",
            multi_modal_data=media,
            params=GREEDY,
            request_id=f"{seed} {n}",
        )
        for n in range(num)
    ]


def test_many_questions_about_one_picture_read_it_once(
    keeping: LLM, llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = questions(1, 12)
    expected = answers(list(llm.stream(asked)))
    keeping.engine._runner.cache.max_bytes = 0
    counts = count_encoded(keeping, monkeypatch)
    results = by_name(list(keeping.stream(asked)))

    assert expected == answers(list(results.values()))
    assert [2] == counts
    cached = sorted(result.num_cached_tokens or 0 for result in results.values())
    shared = len(SYSTEM) + 2
    assert 0 == cached[0]
    assert cached[1] > shared
    for result in results.values():
        assert result.prompt_token_ids is not None
        assert len(result.prompt_token_ids) > (result.num_cached_tokens or 0)


def test_without_the_option_nothing_is_kept(llm: LLM) -> None:
    results = [llm.generate(questions(2, 1)[0], use_tqdm=False)[0] for _ in range(2)]

    assert [0, 0] == [result.num_cached_tokens for result in results]
    assert 0 == llm.engine._scheduler.num_kept_rows


@pytest.mark.parametrize("seed", range(3))
def test_tokens_do_not_depend_on_what_was_kept(llm: LLM, keeping: LLM, seed: int) -> None:
    """Draws, stop strings, log-probabilities, several outputs; again, in pieces, in another order."""
    rng = random.Random(f"prefixes {seed}")
    asked = [random_request(rng, str(name)) for name in range(10)] + questions(seed, 5)
    expected = answers(list(llm.stream(asked)))
    for num_tokens in (8192, 40, 8192):
        rng.shuffle(asked)
        with in_pieces(keeping, num_tokens):
            assert expected == answers(list(keeping.stream(asked)))


def test_a_result_says_how_many_tokens_were_there(keeping: LLM) -> None:
    one, other = questions(5, 2)
    (first,), (again,), (else_) = (
        keeping.generate(request, use_tqdm=False) for request in (one, one, other)
    )

    assert first.prompt_token_ids is not None
    num_tokens = len(first.prompt_token_ids)
    assert 0 == first.num_cached_tokens
    assert num_tokens - BLOCK_TOKENS <= (again.num_cached_tokens or 0) < num_tokens
    assert else_[0].num_cached_tokens
    assert keeping.reset_prefix_cache()
    assert 0 == keeping.generate(one, use_tqdm=False)[0].num_cached_tokens


def test_outputs_of_one_request_share_its_prompt(
    keeping: LLM, llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = SamplingParams(n=4, temperature=1.0, seed=3, max_tokens=6, ignore_eos=True)
    asked = Request(prompt=f"{PICTURE}{SYSTEM}", multi_modal_data={"image": draw(7)}, params=params)
    expected = answers(llm.generate(asked, use_tqdm=False))
    sizes: list[int] = []
    poison_runner(keeping, monkeypatch, "prefill", lambda s: sizes.append(s.num_scheduled))  # type: ignore[arg-type,return-value]

    assert list(expected.values()) == list(
        answers(keeping.generate(asked, use_tqdm=False)).values()
    )
    assert 4 == len(sizes)
    assert sizes[0] > 70
    assert max(sizes[1:]) <= BLOCK_TOKENS


def test_another_picture_of_equal_size_is_another_prompt(keeping: LLM, llm: LLM) -> None:
    """Of equal ids, whatever a caller calls it; and so is the same picture seen otherwise."""
    forms: list[Any] = [
        {
            "prompt": f"{PICTURE}{SYSTEM}",
            "multi_modal_data": {"image": draw(seed, 112, 112)},
            "multi_modal_uuids": {"image": "mine"},
            **more,
        }
        for seed, more in (
            (1, {}),
            (2, {}),
            (1, {"mm_processor_kwargs": {"max_pixels": 56 * 56}}),
        )
    ]
    for form in forms:
        expected = token_ids(llm.generate(form, GREEDY, use_tqdm=False))
        (result,) = keeping.generate(form, GREEDY, use_tqdm=False)
        assert 0 == result.num_cached_tokens
        assert expected == token_ids([result])
    (again,) = keeping.generate(forms[1], GREEDY, use_tqdm=False)
    assert again.num_cached_tokens


def test_features_of_a_caller_are_never_taken_for_others(keeping: LLM, llm: LLM) -> None:
    for seed in (1, 2, 1):
        (features,), _ = features_of(llm, draw(seed))
        form = {"prompt": f"{SYSTEM}{PICTURE}x", "multi_modal_data": {"image": features[None]}}
        expected = token_ids(llm.generate(form, GREEDY, use_tqdm=False))
        (result,) = keeping.generate(form, GREEDY, use_tqdm=False)
        assert expected == token_ids([result])
        assert (result.num_cached_tokens or 0) <= len(SYSTEM)


def test_where_rows_are_few_the_oldest_give_way(
    llm: LLM, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_bytes = (16 + 400) * ROW_BYTES
    asked = [
        Request(prompt=f"{n % 3} {SYSTEM}{n}", params=GREEDY, request_id=str(n)) for n in range(40)
    ]
    expected = answers(list(llm.stream(asked)))
    with LLM(
        str(tiny_folder),
        max_model_len=128,
        kv_cache_memory_bytes=num_bytes,
        enable_prefix_caching=True,
    ) as small:
        results = list(small.stream(asked))
        assert expected == answers(results)
        assert any(result.num_cached_tokens for result in results)
        assert 400 == num_free_rows(small.engine) + small.engine._scheduler.num_kept_rows
        assert_idle(small.engine)


def test_copy_that_fails_costs_a_second_reading_and_nothing_else(
    keeping: LLM, llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = questions(3, 6)
    expected = answers(list(llm.stream(asked)))
    answers(list(keeping.stream(asked[:1])))

    def fail(_: Sequence[Running]) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(keeping.engine._runner, "copy_prefixes", fail)
    for num_tokens in (8192, 30):
        with in_pieces(keeping, num_tokens):
            results = list(keeping.stream(asked))
        assert expected == answers(results)
        assert {0} == {result.num_cached_tokens for result in results}


def test_prefill_that_fails_is_repeated_over_the_copies(
    keeping: LLM, llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = questions(4, 9)
    expected = answers(list(llm.stream(asked)))
    prefill = keeping.engine._runner.prefill

    def prefill_few(sequences: Sequence[Running]) -> Tensor:
        logits = prefill(sequences)
        if len(sequences) > 1:
            raise torch.OutOfMemoryError
        return logits

    monkeypatch.setattr(keeping.engine._runner, "prefill", prefill_few)
    results = list(keeping.stream(asked))

    assert expected == answers(results)
    assert any(result.num_cached_tokens for result in results)


def test_rows_without_numbers_are_kept_for_nobody(
    keeping: LLM, llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = questions(6, 1)[0]
    expected = answers(llm.generate(request, use_tqdm=False))
    prefill = keeping.engine._runner.prefill

    def spoil(sequences: Sequence[Running]) -> Tensor:
        logits = prefill(sequences)
        for sequence in sequences:
            start = sequence.start or 0
            for rows in (*keeping.engine._runner._rows.keys, *keeping.engine._runner._rows.values):
                rows[start : start + sequence.num_read] = torch.nan
        return logits * torch.nan

    monkeypatch.setattr(keeping.engine._runner, "prefill", spoil)
    (failed,) = keeping.generate(request, use_tqdm=False)
    monkeypatch.setattr(keeping.engine._runner, "prefill", prefill)

    assert failed.error is not None
    assert 0 == keeping.engine._scheduler.num_kept_rows
    assert expected == answers(keeping.generate(request, use_tqdm=False))


@pytest.mark.parametrize("changes", [None, GEMMA3_OTHER], ids=["gemma3", "short windows"])
def test_pictures_whose_tokens_see_each_other_are_shared_whole(
    tmp_path: Path, changes: Any
) -> None:
    """With every length of text before them, so that cuts fall anywhere."""
    folder = write_tiny_gemma3(tmp_path, seed=2, changes=changes)
    asked = [
        Request(
            prompt=f"USER: {'y' * before}<start_of_image>{'a b ' * (n + 3)}{n}",
            multi_modal_data={"image": draw(1, 90, 70)},
            params=GREEDY,
            request_id=f"{before} {n}",
        )
        for before in range(0, 16, 3)
        for n in range(3)
    ]
    with LLM(str(folder)) as plain, LLM(str(folder), enable_prefix_caching=True) as keeping:
        expected = answers(list(plain.stream(asked)))
        results = list(keeping.stream(asked))
        assert expected == answers(results)
        assert sum(bool(result.num_cached_tokens) for result in results) > len(asked) // 2


def test_option_is_true_or_false() -> None:
    with pytest.raises(BadConfig, match="enable_prefix_caching must be True or False, got 3"):
        EngineConfig("x", enable_prefix_caching=3)  # type: ignore[arg-type]
