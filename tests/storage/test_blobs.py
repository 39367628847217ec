"""What holds for blobs wherever they lie: the same tests for a folder and for a bucket."""

import hashlib
import os
import resource
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError, ReadTimeoutError
from hypothesis import given
from hypothesis import strategies as st

from storage.blobs import Blobs, BlobStat, FolderBlobs, S3Blobs, S3Config
from storage.errors import (
    BadBlobKeyError,
    BlobConflictError,
    BlobMissingError,
    BlobsRefusedError,
    BlobsUnavailableError,
)
from storage.ids import FileId, JobId, TenantId, new_uuid
from storage.keys import build_errors_key, build_file_key, build_output_key, check_key
from tests.services import S3Server, find_free_ports

PART_BYTES = 5 * 1024 * 1024
OURS = build_file_key(TenantId(new_uuid()), FileId(new_uuid()))
"""A key of the form that a sweep may touch; it passes over others."""


@pytest.fixture(scope="module")
def client(s3_server: S3Server) -> Any:
    """boto reads half a megabyte of descriptions for each; one will do."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in s3_server.env.items():
            patch.setenv(name, value)
        return S3Blobs(build_config(s3_server))._client


@pytest.fixture
def bucket(s3_server: S3Server, s3_settings: dict[str, str], client: Any) -> S3Blobs:
    blobs = S3Blobs.__new__(S3Blobs)
    blobs._config = build_config(s3_server, prefix=s3_settings["DARKROOM_BLOBS"].split("/")[-1])
    blobs._client = client
    return blobs


def build_config(server: S3Server, **other: Any) -> S3Config:
    return S3Config(
        **{
            "bucket": server.bucket,
            "prefix": "unused",
            "endpoint_url": server.endpoint_url,
            "region": server.region,
            "part_bytes": PART_BYTES,
            **other,
        }
    )


@pytest.fixture(params=["folder", pytest.param("bucket", marks=pytest.mark.services)])
def blobs(request: pytest.FixtureRequest, tmp_path: Path) -> Blobs:
    if request.param == "folder":
        return FolderBlobs(tmp_path / "blobs")
    bucket: S3Blobs = request.getfixturevalue("bucket")
    return bucket


def test_what_was_put_is_read_back_whole_and_by_ranges(blobs: Blobs) -> None:
    stat = blobs.put("tenant/file", b"0123456789")

    assert BlobStat(10, hashlib.sha256(b"0123456789").digest()) == stat
    assert b"0123456789" == blobs.read("tenant/file")
    assert b"345" == blobs.read("tenant/file", offset=3, length=3)
    assert b"89" == blobs.read("tenant/file", offset=8, length=100)
    assert b"" == blobs.read("tenant/file", offset=3, length=0)
    assert b"" == blobs.read("tenant/file", offset=10, length=5)
    assert b"56789" == b"".join(blobs.stream("tenant/file", offset=5))
    assert b"" == b"".join(blobs.stream("tenant/file", offset=10))
    assert 10 == blobs.count_bytes("tenant/file")


def test_empty_blob_is_a_blob(blobs: Blobs) -> None:
    blobs.put("empty", b"")

    assert b"" == blobs.read("empty")
    assert 0 == blobs.count_bytes("empty")


def test_equal_bytes_may_be_put_again_and_others_may_not(blobs: Blobs) -> None:
    blobs.put("key", b"first")
    blobs.put("key", b"first")

    with pytest.raises(BlobConflictError):
        blobs.put("key", b"other")

    assert b"first" == blobs.read("key")


def test_missing_blob_is_said_to_be_missing(blobs: Blobs) -> None:
    with pytest.raises(BlobMissingError):
        blobs.read("nothing")
    with pytest.raises(BlobMissingError):
        next(iter(blobs.stream("nothing")))
    with pytest.raises(BlobMissingError):
        blobs.count_bytes("nothing")


def test_name_of_a_folder_is_no_blob(blobs: Blobs) -> None:
    blobs.put("tenant/job/output", b"lines")

    with pytest.raises(BlobMissingError):
        blobs.read("tenant/job")
    with pytest.raises(BlobMissingError):
        blobs.read("tenant/job/output/more")


def test_deleting_twice_is_as_good_as_once(blobs: Blobs) -> None:
    blobs.put("key", b"bytes")
    blobs.delete("key")
    blobs.delete("key")

    with pytest.raises(BlobMissingError):
        blobs.read("key")


def test_writer_in_pieces_gives_one_blob(blobs: Blobs) -> None:
    pieces = [bytes([number]) * 700_000 for number in range(16)]  # three parts in a bucket

    with blobs.open_writer("large") as writer:
        for piece in pieces:
            writer.write(piece)

    whole = b"".join(pieces)
    assert BlobStat(len(whole), hashlib.sha256(whole).digest()) == writer.stat
    assert whole == blobs.read("large")
    assert pieces[8][:10] == blobs.read("large", offset=8 * 700_000, length=10)


def test_large_blob_is_written_once_too(blobs: Blobs) -> None:
    whole = b"x" * (PART_BYTES + 1)
    blobs.put("large", whole)
    blobs.put("large", whole)

    with pytest.raises(BlobConflictError):
        blobs.put("large", whole + b"y")

    assert len(whole) == blobs.count_bytes("large")
    assert 0 == blobs.sweep(older_than_s=-60.0)


def test_writer_that_raises_leaves_nothing(blobs: Blobs) -> None:
    with pytest.raises(ZeroDivisionError), blobs.open_writer("key") as writer:  # noqa: PT012 - the block is the subject
        writer.write(b"x" * (PART_BYTES + 1))
        raise ZeroDivisionError

    with pytest.raises(BlobMissingError):
        blobs.read("key")
    assert 0 == blobs.sweep(older_than_s=-60.0)


@pytest.mark.parametrize("num_bytes", [100_000, PART_BYTES + 100_000])
def test_of_writers_that_race_one_wins_and_no_bytes_mix(blobs: Blobs, num_bytes: int) -> None:
    outcomes: list[str] = []

    def write(letter: bytes) -> None:
        try:
            blobs.put("key", letter * num_bytes)
            outcomes.append("written")
        except BlobConflictError:
            outcomes.append("conflict")

    threads = [threading.Thread(target=write, args=(letter,)) for letter in (b"a", b"b", b"c")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    num_written = outcomes.count("written")
    if isinstance(blobs, S3Blobs) and num_bytes > PART_BYTES:
        # SeaweedFS looks for the key before it joins the parts, and not while it does: of writers that
        # end in the same moment, two may be told that they were the first. AWS tells one.
        assert 1 <= num_written < 3
    else:
        assert 1 == num_written
    assert 3 == len(outcomes)
    assert 1 == len(set(blobs.read("key")))
    assert num_bytes == blobs.count_bytes("key")
    assert 0 == blobs.sweep(older_than_s=-60.0)


@pytest.mark.parametrize(
    "key",
    ["", "/etc/passwd", "a//b", "../x", "a/../b", "a/.hidden", "a b", "a\\b", "ä", "a/", "x" * 513],
)
def test_keys_that_are_not_ours_are_refused(tmp_path: Path, key: str) -> None:
    folder = FolderBlobs(tmp_path)

    with pytest.raises(BadBlobKeyError):
        folder.put(key, b"")
    with pytest.raises(BadBlobKeyError):
        folder.read(key)


def test_bucket_refuses_such_keys_too(bucket: S3Blobs) -> None:
    with pytest.raises(BadBlobKeyError):
        bucket.put("../x", b"")
    with pytest.raises(BadBlobKeyError):
        bucket.read("../x")


def test_listing_gives_our_own_old_keys(blobs: Blobs) -> None:
    tenant, job = TenantId(new_uuid()), JobId(new_uuid())
    ours = [
        build_file_key(tenant, FileId(new_uuid())),
        build_output_key(tenant, job, 3),
        build_errors_key(tenant, job, 12),
    ]
    for key in (*ours, "somebody/elses", f"{tenant}/notes.txt"):
        blobs.put(key, b"x")

    assert sorted(ours) == sorted(blobs.list_keys(older_than_s=-60.0))
    assert [] == list(blobs.list_keys(older_than_s=60.0))


def test_neighbour_whose_prefix_begins_like_ours_is_not_listed(
    s3_server: S3Server, bucket: S3Blobs
) -> None:
    there = S3Blobs(build_config(s3_server, prefix=f"{bucket._config.prefix}-2"))
    there.put(OURS, b"x")

    assert [] == list(bucket.list_keys(older_than_s=-60.0))
    assert [OURS] == list(there.list_keys(older_than_s=-60.0))


def test_upload_of_others_in_the_bucket_is_left_alone(s3_server: S3Server, bucket: S3Blobs) -> None:
    key = f"{bucket._config.prefix}/holiday/films"
    client = s3_server.build_client()
    client.create_multipart_upload(Bucket=s3_server.bucket, Key=key)

    assert 0 == bucket.sweep(older_than_s=-60.0)


def test_ping_answers(blobs: Blobs) -> None:
    blobs.ping()


# Folder


def test_sweep_removes_what_a_dead_writer_left(tmp_path: Path) -> None:
    folder = FolderBlobs(tmp_path)
    (tmp_path / ".unfinished" / "0123").write_bytes(b"half")

    young = folder.sweep(older_than_s=3600.0)
    old = folder.sweep(older_than_s=-1.0)

    assert (0, 1) == (young, old)


@contextmanager
def files_limited_to(num_bytes: int) -> Iterator[None]:
    """A disk that is full after so many bytes, as far as this process can see."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("num_bytes", [66_000, 2_000_000])  # full at the end, and on the way
def test_full_disk_takes_nothing_leaves_nothing_and_may_pass(
    tmp_path: Path, num_bytes: int
) -> None:
    folder = FolderBlobs(tmp_path)

    with files_limited_to(65_536), pytest.raises(BlobsUnavailableError):
        folder.put("key", b"x" * num_bytes)
    left = list((tmp_path / ".unfinished").iterdir())
    with pytest.raises(BlobMissingError):
        folder.read("key")
    again = folder.put("key", b"x" * num_bytes)

    assert [] == left
    assert num_bytes == again.num_bytes == folder.count_bytes("key")


def test_unfinished_file_that_vanished_is_no_missing_blob(tmp_path: Path) -> None:
    folder = FolderBlobs(tmp_path)

    with pytest.raises(BlobsUnavailableError), folder.open_writer("key") as writer:  # noqa: PT012 - the block is the subject
        writer.write(b"bytes")
        for path in (tmp_path / ".unfinished").iterdir():
            path.unlink()
    folder.put("key", b"others")

    assert b"others" == folder.read("key")


def test_folder_whose_mount_was_lost_misses_no_blob(tmp_path: Path) -> None:
    place, elsewhere = tmp_path / "mount", tmp_path / "elsewhere"
    folder = FolderBlobs(place)
    folder.put("key", b"bytes")
    place.rename(elsewhere)
    place.mkdir()

    for fail in (folder.read, folder.count_bytes, lambda key: folder.put(key, b"bytes")):
        with pytest.raises(BlobsUnavailableError):
            fail("key")
    with pytest.raises(BlobsUnavailableError):
        folder.ping()
    assert [] == list(place.iterdir())
    place.rmdir()
    elsewhere.rename(place)

    assert b"bytes" == folder.read("key")


def test_file_in_the_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "blobs").write_bytes(b"")

    with pytest.raises(BlobsRefusedError, match="A file stands"):
        FolderBlobs(tmp_path / "blobs")


def test_new_folders_are_synced_up_to_the_root(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    sync = os.fsync

    def note(descriptor: int) -> None:
        synced.append(str(Path(f"/proc/self/fd/{descriptor}").readlink()))
        sync(descriptor)

    folder = FolderBlobs(tmp_path)
    monkeypatch.setattr(os, "fsync", note)
    folder.put("tenant/job/output", b"lines")

    assert ".unfinished" in synced[0]
    assert [str(tmp_path / name) for name in ("tenant/job", "tenant", "")] == synced[1:]


# Bucket


class ForgetfulClient:
    """Forwards a call of a real client and loses the answer, once."""

    def __init__(self, client: Any, operation: str, error: Exception) -> None:
        self._client = client
        self._operation = operation
        self._error: Exception | None = error

    def __getattr__(self, name: str) -> Any:
        call = getattr(self._client, name)
        if name != self._operation:
            return call

        def forward(**arguments: Any) -> Any:
            answer = call(**arguments)
            if self._error is None:
                return answer
            error, self._error = self._error, None
            raise error

        return forward


@pytest.mark.parametrize(
    ("operation", "num_bytes"),
    [("put_object", 10), ("complete_multipart_upload", PART_BYTES + 10)],
)
def test_write_whose_answer_was_lost_is_repeated_with_success(
    bucket: S3Blobs, operation: str, num_bytes: int
) -> None:
    lost = ReadTimeoutError(endpoint_url="http://bucket")
    client: Any = ForgetfulClient(bucket._client, operation, lost)
    bucket._client = client

    with pytest.raises(BlobsUnavailableError):
        bucket.put("key", b"x" * num_bytes)
    again = bucket.put("key", b"x" * num_bytes)

    assert num_bytes == again.num_bytes
    assert num_bytes == bucket.count_bytes("key")


@pytest.mark.parametrize(
    ("code", "status", "expected"),
    [
        ("SlowDown", 503, BlobsUnavailableError),
        ("InternalError", 500, BlobsUnavailableError),
        ("AccessDenied", 403, BlobsRefusedError),
        ("NoSuchBucket", 404, BlobsRefusedError),
    ],
)
def test_errors_of_the_bucket_say_whether_trying_again_helps(
    bucket: S3Blobs, code: str, status: int, expected: type[Exception]
) -> None:
    answer: Any = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}
    client: Any = ForgetfulClient(bucket._client, "put_object", ClientError(answer, "PutObject"))
    bucket._client = client

    with pytest.raises(expected):
        bucket.put("key", b"x")


@pytest.mark.services
def test_completion_that_was_repeated_by_itself_is_a_success(bucket: S3Blobs) -> None:
    """boto asks again when the answer to the first try was lost; by then the upload is gone."""

    class TwiceClient(ForgetfulClient):
        def __getattr__(self, name: str) -> Any:
            call = getattr(self._client, name)
            if name != "complete_multipart_upload":
                return call
            return lambda **arguments: (call(**arguments), call(**arguments))[1]

    client: Any = TwiceClient(bucket._client, "", RuntimeError())
    bucket._client = client
    bucket.put("key", b"x" * (PART_BYTES + 1))

    assert PART_BYTES + 1 == bucket.count_bytes("key")


@pytest.mark.services
def test_upload_that_a_sweep_ended_may_be_written_again(bucket: S3Blobs) -> None:
    with pytest.raises(BlobsUnavailableError), bucket.open_writer(OURS) as writer:  # noqa: PT012 - the block is the subject
        writer.write(b"x" * (PART_BYTES + 1))
        assert 1 == bucket.sweep(older_than_s=-60.0)

    assert 5 == bucket.put(OURS, b"other").num_bytes


@pytest.mark.services
def test_sweep_leaves_neighbours_alone_and_young_uploads_too(
    s3_server: S3Server, bucket: S3Blobs
) -> None:
    neighbour, namesake = (
        S3Blobs(build_config(s3_server, prefix=prefix))
        for prefix in (f"{bucket._config.prefix}-too", "test")
    )
    with neighbour.open_writer(OURS) as theirs, bucket.open_writer(OURS) as ours:
        theirs.write(b"x" * (PART_BYTES + 1))
        ours.write(b"x" * (PART_BYTES + 1))

        assert 0 == bucket.sweep(older_than_s=3600.0)
        assert 0 == namesake.sweep(older_than_s=-60.0)

    assert PART_BYTES + 1 == neighbour.count_bytes(OURS) == bucket.count_bytes(OURS)


def list_ways(blobs: S3Blobs) -> list[Callable[[], object]]:
    return [
        blobs.ping,
        lambda: blobs.put("key", b"bytes"),
        lambda: blobs.put("key", b"x" * (PART_BYTES + 1)),
        lambda: blobs.read("key"),
        lambda: next(blobs.stream("key")),
        lambda: blobs.count_bytes("key"),
        lambda: blobs.delete("key"),
        lambda: blobs.sweep(older_than_s=0.0),
    ]


@pytest.mark.services
def test_missing_bucket_is_no_missing_blob(s3_server: S3Server, bucket: S3Blobs) -> None:
    for way in list_ways(S3Blobs(build_config(s3_server, bucket="paintings"))):
        with pytest.raises(BlobsRefusedError, match="no such bucket"):
            way()


@pytest.mark.services
@pytest.mark.parametrize(
    ("name", "text"),
    [("AWS_SECRET_ACCESS_KEY", "does not fit"), ("AWS_ACCESS_KEY_ID", "does not know")],
)
def test_wrong_keys_are_told_from_a_passing_fault(
    s3_server: S3Server,
    bucket: S3Blobs,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    text: str,
) -> None:
    monkeypatch.setenv(name, "wrong")
    blobs = S3Blobs(build_config(s3_server))

    for way in list_ways(blobs):
        with pytest.raises(BlobsRefusedError):
            way()
    with pytest.raises(BlobsRefusedError, match=text):
        blobs.put("key", b"bytes")


@pytest.mark.services
def test_no_keys_and_impossible_names_are_said(
    s3_server: S3Server, bucket: S3Blobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(BlobsRefusedError, match="no possible bucket"):
        S3Blobs(build_config(s3_server, bucket="a b")).ping()
    with pytest.raises(BlobsRefusedError, match="no URL"):
        S3Blobs(build_config(s3_server, endpoint_url="photographs"))
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(BlobsRefusedError, match="no keys"):
        S3Blobs(build_config(s3_server)).ping()


@pytest.mark.services
def test_server_that_is_gone_or_silent_may_come_back(s3_server: S3Server, bucket: S3Blobs) -> None:
    gone = S3Blobs(
        build_config(
            s3_server, endpoint_url=f"http://127.0.0.1:{find_free_ports(1)[0]}", max_tries=1
        )
    )
    silent = S3Blobs(build_config(s3_server, read_timeout_s=2.0, max_tries=1))

    for way in list_ways(gone):
        with pytest.raises(BlobsUnavailableError):
            way()
    s3_server.freeze()
    try:
        for way in list_ways(silent)[:2]:
            with pytest.raises(BlobsUnavailableError):
                way()
    finally:
        s3_server.thaw()
    bucket.ping()  # it takes its time to come back
    silent.put("again", b"bytes")

    assert b"bytes" == silent.read("again")


class BrokenServer:
    """Answers every request with the same bytes, and hangs up."""

    def __init__(self, answer: bytes) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._answer = answer
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                with connection:
                    connection.recv(65_536)
                    connection.sendall(self._answer)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


@pytest.mark.services
@pytest.mark.parametrize(
    "head",
    [
        b"Content-Length: 20",  # of which eight come
        b"Content-Length: 8\r\nx-amz-checksum-crc32: AAAAAA==",  # of other bytes
    ],
)
def test_answer_that_broke_off_or_was_garbled_is_never_taken_for_the_blob(
    s3_server: S3Server, bucket: S3Blobs, head: bytes
) -> None:
    server = BrokenServer(b"HTTP/1.1 200 OK\r\n" + head + b"\r\n\r\n" + b"12345678")
    blobs = S3Blobs(build_config(s3_server, endpoint_url=server.url, max_tries=1))

    with pytest.raises(BlobsUnavailableError):
        blobs.read("key")
    with pytest.raises(BlobsUnavailableError):
        list(blobs.stream("key"))
    server.close()


@pytest.mark.services
def test_checksums_can_be_switched_off(s3_server: S3Server, bucket: S3Blobs) -> None:
    without = S3Blobs(build_config(s3_server, prefix=bucket._config.prefix, is_checksummed=False))
    sent: dict[S3Blobs, set[str]] = {bucket: set(), without: set()}
    for blobs, names in sent.items():

        def note(request: Any, names: set[str] = names, **_: Any) -> None:
            names.update(name.lower() for name in request.headers)

        blobs._client.meta.events.register("before-send.s3", note)
        blobs.put(f"small-{len(sent[blobs])}", b"bytes")
        blobs.put(f"large-{len(sent[blobs])}", b"x" * (PART_BYTES + 1))

    assert "x-amz-checksum-crc32" in sent[bucket]
    assert {"x-amz-checksum-mode", "if-none-match"} & sent[bucket]
    assert not [name for name in sent[without] if "checksum" in name]
    assert "if-none-match" in sent[without]


@pytest.mark.services
def test_tries_are_said_and_not_left_to_boto(bucket: S3Blobs) -> None:
    config = bucket._client.meta.config

    assert {"mode": "standard", "total_max_attempts": 5} == config.retries  # type: ignore[attr-defined]


# Keys


def test_keys_hold_our_ids_and_nothing_else() -> None:
    tenant, job, file = TenantId(new_uuid()), JobId(new_uuid()), FileId(new_uuid())

    keys = [
        build_file_key(tenant, file),
        build_output_key(tenant, job, 3),
        build_errors_key(tenant, job, 3),
    ]

    assert [check_key(key) for key in keys] == keys
    assert f"{tenant}/{job}/output.3.jsonl" == keys[1]
    assert 3 == len(set(keys))


@given(st.text())
def test_accepted_keys_stay_inside_the_folder(key: str) -> None:
    try:
        check_key(key)
    except BadBlobKeyError:
        return
    root = Path("/blobs")

    assert root in (root / key).parents
    assert ".." not in Path(key).parts
