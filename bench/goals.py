"""
What the engine promises of an H100, measured: `python -m bench.goals --out FOLDER`.

Each figure comes from a process of its own, `python -m bench.engine` with the words below, so that one
that fails or hangs takes no other along. All that it prints goes to a file in the folder; one line to
stdout says the figure and what share of its goal that is.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ENGINE = (sys.executable, "-m", "bench.engine")
USUAL = "--dtype bfloat16 --llm encoder_cache_bytes=0"
QWEN, LLAVA = f"{USUAL} --model-config qwen2-vl-2b", f"{USUAL} --model-config llava-1.5-7b"
KEPT = ("prompts_s", "ms_a_prompt", "ready_s")  # beside the figure
FP8 = "--llm quantization=fp8"
BESIDE_GENERATE = (
    "--num 2048 --runs 1 --warm-up 640 --peer transformers --peer-num 128 --peer-batches 128"
)


@dataclass(frozen=True, slots=True)
class Goal:
    """
    Attributes:
        words: options of `bench.engine`.
        figure: the key that counts, of the line of the fastest run, the profile or the summary.
        least: what is promised; None for a figure that another is compared with.
        share_of: the goal whose figure this one is a share of.
    """

    words: str
    figure: str = "prompts_s"
    least: float | None = None
    share_of: str | None = None


GOALS = {
    "caption": Goal(f"{QWEN} --num 2048 --runs 2 --warm-up 640", least=130),
    "caption-fp8": Goal(f"{QWEN} {FP8} --num 2048 --runs 2 --warm-up 640", least=180),
    "frames": Goal(f"{QWEN} --work frames --num 768 --runs 1 --warm-up 96", least=25),
    "large": Goal(f"{QWEN} --work large --num 960 --runs 1 --warm-up 128", least=45),
    "llava": Goal(f"{LLAVA} --num 1536 --runs 1 --warm-up 192", least=42),
    "llava-fp8": Goal(
        f"{LLAVA} {FP8} --llm kv_cache_dtype=fp8 --num 768 --runs 1 --warm-up 192", least=60
    ),
    "even": Goal(f"{QWEN} --work even --runs 1 --warm-up 640", "output_tokens_s"),
    "tail": Goal(f"{QWEN} --work tail --runs 1 --warm-up 640", "output_tokens_s", 0.85, "even"),
    "generate": Goal(f"{QWEN} {BESIDE_GENERATE}", "ratio", 6),
    "generate-fp8": Goal(f"{QWEN} {FP8} {BESIDE_GENERATE}", "ratio", 6),
    "generate-frames": Goal(
        f"{QWEN} --work frames --num 384 --runs 1 --warm-up 96 --peer transformers --peer-num 64 "
        "--peer-batches 16,32",
        "ratio",
        6,
    ),
    "busy": Goal(
        f"{QWEN} --num 64 --runs 1 --warm-up 640 --profile busy.json --profile-num 640",
        "steady_busy_share",
        0.95,
    ),
    "mixed": Goal(f"{QWEN} --work mixed --runs 2 --warm-up 64"),
    "drawn": Goal(f"{QWEN} --num 768 --runs 1 --warm-up 640 --sampling temperature=0.7"),
    "nucleus": Goal(
        f"{QWEN} --num 768 --runs 1 --warm-up 640 --sampling temperature=0.7 --sampling top_p=0.9"
    ),
}


def main() -> None:
    options = _options()
    options.out.mkdir(parents=True, exist_ok=True)
    found: dict[str, float] = {}
    for name in options.only or GOALS:
        goal = GOALS[name]
        line = measure(name, goal, options.out, timeout_s=options.timeout_s)
        if line["figure"] is not None:
            found[name] = line["figure"]
            line |= compare(goal, line["figure"], found)
        print(json.dumps(line), flush=True)


def measure(
    name: str,
    goal: Goal,
    folder: Path,
    *,
    timeout_s: float,
    engine: Sequence[str] = ENGINE,
) -> dict[str, Any]:
    """
    Run one of them.

    Returns:
        Its name, its figure (None if it said none), the seconds that it took and, where it ended
        badly, how and its last words. A profile lies in the folder too.
    """
    started = time.perf_counter()
    words = [str(folder / word) if word.endswith(".json") else word for word in goal.words.split()]
    with (folder / f"{name}.jsonl").open("w") as out, (folder / f"{name}.log").open("w") as log:
        process = subprocess.Popen([*engine, *words], stdout=out, stderr=log)  # noqa: S603 - our own program
        try:
            ended: int | str = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            ended = f"after {timeout_s:g} s"
    lines = [json.loads(x) for x in (folder / f"{name}.jsonl").read_text().splitlines()]
    said: list[dict[str, Any]] = [line for line in lines if line.get(goal.figure) is not None]
    best = max(said, key=lambda line: float(line[goal.figure]), default=dict[str, Any]())
    line: dict[str, Any] = {"name": name, "figure": best.get(goal.figure)}
    line |= {key: best[key] for key in KEPT if key in best}
    if ended != 0:
        log_end = (folder / f"{name}.log").read_text(errors="replace")[-600:]
        line |= {"ended": ended, "log": log_end}
    return {**line, "took_s": round(time.perf_counter() - started, 1)}


def compare(goal: Goal, figure: float, found: Mapping[str, float]) -> dict[str, Any]:
    """
    What counts, the goal, and what share of it that is; nothing where there is none.

    Args:
        found: the figures of all that were measured, by name.
    """
    if goal.least is None or goal.share_of not in {None, *found}:
        return {}
    counts = figure / found[goal.share_of] if goal.share_of else figure
    return {
        "counts": round(counts, 3),
        "goal": goal.least,
        "reached": round(counts / goal.least, 3),
    }


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for all that is printed")
    parser.add_argument(
        "--only", nargs="+", choices=list(GOALS), help="some of them, in this order"
    )
    parser.add_argument("--timeout-s", type=float, default=300.0, help="of each (300)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
