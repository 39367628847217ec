"""
Whatever comes when, leaves when, and however little memory there is: the tokens are the same.

`DARKROOM_SCHEDULES=500 pytest tests/engine/test_schedules.py` looks at more schedules.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine import LLM, Request, SamplingParams
from engine.scheduler import Scheduler
from engine.slabs import SlabAllocator
from tests.engine.idle import assert_idle
from tests.engine.pictures import CLIP, PICTURE, draw, draw_clip

NUM_SCHEDULES = int(os.environ.get("DARKROOM_SCHEDULES", "40"))
MAX_LEN = 128


def pool() -> list[Request]:
    """Requests of all kinds; each has one answer."""
    greedy = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    drawn = SamplingParams(temperature=1.0, seed=5, top_p=0.8, max_tokens=15, stop=["e", "th"])
    looking_back = replace(greedy, repetition_penalty=1.3, frequency_penalty=0.4)
    two = SamplingParams(n=2, temperature=0.9, seed=8, max_tokens=6, ignore_eos=True)
    picture = {"image": draw(1, 84, 56)}
    forms: list[tuple[str, dict[str, Any] | None, SamplingParams]] = [
        ("short", None, replace(greedy, max_tokens=1)),
        ("x" * 60, None, replace(greedy, max_tokens=50)),
        (f"{PICTURE}what", picture, greedy),
        (f"{PICTURE}again", picture, drawn),
        (f"{CLIP}moves", {"video": draw_clip(2, 3)}, greedy),
        (f"{PICTURE}{PICTURE}both", {"image": [draw(3, 56, 56), draw(4, 28, 112)]}, looking_back),
        ("drawn", None, drawn),
        ("looks back", None, looking_back),
        ("twice", None, two),
        ("with numbers", None, replace(greedy, logprobs=2)),
    ]
    return [
        Request(prompt=prompt, multi_modal_data=media, params=params)
        for prompt, media, params in forms
    ]


POOL = pool()


@dataclass(frozen=True, slots=True)
class Schedule:
    """
    Attributes:
        streams: requests of each, as places in POOL; read in turn, a result at a time.
        leaves_after: results after which a stream is closed; None for those read to their end.
    """

    streams: list[list[int]]
    leaves_after: list[int | None]
    priorities: list[int]
    num_rows: int
    max_num_seqs: int
    max_prefill_tokens: int
    max_flights: int
    patience: int
    keeps_prefixes: bool


numbers = st.integers(0, len(POOL) - 1)
schedules = st.builds(
    Schedule,
    streams=st.lists(st.lists(numbers, min_size=1, max_size=8), min_size=1, max_size=3),
    leaves_after=st.lists(st.none() | st.integers(0, 4), min_size=3, max_size=3),
    priorities=st.lists(st.integers(-1, 1), min_size=3, max_size=3),
    num_rows=st.integers(MAX_LEN, 400),
    max_num_seqs=st.integers(1, 6),
    max_prefill_tokens=st.integers(16, 200),
    max_flights=st.integers(0, 3),
    patience=st.integers(0, 5),
    keeps_prefixes=st.booleans(),
)


@pytest.fixture(scope="module")
def small(tiny_folder: Path) -> Iterator[LLM]:
    llm = LLM(str(tiny_folder), max_model_len=MAX_LEN, limit_mm_per_prompt={"image": 2})
    yield llm
    llm.close()


@pytest.fixture(scope="module")
def expected(small: LLM) -> list[list[tuple[int, ...]]]:
    """What each of POOL is answered when it is alone."""
    found = []
    for request in POOL:
        (result,) = small.generate(request, use_tqdm=False)
        assert result.error is None
        found.append([tuple(output.token_ids) for output in result.outputs])
    return found


@settings(max_examples=NUM_SCHEDULES, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(schedule=schedules)
def test_tokens_do_not_depend_on_the_schedule(
    small: LLM, expected: list[list[tuple[int, ...]]], schedule: Schedule
) -> None:
    engine = small.engine
    small.reset_mm_cache()
    engine._scheduler = Scheduler(
        SlabAllocator(16 + schedule.num_rows),
        schedule.max_num_seqs,
        schedule.max_prefill_tokens,
        schedule.patience,
    )
    engine._max_flights = schedule.max_flights
    engine._processor._keeps_prefixes = schedule.keeps_prefixes
    streams = []
    for number, members in enumerate(schedule.streams):
        asked = [
            replace(POOL[n], request_id=f"{place} {n}", priority=schedule.priorities[number])
            for place, n in enumerate(members)
        ]
        streams.append((small.stream(asked), schedule.leaves_after[number], len(members)))
    results = []
    while streams:
        stream, leaves_after, num_left = streams.pop(0)
        if leaves_after == 0 or num_left == 0:
            stream.close()  # type: ignore[attr-defined]
            continue
        results.append(next(stream))
        streams.append((stream, None if leaves_after is None else leaves_after - 1, num_left - 1))

    for result in results:
        assert result.error is None
        number = int(result.request_id.split()[1])
        assert expected[number] == [tuple(output.token_ids) for output in result.outputs]
    assert_idle(engine)
