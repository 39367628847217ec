"""One prompt through the queue, answered by the same request."""

import json
import socket
import time
from typing import Any
from urllib.parse import urlsplit
from uuid import UUID

import openai
import pytest

from api.schemas import show_job_id
from storage import chats, jobs
from storage.ids import JobId, new_uuid
from storage.states import JobState
from tests import asking
from tests.api.conftest import Client, Service
from tests.api.inputs import ENDPOINT
from tests.api.server import CHAT_TIMEOUT_S, MODEL

MESSAGES: Any = [{"role": "user", "content": "What is this?"}]


def list_fast_lane(service: Service) -> list[JobId]:
    with service.database.read() as session:
        return jobs.list_unexpanded(session, older_than_s=-1.0)


def test_chat_is_answered_by_a_worker(service: Service, client: Client) -> None:
    with service.worker.working():
        answer = client.api.chat.completions.create(model=MODEL, messages=MESSAGES)

    assert "text of chat" == answer.choices[0].message.content
    assert ("stop", MODEL) == (answer.choices[0].finish_reason, answer.model)
    assert answer.usage is not None
    assert 16 == answer.usage.total_tokens
    assert answer.usage.prompt_tokens_details is not None
    assert 3 == answer.usage.prompt_tokens_details.cached_tokens


def test_chat_that_is_asked_in_parts_has_them_beside_the_text(
    service: Service, client: Client
) -> None:
    messages: Any = [{"role": "user", "content": "Describe it in parts."}]
    with service.worker.working():
        answer = client.api.chat.completions.create(model=MODEL, messages=messages)

    assert "text of chat" == answer.choices[0].message.content
    assert answer.model_extra is not None
    assert ["part 1", "part 2"] == [part["text"] for part in answer.model_extra["parts"]]


def test_chat_that_was_removed_is_a_404_as_one_that_never_was(
    service: Service, client: Client
) -> None:
    with service.worker.working():
        answer = client.api.chat.completions.create(model=MODEL, messages=MESSAGES)
    job = JobId(UUID(answer.id.removeprefix("chatcmpl-")[:32]))
    service.worker.finish(job)
    path = f"/v1/batches/{show_job_id(job)}"
    before = [client.http.get(place).status_code for place in (path, f"{path}/results")]
    with service.database.write() as session:
        chats.remove_page(session, older_than_s=-60.0)

    after = [client.http.get(place) for place in (path, f"{path}/results")]

    assert [200, 200] == before
    assert [404, 404] == [answer.status_code for answer in after]
    never = client.http.get(f"/v1/batches/{show_job_id(JobId(new_uuid()))}")
    assert [never.json()] * 2 == [answer.json() for answer in after]


def test_chat_is_neither_a_batch_nor_a_file_of_anybody(service: Service, client: Client) -> None:
    with service.worker.working():
        client.api.chat.completions.create(model=MODEL, messages=MESSAGES)

    assert [] == client.api.batches.list().data
    assert [] == client.api.files.list().data


def test_stream_holds_the_same_answer(service: Service, client: Client) -> None:
    with service.worker.working():
        chunks = list(
            client.api.chat.completions.create(
                model=MODEL, messages=MESSAGES, stream=True, stream_options={"include_usage": True}
            )
        )

    texts = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "text of chat" == "".join(texts)
    assert "assistant" == chunks[0].choices[0].delta.role
    assert "stop" == chunks[-2].choices[0].finish_reason
    assert chunks[-1].usage is not None
    assert 16 == chunks[-1].usage.total_tokens


def test_description_tells_of_both_forms_and_of_an_answer_that_never_comes(
    service: Service,
) -> None:
    described = asking.get(f"{service.url}/openapi.json").json()
    answers = described["paths"][ENDPOINT]["post"]["responses"]

    assert {"application/json", "text/event-stream"} == set(answers["200"]["content"])
    assert {"400", "408", "503", "504"} <= set(answers)


def test_stream_ends_with_done(service: Service, client: Client) -> None:
    with service.worker.working():
        answer = client.http.post(
            ENDPOINT, json={"model": MODEL, "messages": MESSAGES, "stream": True}
        )

    assert answer.headers["content-type"].startswith("text/event-stream")
    events = answer.text.split("\n\n")
    assert ["data: [DONE]", ""] == events[-2:]
    assert "usage" not in answer.text


def test_failed_item_is_an_error_of_the_client(service: Service, client: Client) -> None:
    with service.worker.working(), pytest.raises(openai.BadRequestError) as caught:
        client.api.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "please fail"}]
        )

    assert "bad_image" == caught.value.code


def test_refused_line_is_an_error_of_the_client(service: Service, client: Client) -> None:
    def refuse(job: JobId) -> None:
        error = {"code": "too_many_images", "message": "2 images.", "param": "messages", "line": 1}
        with service.database.write() as session:
            jobs.reject(session, job, [error])

    with service.worker.working(refuse), pytest.raises(openai.BadRequestError) as caught:
        client.api.chat.completions.create(model=MODEL, messages=MESSAGES)

    assert ("too_many_images", "messages") == (caught.value.code, caught.value.param)


def test_answer_that_takes_too_long_is_cancelled_and_not_asked_for_again(
    service: Service, client: Client
) -> None:
    before = set(list_fast_lane(service))
    started = time.monotonic()
    seen: list[JobId] = []

    def note(job: JobId) -> None:
        if job not in before:
            seen.append(job)

    with service.worker.working(note), pytest.raises(openai.InternalServerError) as caught:
        client.api.chat.completions.create(model=MODEL, messages=MESSAGES)

    assert 504 == caught.value.status_code
    assert CHAT_TIMEOUT_S <= time.monotonic() - started
    (job,) = set(seen)
    assert JobState.CANCELLING is service.worker.find(job).state
    assert jobs.FAST_LANE == service.worker.find(job).priority
    service.worker.finish(job)


def test_client_that_leaves_takes_its_item_along(service: Service, client: Client) -> None:
    before = set(list_fast_lane(service))
    place = urlsplit(service.url)
    body = json.dumps({"model": MODEL, "messages": MESSAGES})
    with socket.create_connection((str(place.hostname), place.port or 0)) as connection:
        request = (
            f"POST {ENDPOINT} HTTP/1.1\r\nHost: {place.netloc}\r\n"
            f"Authorization: Bearer {client.key}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n{body}"
        )
        connection.sendall(request.encode())
        while not (made := set(list_fast_lane(service)) - before):
            time.sleep(0.02)
        deadline = time.monotonic() + CHAT_TIMEOUT_S - 0.5  # before its own time would be over

    while made and time.monotonic() < deadline:
        made &= set(list_fast_lane(service))
        time.sleep(0.05)

    assert set() == made


def test_models_are_listed(client: Client) -> None:
    assert [MODEL] == [model.id for model in client.api.models.list()]
    assert MODEL == client.api.models.retrieve(MODEL).id
