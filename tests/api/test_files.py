"""Uploads as other clients send them: in pieces, out of order, broken off, too large, very large."""

import resource
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import httpx2
import openai
import pytest

from api.multipart import clean_filename
from tests.api.conftest import Client, Service, open_client, start_service
from tests.api.inputs import upload
from tests.api.server import MAX_FILE_BYTES
from tests.waiting import wait_until

FORM = {"content-type": "multipart/form-data; boundary=b"}
PURPOSE = b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
FILE = b'--b\r\nContent-Disposition: form-data; name="file"; filename="in.jsonl"\r\n\r\n'
END = b"\r\n--b--\r\n"
MEBIBYTE = 1024 * 1024
LARGE = b"x" * (4 * MEBIBYTE - 1000)


def list_blobs(service: Service, client: Client) -> list[Path]:
    folder = service.blobs._folder / str(service.find_tenant(client.tenant)) / "files"
    return list(folder.iterdir()) if folder.exists() else []


def list_unfinished(service: Service) -> list[Path]:
    return list((service.blobs._folder / ".unfinished").iterdir())


@pytest.mark.parametrize("piece_bytes", [1, 7, 1000])
def test_upload_in_pieces_is_the_same_file(client: Client, piece_bytes: int) -> None:
    content = b"--b\r\n--b-\n" * 20 + b"\r\n--c--\r\n\0\xff"
    body = PURPOSE + FILE + content + END

    def cut() -> Iterator[bytes]:
        for start in range(0, len(body), piece_bytes):
            yield body[start : start + piece_bytes]

    answer = client.http.post("/v1/files", content=cut(), headers=FORM)

    assert 200 == answer.status_code, answer.text
    assert content == client.api.files.content(answer.json()["id"]).read()


def test_file_may_come_before_its_purpose(client: Client) -> None:
    body = FILE + b"{}\n\r\n" + PURPOSE.removesuffix(b"\r\n") + END

    answer = client.http.post("/v1/files", content=body, headers=FORM)

    assert ("batch", 3) == (answer.json()["purpose"], answer.json()["bytes"])


def test_upload_that_breaks_off_leaves_nothing(service: Service, client: Client) -> None:
    place = urlsplit(service.url)
    head = (
        f"POST /v1/files HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {client.key}\r\n"
        f"Content-Type: {FORM['content-type']}\r\nContent-Length: 3000000\r\n\r\n"
    )
    with socket.create_connection((str(place.hostname), place.port or 0)) as connection:
        connection.sendall(head.encode() + PURPOSE + FILE + b"x" * 2 * MEBIBYTE)
        wait_until(lambda: list_unfinished(service))
        num_unfinished = len(list_unfinished(service))

    wait_until(lambda: not list_unfinished(service))
    assert 1 == num_unfinished
    assert [] == list_blobs(service, client)
    assert [] == client.api.files.list().data


def test_refused_upload_leaves_nothing(service: Service, client: Client) -> None:
    with pytest.raises(openai.BadRequestError):
        upload(client, b"x" * 2 * MEBIBYTE, "no purpose")

    assert [] == list_blobs(service, client)
    assert [] == list_unfinished(service)


@contextmanager
def full_disk(service: Service, num_bytes: int) -> Iterator[None]:
    """No file of this server may grow beyond so many bytes, which is what a full disk comes to."""
    before = resource.prlimit(service.process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(service.process.pid, resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.prlimit(service.process.pid, resource.RLIMIT_FSIZE, before)


@pytest.mark.services
def test_upload_to_a_full_disk_is_a_503_and_leaves_nothing(postgresql_service: Service) -> None:
    service = postgresql_service  # SQLite's own files would be in the way
    with open_client(service, "of a full disk") as client:
        with full_disk(service, 3 * MEBIBYTE):
            refused = client.http.post(
                "/v1/files", content=PURPOSE + FILE + LARGE + END, headers=FORM
            )
            small = client.http.post(
                "/v1/files", content=PURPOSE + FILE + b"{}" + END, headers=FORM
            )

        assert (503, "blobs_unavailable") == (
            refused.status_code,
            refused.json()["error"]["code"],
        )
        assert refused.headers["retry-after"]
        assert 200 == small.status_code
        assert [] == list_unfinished(service)
        assert [small.json()["id"]] == [file.id for file in client.api.files.list()]
        assert 1 == len(list_blobs(service, client))


def test_unknown_field_of_the_form_is_refused_by_its_name(client: Client) -> None:
    form = {"purpose": "batch", "expires_after[second]": "7200"}

    answer = client.http.post("/v1/files", data=form, files={"file": b"{}"})

    error = answer.json()["error"]
    assert (400, "unknown_parameter") == (answer.status_code, error["code"])
    assert "expires_after[second]" == error["param"]


@pytest.mark.parametrize("is_announced", [True, False])
def test_file_that_is_too_large_is_refused_and_sent_once(
    service: Service, client: Client, is_announced: bool
) -> None:
    sizes: list[int] = []
    client.api._client.event_hooks = {"request": [lambda request: sizes.append(1)]}
    content = b"x" * (MAX_FILE_BYTES + (MEBIBYTE if is_announced else 1))

    with pytest.raises(openai.APIStatusError) as caught:
        upload(client, content)

    assert (413, "too_large") == (caught.value.status_code, caught.value.code)
    assert [1] == sizes
    assert [] == list_blobs(service, client)


def test_large_upload_is_never_held_whole(sqlite_template: bytes, tmp_path: Path) -> None:
    num_bytes = 128 * MEBIBYTE
    line = b"x" * 1023 + b"\n"
    (tmp_path / "db").write_bytes(sqlite_template)

    def stream() -> Iterator[bytes]:
        yield PURPOSE + FILE
        for _ in range(num_bytes // MEBIBYTE):
            yield line * 1024
        yield END

    with (
        start_service(f"sqlite:///{tmp_path / 'db'}", tmp_path, "large") as large,
        open_client(large, "large") as client,
    ):
        upload(client, b"{}\n")
        before = read_peak_bytes(large.process.pid)
        answer = client.http.post("/v1/files", content=stream(), headers=FORM)
        with client.http.stream("GET", f"/v1/files/{answer.json()['id']}/content") as content:
            num_read = sum(len(piece) for piece in content.iter_raw())
        after = read_peak_bytes(large.process.pid)

    assert num_bytes == answer.json()["bytes"] == num_read
    assert after - before < 32 * MEBIBYTE


def read_peak_bytes(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("captions.jsonl", "captions.jsonl"),
        ("../../etc/passwd", "passwd"),
        ("C:\\jobs\\a.jsonl", "a.jsonl"),
        ("été 1.jsonl", "été 1.jsonl"),
        ("a\r\nSet-Cookie: b\0.jsonl", "aSet-Cookie: b.jsonl"),
        ("", "upload"),
        ("x" * 1000, "x" * 255),
    ],
)
def test_filename_is_only_shown(name: str, shown: str) -> None:
    assert shown == clean_filename(name)


def test_content_is_never_something_that_a_browser_shows(client: Client) -> None:
    file = client.api.files.create(
        file=('a é".html', b"<script>", "text/html"), purpose="user_data"
    )

    answer = client.http.get(f"/v1/files/{file.id}/content")

    assert b"<script>" == answer.content
    assert "application/octet-stream" == answer.headers["content-type"]
    assert "nosniff" == answer.headers["x-content-type-options"]
    assert answer.headers["content-disposition"].startswith("attachment;")


def test_blob_that_is_lost_is_an_answer_and_no_crash(service: Service, client: Client) -> None:
    file = upload(client, b"{}\n")
    (blob,) = list_blobs(service, client)
    blob.unlink()

    answer: httpx2.Response = client.http.get(f"/v1/files/{file.id}/content")

    assert (404, "not_found") == (answer.status_code, answer.json()["error"]["code"])
