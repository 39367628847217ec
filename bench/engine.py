"""
Prompts a second through the engine, from JPEG bytes to the last text: `python -m bench.engine`.

Decoding, resizing, tokenising and detokenising are inside the clock; loading and warming up are
not. One JSON line to stdout for each run, and with `--peer transformers` one more for the peer's
best static batch in the same call. `--profile FILE` runs some prompts once more under torch's
profiler.
"""

import argparse
import gc
import json
import logging
import platform
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

from bench.configs import SHAPES, write_model
from bench.peers import Transformers, run_best
from bench.profiles import profile
from bench.workloads import WORKLOADS, Prompt, build_prompts, read_work
from engine import LLM, Request, Result, SamplingParams
from engine.floors import Asked, count_patches, find_rates, floor
from engine.meter import Work

WARM_UP_PICTURE = 10**6  # pictures to warm up with have numbers of their own
PROFILE_PICTURE = 2 * 10**6


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(relativeCreated)d ms %(name)s %(message)s")
    options = _options()
    with tempfile.TemporaryDirectory() as folder:
        if options.model_config:
            model = write_model(options.model_config, Path(folder))
        else:
            model = Path(options.model)
        _measure(options, model)


def _measure(options: argparse.Namespace, model: Path) -> None:
    lines, usual = read_work(options.work)
    num = options.num or usual
    is_dummy = options.model_config is not None
    most_pictures = max(len(line.sizes) for line in lines)
    started = time.perf_counter()
    llm = LLM(
        str(model),
        dtype=options.dtype,
        device=options.device,
        load_format="dummy" if is_dummy else "auto",
        max_model_len=options.max_model_len,
        max_num_seqs=options.max_num_seqs,
        max_num_batched_tokens=options.max_num_batched_tokens,
        limit_mm_per_prompt={"image": max(1, most_pictures)},
        num_media_threads=options.media_threads,
        **_more(options.llm),
    )
    load_s = time.perf_counter() - started
    sampling = _more(options.sampling)
    warm_up = build_prompts(lines, options.warm_up or min(num, 64), WARM_UP_PICTURE)
    run(llm, warm_up, sampling)
    ready_s = time.perf_counter() - started
    checkpoint = llm.engine.checkpoint
    about = {
        "work": options.work,
        "model": options.model_config or options.model,
        "prompts": num,
        "dtype": str(checkpoint.dtype).removeprefix("torch."),
        "max_num_seqs": llm.engine.max_num_seqs,
        "max_num_batched_tokens": options.max_num_batched_tokens,
        "llm": options.llm,
        "sampling": options.sampling,
        "load_s": round(load_s, 1),
        "ready_s": round(ready_s, 1),
        **_machine(checkpoint.device),
    }
    rates: list[float] = []
    prompts: list[Prompt] = []
    num_pictures = sum(len(line.sizes) for line in lines) * -(-num // len(lines))
    for number in range(options.runs):
        prompts = build_prompts(lines, num, number * num_pictures)
        figures = run(llm, prompts, sampling)
        rates.append(figures["prompts_s"])
        print(json.dumps({"run": number, **figures, **about}), flush=True)
    if options.profile:
        few = build_prompts(lines, options.profile_num, PROFILE_PICTURE)
        found = profile(partial(run, llm, few, sampling))
        Path(options.profile).write_text(json.dumps({**about, **found}, indent=1) + "\n")
        kept = {name: found.get(name) for name in ("busy_share", "steady_busy_share", "span_ms")}
        print(json.dumps({"profile": options.profile, "prompts": options.profile_num, **kept}))
    summary: dict[str, Any] = {"median_prompts_s": statistics.median(rates), "runs": len(rates)}
    dtype, device = checkpoint.dtype, checkpoint.device
    llm.close()
    del llm, checkpoint
    _free(device)
    if options.peer == "transformers":
        peer = Transformers(model, dtype=dtype, device=device, is_dummy=is_dummy)
        batches = [int(size) for size in options.peer_batches.split(",")]
        summary |= run_best(peer, prompts[: options.peer_num or num], batches)
        if "peer_prompts_s" in summary:
            summary["ratio"] = round(summary["median_prompts_s"] / summary["peer_prompts_s"], 2)
    print(json.dumps({"summary": options.work, **summary, "device": about["device"]}), flush=True)


def run(
    llm: LLM, prompts: Sequence[Prompt], sampling: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """
    Send all prompts at once; figures of the whole, the clock around everything.

    Args:
        sampling: of `SamplingParams`, where it is not greedy.
    """
    requests = [
        Request(
            messages=[
                {
                    "role": "user",
                    "content": [
                        *({"type": "image", "image": jpeg} for jpeg in prompt.pictures),
                        {"type": "text", "text": prompt.line.text},
                    ],
                }
            ],
            params=SamplingParams(
                **{
                    "temperature": 0.0,
                    "max_tokens": prompt.line.max_tokens,
                    "ignore_eos": True,
                    **(sampling or {}),
                }
            ),
        )
        for prompt in prompts
    ]
    device = llm.engine.checkpoint.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    _wait(device)
    before = llm.engine.meter.read()
    started = time.perf_counter()
    results = list(llm.stream(requests))
    _wait(device)
    wall_s = time.perf_counter() - started
    used = llm.engine.meter.read().since(before)
    errors = [result.error for result in results if result.error]
    if errors:
        raise RuntimeError(f"{len(errors)} of {len(prompts)} prompts failed: {errors[0]}")
    num = len(prompts)
    num_pictures = sum(len(prompt.pictures) for prompt in prompts)
    num_tokens = sum(len(result.outputs[0].token_ids) for result in results)
    wall_ms = wall_s * 1000 / num
    each = {work.value: round(used.ms[work] / num, 3) for work in Work}
    figures: dict[str, Any] = {
        "prompts_s": round(num / wall_s, 2),
        "images_s": round(num_pictures / wall_s, 2),
        "output_tokens_s": round(num_tokens / wall_s, 1),
        "prompt_tokens": round(statistics.fmean(_num_prompt_tokens(r) for r in results), 1),
        "wall_s": round(wall_s, 3),
        "ms_a_prompt": {
            "all": round(wall_ms, 3),
            **each,
            "idle": round(wall_ms - sum(each.values()), 3),
        },
        "calls": {work.value: used.calls[work] for work in Work},
    }
    if device.type == "cuda":
        figures["memory_peak_gib"] = round(torch.cuda.max_memory_allocated(device) / 2**30, 2)
        figures |= _against_floor(llm, results, wall_ms)
    return figures


def _against_floor(llm: LLM, results: Sequence[Result], wall_ms: float) -> dict[str, Any]:
    checkpoint = llm.engine.checkpoint
    rates = find_rates(torch.cuda.get_device_name(checkpoint.device))
    if rates is None:
        return {}
    asked = [
        Asked(
            [n for image in result.images for n in count_patches(checkpoint.config, image)],
            _num_prompt_tokens(result),
            len(result.outputs[0].token_ids),
        )
        for result in results
    ]
    least = floor(
        checkpoint.config, asked, llm.engine.max_num_seqs, rates, checkpoint.dtype.itemsize
    )
    return {
        "floor_ms": {
            "all": round(least.total, 3),
            "encode": round(least.encode, 3),
            "prefill": round(least.prefill, 3),
            "decode": round(least.decode, 3),
        },
        "percent_of_floor": round(least.total / wall_ms * 100, 1),
    }


def _num_prompt_tokens(result: Result) -> int:
    return len(result.prompt_token_ids or ())


def _more(words: Sequence[str]) -> dict[str, Any]:
    """`name=value`, the value as JSON where it is JSON."""
    found: dict[str, Any] = {}
    for word in words:
        name, _, value = word.partition("=")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _machine(device: torch.device) -> dict[str, Any]:
    is_cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if is_cuda else cpu_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--work", default="caption", help=f"{', '.join(WORKLOADS)}, or a file of JSON lines")
    add("--model", default="darkroom-tiny", help="a folder, or the bundled model")
    add("--model-config", choices=sorted(SHAPES), help="random weights of this shape instead")
    add("--num", type=int, help="prompts of a run; the workload's own number by default")
    add("--runs", type=int, default=3)
    add("--warm-up", type=int, help="prompts before the clock starts; up to 64 by default")
    add("--dtype", default="auto")
    add("--device", default="auto")
    add("--max-model-len", type=int)
    add("--max-num-seqs", type=int)
    add("--max-num-batched-tokens", type=int)
    add("--media-threads", type=int)
    add("--llm", action="append", default=[], metavar="NAME=VALUE", help="any other word of LLM")
    add(
        "--sampling",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="any word of SamplingParams; greedy without a temperature",
    )
    add("--peer", choices=["none", "transformers"], default="none")
    add("--peer-num", type=int, help="prompts for the peer; all by default")
    add("--peer-batches", default="64,128", help="batch sizes to try")
    add("--profile", help="a file for what torch's profiler sees")
    add("--profile-num", type=int, default=128)
    return parser.parse_args()


if __name__ == "__main__":
    main()
