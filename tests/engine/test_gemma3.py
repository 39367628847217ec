"""What of Gemma 3 tests/engine/families.py does not say: checkpoints that would answer otherwise."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from engine import LLM
from engine.errors import BadConfig
from tests.engine.tiny_llava import GEMMA, write_tiny_text

DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
PARTIAL = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
DEFAULT = {"rope_type": "default", "rope_theta": 1e4}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"rope_parameters": {"full_attention": DYNAMIC, "sliding_attention": DEFAULT}},
            r"positions are of the type 'dynamic', which changes with the length",
        ),
        (
            {"model_type": "phi3", "rope_parameters": PARTIAL},
            r"turn a part of each head only \(partial_rotary_factor\)",
        ),
        ({"use_bidirectional_attention": True}, r"it makes embeddings and no answers"),
        ({"final_logit_softcapping": 30.0}, r"bounds its scores \(final_logit_softcapping\)"),
    ],
)
def test_text_model_that_would_answer_otherwise_is_refused(
    tmp_path: Path, changes: Mapping[str, Any], said: str
) -> None:
    text = {"model_type": "gemma3_text", **GEMMA, **changes}
    if "rope_parameters" in changes:
        text = {name: value for name, value in text.items() if name != "rope_scaling"}
    write_tiny_text(tmp_path, changes={"text": text})

    with pytest.raises(BadConfig, match=said):
        LLM(str(tmp_path))
