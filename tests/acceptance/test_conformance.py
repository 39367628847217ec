"""
OpenAI's own client, in strict mode, against `darkroom up`: the wire's checklist, on a real service.

Numbers are those of the list that the wire was built by. Its sixteenth, webhooks, is not built.
tests/api/test_conformance.py asks the API alone for the same, in every state and on both databases.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from itertools import chain, pairwise
from typing import Any

import httpx2
import openai
import pytest
from openai.types import Batch
from sqlalchemy import text

from storage.db import Database
from tests.acceptance.service import START_S, Service, wait_until
from tests.api.conftest import Client
from tests.api.inputs import (
    BAD_LIMITS,
    BAD_LINES,
    BAD_METADATA,
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
from tests.api.server import MODEL
from tests.storage.rows import let_window_end

MAX_LINES = 50_000
MAX_BATCH_BYTES = 200 * 1024 * 1024
END_S = 120.0
NUM_MANY = 400  # more than the worker takes at a time, so that some wait while others are done

TERMINAL = ("completed", "failed", "expired", "cancelled")

pytestmark = pytest.mark.services


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    service = Service(tmp_path_factory.mktemp("conformance"))
    try:
        wait_until(lambda: service.says("worker_ready") >= 2, START_S)
        yield service
        assert 0 == service.stop()
        assert 0 == service.says("request_crashed")
    finally:
        service.end()


@pytest.fixture(scope="module")
def database(service: Service) -> Iterator[Database]:
    """For what only time would bring: the end of a window, or of a file's life."""
    with closing(Database(f"sqlite:///{service.home / 'darkroom.sqlite3'}")) as database:
        yield database


@pytest.fixture(scope="module")
def client(service: Service) -> Iterator[Client]:
    with open_client(service, "EMPTY") as client:
        yield client


@pytest.fixture(scope="module")
def stranger(service: Service) -> Iterator[Client]:
    made = service.darkroom("keys", "create", "for a test", "--tenant", "stranger")
    assert 0 == made.returncode, made.stderr
    with open_client(service, made.stdout.strip()) as client:
        yield client


@contextmanager
def open_client(service: Service, key: str) -> Iterator[Client]:
    url = f"http://127.0.0.1:{service.port}"
    headers = {"authorization": f"Bearer {key}"}
    with (
        openai.OpenAI(
            base_url=f"{url}/v1", api_key=key, timeout=60.0, _strict_response_validation=True
        ) as api,
        httpx2.Client(base_url=url, headers=headers, timeout=60.0, trust_env=False) as http,
    ):
        yield Client(api, http, key, "default")


def look(client: Client, batch: Batch) -> Batch:
    return client.api.batches.retrieve(batch.id)


def wait_for_end(client: Client, batch: Batch) -> Batch:
    wait_until(lambda: look(client, batch).status in TERMINAL, END_S)
    return look(client, batch)


def build_short(number: int, **body: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "Describe."}]
    return build_line(
        number,
        body={"model": MODEL, "messages": messages, "max_tokens": 8, "temperature": 0, **body},
    )


def submit_many(client: Client) -> Batch:
    """A batch of which a part has been done, and a part not."""
    lines = (build_short(n, min_tokens=32, max_tokens=32) for n in range(NUM_MANY))
    batch = submit(client, *lines)
    wait_until(lambda: count(look(client, batch))[1] > 0, END_S)
    return batch


# 1: files and batches


def test_file_is_made_found_listed_read_and_deleted(client: Client) -> None:
    content = build_jsonl(build_line(1))
    file = upload(client, content)

    assert (len(content), "processed") == (file.bytes, file.status)
    assert file == client.api.files.retrieve(file.id)
    assert file in client.api.files.list(purpose="batch").data
    assert content == client.api.files.content(file.id).read()
    assert client.api.files.delete(file.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.api.files.retrieve(file.id)


def test_batch_is_made_found_listed_and_completed(client: Client) -> None:
    batch = submit(client, *map(build_short, range(3)), metadata={"customer": "user_123"})
    listed = client.api.batches.list(limit=1).data
    done = wait_for_end(client, batch)
    lines = read_lines(client, done.output_file_id)

    assert ("validating", (0, 0, 0)) == (batch.status, count(batch))
    assert {"customer": "user_123"} == done.metadata
    assert [batch.id] == [one.id for one in listed]
    assert ("completed", (3, 3, 0), None) == (done.status, count(done), done.error_file_id)
    assert ["r-0", "r-1", "r-2"] == [line["custom_id"] for line in lines]
    assert done.usage is not None
    bodies = [line["response"]["body"] for line in lines]
    answers = [openai.types.chat.ChatCompletion.model_validate(body) for body in bodies]
    assert all(answer.choices[0].message.content for answer in answers)
    assert done.usage.output_tokens == sum(
        answer.usage.completion_tokens for answer in answers if answer.usage
    )


# 2, 3: input files


def test_unknown_file_is_refused(client: Client) -> None:
    for file in UNKNOWN_FILES:
        with pytest.raises(openai.BadRequestError) as caught:
            create(client, file)
        assert ("input_file_id", "invalid_request_error") == (caught.value.param, caught.value.type)
        assert (caught.value.request_id or "").startswith("req_")


def test_file_of_another_purpose_is_refused(client: Client) -> None:
    file = upload(client, build_jsonl(build_line(1)), "user_data")

    with pytest.raises(openai.BadRequestError) as caught:
        create(client, file.id)

    assert "input_file_id" == caught.value.param


# 4, 5: inputs that do not validate


@pytest.mark.parametrize(("lines", "bad"), BAD_LINES)
def test_every_bad_line_is_named(client: Client, lines: list[Any], bad: list[int]) -> None:
    failed = wait_for_end(client, submit(client, *lines))

    assert "failed" == failed.status
    assert failed.errors is not None
    assert failed.errors.data is not None
    assert bad == [error.line for error in failed.errors.data]
    assert all(error.code and error.message for error in failed.errors.data)
    assert (None, None) == (failed.output_file_id, failed.error_file_id)
    assert (0, 0, 0) == count(failed)


@pytest.mark.parametrize(
    ("build", "code"),
    [
        pytest.param(lambda: b"", "empty_file", id="empty"),
        pytest.param(lambda: b"{}\n" * (MAX_LINES + 1), "too_many_lines", id="lines"),
        pytest.param(lambda: b"x" * (MAX_BATCH_BYTES + 1), "file_too_large", id="bytes"),
    ],
)
def test_input_that_breaks_a_limit_fails(
    client: Client, build: Callable[[], bytes], code: str
) -> None:
    file = upload(client, build())
    failed = wait_for_end(client, create(client, file.id))
    client.api.files.delete(file.id)

    assert "failed" == failed.status
    assert failed.errors is not None
    assert failed.errors.data is not None
    assert [code] == [error.code for error in failed.errors.data]


# 6, 7, 8, 10: cancelling, and what is left


def test_cancelled_batch_keeps_what_was_finished(client: Client) -> None:
    batch = submit_many(client)
    client.api.files.delete(batch.input_file_id)  # a batch needs its input no more
    first = client.api.batches.cancel(batch.id)
    second = client.api.batches.cancel(batch.id)
    done = wait_for_end(client, batch)
    output = read_lines(client, done.output_file_id)
    errors = read_lines(client, done.error_file_id)

    assert first.cancelling_at is not None
    assert (first.id, first.cancelling_at) == (second.id, second.cancelling_at)
    assert {first.status, second.status} <= {"cancelling", "cancelled"}
    assert "cancelled" == done.status
    assert (NUM_MANY, len(output), 0) == count(done)
    assert len(output) > 0
    assert {"batch_cancelled"} == {line["error"]["code"] for line in errors}
    check_files(NUM_MANY, output, errors)


def test_expired_batch_keeps_what_was_finished(client: Client, database: Database) -> None:
    batch = submit_many(client)
    let_window_end(database, job_of(batch))
    done = wait_for_end(client, batch)
    output = read_lines(client, done.output_file_id)
    errors = read_lines(client, done.error_file_id)

    assert "expired" == done.status
    assert (NUM_MANY, len(output), 0) == count(done)
    assert len(output) > 0
    assert {"batch_expired"} == {line["error"]["code"] for line in errors}
    check_files(NUM_MANY, output, errors)


def check_files(total: int, *files: list[dict[str, Any]]) -> None:
    """Every line stands in one of the files, once and in its order."""
    numbers = [[int(line["custom_id"].removeprefix("r-")) for line in lines] for lines in files]
    assert list(range(total)) == sorted(chain(*numbers))
    assert all(some == sorted(some) for some in numbers)


def test_completed_batch_is_not_cancelled_and_the_client_asks_once(client: Client) -> None:
    batch = wait_for_end(client, submit(client, build_short(1)))
    sent: list[Any] = []
    client.api._client.event_hooks = {"response": [sent.append]}

    with pytest.raises(openai.ConflictError) as caught:
        client.api.batches.cancel(batch.id)
    client.api._client.event_hooks = {}

    assert 1 == len(sent)
    assert "false" == caught.value.response.headers["x-should-retry"]
    assert "completed" == look(client, batch).status


# 9: nothing came of it


def test_batch_whose_items_all_failed_is_completed(client: Client) -> None:
    broken = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    messages = [{"role": "user", "content": [broken]}]
    lines = [build_short(n, messages=messages) for n in range(2)]
    done = wait_for_end(client, submit(client, *lines))
    errors = read_lines(client, done.error_file_id)

    assert ("completed", None) == (done.status, done.output_file_id)
    assert (2, 0, 2) == count(done)
    assert [400, 400] == [line["response"]["status_code"] for line in errors]


# 11, 12: bad parameters


def test_bad_limit_and_unknown_cursor_are_refused(client: Client) -> None:
    for limit in BAD_LIMITS:
        with pytest.raises(openai.BadRequestError) as caught:
            client.api.batches.list(limit=limit)
        assert "limit" == caught.value.param
    with pytest.raises(openai.BadRequestError) as caught:
        client.api.batches.list(after="batch_forged")
    assert "after" == caught.value.param


@pytest.mark.parametrize("metadata", BAD_METADATA)
def test_metadata_over_its_limits_is_refused(client: Client, metadata: Any) -> None:
    file = upload(client, build_jsonl(build_line(1)))

    with pytest.raises(openai.BadRequestError) as caught:
        create(client, file.id, metadata=metadata)

    assert "metadata" == caught.value.param


# 13: the same submission again


def test_same_idempotency_key_gives_the_same_batch(client: Client) -> None:
    file = upload(client, build_jsonl(build_short(1))).id
    key = {"Idempotency-Key": "night run 7"}
    sent: list[Any] = []

    first = create(client, file, extra_headers=key)
    second = create(client, file, extra_headers=key)
    client.api._client.event_hooks = {"response": [sent.append]}
    with pytest.raises(openai.ConflictError) as caught:
        create(client, file, extra_headers=key, completion_window="12h")
    client.api._client.event_hooks = {}

    assert first.id == second.id
    assert "idempotency_conflict" == caught.value.code
    assert 1 == len(sent)


# 14, 15: what a poller sees never runs backwards


def test_counts_and_times_only_rise(client: Client) -> None:
    broken = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,x"}}]}]
    lines = [build_short(n, **({"messages": broken} if n % 4 == 0 else {})) for n in range(96)]
    seen = [submit(client, *lines, extra_body={"on_invalid": "skip"})]
    while seen[-1].status not in TERMINAL:
        seen.append(look(client, seen[-1]))

    counts = [count(one) for one in seen]
    assert all(
        a <= b for before, after in pairwise(counts) for a, b in zip(before, after, strict=True)
    )
    assert {96} == {total for one, (total, _, _) in zip(seen, counts, strict=True)} - {0}
    assert {0} == {count(one)[0] for one in seen if one.status == "validating"}
    order = ["validating", "in_progress", "finalizing", "completed"]
    states = list(dict.fromkeys(one.status for one in seen))
    assert states == sorted(states, key=order.index)
    last = seen[-1]
    assert ("completed", (96, 72, 24)) == (last.status, count(last))
    times = [last.created_at, last.in_progress_at, last.finalizing_at, last.completed_at]
    assert all(isinstance(at, int) for at in times)
    assert times == sorted(at or 0 for at in times)


# 17, 18: what is not there


def test_nothing_of_another_tenant_is_found(client: Client, stranger: Client) -> None:
    batch = submit(client, build_short(1))
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

    assert [] == stranger.api.batches.list().data
    assert [] == stranger.api.files.list().data
    assert "completed" == wait_for_end(client, batch).status


def test_content_of_an_expired_file_is_not_found(client: Client, database: Database) -> None:
    file = upload(client, b"{}\n")
    with database.write() as session:
        session.execute(
            text("UPDATE files SET expires_at = 1.0 WHERE id = :id"),
            {"id": file.id.removeprefix("file-")},
        )

    with pytest.raises(openai.NotFoundError) as caught:
        client.api.files.content(file.id)

    assert ("not_found", "not_found_error") == (caught.value.code, caught.value.type)
    assert "error" in json.loads(caught.value.response.content)
