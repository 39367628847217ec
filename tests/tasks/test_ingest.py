"""Entries that cannot become a job just now: they wait, are not lost, and hold up no other."""

import json
from typing import Any

import pytest
from celery.exceptions import Reject

from storage import jobs, tenants
from storage.errors import DatabaseRefusedError
from tasks import ingest, worker
from tasks.broker import build_client
from tasks.config import Config
from tasks.ingest import GROUP, STREAM, StreamIngest
from tasks.stores import Stores
from tasks.submit import Submission, submit
from tests.tasks.fakes import RecordingDispatcher, build_request


def test_entry_that_fails_holds_up_none_of_its_page_and_stays(
    stores: Stores,
    dispatcher: RecordingDispatcher,
    config: Config,
    broker: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse_first(stores: Stores, dispatcher: Any, submission: Submission) -> Any:
        if submission.idempotency_key == "0":
            raise DatabaseRefusedError
        return submit(stores, dispatcher, submission)

    monkeypatch.setattr(ingest, "submit", refuse_first)
    taker = StreamIngest(stores, dispatcher, config, broker, consumer="c")
    with build_client(broker) as redis:
        redis.xgroup_create(STREAM, GROUP, id="0", mkstream=True)
        for key in "012":
            given = {"requests": [build_request("a")], "idempotency_key": key}
            redis.xadd(STREAM, {"submission": json.dumps(given)})

        with pytest.raises(DatabaseRefusedError):
            taker.take_page()

        assert 1 == redis.xlen(STREAM)
    with stores.database.read() as session:
        tenant = tenants.find(session, "default")
        assert tenant is not None
        made, _ = jobs.list_page(session, tenant.id)
    assert ["2", "1"] == [job.idempotency_key for job in made]


@pytest.mark.parametrize("error", [DatabaseRefusedError(), RuntimeError("a bug")])
def test_message_that_fails_goes_back_to_its_queue(
    error: Exception,
    stores: Stores,
    dispatcher: RecordingDispatcher,
    broker: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(worker, "submit", fail)
    monkeypatch.setattr(worker, "BUSY_S", 0.0)

    with pytest.raises(Reject) as rejected:
        worker._submit(stores, dispatcher, broker, {"requests": [build_request("a")]}, "task-1")

    assert rejected.value.requeue  # type: ignore[attr-defined]
