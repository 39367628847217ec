"""
However many large pictures a job brings, its worker holds no more bytes than it was given.

A few of them, or as many as DARKROOM_TEST_LARGE_IMAGES says, of DARKROOM_TEST_LARGE_MEGAPIXELS each, whose
files have DARKROOM_TEST_LARGE_ENCODED_MIB at a time.
"""

import os
import sys
import time
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from media.limits import IMAGE_LIMITS
from media.pool import MAX_BYTES
from storage.states import ItemState
from tests.corpus.cases import build_body, build_line, image_part
from tests.corpus.front import open_front
from tests.corpus.memory import MEBIBYTE, list_children, read_held
from tests.media.files import encode, exif
from tests.media.servers import answering
from tests.media.test_pool_memory import MEGAPIXELS, NUM_IMAGES, watching
from tests.storage.conftest import sqlite_template

__all__ = ["sqlite_template"]

NUM_PROCESSES = 2
ENCODED_MIB = int(os.environ.get("DARKROOM_TEST_LARGE_ENCODED_MIB", "128"))
"""Of pictures as they came: a few of 39 megapixels, where a chunk has dozens of them."""

ALL_BYTES = ENCODED_MIB * MEBIBYTE + MAX_BYTES

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="asks /proc")


def _files() -> dict[str, bytes]:
    """Grainy, so that they are large as files too."""
    side = int((MEGAPIXELS * 1_000_000) ** 0.5)
    rng = np.random.default_rng(1)
    grain = Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8))
    smooth = grain.resize((8, 8)).resize((side, side))
    return {
        "/plain.jpg": encode(grain, "JPEG", quality=50),
        "/turned.jpg": encode(grain, "JPEG", quality=50, progressive=True, exif=exif(6)),
        "/clear.png": encode(smooth.convert("RGBA"), "PNG", compress_level=1),
    }


def test_large_pictures_stay_within_the_bytes_of_a_worker(
    tmp_path: Path, sqlite_template: bytes
) -> None:
    files = _files()
    settings = {
        "DARKROOM_MAX_MEDIA_BYTES": str(ENCODED_MIB * MEBIBYTE),
        "DARKROOM_MAX_IMAGE_PIXELS": str(max(MEGAPIXELS * 1_000_000, IMAGE_LIMITS.max_pixels)),
    }
    seen: list[int] = []
    with open_front(tmp_path, sqlite_template, NUM_PROCESSES, **settings) as front:

        def read() -> int:
            return read_held((front.pid, *list_children(front.pid)))

        port = front.serve({path: answering(content) for path, content in files.items()}).port
        # What is watched is memory: a host that is slow, as one beside two decoders is, may be.
        network = {"allowed": ["127.0.0.1/32"], "ports": [port], "timeout_s": 30.0}
        lines = []
        for number, path in enumerate(islice(cycle(files), NUM_IMAGES)):
            url = f"http://127.0.0.1:{port}{path}?{number}"
            body = build_body(image_part(url), question="Describe the image.")
            lines.append(build_line(body, str(number)))
        before = read()
        started = time.perf_counter()
        with watching(read, seen):
            ended = front.run(lines, network)
        took_s = time.perf_counter() - started

    assert [] == [e.error_message for e in ended.values() if e.state is not ItemState.COMPLETED]
    assert NUM_IMAGES == len(ended)
    grown = max(seen) - before
    print(  # noqa: T201
        f"{NUM_IMAGES} pictures of {MEGAPIXELS} MP, {sum(map(len, files.values())) >> 20} MiB in three "
        f"files, in {took_s:.0f} s: {grown >> 20} MiB of {ALL_BYTES >> 20}, {before >> 20} before"
    )
    assert grown < ALL_BYTES * 1.3
    assert grown > MEGAPIXELS * 4_000_000, "one was seen while it was decoded"
