"""What the GPU did while something ran: its busy share, its kernels, and the gaps between them."""

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

NUM_KERNELS, NUM_GAPS = 60, 30
NAME_CHARACTERS = 120
DEVICE_CATEGORIES = ("kernel", "gpu_memcpy", "gpu_memset")


@dataclass(frozen=True, slots=True)
class Span:
    """One thing that the device did. Times in microseconds."""

    name: str
    start: float
    end: float


def profile(run: Callable[[], object]) -> dict[str, Any]:
    """Run something under torch's profiler; see `summarise`."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        run()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    return summarise(
        [
            Span(event["name"], float(event["ts"]), float(event["ts"]) + float(event["dur"]))
            for event in events
            if event.get("cat") in DEVICE_CATEGORIES and "dur" in event
        ]
    )


def summarise(spans: Sequence[Span]) -> dict[str, Any]:
    """
    Returns:
        busy_share: of the time from the first span to the last, in which any span ran.
        steady_busy_share: the same without the first and the last tenth of that time.
        kernels: by name, the longest in sum first. gaps: the longest, and what stood around them.
    """
    if not spans:
        return {"busy_share": None, "kernels": [], "gaps": []}
    ordered = sorted(spans, key=lambda span: span.start)
    first, last = ordered[0].start, max(span.end for span in ordered)
    tenth = (last - first) / 10
    sums: dict[str, list[float]] = {}
    for span in ordered:
        entry = sums.setdefault(span.name[:NAME_CHARACTERS], [0.0, 0])
        entry[0] += span.end - span.start
        entry[1] += 1
    kernels = sorted(sums.items(), key=lambda item: -item[1][0])
    total = sum(us for us, _ in sums.values())
    return {
        "span_ms": round((last - first) / 1000, 2),
        "busy_share": round(_busy(ordered, first, last), 4),
        "steady_busy_share": round(_busy(ordered, first + tenth, last - tenth), 4),
        "num_spans": len(ordered),
        "kernels": [
            {
                "name": name,
                "ms": round(us / 1000, 3),
                "count": int(count),
                "share": round(us / total, 4),
            }
            for name, (us, count) in kernels[:NUM_KERNELS]
        ],
        "gaps": _gaps(ordered, first),
    }


def _busy(ordered: Sequence[Span], first: float, last: float) -> float:
    """The share of the time from `first` to `last` that is covered; spans may overlap."""
    covered, reached = 0.0, first
    for span in ordered:
        start, end = max(span.start, reached), min(span.end, last)
        if end > start:
            covered += end - start
            reached = end
    return covered / (last - first) if last > first else 0.0


def _gaps(ordered: Sequence[Span], first: float) -> list[dict[str, Any]]:
    found: list[tuple[float, float, str, str]] = []
    before = ordered[0]
    for span in ordered[1:]:
        if span.start > before.end:
            found.append((span.start - before.end, before.end, before.name, span.name))
        if span.end > before.end:
            before = span
    found.sort(reverse=True)
    return [
        {
            "ms": round(us / 1000, 3),
            "at_ms": round((at - first) / 1000, 2),
            "after": after[:NAME_CHARACTERS],
            "before": following[:NAME_CHARACTERS],
        }
        for us, at, after, following in found[:NUM_GAPS]
    ]
