"""Inline submissions, and results that are read while a job runs."""

import json
from typing import Any

import httpx2
import openai
from sqlalchemy import insert, select

from storage import parts
from storage.states import ItemState
from storage.tables import Part
from tests.api.conftest import Client, Service
from tests.api.inputs import ENDPOINT, build_line, job_of, read_lines, submit
from tests.api.server import MODEL


def read(answer: httpx2.Response) -> list[dict[str, Any]]:
    assert 200 == answer.status_code, answer.text
    assert "application/x-ndjson" == answer.headers["content-type"]
    return [json.loads(line) for line in answer.content.splitlines()]


def test_inline_requests_are_a_batch_of_a_file_of_their_own(
    service: Service, client: Client
) -> None:
    line = build_line(1)
    short = {"custom_id": "short", "body": line["body"]}  # without method and url
    batch = client.api.batches.create(
        input_file_id=openai.omit,  # type: ignore[arg-type]
        endpoint=ENDPOINT,
        completion_window="90m",  # type: ignore[arg-type]
        extra_body={
            "requests": [line, short],
            "image_policy": "sample",
            "on_invalid": "skip",
            "priority": -3,
        },
    )
    service.worker.complete(job_of(batch))

    done = client.api.batches.retrieve(batch.id)

    assert ("completed", MODEL, "90m") == (done.status, done.model, done.completion_window)
    assert {"image_policy": "sample", "on_invalid": "skip", "priority": -3} == done.model_extra
    handed_in = read_lines(client, done.input_file_id)
    assert [line, {"method": "POST", "url": ENDPOINT, **short}] == handed_in
    assert ["r-1", "short"] == [one["custom_id"] for one in read_lines(client, done.output_file_id)]


def test_inline_requests_that_are_no_objects_are_named_by_line(
    service: Service, client: Client
) -> None:
    answer = client.http.post(
        "/v1/batches",
        json={
            "requests": [build_line(1), 7, None],
            "endpoint": ENDPOINT,
            "completion_window": "24h",
        },
    )
    batch = client.api.batches.retrieve(answer.json()["id"])
    service.worker.expand(job_of(batch))

    failed = client.api.batches.retrieve(batch.id)

    assert failed.errors is not None
    assert [2, 3] == [error.line for error in failed.errors.data or []]


def test_results_come_while_the_job_runs_each_once(service: Service, client: Client) -> None:
    lines = [build_line(n, "please fail" if n == 2 else "go") for n in range(1, 6)]
    batch = submit(client, *lines)
    service.worker.expand(job_of(batch))
    path = f"/v1/batches/{batch.id}/results"
    empty = client.http.get(path)
    service.worker.run(job_of(batch), max_items=3)
    first = client.http.get(path, params={"limit": 2})
    second = client.http.get(path, params={"after": first.headers["x-last-line"]})
    service.worker.run(job_of(batch))
    third = client.http.get(path, params={"after": second.headers["x-last-line"]})
    service.worker.finish(job_of(batch))
    last = client.http.get(path, params={"after": third.headers["x-last-line"]})
    everything = client.http.get(path)

    assert [] == read(empty)
    assert "0" == empty.headers["x-last-line"]
    assert {1, 2, 3, 4, 5} == {
        line["line"] for answer in (first, second, third) for line in read(answer)
    }
    assert [] == read(last)
    assert third.headers["x-last-line"] == last.headers["x-last-line"] == "5"
    assert ["true"] * 4 == [one.headers["x-incomplete"] for one in (empty, first, second, third)]
    assert ["false"] * 2 == [one.headers["x-incomplete"] for one in (last, everything)]
    assert [1, 2, 3, 4, 5] == [line["seq"] for line in read(everything)]
    known = {"if-none-match": everything.headers["etag"]}
    assert 304 == client.http.get(path, headers=known).status_code


def test_results_are_the_lines_of_the_files(service: Service, client: Client) -> None:
    batch = submit(client, build_line(1), build_line(2, "please fail"))
    service.worker.complete(job_of(batch))
    done = client.api.batches.retrieve(batch.id)

    live = read(client.http.get(f"/v1/batches/{batch.id}/results"))

    own = {"seq", "line"}
    bare = [{name: line[name] for name in line if name not in own} for line in live]
    assert read_lines(client, done.output_file_id) + read_lines(client, done.error_file_id) == bare


def test_results_show_the_parts_of_items_that_have_some(service: Service, client: Client) -> None:
    texts = {1: "as a whole", 2: "in parts", 3: "in parts, and please fail"}
    batch = submit(client, *(build_line(number, text) for number, text in texts.items()))
    service.worker.complete(job_of(batch))
    done = client.api.batches.retrieve(batch.id)

    whole, split, failed = read(client.http.get(f"/v1/batches/{batch.id}/results"))

    assert "parts" not in whole
    assert {
        "number": 2,
        "start_s": 10.0,
        "end_s": 20.0,
        "frame_times_s": [15.0],
        "text": "part 2",
        "finish_reason": "stop",
        "images": [{"index": 0, "kind": "video", "num_frames": 1}],
    } == split["parts"][1]
    assert failed["parts"] == split["parts"]
    assert [split["parts"]] == [
        line["parts"] for line in read_lines(client, done.output_file_id)[1:]
    ]
    assert [failed["parts"]] == [line["parts"] for line in read_lines(client, done.error_file_id)]


def test_results_with_many_parts_come_by_smaller_pages(service: Service, client: Client) -> None:
    batch = submit(client, *(build_line(number, "in parts") for number in range(1, 4)))
    service.worker.complete(job_of(batch))
    with service.database.write() as session:
        row = session.execute(select(Part.__table__).where(Part.number == 1)).mappings().first()
        items = session.scalars(select(Part.item_id).distinct()).all()
        numbers = range(
            3, parts.MAX_PARTS_READ // 2 + 1
        )  # so that two items have as many as are read
        rows = [{**(row or {}), "item_id": item, "number": n} for item in items for n in numbers]
        session.execute(insert(Part), rows)

    path = f"/v1/batches/{batch.id}/results"
    first = client.http.get(path)
    second = client.http.get(path, params={"after": first.headers["x-last-line"]})

    assert [[1, 2], [3]] == [[line["line"] for line in read(page)] for page in (first, second)]
    assert ["true", "false"] == [page.headers["x-incomplete"] for page in (first, second)]
    assert [parts.MAX_PARTS_READ // 2] * 2 == [len(line["parts"]) for line in read(first)]


def test_results_are_found_by_state_and_by_name(service: Service, client: Client) -> None:
    batch = submit(client, build_line(1), build_line(2, "please fail"))
    service.worker.complete(job_of(batch))
    path = f"/v1/batches/{batch.id}/results"

    def find(**params: str) -> list[str]:
        return [line["custom_id"] for line in read(client.http.get(path, params=params))]

    assert ["r-1"] == find(status="completed")
    assert ["r-2"] == find(status="failed")
    assert ["r-2"] == find(custom_id="r-2")
    assert [] == find(custom_id="r-3")


def test_items_that_never_ran_are_in_the_errors_file_only(service: Service, client: Client) -> None:
    batch = submit(client, build_line(1))
    service.worker.expand(job_of(batch))
    client.api.batches.cancel(batch.id)
    service.worker.end_rest(job_of(batch), ItemState.CANCELLED)
    service.worker.finish(job_of(batch))

    done = client.api.batches.retrieve(batch.id)

    assert 1 == len(read_lines(client, done.error_file_id))
    assert [] == read(client.http.get(f"/v1/batches/{batch.id}/results"))


def test_results_of_another_tenant_are_not_found(client: Client, stranger: Client) -> None:
    batch = submit(client, build_line(1))

    assert 404 == stranger.http.get(f"/v1/batches/{batch.id}/results").status_code
