"""On a GPU, prompts that go on from rows that are there say what whole ones say."""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine import LLM, Request, SamplingParams
from engine.sequence import Sequence as Running
from tests.engine.pictures import PICTURE, draw
from tests.engine.tiny import WIDE_HEADS, write_tiny_qwen2_vl
from tests.engine.ways import in_pieces, keeping_prefixes

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

ONE = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)


@pytest.fixture(params=["auto", "fp8", "wide heads"])
def llm(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[LLM]:
    is_wide = request.param == "wide heads"
    folder = write_tiny_qwen2_vl(tmp_path, seed=1, **(WIDE_HEADS if is_wide else {}))
    with LLM(
        str(folder),
        dtype="bfloat16",
        device="cuda",
        kv_cache_memory_bytes=1 << 28,
        kv_cache_dtype="auto" if is_wide else request.param,
    ) as llm:
        yield llm


def questions() -> list[Request]:
    return [
        Request(
            prompt=f"{'You see. ' * 9}{PICTURE}{'and so on ' * number}{number}",
            multi_modal_data={"image": draw(1, 200, 150)},
            params=ONE,
            request_id=str(number),
        )
        for number in range(12)
    ]


def logits_of(
    llm: LLM, asked: Sequence[Request], monkeypatch: pytest.MonkeyPatch
) -> dict[str, Tensor]:
    """After each prompt."""
    found: dict[str, Tensor] = {}
    with monkeypatch.context() as patch:
        prefill = llm.engine._runner.prefill

        def recorded(sequences: Sequence[Running]) -> Tensor:
            logits = prefill(sequences)
            read = [sequence for sequence in sequences if sequence.is_read]
            for sequence, row in zip(read, logits.float().cpu(), strict=True):
                found[str(sequence.prepared.prompt)] = row
            return logits

        patch.setattr(llm.engine._runner, "prefill", recorded)
        results = list(llm.stream(asked))
    assert [] == [result.error for result in results if result.error]
    return found


@pytest.mark.parametrize("way", ["in pieces", "from kept rows"])
def test_logits_are_those_of_whole_prompts(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    asked = questions()
    expected = logits_of(llm, asked, monkeypatch)
    pieces = in_pieces(llm, 64) if way == "in pieces" else nullcontext()
    kept = keeping_prefixes(llm) if way == "from kept rows" else nullcontext()
    with pieces, kept:
        for _ in range(4):  # calls whose shapes come back are replays
            found = logits_of(llm, asked, monkeypatch)
            assert expected.keys() == found.keys()
            for name, row in expected.items():
                assert torch.cosine_similarity(row, found[name], dim=-1).item() > 0.999
    prefills = llm.engine._runner._prefills
    assert prefills is not None
    assert not prefills.are_given_up


def test_kept_rows_outlive_those_who_wrote_them(llm: LLM) -> None:
    """While others decode in graphs, launched before the tokens of earlier steps were read."""
    params = replace(ONE, max_tokens=40)
    asked = [replace(request, params=params) for request in questions()]
    with keeping_prefixes(llm):
        first, again = ({r.request_id: r for r in llm.stream(asked)} for _ in range(2))

    for name, result in again.items():
        assert result.error is None
        assert (result.num_cached_tokens or 0) > (first[name].num_cached_tokens or 0) - 1
        assert (result.num_cached_tokens or 0) > 100
