"""Every example of docs/producers.md is run, as it stands there, against a real `darkroom up`."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

from api.config import ApiConfig
from tasks.config import MEBIBYTE, Config
from tasks.ingest import DEAD, FIELD, STREAM
from tasks.submit import Submission
from tests.acceptance.service import Service, wait_until
from tests.docs.pages import ROOT, Block, find_blocks, find_rows, read_page

PICTURE = ROOT / "samples" / "one.png"
CAPTION: str = json.loads((ROOT / "samples" / "expected.json").read_text("utf-8"))["one.png"]
BLOCKS = find_blocks(read_page("docs/producers.md"))
START = {"sh": ["bash", "-euo", "pipefail"], "python": [sys.executable, "-W", "error"]}

pytestmark = pytest.mark.services


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    service = Service(tmp_path_factory.mktemp("up"), "up")
    try:
        service.wait_for_workers(2)
        yield service
    finally:
        service.end()


@pytest.fixture(scope="module")
def runs(
    service: Service, tmp_path_factory: pytest.TempPathFactory
) -> "Iterator[dict[int, Future[subprocess.CompletedProcess[str]]]]":
    """All examples, two at a time: most of what they do is to wait."""
    note = json.loads((service.home / "valkey" / "darkroom.json").read_text(encoding="utf-8"))
    folder = tmp_path_factory.mktemp("producer")
    shutil.copy(PICTURE, folder / "cat.png")
    env = {
        **service.env,
        "PYTHONPATH": "",  # a producer has nothing of Darkroom
        "DARKROOM_API_KEY": "EMPTY",
        "DARKROOM_REDIS_URL": note["url"],
    }

    def run(block: Block) -> "subprocess.CompletedProcess[str]":
        script = folder / f"line-{block.line}"
        script.write_text(block.code, encoding="utf-8")
        return subprocess.run(
            [*START[block.language], str(script)],
            cwd=folder,
            env=env,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )

    with ThreadPoolExecutor(2) as pool:
        yield {block.line: pool.submit(run, block) for block in BLOCKS if can_run(block)}


def can_run(block: Block) -> bool:
    """Node's client is no package of ours: its example is only read."""
    tools = [tool for tool in ("curl", "redis-cli") if tool in block.code]
    return block.language in START and all(shutil.which(tool) for tool in tools)


def find_block(language: str, *words: str) -> Block:
    (found,) = [b for b in BLOCKS if b.language == language and all(w in b.code for w in words)]
    return found


@pytest.mark.parametrize(
    "block",
    [b for b in BLOCKS if b.language in START],
    ids=lambda block: f"{block.language}-{block.line}",
)
def test_example_runs(block: Block, runs: Any) -> None:
    if block.line not in runs:
        pytest.skip("curl or redis-cli is not installed here")
    run = runs[block.line].result()

    assert (0, "") == (run.returncode, run.stderr)


def test_answers_come_back_over_http(runs: Any) -> None:
    if not can_run(find_block("sh", "/v1/batches")):
        pytest.skip("no curl")
    over_curl = runs[find_block("sh", "/v1/batches").line].result().stdout
    over_openai = runs[find_block("python", "batches.create").line].result().stdout
    of_chat = runs[find_block("python", "chat.completions.create").line].result().stdout
    response = json.loads(over_curl)["response"]["body"]["choices"][0]["message"]

    assert CAPTION == response["content"]
    assert f"cat {CAPTION}\n" == over_openai
    assert f"{CAPTION}\n" == of_chat


def test_every_key_is_one_job_whichever_way_it_came(service: Service, runs: Any) -> None:
    for run in runs.values():
        run.result()
    keys = set(re.findall(r"order-[0-9]+", "".join(b.code for b in BLOCKS if b.line in runs)))
    asked = runs[find_block("python", "order-4711", "client.post").line].result().stdout
    # The batches of HTTP, and one for each key of the messages; what is malformed is none.
    num_over_http = sum("cats-" in block.code for block in BLOCKS if block.line in runs)
    expected = num_over_http + len(keys)

    wait_until(lambda: expected <= len(list(service.client.batches.list(limit=100))), 60)
    batches = list(service.client.batches.list(limit=100))

    assert expected == len(batches)
    assert asked.split()[0] in {batch.id for batch in batches}
    assert "{'order': '4711'}" in asked


def test_what_is_malformed_lies_where_the_page_says(runs: Any) -> None:
    block = find_block("sh", "XREVRANGE")
    if block.line not in runs:
        pytest.skip("no redis-cli")
    shown = runs[block.line].result().stdout

    assert "requests: List should have at least 1 item" in shown


def test_node_example_can_be_read() -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("no node")
    (block,) = [block for block in BLOCKS if block.language == "js"]
    run = subprocess.run(
        [node, "--check", "--input-type=module", "-"],
        input=block.code,
        capture_output=True,
        text=True,
        check=False,
    )

    assert (0, "") == (run.returncode, run.stderr)


def test_fields_and_limits_are_those_of_the_code() -> None:
    page = read_page("docs/producers.md")
    rows = {row[0].strip("`"): row[1] for row in find_rows(page) if len(row) == 3}
    fields = {name for name in rows if name in Submission.model_fields}
    settings, wire = Config.model_fields, ApiConfig(pepper=b"x" * 16)

    assert set(Submission.model_fields) == fields
    for name in ("completion_window", "priority", "image_policy", "on_invalid", "tenant"):
        assert str(Submission.model_fields[name].default) == rows[name]
    assert f"{settings['max_lines'].default:,} lines" in page
    assert f"{settings['max_line_bytes'].default // MEBIBYTE} MiB a line" in page
    assert f"{wire.max_batch_bytes // MEBIBYTE} MiB a job" in page
    assert f"{wire.max_file_bytes // MEBIBYTE} MiB a file" in page
    assert f"{wire.max_body_bytes // MEBIBYTE} MiB a body" in page
    assert all(f"`{name}`" in page or f'"{name}"' in page for name in (STREAM, DEAD, FIELD))
