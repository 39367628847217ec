"""
Pictures a second on the host: `python -m bench.media`.

Two things are measured. From a URL of loopback to bytes, where fetching is installed; and from JPEG
bytes to pixels of the size that Qwen2-VL sees, uint8: in processes, in threads, in a plain loop over
Pillow, in one such loop a core (each a process that keeps its pixels: what this machine can do at
most), and in threads over transformers' own image processor, whose pixels are float32. One JSON
line for each way, size and run, and one for each size that compares the medians; the ways take
turns, so that what disturbs a machine disturbs all of them.
"""

import argparse
import asyncio
import gc
import io
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from ipaddress import ip_network
from itertools import cycle, islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
import transformers
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from bench.engine import cpu_name
from bench.workloads import picture_jpeg
from engine.families.protocol import AreaLimits
from engine.families.qwen2_vl import RESAMPLING, TOKEN_PX, target_size
from media.decoded import Fit, Header
from media.decoder import Decoder, Threads
from media.limits import IMAGE_LIMITS
from media.pool import DecoderPool, count_cores

AREA = AreaLimits()
NUM_DISTINCT_PX = 32 * 640 * 480
"""So many pixels of pictures that differ are made; they come again and again."""

DRAFT = ", draft"
WAYS = (
    "fetch",
    "pool",
    f"pool{DRAFT}",
    "threads",
    f"threads{DRAFT}",
    "loop",
    "loops",
    "transformers",
)
SIZES = "336x336,640x480,1024x768,4000x3000"
THREADS_BESIDE = 2  # as the engine has beside its processes
FETCHES_AT_ONCE = 16

Way = Callable[[Sequence[bytes]], object]


def main() -> None:
    options = _options()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.cores])
    torch.set_num_threads(1)
    about = {
        "cores": options.cores,
        "processes": options.processes or options.cores,
        "cpu": cpu_name(),
        "python": platform.python_version(),
        "pillow": PIL.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    with open_ways(options.cores, options.processes or options.cores) as ways:
        for size in options.sizes:
            measure(size, options, ways, about)


def measure(
    size: tuple[int, int],
    options: argparse.Namespace,
    ways: Mapping[str, Way],
    about: dict[str, Any],
) -> None:
    """Let all ways read the same pictures, in turns."""
    width, height = size
    num_distinct = max(NUM_DISTINCT_PX // (width * height), 2)
    distinct = [picture_jpeg(number, width, height) for number in range(num_distinct)]
    num = options.num or max(16, 4 * options.cores) * num_distinct
    pictures = list(islice(cycle(distinct), num))
    rates: dict[str, list[float]] = {}
    with fetching(distinct) as fetch:
        given = {way: read for way, read in {**fetch, **ways}.items() if way in options.ways}
        if not _is_drafted(size):
            given = {way: read for way, read in given.items() if not way.endswith(DRAFT)}
        for read in given.values():
            read(pictures[: 2 * options.cores])  # warm
        # To look through all that torch and transformers are takes as long as a run of 500 pictures.
        gc.collect()
        gc.freeze()
        for number in range(options.runs):
            for way, read in given.items():
                started = time.perf_counter()
                read(pictures)
                wall_s = time.perf_counter() - started
                rates.setdefault(way, []).append(num / wall_s)
                figures = {
                    "images": num,
                    "images_s": round(num / wall_s, 1),
                    "images_s_a_core": round(num / wall_s / options.cores, 1),
                    "mb_s": round(sum(map(len, pictures)) / 1e6 / wall_s, 1),
                }
                line = {"way": way, "size": f"{width}x{height}", "run": number}
                print(json.dumps({**line, **figures, **about}), flush=True)
    fit = _fit(Header(width, height))
    medians = {way: round(statistics.median(of_runs), 1) for way, of_runs in rates.items()}
    summary = {"summary": f"{width}x{height}", "seen": f"{fit.width_px}x{fit.height_px}"}
    print(json.dumps({**summary, "images_s": medians, **about}), flush=True)


@contextmanager
def fetching(pictures: Sequence[bytes]) -> Iterator[dict[str, Way]]:
    """The way that only fetches, from a server of its own; none where that is not installed."""
    try:
        from media.addresses import AddressRules
        from media.fetch import FetchConfig, Fetcher
    except ImportError as error:
        print(json.dumps({"way": "fetch", "left_out": f"{error.name} is not installed"}))
        yield {}
        return
    with tempfile.TemporaryDirectory() as folder:
        for number, picture in enumerate(pictures):
            (Path(folder) / str(number)).write_bytes(picture)
        server = subprocess.Popen(  # noqa: S603 - our own interpreter and program
            [sys.executable, "-m", "bench.loopback", folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        with server:
            port = int(server.stdout.readline()) if server.stdout else 0
            rules = AddressRules(allowed_networks=(ip_network("127.0.0.0/8"),))
            config = FetchConfig(rules=rules, ports=frozenset({port}))

            async def fetch_all(wanted: Sequence[bytes]) -> None:
                fetcher = Fetcher(config)
                numbers = iter(range(len(wanted)))

                async def go_on() -> None:
                    for number in numbers:
                        url = f"http://127.0.0.1:{port}/{number % len(pictures)}"
                        await fetcher.fetch(url, IMAGE_LIMITS)

                await asyncio.gather(*(go_on() for _ in range(FETCHES_AT_ONCE)))
                await fetcher.aclose()

            yield {"fetch": lambda wanted: asyncio.run(fetch_all(wanted))}


def _is_drafted(size: tuple[int, int]) -> bool:
    fit = _fit(Header(*size))
    return size[0] >= 2 * fit.width_px and size[1] >= 2 * fit.height_px


@contextmanager
def open_ways(num_cores: int, num_decoders: int) -> Iterator[dict[str, Way]]:
    """All ways by their names; each is given pictures and returns when it has read them."""
    processor = Qwen2VLImageProcessorPil(
        size={"shortest_edge": AREA.min_pixels, "longest_edge": AREA.max_pixels}
    )
    context = get_context("spawn")
    together = context.Barrier(num_cores)  # none reads while another is still being started
    with (
        DecoderPool(num_decoders) as pool,
        ThreadPoolExecutor(num_decoders + THREADS_BESIDE) as beside,
        ThreadPoolExecutor(num_cores) as threads,
        ProcessPoolExecutor(num_cores, context, together.wait) as processes,
    ):
        while pool.num_ready < num_decoders:
            time.sleep(0.1)

        def read_all(
            on: ThreadPoolExecutor, read: Callable[[bytes], int], of: Sequence[bytes]
        ) -> int:
            return sum(on.map(read, of))

        in_pool = partial(_read, pool)
        in_threads = partial(_read, Threads())
        ways: dict[str, Way] = {
            "pool": partial(read_all, beside, in_pool),
            f"pool{DRAFT}": partial(read_all, beside, partial(in_pool, may_draft=True)),
            "threads": partial(read_all, threads, in_threads),
            f"threads{DRAFT}": partial(read_all, threads, partial(in_threads, may_draft=True)),
            "loop": _read_all_plainly,
            "loops": lambda pictures: sum(
                processes.map(_read_all_plainly, (pictures[n::num_cores] for n in range(num_cores)))
            ),
            "transformers": partial(read_all, threads, partial(_read_as_peer, processor)),
        }
        yield ways


def _fit(header: Header, *, may_draft: bool = False) -> Fit:
    height, width = target_size(header.height_px, header.width_px, AREA, TOKEN_PX)
    return Fit(width, height, RESAMPLING, may_draft)


def _read(decoder: Decoder, jpeg: bytes, *, may_draft: bool = False) -> int:
    return decoder.decode_image(jpeg, ask=partial(_fit, may_draft=may_draft)).view().size


def _read_all_plainly(jpegs: Sequence[bytes]) -> int:
    return sum(map(_read_plainly, jpegs))


def _read_plainly(jpeg: bytes) -> int:
    image = Image.open(io.BytesIO(jpeg)).convert("RGB")
    fit = _fit(Header(*image.size))
    return np.asarray(image.resize((fit.width_px, fit.height_px), RESAMPLING)).size


def _read_as_peer(processor: Qwen2VLImageProcessorPil, jpeg: bytes) -> int:
    image = Image.open(io.BytesIO(jpeg)).convert("RGB")
    pixels: torch.Tensor = processor([image], return_tensors="pt")["pixel_values"]
    return pixels.numel()


def _parse_sizes(text: str) -> list[tuple[int, int]]:
    sizes = []
    for size in text.split(","):
        width, _, height = size.partition("x")
        sizes.append((int(width), int(height)))
    return sizes


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add(
        "--sizes",
        type=_parse_sizes,
        default=SIZES,
        help="WIDTHxHEIGHT, several with commas between",
    )
    add("--cores", type=int, default=count_cores(), help="that may be used; as many as there are")
    add("--processes", type=int, help="that decode in the pool; by default as many as cores")
    add("--num", type=int, help="pictures of a run; by default about as many pixels of each size")
    add("--runs", type=int, default=3)
    add("--ways", type=lambda text: text.split("/"), default=WAYS, help=f"some of {'/'.join(WAYS)}")
    return parser.parse_args()


if __name__ == "__main__":
    main()
