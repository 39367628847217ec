"""Nothing is left of a request that has ended, however it ended."""

import gc
import random
import weakref
from collections import Counter
from pathlib import Path

from engine import LLM, Request, SamplingParams
from tests.engine.conftest import LIMITS
from tests.engine.idle import assert_idle
from tests.engine.test_engine import random_request

NUM_ROUNDS, NUM_REQUESTS = 5, 36


def count_objects() -> Counter[str]:
    gc.collect()
    return Counter(
        type(thing).__name__
        for thing in gc.get_objects()
        if str(type(thing).__module__).split(".")[0] in ("engine", "media", "torch", "concurrent")
    )


def test_objects_stay_as_many_after_requests_of_all_kinds(tiny_folder: Path) -> None:
    """Half of them leave before they are done."""
    llm = LLM(str(tiny_folder), limit_mm_per_prompt=LIMITS, max_num_seqs=16, encoder_cache_bytes=0)
    llm.engine._max_flights = 2
    counts = []
    for number in range(NUM_ROUNDS):
        rng = random.Random(number)
        asked = [random_request(rng, str(name)) for name in range(NUM_REQUESTS)]
        asked.append(Request(prompt="long", params=SamplingParams(max_tokens=200, ignore_eos=True)))
        stream = llm.stream(asked)
        for _ in range(NUM_REQUESTS // 2):
            next(stream)
        stream.close()  # type: ignore[attr-defined]
        assert_idle(llm.engine)
        del stream, asked
        llm.generate("the last batches land", use_tqdm=False)
        counts.append(count_objects())
    llm.close()

    grown = {name: [count[name] for count in counts[1:]] for name in counts[-1]}
    leaking = {name: of for name, of in grown.items() if of == sorted(of) and of[0] + 3 < of[-1]}
    assert {} == leaking


class Broken:
    """A picture that cannot be read."""

    def __call__(self) -> bytes:
        return b"not a picture"


def test_what_a_refused_request_brought_goes_without_a_garbage_collection(llm: LLM) -> None:
    source = Broken()
    leftover = weakref.ref(source)
    messages = [{"role": "user", "content": [{"type": "image", "image": source}]}]
    gc.collect()
    gc.disable()
    try:
        (result,) = llm.chat(messages, use_tqdm=False)
        del source, messages

        assert result.error is not None
        assert leftover() is None
    finally:
        gc.enable()
