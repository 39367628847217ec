"""The benchmark of decoding: every way reads the same pictures, and says so in JSON."""

import json
import subprocess
import sys

import pytest

pytest.importorskip("httpcore2")  # or there is one way less


@pytest.mark.timeout(600)  # it starts many processes, each with all that it compares
def test_each_way_is_timed_and_compared() -> None:
    command = [
        "-m",
        "bench.media",
        "--sizes",
        "64x48,2400x1700",
        "--num",
        "3",
        "--runs",
        "1",
        "--cores",
        "1",
    ]

    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, check=True, timeout=500
    )

    lines = [json.loads(line) for line in done.stdout.splitlines()]
    small = [line for line in lines if line.get("size") == "64x48"]
    large = [line for line in lines if line.get("size") == "2400x1700"]
    plain = ["fetch", "pool", "threads", "loop", "loops", "transformers"]
    assert plain == [line["way"] for line in small]
    assert [
        "fetch",
        "pool",
        "pool, draft",
        "threads",
        "threads, draft",
        "loop",
        "loops",
        "transformers",
    ] == [line["way"] for line in large]
    for line in (*small, *large):
        assert 3 == line["images"]
        assert line["images_s"] > 0
        assert line["images_s"] == line["images_s_a_core"]
    summaries = [line for line in lines if "summary" in line]
    assert [("64x48", "56x56"), ("2400x1700", "1176x840")] == [
        (line["summary"], line["seen"]) for line in summaries
    ]
    assert plain == list(summaries[0]["images_s"])
