"""
Whether anything stays behind of requests that have ended: `python -m bench.leaks`.

Streams requests of all kinds through one engine with a tiny random model, and lets about half of them
leave at some moment: while they are read, while they wait, while they are written. After each block
the engine must be as it was before: no request, no row, no slot, no pixels; and memory must not
grow once all caches are full. One JSON line to stdout for each block and one for the verdict; the
exit code is 1 where something grows or is held.
"""

import argparse
import ctypes
import gc
import heapq
import io
import json
import logging
import os
import random
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Final

import numpy as np
import torch
from PIL import Image

from bench.configs import write_model
from bench.workloads import picture_jpeg
from engine import LLM, Request, SamplingParams
from engine.engine import Engine
from media.pool import DecoderPool

NUM_KNOWN: Final = 48  # pictures that come again and again
MAX_PICTURES: Final = 4
SIDES_PX: Final = 20, 220
LEAVE_S: Final = 0.5
LONG: Final = 400  # tokens that those who leave ask for, so that few are done before
SETTLE_S: Final = 10.0  # for what is under way in media threads to end
FEW_BYTES: Final = 256 << 10  # of encoded pictures that are kept: full long before the warm-up ends
WARM_UP_PART: Final = 4  # one of so many parts of the blocks
# What may be gained per 1,000 requests, and over all, where so few were asked that it is noise.
MAX_GROWN: Final = {
    "rss_bytes": (1 << 20, 24 << 20),
    "child_rss_bytes": (1 << 20, 24 << 20),
    "device_bytes": (64 << 10, 1 << 20),
    "heap_held_bytes": (512 << 10, 8 << 20),
    "python_blocks": (100, 1500),
}
NOTHING: Final = (
    "requests",
    "preparing",
    "prepared",
    "flights",
    "waiting",
    "running",
    "rows_held",
    "slots_held",
    "queued_bytes",
    "decoder_bytes",
)


@dataclass(frozen=True, slots=True)
class Look:
    """
    What is there when nobody waits for anything.

    Attributes:
        asked: requests so far; of them `left` had no result, `refused` were bad and ended in an error.
        lost: that nobody made leave and that had no result; failed: good ones that ended in an error.
        rss_bytes, child_rss_bytes: resident memory of this process and of its decoder processes.
        device_bytes: that torch has allocated on a GPU; 0 on a CPU.
        threads: without the engine's media threads, which are started when they are first needed.
        heap_held_bytes, heap_free_bytes: of the C library's allocator, which PyTorch's tensors on a CPU
            come from: what somebody holds, and what it keeps for whoever comes. The second is no
            leak, but is resident memory as well. 0 where it is not glibc's.
        python_blocks: of Python's own allocator, a small object each.
        decoder_bytes: pixels of decoder processes that somebody holds.
    """

    asked: int
    left: int
    refused: int
    lost: int
    failed: int
    rss_bytes: int
    child_rss_bytes: int
    device_bytes: int
    heap_held_bytes: int
    heap_free_bytes: int
    python_blocks: int
    descriptors: int
    threads: int
    requests: int
    preparing: int
    prepared: int
    flights: int
    waiting: int
    running: int
    rows_held: int
    slots_held: int
    queued_bytes: int
    decoder_bytes: int
    encoder_cache_bytes: int
    rendered_bytes: int


@dataclass(slots=True)
class Count:
    """Of requests, over all blocks."""

    asked: int = 0
    left: int = 0
    refused: int = 0
    lost: int = 0
    failed: int = 0


@dataclass(slots=True)
class Stream:
    """The requests of one stream: which were asked, and which of them will leave or are bad."""

    asked: set[str] = field(default_factory=set)
    leaving: set[str] = field(default_factory=set)
    bad: set[str] = field(default_factory=set)


class Leavers:
    """Takes requests out of an engine, each when its time has come, from a thread of its own."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._due: list[tuple[float, str]] = []  # a heap, by time.monotonic
        self._changed = threading.Condition()
        self._is_over = False
        self._thread = threading.Thread(target=self._run, name="leavers")
        self._thread.start()

    def add(self, request_id: str, delay_s: float) -> None:
        with self._changed:
            heapq.heappush(self._due, (time.monotonic() + delay_s, request_id))
            self._changed.notify()

    def close(self) -> None:
        with self._changed:
            self._is_over = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                if self._is_over:
                    return
                left_s = self._due[0][0] - time.monotonic() if self._due else None
                if left_s is None or left_s > 0:
                    self._changed.wait(left_s)
                    continue
                request_id = heapq.heappop(self._due)[1]
            self._engine.abort_named({request_id})


class Campaign:
    """
    Args:
        llm: has no other requests.
        seed: of what is asked; when somebody leaves depends on the machine as well.
        leave_s: who leaves does so within this time after it was asked.
    """

    def __init__(self, llm: LLM, seed: int = 0, leave_s: float = LEAVE_S) -> None:
        self._llm = llm
        self._leave_s = leave_s
        self._rng = random.Random(seed)
        self._known = [self._draw_jpeg() for _ in range(NUM_KNOWN)]
        self.count = Count()

    def run(self, num: int, block: int) -> Iterator[Look]:
        """Ask for `num` requests; a look after each `block` of them."""
        leavers = Leavers(self._llm.engine)
        gc.collect()
        gc.freeze()  # what was there before need not be looked through each time
        try:
            while self.count.asked < num:
                goal = min(num, self.count.asked + block)
                while self.count.asked < goal:
                    self._stream(goal - self.count.asked, leavers)
                yield look(self._llm, self.count)
        finally:
            gc.unfreeze()
            leavers.close()

    def _stream(self, most: int, leavers: Leavers) -> None:
        rng, stream, count = self._rng, Stream(), self.count
        num = min(most, rng.randint(20, 200))
        # The last of a block always: nothing comes behind it that could clear away what it leaves.
        closes_after = rng.randrange(num) if num == most or rng.random() < 0.25 else None
        results = self._llm.stream(self._requests(num, stream, leavers))
        answered: set[str] = set()
        for result in results:
            answered.add(result.request_id)
            if result.error is not None:
                is_bad = result.request_id in stream.bad
                count.refused += is_bad
                count.failed += not is_bad
            if closes_after is not None and len(answered) > closes_after:
                break
        results.close()  # type: ignore[attr-defined]
        wait_until(lambda: "feed" not in {thread.name for thread in threading.enumerate()})
        silent = stream.asked - answered
        count.asked += len(stream.asked)
        count.left += len(silent)
        if closes_after is None:
            count.lost += len(silent - stream.leaving)

    def _requests(self, num: int, stream: Stream, leavers: Leavers) -> Iterator[Request]:
        for index in range(num):
            request_id = str(self.count.asked + index)
            is_bad, leaves = self._rng.random() < 0.05, self._rng.random() < 0.5
            stream.asked.add(request_id)
            if is_bad:
                stream.bad.add(request_id)
            yield self._request(request_id, is_bad, leaves)
            if leaves:
                stream.leaving.add(request_id)
                leavers.add(request_id, self._rng.uniform(0, self._leave_s))

    def _request(self, request_id: str, is_bad: bool, leaves: bool) -> Request:
        rng = self._rng
        text = f"{request_id} " + "what is shown here? " * rng.randint(0, 6)
        content: list[dict[str, Any]] = [{"type": "text", "text": text}]
        if is_bad:
            content.append({"type": "image", "image": self._draw_bad()})
        elif rng.random() < 0.1:
            content.append({"type": "video", "video": self._draw_clip()})
        else:
            for _ in range(rng.choice((0, 1, 1, 1, 2, MAX_PICTURES))):
                content.append({"type": "image", "image": self._picture()})
        if rng.random() < 0.3:  # the same question again and again
            content[0]["text"] = "Describe."
        num_outputs = 3 if rng.random() < 0.1 else 1
        params = SamplingParams(
            temperature=float(num_outputs > 1 or rng.random() < 0.5),
            n=num_outputs,
            max_tokens=LONG if leaves else rng.choice((1, 4, 16)),
            ignore_eos=leaves,
            stop=rng.choice((None, None, ["a", "bc"])) if not leaves else None,
            logprobs=rng.choice((None, None, 2)),
            repetition_penalty=rng.choice((1.0, 1.0, 1.2)),
        )
        return Request(
            messages=[{"role": "user", "content": content}],
            params=params,
            request_id=request_id,
            priority=rng.randrange(2),
        )

    def _picture(self) -> Any:
        """One that was there before, or another one; as bytes, as a callable or decoded."""
        rng = self._rng
        if rng.random() < 0.5:
            return rng.choice(self._known)
        if rng.random() < 0.5:
            return self._draw()
        encoded = self._draw_jpeg()
        return encoded if rng.random() < 0.5 else lambda: encoded

    def _draw_jpeg(self) -> bytes:
        rng = self._rng
        return picture_jpeg(rng.getrandbits(32), rng.randint(*SIDES_PX), rng.randint(*SIDES_PX))

    def _draw(self) -> Image.Image:
        rng = self._rng
        cells = np.random.default_rng(rng.getrandbits(32)).integers(0, 256, (4, 4, 3), np.uint8)
        return Image.fromarray(cells).resize((rng.randint(*SIDES_PX), rng.randint(*SIDES_PX)))

    def _draw_clip(self) -> Any:
        frames = [self._draw().resize((84, 56)) for _ in range(self._rng.randint(2, 5))]
        if self._rng.random() < 0.5:
            return frames
        file = io.BytesIO()
        frames[0].save(file, "GIF", save_all=True, append_images=frames[1:], duration=100)
        return file.getvalue()

    def _draw_bad(self) -> Any:
        encoded = self._rng.choice(self._known)
        return self._rng.choice((b"not a picture", encoded[: len(encoded) // 3], _raise))


def _raise() -> bytes:
    raise ValueError("a callable that cannot bring its picture")


def look(llm: LLM, count: Count) -> Look:
    """What is there, once media threads have ended what nobody waits for any more."""
    engine = llm.engine
    wait_until(lambda: not any(_held(engine).values()))
    gc.collect()
    device = engine.checkpoint.device
    heap = read_heap() or Heap(0, 0)
    decoder = engine._decoder
    pids = [c.process.pid for c in decoder._children] if isinstance(decoder, DecoderPool) else []
    return Look(
        **asdict(count),
        rss_bytes=_rss_bytes("self"),
        child_rss_bytes=sum(_rss_bytes(str(pid)) for pid in pids),
        device_bytes=torch.cuda.memory_allocated(device) if device.type == "cuda" else 0,
        heap_held_bytes=heap.held_bytes,
        heap_free_bytes=heap.free_bytes,
        python_blocks=sys.getallocatedblocks(),
        descriptors=len(list(Path("/proc/self/fd").iterdir())),
        threads=sum(not t.name.startswith("media") for t in threading.enumerate()),
        **_held(engine),
        encoder_cache_bytes=engine._runner.cache.num_bytes,
        rendered_bytes=engine._processor._rendered.num_bytes,
    )


def _held(engine: Engine) -> dict[str, int]:
    """Everything that an engine holds for requests: all 0 when there are none."""
    scheduler, decoder = engine._scheduler, engine._decoder
    decoder_bytes = 0
    if isinstance(decoder, DecoderPool):
        with decoder._lock:
            decoder._clear()
            decoder_bytes = decoder._held_bytes + decoder._working_bytes
    return {
        "requests": len(engine._tickets),
        "preparing": len(engine._preparing),
        "prepared": len(engine._prepared),
        "flights": len(engine._flights),
        "waiting": scheduler.num_waiting,
        "running": scheduler.num_running,
        "rows_held": scheduler._slabs.largest_slab - scheduler._slabs.num_free_rows,
        "slots_held": scheduler._max_num_seqs - len(scheduler._free_slots),
        "queued_bytes": engine._prepared_bytes,
        "decoder_bytes": decoder_bytes,
    }


@dataclass(frozen=True, slots=True)
class Heap:
    """Of this process, in bytes: what is in use, and what was let go and is kept."""

    held_bytes: int
    free_bytes: int


class _Mallinfo(ctypes.Structure):
    """`struct mallinfo2` of glibc 2.33 and later: its ten fields, in their order."""

    _fields_: ClassVar = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    ]


def read_heap() -> Heap | None:
    """What the C library's allocator has; None where it cannot be asked."""
    mallinfo = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if mallinfo is None:
        return None
    mallinfo.restype = _Mallinfo
    found = mallinfo()
    # Large blocks are mapped one by one, and are no part of the arenas.
    return Heap(found.uordblks + found.hblkhd, found.fordblks)


def wait_until(is_so: Callable[[], bool]) -> None:
    """Until then, or SETTLE_S: what is not so by then is found by whoever looks."""
    give_up = time.monotonic() + SETTLE_S
    while not is_so() and time.monotonic() < give_up:
        time.sleep(0.005)


def _rss_bytes(process: str) -> int:
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE")


def slope(values: Sequence[float], places: Sequence[float]) -> float:
    """The median of the slopes between any two: one odd value moves it little (Theil and Sen)."""
    slopes = sorted(
        (values[j] - values[i]) / (places[j] - places[i])
        for i in range(len(values))
        for j in range(i + 1, len(values))
    )
    middle = len(slopes) // 2
    return (slopes[middle] + slopes[~middle]) / 2


def judge(
    looks: Sequence[Look], *, max_cache_bytes: int = FEW_BYTES
) -> tuple[dict[str, float], list[str]]:
    """
    Args:
        looks: four or more; the first quarter of them is the warm-up.

    Returns:
        What was gained per 1,000 requests after the warm-up, and what is wrong, in words.
    """
    wrong = [
        f"{name}={getattr(each, name)} after {each.asked} requests"
        for each in looks
        for name in (*NOTHING, "lost", "failed")
        if getattr(each, name)
    ]
    warm = looks[len(looks) // WARM_UP_PART :]
    asked = [each.asked for each in warm]
    span = asked[-1] - asked[0]
    gained = {}
    for name, (per_thousand, in_all) in MAX_GROWN.items():
        grown = slope([getattr(each, name) for each in warm], asked)
        gained[name] = round(grown * 1000, 1)
        if grown * span > max(per_thousand * span / 1000, in_all):
            wrong.append(f"{name} grew by {grown * 1000:.0f} per 1,000 requests")
    for name in ("descriptors", "threads"):
        if getattr(warm[-1], name) > getattr(warm[0], name):
            wrong.append(f"{name} grew from {getattr(warm[0], name)} to {getattr(warm[-1], name)}")
    if looks[-1].encoder_cache_bytes > max_cache_bytes:
        wrong.append(f"the encoder cache holds {looks[-1].encoder_cache_bytes} bytes")
    return gained, wrong


def main() -> None:
    options = _options()
    logging.disable(logging.ERROR)  # bad callables would be told one by one
    with (
        tempfile.TemporaryDirectory() as folder,
        open_llm(Path(folder), options.device, options.media_processes) as llm,
    ):
        started, looks = time.perf_counter(), []
        for each in Campaign(llm, options.seed).run(options.num, options.block):
            looks.append(each)
            took_s = round(time.perf_counter() - started, 1)
            print(json.dumps({**asdict(each), "took_s": took_s}), flush=True)
    gained, wrong = judge(looks)
    print(json.dumps({"is_flat": not wrong, "gained_per_1000": gained, "wrong": wrong[:20]}))
    sys.exit(1 if wrong else 0)


def open_llm(folder: Path, device: str, num_media_processes: int) -> LLM:
    """A tiny random model, with caches so small that they are full soon."""
    return LLM(
        str(write_model("tiny-1m", folder)),
        device=device,
        load_format="dummy",
        max_model_len=1024,
        max_num_seqs=32,
        limit_mm_per_prompt={"image": MAX_PICTURES, "video": 1},
        encoder_cache_bytes=FEW_BYTES,
        num_media_processes=num_media_processes,
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--num", type=int, default=20_000, help="requests")
    add("--block", type=int, default=1000, help="requests between two looks")
    add("--device", default="cpu")
    add("--media-processes", type=int, default=0, help="decode in so many processes")
    add("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.block < 1 or options.num < 4 * options.block:
        parser.error("--num must be four times --block or more")
    return options


if __name__ == "__main__":
    main()
