"""A worker that is killed half way through a clip: what was answered is not asked again."""

import base64
import json
from collections import Counter
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
from tests.faults.stack import Broker, find, look_at, stop
from tests.tasks.fakes import build_request
from tests.tasks.processes import open_fleet, wait_until

clips = pytest.importorskip("tests.media.clips")

pytestmark = [pytest.mark.services, pytest.mark.timeout(300)]

WORKER = "tests.faults.parts_worker"
DELAY_S = 0.06
NUM_PARTS = 30


def test_killed_worker_loses_no_finished_part_of_a_clip(
    tmp_path: Path, database: Database, database_url: str, broker: Broker
) -> None:
    stores = Stores(database, FolderBlobs(tmp_path / "blobs"))
    asked = [tmp_path / "asked-first", tmp_path / "asked-second"]
    settings = {
        "HOME": str(tmp_path),
        "DATABASE_URL": database_url,
        "REDIS_URL": broker.url,
        "LEASE_S": "2",
        "HEARTBEAT_S": "0.5",
        "SWEEP_S": "0.5",
    }
    with open_fleet(tmp_path, **settings) as fleet:
        first = fleet.start(str(DELAY_S), str(asked[0]), module=WORKER)
        job = hand_in(stores, broker.url, tmp_path)
        wait_until(lambda: len(read_kept(database)) >= NUM_PARTS // 2, fleet, timeout_s=120)
        first.kill()
        first.wait()
        kept = read_kept(database)
        second = fleet.start(str(DELAY_S), str(asked[1]), module=WORKER)
        wait_until(lambda: find(database, job).num_completed == 1, fleet, timeout_s=120)
        assert [0] == stop(fleet, second), fleet.logs()
    finish(stores, job)

    assert NUM_PARTS // 2 <= len(kept) < NUM_PARTS, "the kill came too late"
    before, after = (Counter(read_numbers(path)) for path in asked)
    assert kept <= set(before)
    assert {str(n) for n in range(1, NUM_PARTS + 1)} - kept | {"s1.0"} == set(after)
    assert {1} == set(after.values())
    outcome = look_at(database, job)
    assert (1, 2) == (outcome.num_completed, outcome.highest_attempt)
    line = read_line(stores, job)
    assert [(n, 10.0 * n - 10, 10.0 * n) for n in range(1, NUM_PARTS + 1)] == [
        (part["number"], part["start_s"], part["end_s"]) for part in line["parts"]
    ]
    assert all(10 == len(part["frame_times_s"]) for part in line["parts"])
    assert [f"seen from {10 * n} to {10 * n + 9}" for n in range(NUM_PARTS)] == [
        part["text"] for part in line["parts"]
    ]
    assert "whole 30" == line["response"]["body"]["choices"][0]["message"]["content"]


def hand_in(stores: Stores, broker_url: str, home: Path) -> JobId:
    """300 seconds, a frame each, in segments of ten."""
    clip = clips.clip(clips.shades(1, 32, 32) * 300, fps=1)
    url = "data:video/mp4;base64," + base64.b64encode(clip).decode()
    content = [
        {"type": "video_url", "video_url": {"url": url}, "segments": {"seconds": 10}},
        {"type": "text", "text": "What happens?"},
    ]
    request = build_request("clip", messages=[{"role": "user", "content": content}])
    config = load_config(home=home)
    dispatcher = Dispatcher(config, broker_url)
    job = submit(stores, dispatcher, parse_submission({"requests": [request]})).job.id
    expand(stores, dispatcher, config, job)
    dispatcher.close()
    return job


def read_kept(database: Database) -> set[str]:
    with database.read() as session:
        return {str(number) for number in session.scalars(select(Part.number))}


def read_numbers(log: Path) -> list[str]:
    """Of the parts that were asked: a prompt is named after its item, the attempt and the part."""
    return [".".join(name.split(".")[2:]) for name in log.read_text().split()]


def read_line(stores: Stores, job: JobId) -> Any:
    found = find(stores.database, job)
    assert found.error_file_id is None
    assert found.output_file_id is not None
    with stores.database.read() as session:
        key = files.get(session, found.tenant_id, FileId(found.output_file_id)).blob_key
    (line,) = stores.blobs.read(key).splitlines()
    return json.loads(line)
