"""A submission that comes again: by its key, or by its body when an answer was lost."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx2
import openai
import pytest

from api.schemas import show_job_id
from storage import jobs
from storage.errors import IdempotencyConflictError
from tasks.config import load_config
from tasks.dispatch import Dispatcher
from tasks.stores import Stores
from tasks.submit import Submitted, parse_submission
from tasks.submit import submit as submit_message
from tests.api.conftest import Client, Service, open_client
from tests.api.inputs import ENDPOINT, build_line, job_of, submit
from tests.api.server import MODEL

INLINE = {"requests": [build_line(1)], "endpoint": ENDPOINT, "completion_window": "24h"}
NUM_AT_ONCE = 200


def post(client: Client, body: dict[str, Any], **headers: str) -> httpx2.Response:
    return client.http.post("/v1/batches", json=body, headers=headers)


def test_many_submissions_at_once_with_one_key_make_one_job(
    service: Service, client: Client
) -> None:
    headers = {"authorization": f"Bearer {client.key}", "Idempotency-Key": "once"}
    limits = httpx2.Limits(max_connections=NUM_AT_ONCE)
    all_are_there = threading.Barrier(NUM_AT_ONCE)
    with httpx2.Client(
        base_url=service.url, headers=headers, limits=limits, timeout=60.0, trust_env=False
    ) as http:

        def send(_: int) -> httpx2.Response:
            all_are_there.wait()
            return http.post("/v1/batches", json=INLINE)

        with ThreadPoolExecutor(NUM_AT_ONCE) as pool:
            answers = list(pool.map(send, range(NUM_AT_ONCE)))

    assert {200} == {answer.status_code for answer in answers}
    assert 1 == len({answer.json()["id"] for answer in answers})
    assert NUM_AT_ONCE - 1 == sum("idempotent-replayed" in answer.headers for answer in answers)
    with service.database.read() as session:
        page, _ = jobs.list_page(session, service.find_tenant(client.tenant))
    assert 1 == len(page)
    # What the losers wrote is gone again.
    assert 1 == len(client.api.files.list().data)
    folder = service.blobs._folder / str(service.find_tenant(client.tenant)) / "files"
    assert 1 == len(list(folder.iterdir()))


def test_same_bytes_uploaded_again_are_the_same_input(client: Client, stranger: Client) -> None:
    def submit_with_key(asker: Client, *texts: str, **changes: Any) -> Any:
        lines = [build_line(number, text) for number, text in enumerate(texts, 1)]
        return submit(asker, *lines, extra_headers={"Idempotency-Key": "k"}, **changes)

    first = submit_with_key(client, "a", "b")
    again = submit_with_key(client, "a", "b")
    client.api.files.delete(first.input_file_id)
    after_deletion = submit_with_key(client, "a", "b")
    theirs = submit_with_key(stranger, "a", "b")

    assert first.id == again.id == after_deletion.id
    assert first.id != theirs.id
    with pytest.raises(openai.ConflictError):
        submit_with_key(client, "a", "c")
    with pytest.raises(openai.ConflictError):
        submit_with_key(client, "a", "b", completion_window="1h")


def test_other_body_with_the_same_key_is_a_conflict_that_is_sent_once(client: Client) -> None:
    sent: list[Any] = []
    client.api._client.event_hooks = {"request": [sent.append]}
    post(client, INLINE, **{"Idempotency-Key": "k"})

    with pytest.raises(openai.ConflictError) as caught:
        client.api.batches.create(
            input_file_id=openai.omit,  # type: ignore[arg-type]
            endpoint=ENDPOINT,
            completion_window="24h",
            extra_body={"requests": [build_line(2)]},
            extra_headers={"Idempotency-Key": "k"},
        )

    assert "idempotency_conflict" == caught.value.code
    assert 1 == len(sent)


def test_order_of_keys_and_spaces_make_no_other_body(client: Client) -> None:
    turned = dict(reversed(INLINE.items()))

    first = post(client, INLINE, **{"Idempotency-Key": "k"})
    second = client.http.post(
        "/v1/batches",
        content=str(httpx2.Request("POST", "http://x", json=turned).content, "utf-8").replace(
            ",", " ,\n"
        ),
        headers={"Idempotency-Key": "k"},
    )

    assert first.json()["id"] == second.json()["id"]
    assert "true" == second.headers["idempotent-replayed"]


def test_keys_of_two_tenants_do_not_meet(client: Client, stranger: Client) -> None:
    mine = post(client, INLINE, **{"Idempotency-Key": "k"})
    theirs = post(stranger, INLINE, **{"Idempotency-Key": "k"})

    assert mine.json()["id"] != theirs.json()["id"]


def test_body_sent_again_without_a_key_is_the_same_batch(service: Service, client: Client) -> None:
    first = post(client, INLINE)
    again = post(client, INLINE, **{"x-stainless-retry-count": "1"})
    by_hand = post(client, INLINE, **{"x-stainless-retry-count": "0"})
    other = post(client, {**INLINE, "priority": 1}, **{"x-stainless-retry-count": "1"})
    with open_client(service, client.tenant) as colleague:
        of_other_key = post(colleague, INLINE, **{"x-stainless-retry-count": "1"})

    assert first.json()["id"] == again.json()["id"]
    assert "true" == again.headers["idempotent-replayed"]
    assert 4 == len({answer.json()["id"] for answer in (first, by_hand, other, of_other_key)})


def test_lost_answer_costs_no_second_batch(client: Client) -> None:
    """The client itself sends again, and says so in its header."""
    counts: list[str] = []

    def lose_first(response: httpx2.Response) -> None:
        counts.append(response.request.headers["x-stainless-retry-count"])
        if len(counts) == 1:
            response.status_code = 500

    file = submit(client, build_line(1)).input_file_id
    client.api._client.event_hooks = {"response": [lose_first]}
    batch = client.api.batches.create(
        input_file_id=file, endpoint=ENDPOINT, completion_window="24h", metadata={"n": "2"}
    )
    client.api._client.event_hooks = {}

    assert ["0", "1"] == counts
    assert 2 == len(client.api.batches.list().data)
    assert job_of(batch)


# The same submission by way of Redis


@pytest.fixture
def submit_by_redis(service: Service, tmp_path: Path) -> Iterator[Callable[..., Submitted]]:
    """What a message on the broker ends in."""
    config = load_config(home=tmp_path)
    with closing(Dispatcher(config, "redis://127.0.0.1:1/0")) as dispatcher:
        stores = Stores(service.database, service.blobs)
        yield lambda **fields: submit_message(stores, dispatcher, parse_submission(fields))


MESSAGES = build_line(1)["body"]["messages"]
SHORT_LINE = {"custom_id": "r-1", "body": build_line(1)["body"]}


@pytest.mark.parametrize(
    ("by_rest", "by_redis"),
    [
        pytest.param(INLINE, {"requests": [build_line(1)]}, id="with defaults left out"),
        pytest.param(
            {**INLINE, "requests": [SHORT_LINE]}, {"requests": [build_line(1)]}, id="short"
        ),
        pytest.param(
            {**INLINE, "priority": 0, "on_invalid": "fail", "metadata": None},
            {"requests": [SHORT_LINE], "model": MODEL},
            id="with defaults",
        ),
        pytest.param(
            {**INLINE, "priority": 3, "metadata": {"a": "b"}, "completion_window": "30m"},
            {
                "requests": [{"custom_id": "r-1", "body": {"messages": MESSAGES}}],
                "model": MODEL,
                "priority": 3,
                "metadata": {"a": "b"},
                "completion_window": "30m",
            },
            id="with options, and the model once for all",
        ),
    ],
)
@pytest.mark.parametrize("is_rest_first", [True, False])
def test_one_key_over_rest_and_redis_is_one_job(
    client: Client,
    submit_by_redis: Callable[..., Submitted],
    by_rest: dict[str, Any],
    by_redis: dict[str, Any],
    is_rest_first: bool,
) -> None:
    message = {**by_redis, "tenant": client.tenant, "idempotency_key": "both"}
    made = None if is_rest_first else submit_by_redis(**message)

    answer = post(client, by_rest, **{"Idempotency-Key": "both"})
    submitted = submit_by_redis(**message)

    assert 200 == answer.status_code, answer.text
    assert (made is not None) == ("idempotent-replayed" in answer.headers)
    assert not submitted.is_new
    assert answer.json()["id"] == show_job_id(submitted.job.id)


def test_one_key_over_rest_and_redis_is_one_job_of_a_file(
    client: Client, submit_by_redis: Callable[..., Submitted]
) -> None:
    batch = submit(client, build_line(1), extra_headers={"Idempotency-Key": "file"})
    message = {"model": MODEL, "tenant": client.tenant, "idempotency_key": "file"}

    for shown in (batch.input_file_id, str(UUID(batch.input_file_id.removeprefix("file-")))):
        assert job_of(batch) == submit_by_redis(input_file_id=shown, **message).job.id
    with pytest.raises(IdempotencyConflictError):
        submit_by_redis(input_file_id=batch.input_file_id, priority=1, **message)


@pytest.mark.parametrize(
    "changes",
    [
        {"requests": [build_line(2)]},
        {"priority": 1},
        {"completion_window": "1h"},
        {"on_invalid": "skip"},
        {"model": "other"},
    ],
)
def test_other_submission_by_redis_is_a_conflict(
    client: Client, submit_by_redis: Callable[..., Submitted], changes: dict[str, Any]
) -> None:
    post(client, INLINE, **{"Idempotency-Key": "both"})

    with pytest.raises(IdempotencyConflictError):
        submit_by_redis(
            **{"requests": [build_line(1)], **changes},
            tenant=client.tenant,
            idempotency_key="both",
        )
