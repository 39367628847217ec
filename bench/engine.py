"""
Pictures a second through the engine, from JPEG bytes to the last text: `python -m bench.engine`.

Decoding, resizing, tokenising and detokenising are inside the clock; loading is not. With
`--peer transformers` the same prompts also go through transformers' `generate`, one at a time, in
the same call, and the ratio is part of the line. One JSON line to stdout for each run.
"""

import argparse
import json
import platform
import time
from functools import partial
from typing import Any

import torch
import transformers

from bench.workloads import picture_jpeg
from engine import LLM, Request, SamplingParams
from engine.reference import Reference
from media.images import decode_image

PROMPT = "Describe."
WARM_UP = 8  # pictures, with numbers of their own


def requests(first: int, num: int, size: tuple[int, int], params: SamplingParams) -> list[Request]:
    found = []
    for number in range(first, first + num):
        jpeg = picture_jpeg(number, *size)
        parts = [
            {"type": "image", "image": partial(decode_image, jpeg)},
            {"type": "text", "text": PROMPT},
        ]
        found.append(Request(messages=[{"role": "user", "content": parts}], params=params))
    return found


def run_engine(llm: LLM, asked: list[Request]) -> tuple[float, int]:
    """Seconds, and output tokens."""
    started = time.perf_counter()
    results = list(llm.stream(asked))
    _wait()
    took = time.perf_counter() - started
    errors = [result.error for result in results if result.error]
    if errors:
        raise RuntimeError(f"{len(errors)} prompts failed: {errors[0]}")
    return took, sum(len(result.outputs[0].token_ids) for result in results)


def run_transformers(reference: Reference, asked: list[Request], max_tokens: int) -> float:
    content = [{"type": "image"}, {"type": "text", "text": PROMPT}]
    prompt = reference.chat_prompt([{"role": "user", "content": content}])
    started = time.perf_counter()
    for request in asked:
        image = request.messages[0]["content"][0]["image"]()
        reference.generate(prompt, images=[image], max_tokens=max_tokens, ignore_eos=True)
    _wait()
    return time.perf_counter() - started


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def main() -> None:
    options = _options()
    size = (options.width, options.height)
    params = SamplingParams(temperature=0.0, max_tokens=options.max_tokens, ignore_eos=True)
    llm = LLM(options.model, dtype=options.dtype, device=options.device)
    checkpoint = llm.engine.checkpoint
    run_engine(llm, requests(10**6, WARM_UP, size, params))
    reference = None
    if options.peer == "transformers":
        reference = Reference(
            checkpoint.folder, dtype=checkpoint.dtype, device=str(checkpoint.device)
        )
    for number in range(options.runs):
        asked = requests(number * options.num, options.num, size, params)
        seconds, num_tokens = run_engine(llm, asked)
        line: dict[str, Any] = {
            "run": number,
            "pictures": options.num,
            "size": f"{size[0]}x{size[1]}",
            "pictures_s": round(options.num / seconds, 2),
            "output_tokens_s": round(num_tokens / seconds, 1),
            "dtype": str(checkpoint.dtype).removeprefix("torch."),
            "device": _device_name(checkpoint.device),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
        if reference is not None:
            peer_s = run_transformers(reference, asked, options.max_tokens)
            line["peer_pictures_s"] = round(options.num / peer_s, 2)
            line["ratio"] = round(peer_s / seconds, 2)
        print(json.dumps(line), flush=True)


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return platform.processor() or platform.machine()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="darkroom-tiny")
    parser.add_argument("--num", type=int, default=64, help="pictures of a run")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--width", type=int, default=640)
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--peer", choices=["none", "transformers"], default="none")
    return parser.parse_args()


if __name__ == "__main__":
    main()
