"""Blobs that nothing needs are removed, and no other."""

import os
import threading
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from storage import chats, files, jobs
from storage.errors import BlobMissingError, BlobsUnavailableError
from storage.ids import FileId, JobId, TenantId, new_uuid
from storage.keys import build_file_key, build_output_key
from tasks.collect import Collector
from tasks.config import Config
from tasks.expand import expand
from tasks.finish import finish
from tasks.stores import Stores
from tasks.submit import parse_submission, submit
from tests.storage.rows import make_job, make_tenant
from tests.tasks.fakes import RecordingDispatcher, build_request
from tests.tasks.test_run import Rig
from tests.waiting import wait_until

OLD_S = -60.0
"""A grace period that is over for everything, also for what was written a moment ago."""


def collect(stores: Stores, grace_s: float = OLD_S) -> int:
    return build_collector(stores, grace_s=grace_s).collect()


def build_collector(stores: Stores, **values: float) -> Collector:
    return Collector(
        stores, **{"grace_s": OLD_S, "chat_lifetime_s": 3600.0, "every_s": 1.0, **values}
    )


def is_there(stores: Stores, key: str) -> bool:
    try:
        stores.blobs.count_bytes(key)
    except BlobMissingError:
        return False
    return True


def put_file(stores: Stores, tenant: TenantId, **values: Any) -> tuple[FileId, str]:
    file = FileId(new_uuid())
    key = build_file_key(tenant, file)
    stat = stores.blobs.put(key, b"{}")
    with stores.database.write() as session:
        files.create(
            session,
            file=file,
            tenant=tenant,
            filename="in.jsonl",
            num_bytes=stat.num_bytes,
            sha256=stat.sha256,
            blob_key=key,
            **{"purpose": "batch", **values},
        )
    return file, key


def test_blob_without_a_row_goes_when_its_row_can_no_longer_come(stores: Stores) -> None:
    tenant = make_tenant(stores.database)
    orphans = [
        build_file_key(tenant, FileId(new_uuid())),
        build_output_key(tenant, JobId(new_uuid()), 1),
    ]
    for key in orphans:
        stores.blobs.put(key, b"x")
    _, named = put_file(stores, tenant)

    assert 0 == collect(stores, grace_s=3600.0)
    assert 2 == collect(stores)
    assert [False, False, True] == [is_there(stores, key) for key in (*orphans, named)]
    assert 0 == collect(stores)


def test_blob_goes_with_its_file_and_not_before_the_job_that_reads_it(
    stores: Stores, dispatcher: RecordingDispatcher, config: Config
) -> None:
    given = parse_submission({"requests": [build_request("a", "a bad picture")]})
    rig = Rig(stores, dispatcher, config)
    job = rig.job(submit(stores, dispatcher, given).job.id)
    with stores.database.write() as session:
        files.delete(session, job.tenant_id, job.input_file_id)

    assert 0 == collect(stores), "it validates"
    expand(stores, dispatcher, config, job.id)
    assert 0 == collect(stores), "it runs"
    rig.run()
    finish(stores, job.id)
    assert 0 == collect(stores, grace_s=3600.0), "somebody may be reading it still"
    assert 1 == collect(stores)

    assert not is_there(stores, job.manifest_key)
    ended = rig.job(job.id)
    assert ended.error_file_id is not None
    with stores.database.read() as session:
        key = files.get(session, job.tenant_id, FileId(ended.error_file_id)).blob_key
    assert is_there(stores, key), "the job's own files stay"


def test_blobs_of_files_that_have_expired_go(stores: Stores) -> None:
    tenant = make_tenant(stores.database)
    _, gone = put_file(stores, tenant, lifetime_s=-3600.0)
    _, answered = put_file(stores, tenant, lifetime_s=-3600.0, purpose=files.REQUEST_PURPOSE)
    _, kept = put_file(stores, tenant, lifetime_s=3600.0)

    assert 2 == collect(stores)
    assert [False, False, True] == [is_there(stores, key) for key in (gone, answered, kept)]


def test_answered_chat_goes_when_its_life_is_over_and_its_blob_with_the_others(
    stores: Stores, dispatcher: RecordingDispatcher, config: Config
) -> None:
    rig = Rig(stores, dispatcher, config)
    chat = rig.job(rig.make_chat("What is this?"))
    still_open = build_collector(stores, chat_lifetime_s=OLD_S).remove_chats(threading.Event())
    rig.run()
    finish(stores, chat.id)
    young = build_collector(stores).remove_chats(threading.Event())
    with stores.database.write() as session:  # as the API marks it
        session.execute(text("UPDATE files SET purpose = 'request'"))

    old = build_collector(stores, chat_lifetime_s=OLD_S).remove_chats(threading.Event())

    assert (0, 0, 1) == (still_open, young, old)
    with stores.database.read() as session:
        assert jobs.find(session, chat.id) is None
    assert is_there(stores, chat.manifest_key)
    assert 0 == collect(stores, grace_s=3600.0)
    assert 1 == collect(stores)
    assert finish(stores, chat.id) is None, "a message that comes once more"
    expand(stores, dispatcher, config, chat.id)


def test_chats_go_page_after_page_until_the_process_stops(stores: Stores) -> None:
    tenant = make_tenant(stores.database)
    for _ in range(chats.PAGE + 1):
        job = make_job(stores.database, 0, tenant=tenant, is_started=False, priority=jobs.FAST_LANE)
        with stores.database.write() as session:
            jobs.reject(session, job, [])
    collector = build_collector(stores, chat_lifetime_s=OLD_S)
    stopping = threading.Event()
    stopping.set()

    assert [0, chats.PAGE + 1, 0] == [
        collector.remove_chats(stop) for stop in (stopping, threading.Event(), threading.Event())
    ]


def test_chats_go_while_the_blob_store_is_away(
    stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = make_job(stores.database, 0, is_started=False, priority=jobs.FAST_LANE)
    with stores.database.write() as session:
        jobs.reject(session, chat, [])
    is_asked = threading.Event()

    def sweep(*, older_than_s: float) -> int:
        is_asked.set()
        raise BlobsUnavailableError

    monkeypatch.setattr(stores.blobs, "sweep", sweep)
    stop = threading.Event()
    collector = build_collector(stores, chat_lifetime_s=OLD_S)
    thread = threading.Thread(target=collector.run, args=(stop,))
    thread.start()
    wait_until(is_asked.is_set)
    stop.set()
    thread.join(60)

    with stores.database.read() as session:
        assert jobs.find(session, chat) is None


def test_one_process_collects_until_it_is_told_to_stop(stores: Stores, tmp_path: Path) -> None:
    keys = [build_file_key(make_tenant(stores.database), FileId(new_uuid())) for _ in range(3)]
    for key in keys:
        stores.blobs.put(key, b"x")
    stop = threading.Event()
    chat = make_job(stores.database, 0, is_started=False, priority=jobs.FAST_LANE)
    with stores.database.write() as session:
        jobs.reject(session, chat, [])
    collector = build_collector(stores, grace_s=3600.0, chat_lifetime_s=OLD_S, every_s=0.01)
    thread = threading.Thread(target=collector.run, args=(stop,))
    thread.start()
    for key in keys:  # round after round
        os.utime(tmp_path / "blobs" / key, (1.0, 1.0))
        while is_there(stores, key):
            assert thread.is_alive()
    stop.set()
    thread.join(60)

    assert not thread.is_alive()
    with stores.database.read() as session:
        assert jobs.find(session, chat) is None
