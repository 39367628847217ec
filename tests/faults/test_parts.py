"""
Workers that are killed half way through clips: what was answered is not asked again.

`make faults` has more clips and more kills. The `database` fixture checks L1 to L7,
changes included, when a test is over: no part is answered twice.
"""

import base64
import json
import os
import random
from collections import Counter
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from storage import files
from storage.blobs import FolderBlobs
from storage.db import Database
from storage.ids import FileId, JobId
from storage.tables import Part
from tasks.config import load_config
from tasks.dispatch import Dispatcher
from tasks.expand import expand
from tasks.finish import finish
from tasks.stores import Stores
from tasks.submit import parse_submission, submit
from tests.faults.stack import Broker, count_items_of, find, look_at, stop
from tests.tasks.fakes import build_request
from tests.tasks.processes import open_fleet, wait_until

clips = pytest.importorskip("tests.media.clips")

pytestmark = [pytest.mark.services, pytest.mark.timeout(900)]

WORKER = "tests.faults.parts_worker"
DELAY_S = 0.06
LAST = 18
"""The part at which the first worker stands still and is killed."""

NUM_PARTS = 30


def test_killed_worker_loses_no_finished_part_of_a_clip(
    tmp_path: Path, database: Database, database_url: str, broker: Broker
) -> None:
    stores = Stores(database, FolderBlobs(tmp_path / "blobs"))
    asked = [tmp_path / "asked-first", tmp_path / "asked-second"]
    with open_fleet(tmp_path, **build_settings(tmp_path, database_url, broker)) as fleet:
        first = fleet.start("0", str(asked[0]), str(LAST), module=WORKER)
        job = hand_in(stores, broker.url, tmp_path)
        wait_until(partial(has_kept, database, LAST - 1), fleet, timeout_s=120)
        first.kill()
        first.wait()
        kept = {number for _, number in read_kept(database)}
        second = fleet.start("0", str(asked[1]), module=WORKER)
        wait_until(lambda: find(database, job).num_completed == 1, fleet, timeout_s=120)
        assert [0] == stop(fleet, second), fleet.logs()
    finish(stores, job)

    numbers = [str(number) for number in range(1, NUM_PARTS + 1)]
    assert set(numbers[: LAST - 1]) == kept
    assert numbers[:LAST] == read_numbers(asked[0])
    assert [*numbers[LAST - 1 :], "s1.0"] == read_numbers(asked[1])
    outcome = look_at(database, job)
    assert (1, 2) == (outcome.num_completed, outcome.highest_attempt)
    (line,) = read_lines(stores, job)
    assert [(n, 10.0 * n - 10, 10.0 * n) for n in range(1, NUM_PARTS + 1)] == [
        (part["number"], part["start_s"], part["end_s"]) for part in line["parts"]
    ]
    assert all(10 == len(part["frame_times_s"]) for part in line["parts"])
    assert [f"seen from {10 * n} to {10 * n + 9}" for n in range(NUM_PARTS)] == [
        part["text"] for part in line["parts"]
    ]
    assert "whole 30" == line["response"]["body"]["choices"][0]["message"]["content"]


@dataclass(frozen=True)
class Profile:
    num_clips: int
    num_kills: int
    databases: tuple[str, ...]


SHORT, FULL = Profile(2, 2, ("sqlite",)), Profile(40, 25, ("sqlite", "postgresql"))
PROFILE = FULL if os.environ.get("DARKROOM_FAULT_PROFILE") == "full" else SHORT
SEED = int(os.environ.get("DARKROOM_FAULT_SEED", "20261127"))


@pytest.mark.parametrize("database_url", PROFILE.databases, indirect=True)
def test_clips_survive_workers_that_are_killed_at_random(
    tmp_path: Path, database: Database, database_url: str, broker: Broker
) -> None:
    chance = random.Random(SEED)
    stores = Stores(database, FolderBlobs(tmp_path / "blobs"))
    log = tmp_path / "asked"
    with open_fleet(tmp_path, **build_settings(tmp_path, database_url, broker)) as fleet:
        workers = [fleet.start(str(DELAY_S), str(log), module=WORKER) for _ in range(2)]
        job = hand_in(stores, broker.url, tmp_path, num_clips=PROFILE.num_clips)
        for number in range(PROFILE.num_kills):
            few = (number + 1) * chance.randrange(5, 10)
            wait_until(partial(has_kept, database, few), fleet, timeout_s=120)
            victim = chance.choice(
                [n for n in range(2) if count_items_of(database, workers[n])] or [0]
            )
            workers[victim].kill()
            workers[victim].wait()
            workers[victim] = fleet.start(str(DELAY_S), str(log), module=WORKER)
        wait_until(
            lambda: find(database, job).num_completed == PROFILE.num_clips, fleet, timeout_s=600
        )
        assert [0, 0] == stop(fleet, *workers), fleet.logs()
    finish(stores, job)

    lines = read_lines(stores, job)
    assert PROFILE.num_clips == len(lines)
    for line in lines:
        assert list(range(1, NUM_PARTS + 1)) == [part["number"] for part in line["parts"]]
        assert "whole 30" == line["response"]["body"]["choices"][0]["message"]["content"]
    asked = Counter(log.read_text().split())
    figures = {
        "database": database.engine.dialect.name,
        "seed": SEED,
        "num_kills": PROFILE.num_kills,
        "num_parts": PROFILE.num_clips * NUM_PARTS,
        "num_asked": sum(1 for name in asked.elements() if ".s" not in name),
        **asdict(look_at(database, job)),
    }
    print(json.dumps(figures))  # noqa: T201 - the figures of a long run are what it is for


def build_settings(folder: Path, database_url: str, broker: Broker) -> dict[str, str]:
    return {
        "HOME": str(folder),
        "DATABASE_URL": database_url,
        "REDIS_URL": broker.url,
        "CHUNK_ITEMS": "2",
        "LEASE_S": "6",  # on a busy machine a beat comes late, and a lost lease is an attempt more
        "HEARTBEAT_S": "0.5",
        "SWEEP_S": "0.5",
    }


def hand_in(stores: Stores, broker_url: str, home: Path, *, num_clips: int = 1) -> JobId:
    """Clips of 300 seconds, a frame each, in segments of ten."""
    clip = clips.clip(clips.shades(1, 32, 32) * 300, fps=1)
    url = "data:video/mp4;base64," + base64.b64encode(clip).decode()
    content = [
        {"type": "video_url", "video_url": {"url": url}, "segments": {"seconds": 10}},
        {"type": "text", "text": "What happens?"},
    ]
    messages = [{"role": "user", "content": content}]
    requests = [build_request(f"clip-{n}", messages=messages) for n in range(num_clips)]
    config = load_config(home=home)
    dispatcher = Dispatcher(config, broker_url)
    job = submit(stores, dispatcher, parse_submission({"requests": requests})).job.id
    expand(stores, dispatcher, config, job)
    dispatcher.close()
    return job


def read_kept(database: Database) -> set[tuple[int, str]]:
    """The items and the numbers of what is answered by now."""
    with database.read() as session:
        rows = session.execute(select(Part.item_id, Part.number))
        return {(item, str(number)) for item, number in rows}


def has_kept(database: Database, num_parts: int) -> bool:
    return len(read_kept(database)) >= num_parts


def read_numbers(log: Path) -> list[str]:
    """Of the parts that were asked: a prompt is named after its item, the attempt and the part."""
    return [".".join(name.split(".")[2:]) for name in log.read_text().split()]


def read_lines(stores: Stores, job: JobId) -> list[Any]:
    found = find(stores.database, job)
    assert found.error_file_id is None
    assert found.output_file_id is not None
    with stores.database.read() as session:
        key = files.get(session, found.tenant_id, FileId(found.output_file_id)).blob_key
    return [json.loads(line) for line in stores.blobs.read(key).splitlines()]
