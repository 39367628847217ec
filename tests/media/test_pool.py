"""Decoding in processes: the same pixels as in threads, and what becomes of processes that misbehave."""

import errno
import gc
import json
import math
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from media import pool as pool_module
from media.decoded import Fit, Header
from media.errors import (
    DecodeMemoryError,
    DecoderFailedError,
    DecodersAwayError,
    DecodeTimeoutError,
    ImageTooLargeError,
    ImageUnreadableError,
    MediaError,
    VideoTooLargeError,
)
from media.images import can_read, decode_image
from media.limits import IMAGE_LIMITS, ImageLimits
from media.pool import DecoderPool, PoolClosedError
from tests.media.bad_child import OPENING
from tests.media.files import (
    animation,
    encode,
    exif,
    jpeg_that_says,
    picture,
    png,
    png_chunk,
)
from tests.waiting import wait_until

BAD_CHILD = "tests.media.bad_child:main"
NEVER_READY = "tests.media.bad_child:never_ready"
NUM_ITEMS = int(os.environ.get("DARKROOM_TEST_POOL_ITEMS", "200"))  # one in ten is bad

LIMIT_S = 120.0  # of what must not run into it, however busy the machine

WITH_TIFF = ImageLimits(formats=(*IMAGE_LIMITS.formats, "TIFF"))

linux = pytest.mark.skipif(sys.platform != "linux", reason="asks /proc")


@pytest.fixture(scope="module")
def pool() -> Iterator[DecoderPool]:
    with DecoderPool(2, image_limit_s=LIMIT_S) as pool:
        yield pool


@pytest.fixture(scope="module")
def bad_pool() -> Iterator[DecoderPool]:
    with DecoderPool(2, image_limit_s=LIMIT_S, entry=BAD_CHILD) as pool:
        yield pool


def half(header: Header) -> Fit:
    return Fit(max(header.width_px // 2, 1), max(header.height_px // 2, 1))


def lanczos(header: Header) -> Fit:
    return Fit(48, 31, Image.Resampling.LANCZOS)


def as_it_is(header: Header) -> Fit:
    return Fit(header.width_px, header.height_px)


def _late_exif() -> bytes:
    """A PNG whose orientation stands behind its pixels."""
    whole = encode(picture(), "PNG", exif=exif(6))
    at = whole.index(b"eXIf") - 4
    chunk = whole[at : at + 12 + int.from_bytes(whole[at : at + 4], "big")]
    rest = whole[:at] + whole[at + len(chunk) :]
    end = rest.index(b"IEND") - 4
    return rest[:end] + chunk + rest[end:]


def _mpo() -> bytes:
    return encode(picture(), "MPO", save_all=True, append_images=[picture(seed=1)])


FILES: dict[str, bytes] = {
    **{name: encode(picture(), name) for name in ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "AVIF")},
    **{f"JPEG turned {n}": encode(picture(), "JPEG", exif=exif(n)) for n in range(2, 9)},
    **{f"{name} turned": encode(picture(), name, exif=exif(6)) for name in ("WEBP", "PNG", "TIFF")},
    **{
        mode: encode(picture().convert(mode), "PNG")
        for mode in ("1", "L", "LA", "P", "RGBA", "I;16")
    },
    "AVIF turned": encode(picture(), "AVIF", exif=exif(6)),
    "PNG turned late": _late_exif(),
    "MPO": _mpo(),
    "progressive": encode(picture(), "JPEG", progressive=True),
    "CMYK": encode(picture().convert("CMYK"), "JPEG"),
    "colour key": png(2, 1, b"\0\x10\x20", before=png_chunk(b"tRNS", b"\0\x10")),
    "GIF": animation("GIF", [(255, 0, 0), (0, 255, 0)], duration=100),
    "one pixel": encode(picture(1, 1), "PNG"),
    "several strips": encode(picture(900, 1300), "JPEG"),
}


def drafted(header: Header) -> Fit:
    return Fit(12, 9, may_draft=True)


@pytest.mark.parametrize("ask", [None, half, lanczos, as_it_is, drafted])
@pytest.mark.parametrize("name", FILES)
def test_processes_give_the_pixels_that_threads_give(
    pool: DecoderPool, name: str, ask: Callable[[Header], Fit] | None
) -> None:
    expected = decode_image(FILES[name], WITH_TIFF, ask)

    found = pool.decode_image(FILES[name], WITH_TIFF, ask)

    assert np.array_equal(expected.pixels(), found.view())
    assert np.array_equal(expected.pixels(), np.asarray(found.image))
    assert (expected.width_px, expected.height_px) == (found.width_px, found.height_px)


@pytest.mark.parametrize("name", ["JPEG", "progressive", "CMYK", "several strips"])
def test_process_is_asked_for_a_plain_jpeg_in_one_turn(
    pool: DecoderPool, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    headers = []
    monkeypatch.setattr(pool_module, "_read_header", None)  # it would be called for a question

    def ask(header: Header) -> Fit:
        headers.append(header)
        return half(header)

    found = pool.decode_image(FILES[name], ask=ask)

    assert 1 == len(headers)
    expected = decode_image(FILES[name], ask=ask)
    assert headers[0] == headers[1]
    assert np.array_equal(expected.view(), found.view())


@pytest.mark.parametrize("guessed", [Header(60, 40, 7), Header(1, 1), Header(39, 40, 30_000_000)])
@pytest.mark.parametrize("name", ["JPEG", "PNG", "several strips", "JPEG turned 6"])
def test_wrong_guess_changes_nothing(
    pool: DecoderPool, monkeypatch: pytest.MonkeyPatch, name: str, guessed: Header
) -> None:
    headers = []
    monkeypatch.setattr(pool_module, "guess_header", lambda encoded: guessed)

    def ask(header: Header) -> Fit:
        headers.append(header)
        return half(header)

    found = pool.decode_image(FILES[name], ask=ask)

    expected = decode_image(FILES[name], ask=ask)
    assert [guessed, headers[2], headers[2]] == headers
    assert np.array_equal(expected.view(), found.view())
    assert pool.num_bytes == found.view().size


def test_wrong_guess_costs_no_memory_that_the_picture_needs(
    pool: DecoderPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded = encode(Image.new("RGB", (6000, 5000), (9, 99, 200)), "JPEG", progressive=True)
    monkeypatch.setattr(pool_module, "guess_header", lambda encoded: Header(6, 5, 300))

    assert 6000 == pool.decode_image(encoded).width_px


@pytest.mark.parametrize(
    "encoded",
    [
        b"",
        b"no picture",
        b"<svg/>",
        FILES["JPEG"][:-200],
        jpeg_that_says(60_000, 60_000),
        jpeg_that_says(0, 40),
        FILES["JPEG"][: FILES["JPEG"].index(b"\xff\xc0") + 6],
        FILES["PNG"][:60],
        FILES["WEBP"][:80],
        FILES["TIFF"],
        encode(picture(600, 2), "PNG"),
    ],
)
def test_bad_files_are_refused_in_the_same_words(pool: DecoderPool, encoded: bytes) -> None:
    pids = pool.pids
    with pytest.raises(MediaError) as in_thread:
        decode_image(encoded)

    with pytest.raises(MediaError) as in_process:
        pool.decode_image(encoded)

    assert type(in_thread.value) is type(in_process.value)
    assert str(in_thread.value) == str(in_process.value)
    assert pids == pool.pids


def test_limits_of_the_call_count(pool: DecoderPool) -> None:
    with pytest.raises(ImageTooLargeError, match="60x40"):
        pool.decode_image(FILES["PNG"], ImageLimits(max_pixels=1000))


def test_what_the_caller_raises_comes_back_and_costs_no_process(pool: DecoderPool) -> None:
    pids = pool.pids

    def refuse(header: Header) -> Fit:
        raise KeyError((header.width_px, header.height_px))

    for _ in range(4):
        with pytest.raises(KeyError, match="60, 40"):
            pool.decode_image(FILES["JPEG"], ask=refuse)
    assert pids == pool.pids


def test_pixels_are_kept_as_long_as_anybody_looks_at_them(pool: DecoderPool) -> None:
    wait_until(lambda: pool.num_bytes == 0)
    kept = pool.decode_image(FILES["JPEG"]).view()[5:, 3:].transpose(2, 0, 1)[1]
    before = kept.copy()

    for seed in range(20):
        pool.decode_image(encode(picture(seed=seed), "JPEG"))
    gc.collect()

    assert np.array_equal(before, kept)
    wait_until(lambda: pool.num_bytes == 60 * 40 * 3)
    del kept
    wait_until(lambda: pool.num_bytes == 0)


def test_pixels_outlive_the_pool() -> None:
    with DecoderPool(1) as pool:
        found = pool.decode_image(FILES["PNG"])

    assert np.array_equal(decode_image(FILES["PNG"]).view(), found.view())


def test_callers_may_hold_more_than_one_arena(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("media.pool.ARENA_BYTES", 64 << 10)
    with DecoderPool(1) as pool:
        held = [pool.decode_image(FILES["PNG"]) for _ in range(30)]  # 7 KB each

        assert pool.num_bytes == 30 * 60 * 40 * 3
    for image in held:
        assert np.array_equal(decode_image(FILES["PNG"]).view(), image.view())


def test_decodings_wait_for_room() -> None:
    large = encode(picture(1000, 1000), "JPEG")  # 9 MB of work, as its header says
    seen, over = [], threading.Event()

    with DecoderPool(2, max_bytes=11 << 20) as pool, ThreadPoolExecutor(4) as threads:

        def look() -> None:
            while not over.is_set():
                seen.append(pool.num_bytes)

        looking = threads.submit(look)
        done = list(threads.map(lambda _: pool.decode_image(large, ask=half).width_px, range(12)))
        over.set()
        looking.result()

    assert [500] * 12 == done
    assert 9_000_000 < max(seen) <= 11 << 20


def test_one_that_needs_more_than_there_is_goes_alone() -> None:
    with DecoderPool(2, max_bytes=1) as pool, ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda _: pool.decode_image(FILES["PNG"]), range(8)))

    assert 8 == len(found)


# --- processes that misbehave ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("encoded", "error"),
    [
        (b"CRASH", DecoderFailedError),
        (b"RAISE", DecoderFailedError),
        (b"LIES.", DecoderFailedError),
        (b"NEVER", DecoderFailedError),
        (b"HANG.", DecodeTimeoutError),
        (b"HOG..", DecodeMemoryError),
    ],
)
def test_misbehaving_process_is_the_error_of_its_file_and_is_replaced(
    bad_pool: DecoderPool,
    monkeypatch: pytest.MonkeyPatch,
    encoded: bytes,
    error: type[MediaError],
) -> None:
    wait_until(lambda: len(bad_pool.pids) == 2)
    before = bad_pool.pids
    if error is DecodeTimeoutError:
        monkeypatch.setattr(bad_pool, "_image_limit_s", 1.0)

    with pytest.raises(error) as caught:
        bad_pool.decode_image(encoded)

    assert error is type(caught.value)
    wait_until(lambda: len(bad_pool.pids) == 2)
    assert 1 == len(bad_pool.pids & before)
    assert bad_pool.num_bytes == 0
    monkeypatch.undo()
    assert bad_pool.decode_image(FILES["PNG"]).width_px == 60


def test_process_that_claims_a_size_over_the_limits_is_not_believed(bad_pool: DecoderPool) -> None:
    with pytest.raises(ImageTooLargeError):
        bad_pool.decode_image(b"LARGE")


def test_killed_process_is_replaced_while_nobody_asks(bad_pool: DecoderPool) -> None:
    wait_until(lambda: len(bad_pool.pids) == 2)
    before = bad_pool.pids

    os.kill(min(before), signal.SIGKILL)

    wait_until(lambda: len(bad_pool.pids - before) == 1)
    assert min(before) not in bad_pool.pids


@pytest.mark.parametrize(
    "times_s",
    [
        [],
        [0.5, 1.0],
        [0.0, 2.0, 1.0],
        [-1.0, 0.0],
        [0.0, math.nan],
        [0.0, math.inf],
        [0.0, 1],
        [0.0, "1.0"],
        [0.0, 10**400],
    ],
)
def test_times_of_a_clip_that_cannot_be_are_not_believed(
    bad_pool: DecoderPool, times_s: list[Any]
) -> None:
    with pytest.raises(DecoderFailedError):
        bad_pool.measure_clip(b"TIMES" + json.dumps(times_s).encode())


def test_process_killed_while_idle_costs_no_file_anything(bad_pool: DecoderPool) -> None:
    wait_until(lambda: len(bad_pool.pids) == 2)

    for pid in bad_pool.pids:
        os.kill(pid, signal.SIGKILL)

    assert bad_pool.decode_image(FILES["PNG"]).width_px == 60


def test_bad_files_harm_no_good_one(bad_pool: DecoderPool) -> None:
    bad = (b"CRASH", b"RAISE", b"HOG..", b"LIES.", b"no picture", FILES["JPEG"][:-200])
    files = [FILES["JPEG"]] * (NUM_ITEMS - NUM_ITEMS // 10)
    files += [bad[index % len(bad)] for index in range(NUM_ITEMS // 10)]
    random.Random(7).shuffle(files)
    expected = decode_image(FILES["JPEG"], ask=half).view()

    def read(encoded: bytes) -> bool:
        try:
            return np.array_equal(expected, bad_pool.decode_image(encoded, ask=half).view())
        except MediaError:
            return False

    with ThreadPoolExecutor(4) as threads:
        results = list(threads.map(read, files))

    assert [encoded is FILES["JPEG"] for encoded in files] == results


@linux
def test_process_can_reach_nothing(bad_pool: DecoderPool) -> None:
    with pytest.raises(ImageUnreadableError) as caught:
        bad_pool.decode_image(b"TRIES")

    came_of_it = json.loads(str(caught.value))
    stopped = {f"errno {errno.EPERM}", f"errno {errno.EMFILE}"}
    assert "done" == came_of_it.pop("nothing")
    assert ["KeyError", "KeyError"] == [came_of_it.pop("torch"), came_of_it.pop("secrets")]
    assert {name: found for name, found in came_of_it.items() if found not in stopped} == {}


@linux
def test_limits_alone_keep_a_process_from_network_and_files(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with DecoderPool(1, entry="tests.media.bad_child:unfiltered") as pool:
        for encoded in FILES.values():
            expected = decode_image(encoded, WITH_TIFF)
            assert np.array_equal(expected.view(), pool.decode_image(encoded, WITH_TIFF).view())
        with pytest.raises(ImageUnreadableError) as caught:
            pool.decode_image(b"OPENS")

    assert "decoder_not_filtered" in caplog.text
    came_of_it = json.loads(str(caught.value))
    assert dict.fromkeys(OPENING, f"errno {errno.EMFILE}") == came_of_it


@linux
def test_process_has_nothing_open_but_its_pipes_and_its_arena(pool: DecoderPool) -> None:
    pool.decode_image(FILES["JPEG"])

    for pid in pool.pids:
        opened = {str(fd.readlink()).partition(":")[0] for fd in Path(f"/proc/{pid}/fd").iterdir()}
        opened.discard(f"/proc/{pid}/statm")
        assert {"/dev/null", "pipe", "/memfd"} == opened
        environment = Path(f"/proc/{pid}/environ").read_bytes().decode()
        names = {line.partition("=")[0] for line in environment.split("\0") if line}
        assert "PATH" not in names
        assert all(
            name.startswith(("MALLOC_", "OMP_", "OPENBLAS_", "LD_LIBRARY")) for name in names
        )


def test_processes_that_never_started_are_told_at_once() -> None:
    with pytest.raises(DecodersAwayError, match="threads"):
        DecoderPool(1, entry=NEVER_READY)


@pytest.fixture
def empty_pool() -> Iterator[DecoderPool]:
    """It had a process, and none starts any more."""
    with DecoderPool(1, entry=BAD_CHILD) as pool:
        pool._entry = NEVER_READY
        for pid in pool.pids:
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: pool._num_starts_failed)
        yield pool


def test_file_waits_while_no_process_starts(
    empty_pool: DecoderPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool_module, "RETRY_START_S", 0.1)
    monkeypatch.setattr(pool_module, "STEADY_S", 1.0)
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(empty_pool.decode_image, FILES["JPEG"])
        wait_until(lambda: empty_pool._num_starts_failed > pool_module.MAX_STARTS_FAILED)
        assert not waiting.done()

        empty_pool._entry = BAD_CHILD

        assert waiting.result(120).pixels().any()
    wait_until(lambda: not empty_pool._num_starts_failed)


def test_file_waits_for_a_bounded_time(
    empty_pool: DecoderPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool_module, "GIVE_UP_S", 1.0)

    with pytest.raises(DecodersAwayError):
        empty_pool.decode_image(FILES["JPEG"])

    empty_pool._entry = BAD_CHILD
    wait_until(lambda: empty_pool._idle)
    assert empty_pool.decode_image(FILES["JPEG"]).pixels().any()


def test_each_start_that_fails_makes_the_next_pause_longer(empty_pool: DecoderPool) -> None:
    pauses_s = []
    for _ in range(20):
        empty_pool._next_start = 0.0
        empty_pool._note_failed_start()
        pauses_s.append(round(empty_pool._next_start - time.monotonic()))

    assert sorted(pauses_s) == pauses_s
    assert pool_module.MAX_RETRY_START_S == pauses_s[-1]


def test_process_that_works_is_waited_for_though_no_other_starts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pool_module, "GIVE_UP_S", 0.0)
    with (
        DecoderPool(2, image_limit_s=LIMIT_S, entry=BAD_CHILD) as pool,
        ThreadPoolExecutor(2) as threads,
    ):
        wait_until(lambda: len(pool._idle) == 2)
        pool._entry = NEVER_READY
        hanging = threads.submit(pool.decode_image, b"HANG.")
        wait_until(lambda: len(pool._idle) == 1)
        os.kill(pool._idle[0].process.pid, signal.SIGKILL)
        wait_until(lambda: pool._num_starts_failed)

        waiting = threads.submit(pool.decode_image, FILES["JPEG"])
        time.sleep(2 * pool_module.LOOK_S)

        assert not waiting.done()
        pool.close()
        assert isinstance(hanging.exception(60), PoolClosedError | DecoderFailedError)
        assert isinstance(waiting.exception(60), PoolClosedError)


def list_open_files() -> set[str]:
    gc.collect()
    return set(os.listdir("/proc/self/fd"))  # noqa: PTH208


@linux
@pytest.mark.parametrize("broken", ["os.pipe", "threading.Thread.start", "subprocess.Popen"])
def test_start_that_the_system_refuses_is_tried_again_and_leaves_nothing_open(
    broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError if "Thread" in broken else OSError(errno.EMFILE, "none left")

    with DecoderPool(1) as pool:
        wait_until(lambda: len(pool._idle) == 1)
        before = list_open_files()
        with monkeypatch.context() as patched:
            patched.setattr(broken, refuse)
            with suppress(OSError, RuntimeError):
                pool._start()
            assert before == list_open_files()
            for pid in pool.pids:
                os.kill(pid, signal.SIGKILL)
            wait_until(lambda: pool._num_starts_failed)

        assert pool.decode_image(FILES["JPEG"]).pixels().any()


@pytest.mark.parametrize("word", [b"AWAY.", b"PAUSE"])
def test_process_cannot_say_that_trying_again_helps(bad_pool: DecoderPool, word: bytes) -> None:
    """Nor that a host asked for a pause, for which an item is given back without a charge."""
    with pytest.raises(DecoderFailedError):
        bad_pool.decode_image(word)
    with pytest.raises(DecoderFailedError):
        bad_pool.measure_clip(word)


def test_process_cannot_count_more_frames_than_are_allowed(bad_pool: DecoderPool) -> None:
    with pytest.raises(DecoderFailedError):
        bad_pool.measure_clip(b"TIMES" + json.dumps([0.0] * 216_001).encode())


def test_process_killed_over_a_file_leaves_it_to_another(
    bad_pool: DecoderPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    wait_until(lambda: len(bad_pool._idle) == 2)
    before = bad_pool.pids
    monkeypatch.setattr(bad_pool, "_image_limit_s", 3.0)
    with ThreadPoolExecutor(1) as threads:
        hanging = threads.submit(bad_pool.decode_image, b"HANG.")
        wait_until(lambda: len(bad_pool._idle) == 1)
        (busy,) = before - {child.process.pid for child in bad_pool._idle}

        os.kill(busy, signal.SIGKILL)

        assert isinstance(hanging.exception(60), DecodeTimeoutError)  # in the one that came after
    wait_until(lambda: len(bad_pool.pids - before) == 2)


def test_processes_that_were_killed_while_idle_cost_no_file() -> None:
    with DecoderPool(4) as pool:
        wait_until(lambda: len(pool._idle) == 4)
        for child in list(pool._idle):
            child.process.send_signal(signal.SIGKILL)
            os.waitid(os.P_PID, child.process.pid, os.WEXITED | os.WNOWAIT)

        assert pool.decode_image(FILES["JPEG"]).pixels().any()


LARGE_FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "lossy WebP": ("WEBP", {"quality": 0, "method": 0}),
    "lossless WebP": ("WEBP", {"lossless": True, "quality": 0, "method": 0}),
    "WebP with a canvas": ("WEBP", {"quality": 0, "method": 0, "exif": exif(1)}),
    "AVIF": ("AVIF", {"quality": 0, "speed": 10}),
    "HEIC": ("HEIF", {"quality": 0}),
}


@pytest.mark.parametrize("name", LARGE_FORMS)
def test_large_picture_is_decoded_within_what_its_header_asked_for(
    pool: DecoderPool, name: str
) -> None:
    kind, options = LARGE_FORMS[name]
    if not can_read(kind):
        pytest.skip(f"{kind} is not installed")
    encoded = encode(Image.new("RGB", (6000, 5000), (9, 99, 200)), kind, **options)
    limits = ImageLimits(formats=(*IMAGE_LIMITS.formats, "HEIC"))

    image = pool.decode_image(encoded, limits, ask=lambda _: Fit(60, 50))

    assert (60, 50) == (image.width_px, image.height_px)
    if kind == "WEBP":
        frames = pool.decode_video(encoded, ask=lambda _: Fit(60, 50))
        assert (1, 60) == (frames.num_frames, frames.width_px)
        assert (0.0,) == pool.measure_clip(encoded)


@pytest.mark.parametrize("name", ["lossy WebP", "lossless WebP", "WebP with a canvas"])
def test_webp_over_the_limit_is_refused_before_it_is_opened(pool: DecoderPool, name: str) -> None:
    encoded = encode(Image.new("RGB", (7000, 6000)), *LARGE_FORMS[name][:1], **LARGE_FORMS[name][1])

    with pytest.raises(ImageTooLargeError, match="7000x6000"):
        pool.decode_image(encoded)
    with pytest.raises(VideoTooLargeError, match="7000x6000"):
        pool.decode_video(encoded)


@pytest.mark.parametrize(("steady_s", "num_failed"), [(60.0, 1), (0.0, 0)])
def test_process_that_ends_soon_by_itself_counts_as_one_that_did_not_start(
    monkeypatch: pytest.MonkeyPatch, steady_s: float, num_failed: int
) -> None:
    monkeypatch.setattr(pool_module, "STEADY_S", steady_s)
    with DecoderPool(1) as pool:
        child = pool._take()
        child.process.kill()
        child.process.wait()

        pool._bury_ended(child)

        assert num_failed == pool._num_starts_failed


# --- the end -----------------------------------------------------------------------------------------


@linux
def test_closing_leaves_no_process_and_no_descriptor() -> None:
    before = list_open_files()
    for _ in range(2):
        pool = DecoderPool(2)
        pool.decode_image(FILES["JPEG"])
        pids = pool.pids

        pool.close()
        pool.close()

        assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    # A thread that waited for a process to get ready may hold its memory for a moment more.
    wait_until(lambda: before == list_open_files())
    with pytest.raises(PoolClosedError):
        pool.decode_image(FILES["JPEG"])


def test_closing_ends_what_is_under_way() -> None:
    pool = DecoderPool(1, entry=BAD_CHILD)
    with ThreadPoolExecutor(2) as threads:
        hanging = threads.submit(pool.decode_image, b"HANG.")
        wait_until(lambda: not pool._idle)
        waiting = threads.submit(pool.decode_image, b"HANG.")
        time.sleep(0.1)

        pool.close()

        assert isinstance(hanging.exception(60), PoolClosedError)
        assert isinstance(waiting.exception(60), PoolClosedError)


_KILLED_PARENT = f"""
import threading, time
from media.pool import DecoderPool
pool = DecoderPool(2, entry={BAD_CHILD!r})
threading.Thread(target=pool.decode_image, args=(b"HANG.",), daemon=True).start()
while len(pool.pids) < 2 or len(pool._idle) != 1:
    time.sleep(0.01)
print(*pool.pids, flush=True)
time.sleep(60)
"""


@linux
def test_nothing_is_left_of_a_parent_that_was_killed() -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", _KILLED_PARENT], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout
    pids = parent.stdout.readline().split()
    assert 2 == len(pids)

    parent.kill()

    parent.wait()
    parent.stdout.close()
    # A process that has ended is a zombie until whoever inherited it has looked.
    wait_until(lambda: not any(_is_alive(pid) for pid in pids))


def _is_alive(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
