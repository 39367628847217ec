"""
A GPU's way of calling, on a CPU: sizes rounded up, prompts told apart on the device, and calls that
are recorded once and repeated over the same memory. The kernels alone are others there.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from engine import LLM, Request, SamplingParams
from engine import engine as engine_module
from engine.attention import TextContext
from engine.kernels import decode, prompts
from engine.uploads import Download
from tests.engine.conftest import LIMITS
from tests.engine.families import CASES
from tests.engine.families import mixed as mixed_of
from tests.engine.idle import assert_idle
from tests.engine.test_flights import answers, mixed
from tests.engine.test_prefixes import questions
from tests.engine.test_recorder import Hands
from tests.engine.tiny import write_tiny_qwen2_vl
from tests.engine.tiny_qwen import QWEN3_VL_OTHER, write_tiny_qwen
from tests.engine.ways import read_late

# Of an engine, and whether our own kernels take decode steps and prompts from flash.
WAYS: dict[str, tuple[dict[str, Any], bool]] = {
    "whole": ({}, False),
    "pieces": ({"max_num_batched_tokens": 40}, True),
    "prefixes": ({"enable_prefix_caching": True, "max_num_batched_tokens": 60}, False),
    "deterministic": ({"deterministic": True}, True),
}


def attend_flash(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    context: TextContext,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    """torch's FlashAttention over slabs, as far as it is told on the device; other rows are no numbers."""
    assert context.device_spans is not None
    query_starts, slab_starts, lens = (spans.tolist() for spans in context.device_spans)
    queries = query[0].transpose(0, 1)
    attended = torch.full_like(queries, torch.nan)
    for index, length in enumerate(lens):
        span, start = slice(*query_starts[index : index + 2]), slab_starts[index]
        size = span.stop - span.start
        assert size <= min(length, context.max_queries or 0)
        assert length <= (context.max_rows or 0)
        if size:
            rows = torch.arange(length - size, length)[:, None]
            columns = torch.arange(length)
            is_seen = (columns <= rows) & (columns > rows - (window or length))
            attended[span] = F.scaled_dot_product_attention(
                queries[span].transpose(0, 1),
                keys[start : start + length].transpose(0, 1),
                values[start : start + length].transpose(0, 1),
                attn_mask=is_seen,
                scale=scaling,
                enable_gqa=True,
            ).transpose(0, 1)
    return attended[None]


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path, str], LLM]:
    """An engine that takes its CPU for a GPU."""
    monkeypatch.setattr("engine.attention._attend_flash", attend_flash)
    monkeypatch.setattr("engine.runner.can_use_flash", lambda *_: True)
    monkeypatch.setattr("engine.runner.Recorder", lambda *_: Hands())
    # A copy that is queued before the next call: here it would share memory with what that writes.
    monkeypatch.setattr(engine_module, "Download", lambda tensor: Download(tensor.clone()))

    def build(folder: Path, way: str) -> LLM:
        words, has_kernels = WAYS[way]
        kernels = (decode.attend, prompts.attend) if has_kernels else (None, None)
        monkeypatch.setattr("engine.runner.find_decode_attention", lambda *_: kernels[0])
        monkeypatch.setattr("engine.runner.find_prefill_attention", lambda *_: kernels[1])
        llm = LLM(
            str(folder),
            limit_mm_per_prompt=LIMITS,
            max_num_seqs=8,
            **words,
        )
        read_late(llm)
        return llm

    return build


def write_qwen2_vl(folder: Path) -> tuple[Path, list[Request]]:
    return write_tiny_qwen2_vl(folder, seed=1), mixed(1)[:5] + questions(1, 3)


def write_qwen3_vl(folder: Path) -> tuple[Path, list[Request]]:
    """Whose pictures add to what later layers give."""
    return write_tiny_qwen(folder, QWEN3_VL_OTHER, seed=3), mixed(2)[:5] + questions(2, 3)


def write_gemma3(folder: Path) -> tuple[Path, list[Request]]:
    """Whose pictures see both ways, and some of whose layers look back a little only."""
    case = CASES["gemma3, windows shorter than a picture"]
    written = case.write(folder, seed=3, changes=case.changes)
    return written, [one.request() for one in mixed_of(case, 10, "recorded")]


@dataclass(frozen=True, slots=True)
class Told:
    """A checkpoint, and what an engine says that takes its CPU for one."""

    folder: Path
    asked: list[Request]
    expected: dict[str, Any]


@pytest.fixture(scope="module", params=[write_qwen2_vl, write_qwen3_vl, write_gemma3])
def told(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Told:
    folder, asked = request.param(tmp_path_factory.mktemp("recorded"))
    with LLM(str(folder), limit_mm_per_prompt=LIMITS) as llm:
        return Told(folder, asked, answers(list(llm.stream(asked))))


def draws() -> list[Request]:
    """Of every kind that a graph draws, several outputs of some; one takes the likeliest."""
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 0.7},
        {"top_k": 5, "n": 3},
        {"top_p": 0.8},
        {"min_p": 0.1, "temperature": 1.5, "n": 2},
        {"top_k": 20, "top_p": 0.9, "min_tokens": 4},
    ]
    return [
        Request(
            prompt="x" * number,
            params=SamplingParams(max_tokens=6 + number, ignore_eos=True, seed=number, **kind),
            request_id=str(number),
        )
        for number, kind in enumerate(kinds + kinds, start=1)
    ]


def test_graphs_draw_what_is_drawn_by_hand_with_any_neighbours(
    told: Told, build: Callable[[Path, str], LLM]
) -> None:
    asked = draws()
    penalised = Request(
        prompt="p",
        params=SamplingParams(temperature=0.0, presence_penalty=0.5, max_tokens=8, ignore_eos=True),
        request_id="penalised",
    )
    with LLM(str(told.folder), limit_mm_per_prompt=LIMITS) as llm:
        expected = answers(list(llm.stream([*asked, penalised])))
    alone = dict(expected)
    del alone["penalised"]
    with build(told.folder, "whole") as llm:
        assert alone == answers(list(llm.stream(asked)))
        assert expected == answers(list(llm.stream([penalised, *asked])))
        assert_idle(llm.engine)
        graphs = llm.engine._runner._graphs

        assert graphs is not None
        assert not graphs.are_given_up
        assert {(False, False), (False, True), (True, False)} == {key[2:] for key in graphs._graphs}


def test_graphs_draw_only_where_somebody_does(
    told: Told, build: Callable[[Path, str], LLM]
) -> None:
    params = SamplingParams(temperature=0.0, min_tokens=3, max_tokens=8, ignore_eos=True)
    asked = [Request(prompt="x" * n, params=params, request_id=f"{n}") for n in (1, 2, 3)]
    with LLM(str(told.folder), limit_mm_per_prompt=LIMITS) as llm:
        expected = answers(list(llm.stream(asked)))
    with build(told.folder, "whole") as llm:
        assert expected == answers(list(llm.stream(asked)))
        graphs = llm.engine._runner._graphs

        assert graphs is not None
        assert {(False, False), (True, False)} == {key[2:] for key in graphs._graphs}


def test_steps_without_a_graph_count_once(told: Told, build: Callable[[Path, str], LLM]) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True)
    with build(told.folder, "whole") as llm:
        graphs: Any = llm.engine._runner._graphs
        graphs._graphs.clear()
        graphs._recorder.error = torch.OutOfMemoryError("CUDA out of memory")
        llm.generate("x", params, use_tqdm=False)

        assert not graphs.are_given_up
        assert 4 == llm.engine.read_usage().num_tokens


@pytest.mark.parametrize("way", WAYS)
def test_recorded_calls_say_what_they_say_one_by_one(
    told: Told, build: Callable[[Path, str], LLM], way: str
) -> None:
    with build(told.folder, way) as llm:
        for seed in range(2):
            shuffled = random.Random(seed).sample(told.asked, len(told.asked))
            assert told.expected == answers(list(llm.stream(shuffled)))
        assert_idle(llm.engine)
        runner = llm.engine._runner

        assert runner._graphs is not None
        assert runner._graphs.num_graphs > 0
        assert not runner._graphs.are_given_up
        assert runner._prefills is not None
        assert not runner._prefills.are_given_up
        # Those with pictures that see both ways are run as they are.
        assert runner._prefills.num_graphs > 0 or runner._family.sees_both_ways


def test_a_prefill_is_filled_up_to_no_more_than_it_may_have(
    build: Callable[[Path, str], LLM], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a budget was chosen for, such as tiles that fill a GPU to the last, stays."""
    with build(write_tiny_qwen2_vl(tmp_path / "model", seed=1), "pieces") as llm:
        prefills, sizes = llm.engine._runner._prefills, []
        assert prefills is not None
        run = prefills.run

        def recorded(key: Any, *rest: Any) -> Tensor:
            sizes.append(key[0])
            return run(key, *rest)

        monkeypatch.setattr(prefills, "run", recorded)
        llm.generate(["x", "y" * 70], SamplingParams(max_tokens=2), use_tqdm=False)

    assert {40} == set(sizes)  # of tokens; sizes come in steps of 256
