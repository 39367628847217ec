"""A deterministic engine on a GPU: the same numbers to the last bit, alone and among others."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine import LLM
from tests.engine.test_determinism import Numbers, ask, build_requests
from tests.engine.tiny import WIDE_HEADS, Shape, write_tiny_qwen2_vl

pytestmark = pytest.mark.gpu


WAYS: dict[str, tuple[bool, Shape]] = {
    "graphs": (False, {}),
    "eager": (True, {}),
    "graphs, wide heads": (False, WIDE_HEADS),
    "eager, wide heads": (True, WIDE_HEADS),
}


@pytest.fixture(scope="module", params=WAYS)
def llm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    is_eager, shape = WAYS[request.param]
    folder: Path = write_tiny_qwen2_vl(tmp_path_factory.mktemp("models") / "tiny", seed=1, **shape)
    llm = LLM(
        str(folder),
        dtype="bfloat16",
        device="cuda",
        limit_mm_per_prompt={"image": 8, "video": 1},
        max_num_seqs=24,
        kv_cache_memory_bytes=1 << 28,
        encoder_cache_bytes=0,
        enforce_eager=is_eager,
        deterministic=True,
    )
    yield llm
    llm.close()


def test_a_request_does_not_depend_on_its_neighbours(llm: LLM) -> None:
    requests = build_requests(40)
    alone: dict[str, Numbers] = {}
    for request in requests:
        alone |= ask(llm, [request])
    shuffled = list(requests)
    random.Random(3).shuffle(shuffled)

    assert alone == ask(llm, requests)
    assert alone == ask(llm, shuffled)
