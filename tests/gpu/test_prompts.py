"""Prompts that a kernel of ours attends to say what they say with torch's FlashAttention."""

from pathlib import Path

import pytest
import torch

from engine import LLM
from engine.kernels import prompts
from tests.engine.tiny import WIDE_HEADS, write_tiny_qwen2_vl
from tests.gpu.test_prefixes import logits_of, questions

pytestmark = pytest.mark.gpu


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
    reason="a kernel for Hopper",
)
@pytest.mark.parametrize("is_eager", [False, True], ids=["graphs", "eager"])
def test_logits_are_those_of_flash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_eager: bool
) -> None:
    folder = write_tiny_qwen2_vl(tmp_path, seed=1, **WIDE_HEADS)

    def build() -> LLM:
        return LLM(
            str(folder),
            dtype="bfloat16",
            device="cuda",
            kv_cache_memory_bytes=1 << 28,
            enforce_eager=is_eager,
        )

    with monkeypatch.context() as patch:
        patch.setattr("engine.runner.find_prefill_attention", lambda *_: None)
        with build() as llm:
            expected = logits_of(llm, questions(), monkeypatch)
    with build() as llm:
        runner = llm.engine._runner
        assert runner._prefill_kernel is prompts.attend
        calls = [logits_of(llm, questions(), monkeypatch) for _ in range(4)]

        assert is_eager or (runner._prefills is not None and runner._prefills.num_graphs > 0)
        for found in calls:  # the first run as they are, the others replays of graphs
            assert expected.keys() == found.keys()
            for name, row in expected.items():
                assert torch.cosine_similarity(row, found[name], dim=-1).item() > 0.999
