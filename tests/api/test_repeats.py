"""A submission that comes again: by its key, or by its body when an answer was lost."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
import openai
import pytest

from storage import jobs
from tests.api.conftest import Client, Service, open_client
from tests.api.inputs import ENDPOINT, build_line, job_of, submit

INLINE = {"requests": [build_line(1)], "endpoint": ENDPOINT, "completion_window": "24h"}
NUM_AT_ONCE = 200
NUM_THREADS = 32


def post(client: Client, body: dict[str, Any], **headers: str) -> httpx2.Response:
    return client.http.post("/v1/batches", json=body, headers=headers)


def test_many_submissions_at_once_with_one_key_make_one_job(
    service: Service, client: Client
) -> None:
    def send(_: int) -> httpx2.Response:
        return post(client, INLINE, **{"Idempotency-Key": "once"})

    with ThreadPoolExecutor(NUM_THREADS) as pool:
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
