"""
OpenAI's own client, in strict mode, against a running API: the wire's promises, one test each.

A stand-in does the work, so that every state can be held and looked at, on both databases;
tests/acceptance/test_conformance.py asks a whole service for the same. Webhooks (a signed call that
the client unwraps) are not built, and so not here.
"""

import time
from io import BytesIO
from itertools import pairwise
from typing import Any

import openai
import pytest
from sqlalchemy import text

from storage import jobs
from storage.states import ItemState
from tests.api.conftest import Client, Service
from tests.api.inputs import (
    BAD_LIMITS,
    BAD_LINES,
    BAD_METADATA,
    ENDPOINT,
    UNKNOWN_FILES,
    build_jsonl,
    build_line,
    count,
    create,
    job_of,
    read_lines,
    submit,
    upload,
)
from tests.api.server import MAX_BATCH_BYTES, MAX_BATCH_LINES, MODEL
from tests.storage.rows import let_window_end

# 1: files and batches


def test_file_is_uploaded_found_listed_read_and_deleted(client: Client) -> None:
    content = build_jsonl(build_line(1))
    file = client.api.files.create(file=BytesIO(content), purpose="batch")

    found = client.api.files.retrieve(file.id)
    listed = client.api.files.list(purpose="batch").data
    read = client.api.files.content(file.id).read()
    deleted = client.api.files.delete(file.id)

    assert (len(content), "batch", "processed", "upload") == (
        file.bytes,
        file.purpose,
        file.status,
        file.filename,
    )
    assert file.expires_at is not None
    assert 30 * 24 * 3600 == pytest.approx(file.expires_at - file.created_at, abs=1)
    assert file == found
    assert [file] == listed
    assert content == read
    assert (file.id, True) == (deleted.id, deleted.deleted)
    assert [] == client.api.files.list().data
    with pytest.raises(openai.NotFoundError):
        client.api.files.retrieve(file.id)


def test_lifetime_of_an_upload_is_what_was_asked_for(client: Client) -> None:
    file = client.api.files.create(
        file=("a.jsonl", b"{}\n"),
        purpose="batch",
        expires_after={"anchor": "created_at", "seconds": 7200},
    )
    kept = client.api.files.create(file=("a.bin", b"abc"), purpose="user_data")

    assert file.expires_at is not None
    assert 7200 == pytest.approx(file.expires_at - file.created_at, abs=1)
    assert kept.expires_at is None
    assert client.api.files.wait_for_processing(kept.id) == kept


def test_files_are_listed_both_ways_in_pages(client: Client) -> None:
    made = [upload(client, b"x\n", purpose).id for purpose in ("batch", "vision", "batch")]

    assert made[::-1] == [file.id for file in client.api.files.list(limit=2)]
    assert made == [file.id for file in client.api.files.list(limit=1, order="asc")]
    assert [made[1]] == [file.id for file in client.api.files.list(purpose="vision")]


def test_batch_goes_from_validating_to_completed(service: Service, client: Client) -> None:
    batch = submit(client, build_line(1), build_line(2), metadata={"customer": "user_123"})
    fresh = client.api.batches.retrieve(batch.id)
    service.worker.expand(job_of(batch))
    running = client.api.batches.retrieve(batch.id)
    service.worker.complete(job_of(batch))
    done = client.api.batches.retrieve(batch.id)

    assert batch == fresh
    assert ("validating", MODEL, "24h", ENDPOINT) == (
        batch.status,
        batch.model,
        batch.completion_window,
        batch.endpoint,
    )
    assert (batch.created_at + 86400, {"customer": "user_123"}) == (
        batch.expires_at,
        batch.metadata,
    )
    assert (0, 0, 0) == count(batch)
    assert ("in_progress", (2, 0, 0)) == (running.status, count(running))
    assert ("completed", (2, 2, 0)) == (done.status, count(done))
    assert done.usage is not None
    assert (24, 6, 8, 32) == (
        done.usage.input_tokens,
        done.usage.input_tokens_details.cached_tokens,
        done.usage.output_tokens,
        done.usage.total_tokens,
    )
    assert done.error_file_id is None
    lines = read_lines(client, done.output_file_id)
    assert ["r-1", "r-2"] == [line["custom_id"] for line in lines]
    body = lines[0]["response"]["body"]
    assert (
        "text of r-1"
        == openai.types.chat.ChatCompletion.model_validate(body).choices[0].message.content
    )


def test_batches_are_listed_newest_first_in_pages(client: Client) -> None:
    made = [submit(client, build_line(1), metadata={"n": str(n)}).id for n in range(3)]

    page = client.api.batches.list(limit=2)

    assert made[:0:-1] == [batch.id for batch in page.data]
    assert page.has_more
    assert made[::-1] == [batch.id for batch in client.api.batches.list(limit=1)]


# 2, 3: input files


def test_unknown_file_is_refused(client: Client) -> None:
    for file in UNKNOWN_FILES:
        with pytest.raises(openai.BadRequestError) as caught:
            create(client, file)
        assert "input_file_id" == caught.value.param
        assert caught.value.request_id is not None
        assert caught.value.request_id.startswith("req_")


def test_file_of_another_purpose_is_refused(client: Client) -> None:
    file = upload(client, build_jsonl(build_line(1)), "user_data")

    with pytest.raises(openai.BadRequestError) as caught:
        create(client, file.id)

    assert "input_file_id" == caught.value.param


# 4, 5: inputs that do not validate


@pytest.mark.parametrize(("lines", "bad"), BAD_LINES)
def test_every_bad_line_is_named(
    service: Service, client: Client, lines: list[Any], bad: list[int]
) -> None:
    batch = submit(client, *lines)
    service.worker.expand(job_of(batch))

    failed = client.api.batches.retrieve(batch.id)

    assert "failed" == failed.status
    assert failed.failed_at is not None
    assert failed.errors is not None
    assert failed.errors.data is not None
    assert bad == [error.line for error in failed.errors.data]
    assert (None, None) == (failed.output_file_id, failed.error_file_id)
    assert (0, 0, 0) == count(failed)


@pytest.mark.parametrize(
    ("content", "code"),
    [
        pytest.param(b"", "empty_file", id="empty"),
        pytest.param(
            build_jsonl(*map(build_line, range(MAX_BATCH_LINES + 1))), "too_many_lines", id="lines"
        ),
        pytest.param(
            build_jsonl(build_line(1, text="x" * MAX_BATCH_BYTES)), "file_too_large", id="bytes"
        ),
    ],
)
def test_input_that_breaks_a_limit_fails(client: Client, content: bytes, code: str) -> None:
    batch = create(client, upload(client, content).id)

    failed = client.api.batches.retrieve(batch.id)

    assert "failed" == failed.status
    assert failed.errors is not None
    assert failed.errors.data is not None
    assert [code] == [error.code for error in failed.errors.data]


# 6, 7: cancelling


def test_cancelling_twice_gives_the_same_batch(service: Service, client: Client) -> None:
    batch = submit(client, build_line(1))
    service.worker.expand(job_of(batch))

    first = client.api.batches.cancel(batch.id)
    second = client.api.batches.cancel(batch.id)

    assert "cancelling" == first.status
    assert first == second


def test_completed_batch_is_not_cancelled_and_the_client_asks_once(
    service: Service, client: Client
) -> None:
    batch = submit(client, build_line(1))
    service.worker.complete(job_of(batch))
    sent: list[Any] = []
    client.api._client.event_hooks = {"response": [sent.append]}

    with pytest.raises(openai.ConflictError) as caught:
        client.api.batches.cancel(batch.id)

    assert 1 == len(sent)
    assert "false" == caught.value.response.headers["x-should-retry"]


# 8, 9: what is left


def test_cancelled_batch_keeps_what_was_finished(service: Service, client: Client) -> None:
    batch = submit(client, *map(build_line, range(3)))
    service.worker.expand(job_of(batch))
    service.worker.run(job_of(batch), max_items=2)
    client.api.batches.cancel(batch.id)
    service.worker.end_rest(job_of(batch), ItemState.CANCELLED)
    service.worker.finish(job_of(batch))

    done = client.api.batches.retrieve(batch.id)

    assert "cancelled" == done.status
    assert (3, 2, 0) == count(done)
    assert 2 == len(read_lines(client, done.output_file_id))
    (left,) = read_lines(client, done.error_file_id)
    assert ("batch_cancelled", None) == (left["error"]["code"], left["response"])


def test_expired_batch_keeps_what_was_finished(service: Service, client: Client) -> None:
    batch = submit(client, *map(build_line, range(3)))
    service.worker.expand(job_of(batch))
    service.worker.run(job_of(batch), max_items=1)
    let_window_end(service.database, job_of(batch))
    service.worker.end_rest(job_of(batch), ItemState.EXPIRED)
    service.worker.finish(job_of(batch))

    done = client.api.batches.retrieve(batch.id)

    assert "expired" == done.status
    assert (3, 1, 0) == count(done)
    assert done.request_counts is not None
    assert {"expired": 2, "cancelled": 0} == done.request_counts.model_extra
    assert 1 == len(read_lines(client, done.output_file_id))
    left = read_lines(client, done.error_file_id)
    assert ["batch_expired"] * 2 == [line["error"]["code"] for line in left]


def test_batch_whose_items_all_failed_is_completed(service: Service, client: Client) -> None:
    batch = submit(client, *(build_line(n, "please fail") for n in range(2)))
    service.worker.complete(job_of(batch))

    done = client.api.batches.retrieve(batch.id)

    assert ("completed", None) == (done.status, done.output_file_id)
    assert (2, 0, 2) == count(done)
    lines = read_lines(client, done.error_file_id)
    assert [400, 400] == [line["response"]["status_code"] for line in lines]
    assert "bad_image" == lines[0]["response"]["body"]["error"]["code"]


# 10: the input is not needed any more


def test_deleting_the_input_changes_nothing(service: Service, client: Client) -> None:
    batch = submit(client, build_line(1))
    client.api.files.delete(batch.input_file_id)

    service.worker.complete(job_of(batch))

    assert "completed" == client.api.batches.retrieve(batch.id).status


# 11, 12: bad parameters


@pytest.mark.parametrize("limit", BAD_LIMITS)
def test_bad_limit_is_refused(client: Client, limit: int) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.api.batches.list(limit=limit)

    assert "limit" == caught.value.param


def test_unknown_cursor_is_refused(client: Client) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.api.batches.list(after="batch_forged")

    assert "after" == caught.value.param


@pytest.mark.parametrize("metadata", BAD_METADATA)
def test_metadata_over_its_limits_is_refused(client: Client, metadata: Any) -> None:
    file = upload(client, build_jsonl(build_line(1)))

    with pytest.raises(openai.BadRequestError) as caught:
        create(client, file.id, metadata=metadata)

    assert "metadata" == caught.value.param


def test_metadata_within_its_limits_comes_back(client: Client) -> None:
    metadata = {f"{n:x<64}": "é" * 512 for n in range(16)}

    batch = submit(client, build_line(1), metadata=metadata)

    assert metadata == batch.metadata


# 13: the same submission again


def test_same_idempotency_key_gives_the_same_batch(client: Client) -> None:
    file = upload(client, build_jsonl(build_line(1))).id
    key = {"Idempotency-Key": "night run 7"}

    first = create(client, file, extra_headers=key)
    client.api.files.delete(file)
    second = create(client, file, extra_headers=key)
    with pytest.raises(openai.ConflictError) as caught:
        create(client, file, extra_headers=key, completion_window="12h")

    assert first.id == second.id
    assert "idempotency_conflict" == caught.value.code
    assert "false" == caught.value.response.headers["x-should-retry"]


# 14, 15: what a poller sees never runs backwards


def test_counts_and_times_only_rise(service: Service, client: Client) -> None:
    lines = [build_line(n, "please fail" if n % 3 == 0 else "go") for n in range(9)]
    batch = submit(client, *lines)
    seen = [batch]

    def look() -> None:
        seen.append(client.api.batches.retrieve(batch.id))

    look()
    service.worker.expand(job_of(batch))
    look()
    while service.worker.run(job_of(batch), max_items=2):
        look()
    with service.database.write() as session:
        assert jobs.start_finishing(session, job_of(batch)) is not None
    look()
    service.worker.finish(job_of(batch))
    look()

    counts = [count(one) for one in seen]
    assert all(
        a <= b for before, after in pairwise(counts) for a, b in zip(before, after, strict=True)
    )
    assert {0, 9} == {total for total, _, _ in counts}
    assert ["validating", "in_progress", "finalizing", "completed"] == list(
        dict.fromkeys(one.status for one in seen)
    )
    last = seen[-1]
    times = [last.created_at, last.in_progress_at, last.finalizing_at, last.completed_at]
    assert all(isinstance(at, int) for at in times)
    assert sorted(at or 0 for at in times) == times
    assert abs(time.time() - last.created_at) < 60


# 17, 18: what is not there


def test_nothing_of_another_tenant_is_found(
    service: Service, client: Client, stranger: Client
) -> None:
    batch = submit(client, build_line(1))
    for ask in (
        lambda: stranger.api.files.retrieve(batch.input_file_id),
        lambda: stranger.api.files.content(batch.input_file_id),
        lambda: stranger.api.files.delete(batch.input_file_id),
        lambda: stranger.api.batches.retrieve(batch.id),
        lambda: stranger.api.batches.cancel(batch.id),
    ):
        with pytest.raises(openai.NotFoundError) as caught:
            ask()
        assert "not_found_error" == caught.value.type
    with pytest.raises(openai.BadRequestError):
        create(stranger, batch.input_file_id)
    with pytest.raises(openai.BadRequestError):
        stranger.api.batches.list(after=batch.id)

    assert [] == stranger.api.batches.list().data
    assert [] == stranger.api.files.list().data
    assert "validating" == client.api.batches.retrieve(batch.id).status


def test_content_of_an_expired_file_is_not_found(service: Service, client: Client) -> None:
    file = upload(client, b"{}\n")
    with service.database.write() as session:
        session.execute(
            text("UPDATE files SET expires_at = 1.0 WHERE id = :id"),
            {"id": file.id.removeprefix("file-")},
        )

    with pytest.raises(openai.NotFoundError) as caught:
        client.api.files.content(file.id)

    assert ("not_found", "not_found_error") == (caught.value.code, caught.value.type)
