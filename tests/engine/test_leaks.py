"""Nothing is left of a request that has ended, however it ended."""

import gc
import random
import threading
import time
import weakref
from collections import Counter, deque
from pathlib import Path

from PIL import Image

from engine import LLM, Request, SamplingParams
from tests.engine.conftest import LIMITS
from tests.engine.idle import assert_idle
from tests.engine.pictures import draw
from tests.engine.test_engine import random_request
from tests.waiting import wait_until

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
        wait_until(lambda: leftover() is None)  # the thread that read it may be about to return
    finally:
        gc.enable()


def test_what_left_is_let_go_by_an_engine_that_has_nothing_else_to_do(llm: LLM) -> None:
    """No step comes that could clear away what media threads have made of it meanwhile."""
    may_go = threading.Event()

    def wait() -> Image.Image:
        assert may_go.wait(60)
        return draw(1)

    messages = [{"role": "user", "content": [{"type": "image", "image": wait}]}]
    stream = llm.stream([Request(prompt="first"), Request(messages=messages)])
    next(stream)
    (future,) = llm.engine._preparing
    stream.close()  # type: ignore[attr-defined]
    may_go.set()
    future.result(timeout=60)
    leftover = weakref.ref(future)
    del future
    deadline = time.monotonic() + 60
    while leftover() is not None and time.monotonic() < deadline:
        time.sleep(0.001)
        gc.collect()

    assert leftover() is None
    assert not llm.engine._prepared


def test_pictures_of_batches_in_the_air_go_with_the_last_who_waits(tiny_folder: Path) -> None:
    llm = LLM(str(tiny_folder), limit_mm_per_prompt=LIMITS)
    engine = llm.engine
    engine._max_flights = 2
    engine.add(
        Request(prompt="long", params=SamplingParams(max_tokens=200, ignore_eos=True)), deque()
    )
    deadline = time.monotonic() + 60
    while not engine._flights and time.monotonic() < deadline:
        with engine._turn():
            engine._step()
    num_flying = len(engine._flights)
    engine.abort(list(engine._tickets))

    assert num_flying
    assert not engine._flights
    assert_idle(engine)
    assert llm.generate("goes on", use_tqdm=False)[0].error is None
    llm.close()
