"""The loop: results the moment they are ready, each exactly once, and no request costs another."""

import itertools
import random
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from engine import LLM, Request, Result, SamplingParams
from engine.engine import MAX_UNPREPARED, NUM_PREPARED_AHEAD, _Feed
from engine.errors import EngineClosed
from engine.families.protocol import Visual
from engine.sampler import SamplingRow
from engine.sequence import Sequence as Running
from tests.engine.idle import assert_idle, num_free_rows
from tests.engine.pictures import (
    CLIP,
    GREEDY,
    PICTURE,
    draw,
    draw_clip,
    error_of,
    features_of,
    texts,
    token_ids,
)

WAIT_S = 120.0
ROW_BYTES = 2 * 2 * 2 * 16 * 4  # of the tiny model: keys and values, layers, heads, dim, float32


def picture_request(seed: int, name: str = "", **options: Any) -> Request:
    data = {"image": draw(seed, 60 + 10 * (seed % 5), 84)}
    return Request(
        prompt=f"{PICTURE}{seed}", multi_modal_data=data, params=GREEDY, request_id=name, **options
    )


def by_name(results: Sequence[Result]) -> dict[str, Result]:
    found = {result.request_id: result for result in results}
    assert len(found) == len(results), "a request has more than one result"
    return found


# --- streaming ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_num_seqs", [1, 8])
def test_pixels_are_let_go_when_all_outputs_have_read_them(
    llm: LLM, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, max_num_seqs: int
) -> None:
    """With one place, the second output reads the prompt when the first has ended."""
    params = SamplingParams(n=2, temperature=1.0, seed=3, max_tokens=5, ignore_eos=True)
    asked = Request(prompt=PICTURE, multi_modal_data={"image": draw(1)}, params=params)
    expected = [output.token_ids for output in llm.generate(asked, use_tqdm=False)[0].outputs]
    few = LLM(str(tiny_folder), max_num_seqs=max_num_seqs)
    held = []
    poison_runner(few, monkeypatch, "decode", lambda s: bool(held.append(len(s.prepared.media))))  # type: ignore[func-returns-value]
    (result,) = few.generate(asked, use_tqdm=False)
    few.close()

    assert expected == [output.token_ids for output in result.outputs]
    assert ([1] * 4 + [0] * 4 if max_num_seqs == 1 else [0] * 8) == held


def test_requests_of_unknown_size_are_pulled_only_so_far_ahead(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However small those were that came before."""
    engine = llm.engine
    feed = _Feed(iter(()), num_waiting=500)
    monkeypatch.setattr(engine, "_num_ahead", 1000)
    monkeypatch.setattr(engine, "_usual_tokens", 1.0)
    monkeypatch.setattr(engine, "_preparing", dict.fromkeys(range(MAX_UNPREPARED - 1)))
    has_room = engine._can_pull(feed)
    engine._preparing |= dict.fromkeys(range(MAX_UNPREPARED))  # type: ignore[arg-type]
    is_full = not engine._can_pull(feed)
    monkeypatch.setattr(engine, "_prepared", [None])
    one_is_known = engine._can_pull(feed)

    assert (True, True, True) == (has_room, is_full, one_is_known)


def test_endless_source_is_pulled_a_little_ahead_and_no_further(llm: LLM) -> None:
    num_pulled = 0

    def endless() -> Iterator[str]:
        nonlocal num_pulled
        for number in itertools.count():
            num_pulled += 1
            yield f"Prompt {number}"

    stream = llm.stream(endless(), GREEDY)
    first = [next(stream) for _ in range(50)]
    stream.close()  # type: ignore[attr-defined]

    assert 50 == len(texts(first))
    assert num_pulled < 50 + 256 + 2 * NUM_PREPARED_AHEAD
    assert_idle(llm.engine)


def test_first_result_comes_before_the_last_prompt_is_prepared(tiny_folder: Path) -> None:
    llm = LLM(str(tiny_folder), max_num_seqs=4)
    has_first = threading.Event()

    def fetch_late() -> Any:
        assert has_first.wait(WAIT_S)
        return draw(1)

    late = Request(prompt=PICTURE, multi_modal_data={"image": fetch_late}, request_id="late")
    results = []
    for result in llm.stream([late, *(f"Prompt {number}" for number in range(9))], GREEDY):
        results.append(result)
        has_first.set()

    assert 10 == len(texts(results))
    assert "late" == results[-1].request_id


def test_every_request_has_exactly_one_result(llm: LLM) -> None:
    requests = [
        picture_request(n, str(n)) if n % 3 else Request(prompt=f"{n}", request_id=str(n))
        for n in range(60)
    ]
    requests[7] = Request(prompt=3.5, request_id="7")
    results = by_name(list(llm.stream(requests, GREEDY)))

    assert {str(n) for n in range(60)} == set(results)
    assert ["7"] == [name for name, result in results.items() if result.error]


def test_outputs_of_one_request_that_end_together_all_free_their_rows(llm: LLM) -> None:
    params = SamplingParams(n=6, temperature=1.0, seed=4, max_tokens=5, ignore_eos=True)
    for _ in range(3):
        (result,) = llm.generate("many", params, use_tqdm=False)

        assert [5] * 6 == [len(output.token_ids) for output in result.outputs]
        assert_idle(llm.engine)


def test_closing_the_stream_frees_everything(llm: LLM) -> None:
    long = SamplingParams(temperature=0, max_tokens=500, ignore_eos=True)
    for num_read in (0, 1, 5):
        short = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
        requests = [
            Request(prompt=f"{n}", params=short if n < num_read else long) for n in range(20)
        ]
        stream = llm.stream(requests)
        for _ in range(num_read):
            next(stream)
        if num_read:
            assert num_free_rows(llm.engine) < llm.engine._scheduler._slabs.largest_slab
        stream.close()  # type: ignore[attr-defined]

        assert_idle(llm.engine)


def test_closing_aborts_what_is_still_being_prepared(llm: LLM) -> None:
    may_go_on = threading.Event()

    def fetch() -> Any:
        may_go_on.wait(WAIT_S)
        return draw(1)

    waiting = Request(prompt=PICTURE, multi_modal_data={"image": fetch})
    stream = llm.stream(["quick", *[waiting] * 6], GREEDY)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert_idle(llm.engine)
    may_go_on.set()

    assert texts(llm.generate("after", GREEDY, use_tqdm=False))


def test_one_request_of_a_stream_is_dropped_by_its_id_from_another_thread(llm: LLM) -> None:
    long = SamplingParams(temperature=0, max_tokens=500, ignore_eos=True)
    requests = [Request(prompt="a", request_id=name, params=long) for name in ("1.1", "1.2")]
    requests.append(Request(prompt="a", request_id="2.1", params=GREEDY))
    stream = llm.stream(requests)
    first = next(stream).request_id
    before = llm.engine.progress_at_s

    dropping = threading.Thread(target=llm.engine.abort_named, args=({"1.1", "9.9"},))
    dropping.start()
    dropping.join()

    assert "2.1" == first
    assert ["1.2"] == [result.request_id for result in stream]
    assert before < llm.engine.progress_at_s


def test_what_the_media_threads_finish_is_progress_too(llm: LLM) -> None:
    bad = Request(prompt=PICTURE, multi_modal_data={"image": b"no picture"}, params=GREEDY)
    before = llm.engine.progress_at_s

    (result,) = llm.stream([bad])

    assert result.error is not None
    assert before < llm.engine.progress_at_s


def test_stream_inside_the_loop_of_a_stream(llm: LLM) -> None:
    outer_names = [f"outer {number}" for number in range(40)]
    outer, inner = [], []
    for result in llm.stream([Request(prompt=n, request_id=n) for n in outer_names], GREEDY):
        outer.append(result)
        if len(outer) % 10 == 1:
            name = f"inner {len(outer)}"
            inner += list(llm.stream([Request(prompt=name, request_id=name)], GREEDY))
    alone = llm.generate(outer_names, GREEDY, use_tqdm=False)

    assert set(outer_names) == set(by_name(outer))
    assert ["inner 1", "inner 11", "inner 21", "inner 31"] == [r.request_id for r in inner]
    named = by_name(outer)
    assert token_ids(alone) == token_ids([named[name] for name in outer_names])


def test_source_may_ask_the_model_itself(llm: LLM) -> None:
    def chained() -> Iterator[str]:
        for number in range(3):
            (result,) = llm.generate(f"first {number}", GREEDY, use_tqdm=False)
            yield f"second {number} {len(result.outputs[0].token_ids)}"

    assert 3 == len(texts(list(llm.stream(chained(), GREEDY))))


def test_source_that_raises_ends_the_stream_and_frees_everything(llm: LLM) -> None:
    def broken() -> Iterator[str]:
        yield from (f"Prompt {number}" for number in range(5))
        raise LookupError("no more lines")

    with pytest.raises(LookupError, match="no more lines"):
        list(llm.stream(broken(), GREEDY))
    assert_idle(llm.engine)

    assert texts(llm.generate("after", GREEDY, use_tqdm=False))


def test_source_may_wait_for_the_result_of_what_it_gave(llm: LLM) -> None:
    has_result = threading.Semaphore(0)

    def one_by_one() -> Iterator[str]:
        for number in range(4):
            yield f"Prompt {number}"
            assert has_result.acquire(timeout=WAIT_S)

    results = []
    for result in llm.stream(one_by_one(), GREEDY):
        results.append(result)
        has_result.release()

    assert [f"Prompt {number}" for number in range(4)] == [r.prompt for r in results]


def test_results_come_while_a_slow_source_is_at_rest(llm: LLM) -> None:
    may_go_on = threading.Event()

    def slow() -> Iterator[str]:
        yield from ("first", "second")
        assert may_go_on.wait(WAIT_S)
        yield "third"

    stream = llm.stream(slow(), GREEDY)
    early = [next(stream).prompt for _ in range(2)]
    may_go_on.set()
    late = [result.prompt for result in stream]

    assert {"first", "second"} == set(early)
    assert ["third"] == late


def test_stream_is_closed_while_its_source_is_at_rest(llm: LLM) -> None:
    may_go_on, has_ended = threading.Event(), threading.Event()

    def slow() -> Iterator[str]:
        yield "first"
        assert may_go_on.wait(WAIT_S)
        has_ended.set()
        yield "never read"

    stream = llm.stream(slow(), GREEDY)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert_idle(llm.engine)
    may_go_on.set()

    assert has_ended.wait(WAIT_S)
    assert_idle(llm.engine)


def test_reader_that_pauses_stops_its_source(llm: LLM) -> None:
    num_pulled = 0

    def endless() -> Iterator[str]:
        nonlocal num_pulled
        for number in itertools.count():
            num_pulled += 1
            yield f"Prompt {number}"

    paused = llm.stream(endless(), GREEDY)
    next(paused)
    for _ in range(5):  # steps for both
        llm.generate(["x"] * 100, GREEDY, use_tqdm=False)
    paused.close()  # type: ignore[attr-defined]

    assert num_pulled < 256 + 3 * NUM_PREPARED_AHEAD


def test_nobody_waits_for_the_media_of_another_thread(tiny_folder: Path) -> None:
    llm = LLM(str(tiny_folder), num_media_threads=2)
    may_go_on, is_fetching = threading.Event(), threading.Event()
    found: list[Result] = []

    def fetch() -> Any:
        is_fetching.set()
        assert may_go_on.wait(WAIT_S)
        return draw(1)

    def work() -> None:
        slow = Request(prompt=PICTURE, multi_modal_data={"image": fetch})
        found.extend(llm.stream([slow] * (NUM_PREPARED_AHEAD + 5), GREEDY))

    thread = threading.Thread(target=work)
    thread.start()
    assert is_fetching.wait(WAIT_S)
    results = llm.generate("Text.", GREEDY, use_tqdm=False)
    was_waiting = thread.is_alive()
    may_go_on.set()
    thread.join(WAIT_S)

    assert texts(results)
    assert was_waiting
    assert texts(found)


def test_one_prompt_may_be_streamed_without_a_list(llm: LLM) -> None:
    forms: list[Any] = ["Hello", {"prompt": "Hello"}, Request(prompt="Hello")]

    assert [1, 1, 1] == [len(list(llm.stream(form, GREEDY))) for form in forms]


def test_threads_share_an_engine_and_each_has_its_own_results(llm: LLM) -> None:
    num_threads, num_prompts = 4, 40
    found: dict[int, list[Result]] = {}

    def work(thread: int) -> None:
        names = [f"{thread}/{number}" for number in range(num_prompts)]
        requests = [Request(prompt=name, request_id=name) for name in names]
        found[thread] = list(llm.stream(requests, GREEDY))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(num_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)

    for number in range(num_threads):
        names = {f"{number}/{prompt}" for prompt in range(num_prompts)}
        assert names == set(by_name(found[number]))
        assert texts(found[number])


def test_thread_that_comes_later_is_not_starved(llm: LLM) -> None:
    long = SamplingParams(temperature=0, max_tokens=1500, ignore_eos=True)
    has_first, is_done = threading.Event(), threading.Event()
    found: list[Result] = []

    def work() -> None:
        for result in llm.stream(["quick", Request(prompt="long", params=long)], GREEDY):
            found.append(result)
            has_first.set()
        is_done.set()

    thread = threading.Thread(target=work)
    thread.start()
    assert has_first.wait(WAIT_S)
    results = list(llm.stream(["late"], GREEDY))
    was_first = not is_done.is_set()
    thread.join(WAIT_S)

    assert texts(results)
    assert 2 == len(texts(found))
    assert 1500 == len(found[-1].outputs[0].token_ids)
    assert was_first


def test_pictures_are_let_go_once_they_are_cut(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures: list[weakref.ref[Image.Image]] = []
    num_alive: list[int] = []

    def build(number: int) -> Request:
        picture = draw(number, 200, 200)
        pictures.append(weakref.ref(picture))
        return Request(prompt=PICTURE, multi_modal_data={"image": picture}, params=GREEDY)

    def count(_: Running) -> bool:
        num_alive.append(sum(picture() is not None for picture in pictures))
        return False

    poison_runner(llm, monkeypatch, "decode", count)

    assert 6 == len(texts(list(llm.stream(build(number) for number in range(6)))))
    assert 0 == num_alive[-1]


# --- requests that break something ------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("no"),
        OSError("/secret/path"),
        KeyError("x"),
        SystemExit(3),
        KeyboardInterrupt(),
    ],
)
def test_callable_that_raises_fails_alone(llm: LLM, error: BaseException) -> None:
    def fetch() -> Any:
        raise error

    bad = Request(prompt=PICTURE, multi_modal_data={"image": fetch}, request_id="bad")
    requests = [picture_request(1, "1"), bad, picture_request(2, "2")]
    results = by_name(list(llm.stream(requests, GREEDY)))
    alone = list(llm.stream([picture_request(1), picture_request(2)]))

    assert "secret" not in error_of([results["bad"]])
    assert sorted(token_ids(alone)) == sorted(token_ids([results["1"], results["2"]]))


class PoisonError(RuntimeError):
    """What a kernel might raise."""


@dataclass(slots=True)
class Calls:
    """Of one method of the runner: how many sequences each had, and how many had ended already."""

    sizes: list[int] = field(default_factory=list)
    num_ended: int = 0


def poison_runner(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, method: str, is_poisoned: Callable[[Running], bool]
) -> Calls:
    """Make the runner fail whenever a poisoned sequence is in the batch."""
    run = getattr(llm.engine._runner, method)
    calls = Calls()

    def run_poisoned(sequences: Sequence[Running]) -> Any:
        calls.sizes.append(len(sequences))
        calls.num_ended += sum(sequence.is_finished for sequence in sequences)
        if any(is_poisoned(sequence) for sequence in sequences):
            raise PoisonError
        return run(sequences)

    monkeypatch.setattr(llm.engine._runner, method, run_poisoned)
    return calls


@pytest.mark.parametrize("method", ["prefill", "encode", "decode"])
def test_sequence_that_breaks_the_runner_fails_alone(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    requests = [picture_request(n, str(n)) for n in range(12)]
    expected = by_name(list(llm.stream(requests)))
    poison_runner(llm, monkeypatch, method, lambda s: s.prepared.prompt == f"{PICTURE}5")
    results = by_name(list(llm.stream(requests)))

    error = results.pop("5").error
    assert error is not None
    assert ("engine_failure", True) == (error.code, error.retryable)
    assert {n: token_ids([expected[n]]) for n in results} == {
        n: token_ids([result]) for n, result in results.items()
    }


def test_picture_that_breaks_the_encoder_fails_alone(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [picture_request(n, str(n)) for n in range(12)]
    expected = by_name(list(llm.stream(requests)))
    family = llm.engine.checkpoint.family
    encode = family.encode

    def encode_poisoned(visuals: Sequence[Visual]) -> list[Tensor]:
        if any(visual.plan.layout.columns == 8 for visual in visuals):
            raise PoisonError
        return encode(visuals)

    llm.reset_mm_cache()  # or nothing would be encoded again
    monkeypatch.setattr(type(family), "encode", staticmethod(encode_poisoned))
    results = by_name(list(llm.stream(requests)))
    failed = {name for name, result in results.items() if result.error}

    assert {"4", "9"} == failed
    for name in set(results) - failed:
        assert token_ids([expected[name]]) == token_ids([results[name]])


def test_batch_too_large_for_the_device_is_halved_and_nobody_fails(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [picture_request(n, str(n)) for n in range(12)]
    expected = by_name(list(llm.stream(requests)))
    prefill, sizes = llm.engine._runner.prefill, []

    def prefill_few(sequences: Sequence[Running]) -> Tensor:
        if len(sequences) > 2:
            raise torch.OutOfMemoryError
        sizes.append(len(sequences))
        return prefill(sequences)

    monkeypatch.setattr(llm.engine._runner, "prefill", prefill_few)
    results = by_name(list(llm.stream(requests)))

    assert {n: token_ids([r]) for n, r in expected.items()} == {
        n: token_ids([r]) for n, r in results.items()
    }
    assert 12 == sum(sizes)


def test_one_broken_output_of_many_fails_its_request_once(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    many = SamplingParams(n=5, temperature=1.5, seed=1, max_tokens=8, ignore_eos=True)
    others = [picture_request(n, str(n)) for n in range(4)]
    expected = by_name(list(llm.stream(others)))
    calls = poison_runner(
        llm,
        monkeypatch,
        "decode",
        lambda s: s.prepared.prompt == "many" and s.index == 2 and len(s.output_ids) == 3,
    )
    requests = [Request(prompt="many", params=many, request_id="many"), *others]
    results = by_name(list(llm.stream(requests)))

    assert results.pop("many").error is not None
    assert {n: token_ids([r]) for n, r in expected.items()} == {
        n: token_ids([r]) for n, r in results.items()
    }
    assert 0 == calls.num_ended  # its four others left with it


def test_logits_that_are_no_numbers_fail_their_sequence_alone(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = llm.engine._runner.decode

    def decode_badly(sequences: Sequence[Running]) -> Tensor:
        logits = decode(sequences)
        for row, sequence in enumerate(sequences):
            if sequence.prepared.prompt == "bad" and len(sequence.output_ids) == 4:
                logits[row] = torch.nan
        return logits

    (alone,) = llm.generate("good", GREEDY, use_tqdm=False)
    monkeypatch.setattr(llm.engine._runner, "decode", decode_badly)
    bad, good = llm.generate(["bad", "good"], GREEDY, use_tqdm=False)

    assert bad.error is not None
    assert token_ids([alone]) == token_ids([good])


POISON = SamplingParams(temperature=1.0, seed=666, max_tokens=12, ignore_eos=True)


def poison_sampler(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the sampler fail at the third token of every row with the seed of `POISON`."""
    sample = llm.engine._sampler.sample

    def sample_poisoned(logits: Tensor, rows: Sequence[SamplingRow]) -> Any:
        if any(row.params.seed == POISON.seed and row.position == 3 for row in rows):
            raise OverflowError("int too big to convert")
        return sample(logits, rows)

    monkeypatch.setattr(llm.engine._sampler, "sample", sample_poisoned)


def test_row_that_breaks_the_sampler_fails_alone(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    others = [picture_request(n, str(n)) for n in range(12)]
    expected = by_name(list(llm.stream(others)))
    poison_sampler(llm, monkeypatch)
    bad = Request(prompt="bad", params=POISON, request_id="bad")
    results = by_name(list(llm.stream([*others[:5], bad, *others[5:]])))

    error = results.pop("bad").error
    assert error is not None
    assert "engine_failure" == error.code
    assert {n: token_ids([r]) for n, r in expected.items()} == {
        n: token_ids([r]) for n, r in results.items()
    }


def test_row_that_breaks_the_sampler_costs_no_other_thread(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = [picture_request(n, str(n)) for n in range(12)]
    expected = by_name(list(llm.stream(others)))
    poison_sampler(llm, monkeypatch)
    bad = [Request(prompt=f"{n}", params=POISON, request_id=f"{n}") for n in range(12)]
    found: dict[str, dict[str, Result]] = {}

    def work(name: str, requests: Sequence[Request]) -> None:
        found[name] = by_name(list(llm.stream(requests)))

    threads = [threading.Thread(target=work, args=each) for each in (("a", others), ("b", bad))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)

    assert {n: token_ids([r]) for n, r in expected.items()} == {
        n: token_ids([r]) for n, r in found["a"].items()
    }
    assert 12 == sum(result.error is not None for result in found["b"].values())


@pytest.mark.parametrize("method", ["push", "output"])
def test_text_that_cannot_be_made_fails_its_request_alone(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    make = getattr(Running, method)

    def make_poisoned(sequence: Running, *args: Any) -> Any:
        if sequence.prepared.prompt == "bad" and sequence.index == 1:
            raise PoisonError
        return make(sequence, *args)

    many = SamplingParams(n=3, temperature=1.0, seed=1, max_tokens=4, ignore_eos=True)
    requests = [Request(prompt=name, params=many, request_id=name) for name in ("bad", "good")]
    expected = by_name(list(llm.stream(requests)))["good"]
    monkeypatch.setattr(Running, method, make_poisoned)
    results = by_name(list(llm.stream(requests)))

    assert results["bad"].error is not None
    assert expected.outputs == results["good"].outputs


def test_request_that_cannot_be_queued_fails_alone(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    def queue_badly(ticket: Any, prepared: Any) -> None:
        if prepared.prompt == "bad":
            raise PoisonError
        queue(ticket, prepared)

    queue = llm.engine._queue
    monkeypatch.setattr(llm.engine, "_queue", queue_badly)
    bad, good = llm.generate(["bad", "good"], GREEDY, use_tqdm=False)

    assert bad.error is not None
    assert good.error is None


def test_top_k_beyond_all_numbers_means_all(llm: LLM) -> None:
    options = {"temperature": 1.0, "seed": 5, "max_tokens": 8, "ignore_eos": True}
    params = [SamplingParams(top_k=top_k, **options) for top_k in (272, 10**20)]  # type: ignore[arg-type]
    results = llm.generate(["a", "a"], params, use_tqdm=False)

    assert token_ids(results[:1]) == token_ids(results[1:])


def test_embeddings_out_of_all_measure_do_not_touch_their_neighbours(llm: LLM) -> None:
    (features,), _ = features_of(llm, draw(1))
    huge = torch.full_like(features, 3e38)
    data = [{"image": image[None]} for image in (features, huge, features)]
    prompts = [{"prompt": PICTURE, "multi_modal_data": each} for each in data]
    results = llm.generate(prompts, GREEDY, use_tqdm=False)
    (alone,) = llm.generate(prompts[0], GREEDY, use_tqdm=False)

    assert token_ids([alone]) == token_ids(results[:1]) == token_ids(results[2:])


def random_request(rng: random.Random, name: str) -> Request:
    num_pictures, num_clips = rng.choice([(0, 0), (1, 0), (2, 0), (1, 1)])
    params = SamplingParams(
        temperature=1.0,
        n=rng.choice([1, 1, 3]),
        seed=rng.randrange(100),
        max_tokens=rng.choice([1, 5, 20]),
        stop=rng.choice([None, ["a", "bc"]]),
        logprobs=rng.choice([None, 1]),
    )
    data = {
        "image": [draw(rng.randrange(99), rng.randrange(20, 150)) for _ in range(num_pictures)],
        "video": [draw_clip(rng.randrange(99), rng.randrange(1, 5)) for _ in range(num_clips)],
    }
    prompt = PICTURE * num_pictures + CLIP * num_clips + "x" * rng.randrange(1, 40)
    return Request(
        prompt=prompt,
        multi_modal_data={modality: items for modality, items in data.items() if items},
        params=params,
        request_id=name,
        priority=rng.randrange(3),
    )


@pytest.mark.parametrize("seed", range(2))
def test_whatever_fails_and_whoever_leaves_each_has_one_result(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    rng = random.Random(seed)
    llm = LLM(
        str(tiny_folder),
        limit_mm_per_prompt={"image": 2},
        max_model_len=256,
        max_num_seqs=10,
        kv_cache_memory_bytes=(16 + 900) * ROW_BYTES,
    )
    for method in ("encode", "prefill", "decode"):
        poison_runner(
            llm,
            monkeypatch,
            method,
            lambda s: rng.random() < 0.01 or s.prepared.prompt == "poison",
        )
    for _ in range(4):
        requests = [random_request(rng, str(name)) for name in range(15)]
        requests[7] = Request(prompt="poison", request_id="7")
        results = by_name(list(llm.stream(requests)))
        failed = {name for name, result in results.items() if result.error}
        assert {str(name) for name in range(15)} == set(results)
        assert "7" in failed
        assert len(failed) < 8
        assert_idle(llm.engine)

        leaving = llm.stream(requests)
        for _ in range(rng.randrange(15)):
            next(leaving)
        leaving.close()  # type: ignore[attr-defined]
        assert_idle(llm.engine)


# --- little memory, long prompts ----------------------------------------------------------------------


def test_where_rows_are_few_requests_wait_and_all_finish(
    llm: LLM, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_bytes = (16 + 160) * ROW_BYTES
    small = LLM(str(tiny_folder), max_model_len=128, kv_cache_memory_bytes=num_bytes)
    calls = poison_runner(small, monkeypatch, "decode", lambda _: False)
    prompts = [f"{n} " + "x" * (n % 50) for n in range(40)]
    answers = token_ids(small.generate(prompts, GREEDY, use_tqdm=False))

    assert 160 == small.engine._scheduler._slabs.largest_slab
    assert 1 < max(calls.sizes) <= 160 // 16
    assert token_ids(llm.generate(prompts, GREEDY, use_tqdm=False)) == answers
    assert_idle(small.engine)


def test_prompt_longer_than_a_prefill_is_read_in_pieces(
    tiny_folder: Path, llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = LLM(str(tiny_folder), max_num_batched_tokens=64)
    sizes = []
    prefill = small.engine._runner.prefill

    def record(sequences: Sequence[Running]) -> Tensor:
        sizes.append([sequence.num_scheduled for sequence in sequences])
        return prefill(sequences)

    monkeypatch.setattr(small.engine._runner, "prefill", record)
    prompts = ["x" * length for length in (20, 30, 200, 40, 10, 10, 300)]
    answers = token_ids(small.generate(prompts, GREEDY, use_tqdm=False))

    assert token_ids(llm.generate(prompts, GREEDY, use_tqdm=False)) == answers
    assert 3 + 4 == sizes.count([64])
    assert all(sum(lengths) <= 64 for lengths in sizes)


def test_sequences_that_decode_together_stay_within_the_limit(
    tiny_folder: Path, llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = LLM(str(tiny_folder), max_num_seqs=3)
    calls = poison_runner(small, monkeypatch, "decode", lambda _: False)
    prompts = [f"Prompt {number}" for number in range(10)]
    answers = token_ids(small.generate(prompts, GREEDY, use_tqdm=False))

    assert 3 == max(calls.sizes)
    assert token_ids(llm.generate(prompts, GREEDY, use_tqdm=False)) == answers


# --- the end ------------------------------------------------------------------------------------------


def media_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("media")]


def test_close_stops_the_threads(tiny_folder: Path) -> None:
    before = set(media_threads())
    llm = LLM(str(tiny_folder))
    llm.generate("a", GREEDY, use_tqdm=False)
    started = set(media_threads()) - before
    llm.close()
    for thread in started:
        thread.join(WAIT_S)

    assert started
    assert not any(thread.is_alive() for thread in started)


def test_close_ends_what_is_in_flight_with_a_result(tiny_folder: Path) -> None:
    llm = LLM(str(tiny_folder))
    lengths = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in (2, 200, 300)]
    is_read = threading.Event()

    def source() -> Iterator[Request]:
        for params in lengths:
            yield Request(prompt="x", params=params)
        is_read.set()

    stream = llm.stream(source())
    next(stream)
    assert is_read.wait(WAIT_S)  # what comes later is refused
    llm.close()
    errors = [result.error for result in stream]

    assert [("engine_closed", True)] * 2 == [(e.code, e.retryable) for e in errors if e]
    assert_idle(llm.engine)


def test_close_waits_neither_for_a_fetch_nor_for_a_source(tiny_folder: Path) -> None:
    llm = LLM(str(tiny_folder))
    may_go_on, is_fetching = threading.Event(), threading.Event()
    found: list[Result] = []

    def fetch() -> Any:
        is_fetching.set()
        may_go_on.wait(WAIT_S)

    def source() -> Iterator[Any]:
        yield {"prompt": PICTURE, "multi_modal_data": {"image": fetch}}
        may_go_on.wait(WAIT_S)
        yield "late"

    def work() -> None:
        with pytest.raises(EngineClosed):
            found.extend(iter(llm.stream(source(), GREEDY)))

    thread = threading.Thread(target=work)
    thread.start()
    assert is_fetching.wait(WAIT_S)
    llm.close()  # returns, though nothing else does yet
    assert thread.is_alive()
    may_go_on.set()
    thread.join(WAIT_S)

    assert not thread.is_alive()
    assert_idle(llm.engine)


def test_closed_engine_takes_nothing_and_says_so(tiny_folder: Path) -> None:
    with LLM(str(tiny_folder)) as llm:
        llm.generate("a", GREEDY, use_tqdm=False)
    llm.close()

    with pytest.raises(EngineClosed, match=r"^The engine was closed"):
        llm.generate(["a", "b"], GREEDY, use_tqdm=False)
    with pytest.raises(EngineClosed):
        list(llm.stream(["a"], GREEDY))
    assert_idle(llm.engine)


def test_text_does_not_queue_behind_callables_that_fetch(tiny_folder: Path) -> None:
    llm = LLM(str(tiny_folder), num_media_threads=1)
    may_go_on = threading.Event()

    def fetch() -> Any:
        assert may_go_on.wait(WAIT_S)
        return draw(1)

    part = {"type": "image", "image": fetch}
    slow: list[Any] = [
        Request(prompt=PICTURE, multi_modal_data={"image": [fetch]}),
        {"prompt": PICTURE, "multi_modal_data": {"image": {"image": fetch}}},
        Request(messages=[{"role": "user", "content": [part]}]),
    ]
    stream = llm.stream(
        [*slow, "Text.", {"prompt": PICTURE, "multi_modal_data": {"image": draw(2)}}], GREEDY
    )
    first = [next(stream).prompt for _ in range(2)]
    may_go_on.set()

    assert {"Text.", PICTURE} == set(first)
    assert 3 == len(texts(list(stream)))


def test_media_threads_prepare_several_at_once(tiny_folder: Path) -> None:
    llm = LLM(str(tiny_folder), num_media_threads=3)
    together = threading.Barrier(3)

    def fetch() -> Any:
        together.wait(WAIT_S)
        return draw(1)

    request = Request(prompt=PICTURE, multi_modal_data={"image": fetch}, params=GREEDY)
    started = time.perf_counter()

    assert texts(list(llm.stream([request] * 3)))
    assert time.perf_counter() - started < WAIT_S
