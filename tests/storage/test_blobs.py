"""What holds for blobs wherever they lie: the same tests for a folder and for a bucket."""

import hashlib
import threading
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
from tests.services import S3Server

PART_BYTES = 5 * 1024 * 1024


@pytest.fixture
def bucket(s3_server: S3Server, s3_settings: dict[str, str]) -> S3Blobs:
    return S3Blobs(build_config(s3_server, prefix=s3_settings["DARKROOM_BLOBS"].split("/")[-1]))


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


def test_of_writers_that_race_one_wins_and_no_bytes_mix(blobs: Blobs) -> None:
    outcomes: list[str] = []

    def write(letter: bytes) -> None:
        try:
            blobs.put("key", letter * 100_000)
            outcomes.append("written")
        except BlobConflictError:
            outcomes.append("conflict")

    threads = [threading.Thread(target=write, args=(letter,)) for letter in (b"a", b"b", b"c")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert ["conflict", "conflict", "written"] == sorted(outcomes)
    assert 1 == len(set(blobs.read("key")))


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


def test_ping_answers(blobs: Blobs) -> None:
    blobs.ping()


# Folder


def test_sweep_removes_what_a_dead_writer_left(tmp_path: Path) -> None:
    folder = FolderBlobs(tmp_path)
    (tmp_path / ".unfinished" / "0123").write_bytes(b"half")

    young = folder.sweep(older_than_s=3600.0)
    old = folder.sweep(older_than_s=-1.0)

    assert (0, 1) == (young, old)


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


def test_checksums_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    blobs = S3Blobs(S3Config("photographs", region="us-east-1", is_checksummed=False))

    config = blobs._client.meta.config

    assert "when_required" == config.request_checksum_calculation  # type: ignore[attr-defined]
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
