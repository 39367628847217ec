"""However large the pictures, a pool and its processes hold no more than they were given."""

import os
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import cycle, islice

import pytest
from PIL import Image

from media.decoded import Fit, Header
from media.limits import ImageLimits
from media.pool import DecoderPool
from tests.corpus.memory import read_held
from tests.media.files import encode, exif, picture
from tests.waiting import wait_until

# A campaign: DARKROOM_TEST_LARGE_IMAGES=10000 DARKROOM_TEST_LARGE_MEGAPIXELS=50
NUM_IMAGES = int(os.environ.get("DARKROOM_TEST_LARGE_IMAGES", "12"))
MEGAPIXELS = int(os.environ.get("DARKROOM_TEST_LARGE_MEGAPIXELS", "8"))
NUM_PROCESSES = 4
# Room for one picture with transparency at a time, which asks for most.
MAX_BYTES = MEGAPIXELS * 20_000_000

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="asks /proc")


def read_all(pool: DecoderPool) -> int:
    return read_held((os.getpid(), *pool.pids))


@contextmanager
def watching(read: Callable[[], int], seen: list[int], every_s: float = 0.01) -> Iterator[None]:
    over = threading.Event()

    def watch() -> None:
        while not over.wait(every_s):
            seen.append(read())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _files() -> list[bytes]:
    side = int((MEGAPIXELS * 1_000_000) ** 0.5)
    large = picture(side, side)
    heavy = [encode(large.convert("RGBA"), "PNG", compress_level=1)]
    return [
        *heavy * 4,
        encode(large, "JPEG"),
        encode(large, "JPEG", progressive=True, exif=exif(6)),
        encode(large.quantize(64, Image.Quantize.FASTOCTREE), "GIF"),
    ]


def small(header: Header) -> Fit:
    return Fit(448, 448)


def test_large_pictures_stay_within_the_bytes_of_the_pool() -> None:
    files = _files()
    limits = ImageLimits(max_pixels=60_000_000)
    seen: list[int] = []

    with (
        DecoderPool(NUM_PROCESSES, max_bytes=MAX_BYTES, image_limit_s=120.0) as pool,
        ThreadPoolExecutor(NUM_PROCESSES + 2) as threads,
    ):
        wait_until(lambda: len(pool._idle) == NUM_PROCESSES)
        before = read_all(pool)
        with watching(lambda: read_all(pool), seen):
            widths = threads.map(
                lambda encoded: pool.decode_image(encoded, limits, small).width_px,
                islice(cycle(files), NUM_IMAGES),
            )
            assert [448] * NUM_IMAGES == list(widths)

    grown = max(seen) - before
    print(f"{NUM_IMAGES} pictures of {MEGAPIXELS} MP: {grown >> 20} MiB of {MAX_BYTES >> 20}")  # noqa: T201
    assert grown < MAX_BYTES * 1.3
    assert grown > MEGAPIXELS * 16_000_000, "one with transparency was seen while it was decoded"
