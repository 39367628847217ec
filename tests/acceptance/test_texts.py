"""
The bundled model says through the whole service what it says by itself, item by item.

In short here; `make acceptance` asks 500 items. Both sides get the same bytes of the same pictures.
"""

import base64
import io
import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from bench.queue import Client, wait_for_end
from bench.service import open_service
from engine import LLM, SamplingParams
from storage import items
from storage.db import Database
from storage.ids import JobId
from storage.tables import Item
from tests.engine.mixed import QUESTIONS, Mixed, mixed_requests

pytestmark = [pytest.mark.services, pytest.mark.timeout(1800)]

MODEL = "darkroom-tiny"
NUM_ITEMS = int(os.environ.get("DARKROOM_ACCEPTANCE_ITEMS", "24"))
NUM_WORKERS = 3
LIMITS = {"image": 8, "video": 1}
Conversation = list[dict[str, Any]]


def build_conversation(mixed: Mixed, chance: random.Random) -> Conversation:
    """A message of pictures, frames and text in any order, as the wire has it."""
    parts: list[dict[str, Any]] = []
    for image in mixed.images:
        url = f"data:image/png;base64,{encode(image.image, 'PNG')}"
        parts.append({"type": "image_url", "image_url": {"url": url}})
    for video in mixed.videos:
        frames = ",".join(encode(frame.image, "JPEG") for frame in video.images)
        parts.append(
            {"type": "video_url", "video_url": {"url": f"data:video/jpeg;base64,{frames}"}}
        )
    chance.shuffle(parts)
    question = {"type": "text", "text": chance.choice(QUESTIONS)}
    parts.insert(chance.randint(0, len(parts)), question)
    content: Any = parts if len(parts) > 1 else question["text"]
    user = {"role": "user", "content": content}
    system = {"role": "system", "content": "You are a careful observer."}
    return [system, user] if chance.random() < 0.3 else [user]


def encode(image: Any, form: str) -> str:
    file = io.BytesIO()
    image.save(file, form)
    return base64.b64encode(file.getvalue()).decode()


def ask_offline(conversations: list[Conversation], lengths: list[int]) -> list[str]:
    params = [SamplingParams(temperature=0.0, max_tokens=length) for length in lengths]
    with LLM(MODEL, limit_mm_per_prompt=LIMITS, device="cpu") as llm:
        results = llm.chat(conversations, params, use_tqdm=False)
    assert [] == [result.error for result in results if result.error]
    return [result.outputs[0].text for result in results]


def write_lines(file: Path, conversations: list[Conversation], lengths: list[int]) -> None:
    with file.open("w", encoding="utf-8") as out:
        for number, (messages, length) in enumerate(zip(conversations, lengths, strict=True)):
            body = {
                "model": MODEL,
                "messages": messages,
                "temperature": 0,
                "max_tokens": length,
            }
            line = {
                "custom_id": f"item-{number}",
                "method": "POST",
                "url": "/v1/chat/completions",
                "body": body,
            }
            out.write(json.dumps(line) + "\n")


def list_workers(database: Database, job: JobId) -> set[str | None]:
    with database.read() as session:
        return set(session.scalars(select(Item.worker).where(Item.job_id == job).distinct()))


def test_three_workers_give_the_texts_of_the_offline_engine(tmp_path: Path) -> None:
    chance = random.Random(20261127)
    mixed = mixed_requests(NUM_ITEMS, "acceptance")
    conversations = [build_conversation(one, chance) for one in mixed]
    lengths = [one.max_tokens for one in mixed]
    alone = ask_offline(conversations, lengths)
    write_lines(tmp_path / "in.jsonl", conversations, lengths)
    options = [f"{kind}={count}" for kind, count in LIMITS.items()]
    command = ("cli", "worker", "--model", MODEL, "--device", "cpu")

    with open_service(
        "postgresql",
        max_lines=NUM_ITEMS,
        MODELS=json.dumps({MODEL: LIMITS}),
        CHUNK_ITEMS="4",
        CHUNKS_IN_FLIGHT="1",
    ) as service:
        service.start(
            "gpu", *command, "--limit-mm-per-prompt", ",".join(options), count=NUM_WORKERS
        )
        client = Client(service)
        job = wait_for_end(service, client.create(client.upload(tmp_path / "in.jsonl")))
        lines = [
            json.loads(line)
            for line in client.read_lines(client.retrieve(f"batch_{job.id.hex}")["output_file_id"])
        ]
        workers = list_workers(service.database, job.id)
        with service.database.read() as session:
            ended = items.list_by_line(session, job.id, limit=NUM_ITEMS)

    texts = [line["response"]["body"]["choices"][0]["message"]["content"] for line in lines]
    num_equal = sum(one == other for one, other in zip(alone, texts, strict=True))
    print(f"{num_equal} of {NUM_ITEMS} texts are equal, from {len(workers)} workers")  # noqa: T201
    assert alone == texts
    assert len(workers) > 1
    for one, kept in zip(mixed, ended, strict=True):
        details = kept.details or {}
        assert MODEL in details["stamp"]["model"]
        sizes = [(image.width_px, image.height_px) for image in one.images]
        shown = [(image["width"], image["height"]) for image in details.get("images", ())]
        assert set(sizes) <= set(shown)
    assert {0, 1} <= {min(len(one.images), 1) for one in mixed}
    assert any(one.videos for one in mixed)
    assert any(len(one.images) > 2 for one in mixed)
