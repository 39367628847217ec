"""What processes stand on goes away while they work: the database, the bucket, the disk, the API."""

import json
import os
import resource
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
from sqlalchemy import select, text

from storage import items
from storage.blobs import FolderBlobs, S3Blobs, S3Config
from storage.db import Database
from storage.errors import BlobsUnavailableError, DatabaseUnavailableError
from storage.ids import JobId
from storage.states import JobState
from storage.tables import Job
from tasks.app import CPU_QUEUE
from tasks.broker import build_client
from tasks.config import load_config
from tasks.finish import finish
from tasks.ingest import STREAM
from tasks.stores import Stores, open_blobs
from tests import asking
from tests.faults.stack import (
    Broker,
    assert_output_is_whole,
    find,
    hand_in,
    look_at,
    stop,
    wait_until_begun,
    wait_until_completed,
)
from tests.services import PostgreSQL, S3Server, find_free_ports
from tests.storage import rows
from tests.tasks.fakes import build_request
from tests.tasks.processes import Fleet, open_fleet, wait_until

pytestmark = [pytest.mark.services, pytest.mark.timeout(600)]

on_sqlite = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
on_postgresql = pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)


def settings_of(home: Path, broker: Broker, **more: str) -> dict[str, str]:
    return {
        "HOME": str(home),
        "REDIS_URL": broker.url,
        "CHUNK_ITEMS": "16",
        "CHUNKS_IN_FLIGHT": "2",
        "SWEEP_S": "0.5",
        **more,
    }


# The database


@on_postgresql
def test_database_whose_connections_are_cut_and_that_crashes_costs_no_item(
    tmp_path: Path,
    database: Database,
    database_url: str,
    postgresql_server: PostgreSQL,
    broker: Broker,
) -> None:
    stores = Stores(database, FolderBlobs(tmp_path / "blobs"))
    # A lease whose commit was answered to nobody is over soon.
    settings = settings_of(
        tmp_path, broker, DATABASE_URL=database_url, LEASE_S="6", HEARTBEAT_S="1"
    )
    with open_fleet(tmp_path, **settings) as fleet:
        cpu, *workers = fleet.start("cpu"), *(fleet.start("gpu", "0.05") for _ in range(2))
        job = hand_in(stores, broker.url, tmp_path, 300)
        wait_until_begun(database, job, fleet)
        num_cut = 0
        for _ in range(6):
            num_cut += cut_connections(database)
            time.sleep(0.2)
        postgresql_server.restart("immediate")
        time.sleep(0.3)
        postgresql_server.restart("fast")
        done_then = count_completed(database, job)
        wait_until_completed(database, job, fleet)
        codes = stop(fleet, cpu, *workers)
        told = sum(fleet.count_logged(worker, "database_unavailable") for worker in workers)
        told += sum(fleet.count_logged(worker, "commit_unknown") for worker in workers)

    outcome = look_at(database, job)
    assert [0, 0, 0] == codes
    assert num_cut > 0
    assert told > 0, "nobody noticed"
    assert done_then < 300, "the job was over before the last restart"
    assert (300, 0) == (outcome.num_completed, outcome.num_failed)
    assert 0 == outcome.num_charged
    assert_output_is_whole(stores, job, 300)


def cut_connections(database: Database) -> int:
    """All but our own."""
    with database.read() as session:
        return len(
            session.execute(
                text(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                    "WHERE datname = current_database() AND pid <> pg_backend_pid()"
                )
            ).all()
        )


def count_completed(database: Database, job: JobId) -> int:
    while True:
        try:
            return find(database, job).num_completed
        except DatabaseUnavailableError:
            time.sleep(0.1)


# The bucket


@on_sqlite
def test_bucket_that_dies_while_workers_read_and_while_the_job_ends(
    tmp_path: Path,
    database: Database,
    database_url: str,
    broker: Broker,
    s3_server: S3Server,
    s3_settings: dict[str, str],
) -> None:
    stores = Stores(database, open_blobs(load_config()))
    settings = settings_of(tmp_path, broker, DATABASE_URL=database_url, CHUNK_ITEMS="50")
    with open_fleet(tmp_path, **settings) as fleet:
        cpu = fleet.start("cpu")
        job = hand_in(stores, broker.url, tmp_path, 50)
        wait_until(lambda: find(database, job).state is JobState.IN_PROGRESS, fleet, timeout_s=120)
        s3_server.kill()
        worker = fleet.start("gpu", "0.03")
        wait_until(lambda: fleet.count_logged(worker, "chunk_unreadable") > 0, fleet, timeout_s=120)
        s3_server.start()
        wait_until_begun(database, job, fleet)  # so its lines have been read, all at once
        with frozen(s3_server):
            wait_until(
                lambda: find(database, job).state is JobState.FINALIZING, fleet, timeout_s=120
            )
            time.sleep(0.5)  # the artifact is being sent
            s3_server.kill()
        s3_server.start()
        wait_until_completed(database, job, fleet)
        codes = stop(fleet, cpu, worker)

    outcome = look_at(database, job)
    assert [0, 0] == codes
    assert (50, 0) == (outcome.num_completed, outcome.num_failed)
    assert (0, 0) == (outcome.num_charged, outcome.num_suspects)
    assert 2 <= outcome.highest_attempt < 10, "a bucket that is away is no reason to try in circles"
    assert_output_is_whole(stores, job, 50)


@contextmanager
def frozen(server: S3Server) -> Iterator[None]:
    server.freeze()
    try:
        yield
    finally:
        server.thaw()  # where it was not killed


@on_sqlite
def test_bucket_that_dies_between_two_parts_of_an_artifact_gets_it_whole_later(
    database: Database, s3_server: S3Server, s3_settings: dict[str, str]
) -> None:
    config = load_config()
    bucket = S3Config(
        s3_server.bucket,
        config.blobs.rsplit("/", 1)[1],
        endpoint_url=config.s3_endpoint_url,
        region=config.s3_region,
        max_tries=1,
        part_bytes=5 * 1024 * 1024,
    )
    blobs = DyingBlobs(bucket, dies=s3_server.kill, after_bytes=8 * 1024 * 1024)
    stores = Stores(database, blobs)
    job = make_large_job(database, num_items=120, num_chars=100_000)

    with pytest.raises(BlobsUnavailableError):
        finish(stores, job)
    s3_server.start()
    left_open = s3_server.build_client().list_multipart_uploads(
        Bucket=bucket.bucket, Prefix=f"{bucket.prefix}/"
    )["Uploads"]
    state = finish(stores, job)

    found = find(database, job)
    keys = [
        content["Key"]
        for content in s3_server.build_client().list_objects_v2(
            Bucket=bucket.bucket, Prefix=f"{bucket.prefix}/"
        )["Contents"]
    ]
    assert 1 == len(left_open)
    assert 1 == blobs.sweep(older_than_s=-60.0)
    assert JobState.COMPLETED is state is found.state
    assert [f"{bucket.prefix}/{found.tenant_id}/{job}/output.2.jsonl"] == keys
    lines = [json.loads(line) for line in blobs.read(keys[0].split("/", 1)[1]).splitlines()]
    assert [f"item-{number}" for number in range(1, 121)] == [one["custom_id"] for one in lines]
    texts = [one["response"]["body"]["choices"][0]["message"]["content"] for one in lines]
    assert [str(number).ljust(100_000, ".") for number in range(1, 121)] == texts


class DyingBlobs(S3Blobs):
    """The server dies when so many bytes of the first blob were written."""

    def __init__(self, config: S3Config, *, dies: Callable[[], None], after_bytes: int) -> None:
        super().__init__(config)
        self._dies: Callable[[], None] | None = dies
        self._after_bytes = after_bytes

    def open_writer(self, key: str) -> Any:
        writer: Any = super().open_writer(key)
        write, dies = writer.write, self._dies
        if dies is None:
            return writer
        num_bytes = 0

        def write_or_die(chunk: bytes) -> None:
            nonlocal num_bytes
            num_bytes += len(chunk)
            if num_bytes > self._after_bytes and self._dies is not None:
                self._dies = None
                dies()
            write(chunk)

        writer.write = write_or_die
        return writer


def make_large_job(database: Database, *, num_items: int, num_chars: int) -> JobId:
    job = rows.make_job(database, num_items)
    chunk = rows.lease(database, num_items)
    with database.write() as session:
        items.complete(
            session,
            [
                rows.completion(item.fence, str(item.line).ljust(num_chars, "."))
                for item in chunk.items
            ],
        )
    return job


# The API


@on_sqlite
def test_job_whose_api_was_killed_before_it_sent_the_message_is_found(
    tmp_path: Path, database: Database, broker: Broker
) -> None:
    stores = Stores(database, FolderBlobs(tmp_path / "blobs"))
    body = {
        "endpoint": "/v1/chat/completions",
        "completion_window": "24h",
        "requests": [build_request(f"r-{n}", f"text {n}") for n in range(20)],
    }
    headers = {"Idempotency-Key": "once"}
    with open_fleet(tmp_path, **settings_of(tmp_path, broker)) as fleet:
        url, api = start_api(fleet, "dies")
        with pytest.raises(httpx2.TransportError):
            asking.post(f"{url}/v1/batches", json=body, headers=headers)
        assert -9 == api.wait(timeout=60)
        job = list_jobs(database)[0]
        with build_client(broker.url) as client:
            assert 0 == client.llen(CPU_QUEUE)
        assert JobState.VALIDATING is find(database, job).state

        cpu, worker = fleet.start("cpu"), fleet.start("gpu")
        url, api = start_api(fleet)
        wait_until_completed(database, job, fleet)
        again = asking.post(f"{url}/v1/batches", json=body, headers=headers)
        num_resent = sum(fleet.count_logged(one, "sent_again") for one in (cpu, worker))
        codes = stop(fleet, cpu, worker)

    assert [0, 0] == codes
    assert num_resent > 0
    assert f"batch_{job.hex}" == again.json()["id"]
    assert [job] == list_jobs(database)
    assert_output_is_whole(stores, job, 20)


def start_api(fleet: Fleet, *words: str) -> "tuple[str, subprocess.Popen[bytes]]":
    port = str(find_free_ports(1)[0])
    url = f"http://127.0.0.1:{port}"
    process = fleet.start(port, *words, module="tests.faults.api")
    wait_until(lambda: answers(f"{url}/readyz"), fleet, timeout_s=120)
    return url, process


def answers(url: str) -> bool:
    try:
        return asking.get(url).status_code == 200
    except httpx2.TransportError:
        return False


def list_jobs(database: Database) -> list[JobId]:
    with database.read() as session:
        return list(session.scalars(select(Job.id)))


# The disk


@contextmanager
def full_disk(pid: int, num_bytes: int) -> Iterator[None]:
    """No file of this process grows beyond so many bytes: for a large blob the disk is full."""
    before = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, before)


@on_postgresql  # an SQLite would be on the same disk
def test_full_disk_delays_what_was_handed_in_and_loses_none_of_it(
    tmp_path: Path, database: Database, database_url: str, broker: Broker
) -> None:
    stores = Stores(database, FolderBlobs(tmp_path / "blobs"))
    requests = [build_request(f"r-{n}", f"text {n}", user="x" * 9000) for n in range(40)]
    settings = settings_of(tmp_path, broker, DATABASE_URL=database_url, INGEST_IDLE_S="1")
    with open_fleet(tmp_path, **settings) as fleet, build_client(broker.url) as client:
        cpu = fleet.start("cpu")
        wait_until(lambda: fleet.count_logged(cpu, "worker_ready") > 0, fleet, timeout_s=120)
        with full_disk(cpu.pid, 200_000):
            client.xadd(STREAM, {"submission": json.dumps({"requests": requests})})
            wait_until(lambda: is_failing(fleet, cpu, "ingest_failed"), fleet, timeout_s=120)
            assert 1 == client.xlen(STREAM)
            assert [] == list_jobs(database)
        wait_until(lambda: list_jobs(database) != [], fleet, timeout_s=120)
        job = list_jobs(database)[0]
        wait_until(lambda: find(database, job).state is JobState.IN_PROGRESS, fleet, timeout_s=120)
        with full_disk(cpu.pid, 4_000):
            worker = fleet.start("gpu")
            wait_until(lambda: is_failing(fleet, cpu, "task_failed"), fleet, timeout_s=120)
            assert JobState.FINALIZING is find(database, job).state
        wait_until_completed(database, job, fleet)
        codes = stop(fleet, cpu, worker)

    assert [0, 0] == codes
    assert [] == list((tmp_path / "blobs" / ".unfinished").iterdir())
    assert_output_is_whole(stores, job, 40)


def is_failing(fleet: Fleet, process: "subprocess.Popen[bytes]", event: str) -> bool:
    return (
        fleet.count_logged(process, event) > 0
        and fleet.count_logged(process, "blobs_unavailable") > 0
    )


@on_sqlite
def test_full_disk_refuses_an_upload_that_may_come_again(
    tmp_path: Path, database: Database, broker: Broker
) -> None:
    content = b"x" * 99_999 + b"\n"
    upload = {"file": ("lines.jsonl", 100 * content)}
    with open_fleet(tmp_path, **settings_of(tmp_path, broker)) as fleet:
        url, api = start_api(fleet)

        def send() -> httpx2.Response:
            return asking.post(f"{url}/v1/files", data={"purpose": "batch"}, files=upload)

        with full_disk(api.pid, 6_000_000):
            refused = send()
            left = list((tmp_path / "blobs").rglob("*"))
        taken = send()
        found = asking.get(f"{url}/v1/files/{taken.json()['id']}/content")

    assert 503 == refused.status_code
    assert "blobs_unavailable" == refused.json()["error"]["code"]
    assert [tmp_path / "blobs" / ".unfinished"] == left
    assert 200 == taken.status_code
    assert 100 * content == found.content


@on_sqlite
def test_full_disk_of_the_database_undoes_what_does_not_fit_and_nothing_else(
    tmp_path: Path, database: Database
) -> None:
    rows.make_job(database, 10)
    largest = max(path.stat().st_size for path in tmp_path.iterdir())

    with full_disk(os.getpid(), largest + 8192), pytest.raises(DatabaseUnavailableError):  # noqa: PT012 - one of them must
        for _ in range(100):
            rows.make_job(database, 200)
    num_jobs = len(list_jobs(database))
    rows.make_job(database, 200)

    assert num_jobs + 1 == len(list_jobs(database))
    with database.read() as session:
        assert [("ok",)] == session.execute(text("PRAGMA integrity_check")).all()
