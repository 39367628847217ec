"""The start page's server line for Phi-3.5-vision as it stands, and a checkpoint that cannot be served."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import openai
import pytest

from engine import LLM, SamplingParams
from tests.acceptance.service import ROOT, START_S, Service
from tests.engine.pictures import data_url, draw, texts
from tests.engine.tiny_phi3_v import write_tiny_phi3_v

pytestmark = pytest.mark.services

WORDS = (
    *("--task", "generate"),
    "--trust-remote-code",
    *("--max-model-len", "4096"),
    *("--limit-mm-per-prompt", "image=2"),
)
TEMPLATE = "{% for m in messages %}<|user|>\n{{ m.content }}<|end|>\n{% endfor %}<|assistant|>\n"


def _ask(num_pictures: int, **options: int) -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = [
        {"type": "image_url", "image_url": {"url": data_url(draw(seed, 90, 90))}, **options}
        for seed in range(num_pictures)
    ]
    parts.append({"type": "text", "text": "What is the content of each image?"})
    return [{"role": "user", "content": parts}]


def test_server_of_the_start_page_says_what_the_library_says(tmp_path: Path) -> None:
    folder = write_tiny_phi3_v(tmp_path / "phi", seed=4)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["chat_template"]  # one that comes as a file instead
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "template.jinja").write_text(TEMPLATE)
    more = ("--chat-template", str(tmp_path / "template.jinja"))
    sizes = ("--mm-processor-kwargs", '{"num_crops": 4}')
    with LLM(str(folder), limit_mm_per_prompt={"image": 2}, chat_template=TEMPLATE) as llm:
        params = SamplingParams(temperature=0, max_tokens=8)
        expected = [
            *texts(llm.chat(_ask(2, num_crops=4), params, use_tqdm=False)),
            *texts(llm.chat(_ask(1, num_crops=1), params, use_tqdm=False)),
        ]

    service = Service(tmp_path, "serve", str(folder), *WORDS, *more, *sizes)
    try:
        service.wait_for_workers(2)

        def answer(messages: list[dict[str, Any]]) -> str | None:
            made = service.client.chat.completions.create(
                model=str(folder),
                messages=messages,  # type: ignore[arg-type]
                temperature=0,
                max_tokens=8,
            )
            return made.choices[0].message.content

        answers = [answer(_ask(2)), answer(_ask(1, num_crops=1))]
        with pytest.raises(openai.BadRequestError, match="At most 2 image"):
            answer(_ask(3))
        with pytest.raises(openai.BadRequestError, match="trust_remote_code"):
            service.client.chat.completions.create(
                model=str(folder),
                messages=[{"role": "user", "content": "x"}],
                extra_body={"trust_remote_code": True},
            )
    finally:
        service.end()

    assert expected[0] != expected[1]
    assert expected == answers


def test_worker_of_a_checkpoint_that_cannot_be_served_says_why_and_ends(tmp_path: Path) -> None:
    folder = write_tiny_phi3_v(tmp_path / "phi")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    run = subprocess.run(
        [sys.executable, "-m", "cli", "worker", "--model", str(folder), "--device", "cpu"],
        env={**os.environ, "DARKROOM_HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=START_S,
    )
    told = [line for line in run.stderr.splitlines() if not line.startswith("{")]  # no event's

    assert 2 == run.returncode
    assert [
        f"error: The model {str(folder)!r} cannot be loaded: it has no weights in safetensors that fit "
        "its config and that can be read. Give a checkpoint folder, a hub id that is in the cache, or "
        "darkroom-tiny."
    ] == told
    assert not (
        tmp_path / "home" / "valkey" / "darkroom.json"
    ).exists()  # the broker has ended, too
