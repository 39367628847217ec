"""Cheap polling: ETags, 304, and answers that wait for a change."""

import socket
import threading
import time
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.api.conftest import Client, Service, open_client, start_service
from tests.api.inputs import build_line, job_of, submit

SHORT_S = 40.0  # a client's patience: it fails where an answer waits for its whole minute


def test_known_version_is_not_sent_again(service: Service, client: Client) -> None:
    batch = submit(client, build_line(1))
    first = client.http.get(f"/v1/batches/{batch.id}")
    known = {"if-none-match": first.headers["etag"]}

    unchanged = client.http.get(f"/v1/batches/{batch.id}", headers=known)
    service.worker.expand(job_of(batch))
    changed = client.http.get(f"/v1/batches/{batch.id}", headers=known)

    assert (304, b"", first.headers["etag"]) == (
        unchanged.status_code,
        unchanged.content,
        unchanged.headers["etag"],
    )
    assert unchanged.headers["x-request-id"]
    assert (200, "in_progress") == (changed.status_code, changed.json()["status"])
    assert changed.headers["etag"] != first.headers["etag"]


@pytest.mark.parametrize("has_tag", [True, False])
def test_waiting_answer_comes_with_the_next_change(
    service: Service, client: Client, has_tag: bool
) -> None:
    batch = submit(client, build_line(1))
    tag = client.http.get(f"/v1/batches/{batch.id}").headers["etag"]
    headers = {"if-none-match": tag} if has_tag else {}
    timer = threading.Timer(0.5, service.worker.expand, [job_of(batch)])
    timer.start()

    answer = client.http.get(f"/v1/batches/{batch.id}?wait=30", headers=headers)

    timer.join()
    assert (200, "in_progress") == (answer.status_code, answer.json()["status"])


def test_wait_without_a_change_ends_in_what_the_client_can_take(client: Client) -> None:
    batch = submit(client, build_line(1))
    tag = client.http.get(f"/v1/batches/{batch.id}").headers["etag"]

    plain = client.http.get(f"/v1/batches/{batch.id}?wait=1")
    tagged = client.http.get(f"/v1/batches/{batch.id}?wait=1", headers={"if-none-match": tag})

    assert (200, 304) == (plain.status_code, tagged.status_code)
    assert "validating" == plain.json()["status"]


def test_version_that_is_old_already_is_answered_at_once(service: Service, client: Client) -> None:
    batch = submit(client, build_line(1))
    tag = client.http.get(f"/v1/batches/{batch.id}").headers["etag"]
    service.worker.expand(job_of(batch))

    answer = client.http.get(
        f"/v1/batches/{batch.id}?wait=60", headers={"if-none-match": tag}, timeout=SHORT_S
    )

    assert 200 == answer.status_code


def test_nobody_waits_for_a_batch_that_has_ended(service: Service, client: Client) -> None:
    batch = submit(client, build_line(1))
    service.worker.complete(job_of(batch))

    answer = client.http.get(f"/v1/batches/{batch.id}?wait=60", timeout=SHORT_S)

    assert "completed" == answer.json()["status"]


def test_answer_comes_well_before_the_client_gives_up(client: Client) -> None:
    batch = submit(client, build_line(1))

    answer = client.http.get(
        f"/v1/batches/{batch.id}?wait=60",
        headers={"x-stainless-read-timeout": "1"},
        timeout=SHORT_S,
    )

    assert "validating" == answer.json()["status"]


def test_many_wait_at_once(service: Service, client: Client) -> None:
    batch = submit(client, build_line(1))
    states: list[str] = []

    def wait() -> None:
        answer = client.http.get(f"/v1/batches/{batch.id}?wait=20")
        states.append(answer.json()["status"])

    threads = [threading.Thread(target=wait) for _ in range(60)]  # more than the server's threads
    for thread in threads:
        thread.start()
    time.sleep(0.5)
    service.worker.expand(job_of(batch))
    for thread in threads:
        thread.join(timeout=60)

    assert ["in_progress"] * 60 == states


def test_server_that_stops_answers_those_who_wait(sqlite_template: bytes, tmp_path: Path) -> None:
    (tmp_path / "db").write_bytes(sqlite_template)
    with (
        start_service(f"sqlite:///{tmp_path / 'db'}", tmp_path) as service,
        open_client(service, "patient") as client,
    ):
        batch = submit(client, build_line(1))
        place = urlsplit(service.url)
        with socket.create_connection((str(place.hostname), place.port or 0)) as connection:
            request = (
                f"GET /v1/batches/{batch.id}?wait=60 HTTP/1.1\r\nHost: {place.netloc}\r\n"
                f"Authorization: Bearer {client.key}\r\n\r\n"
            )
            connection.sendall(request.encode())
            client.http.get("/healthz")  # behind it in the same loop: the server has it by now
            service.process.terminate()
            answer = b"".join(iter(lambda: connection.recv(65536), b""))

    # One that is cut off when the time of the others is over gets no answer at all.
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert b'"status":"validating"' in answer
