"""
Blobs: bytes under keys of ours, written once, in a folder or in a bucket.

SQL is the only pointer to a blob, so a port of few methods will do. A key is never overwritten: who
writes equal bytes a second time has succeeded, who writes others has a bug or a rival, and is told.
That makes every write safe to repeat when its answer was lost.

boto's errors end here, and so do the file system's.
"""

import hashlib
import os
import secrets
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, Final, Literal, Protocol, Self

from storage.errors import (
    BlobConflictError,
    BlobMissingError,
    BlobsRefusedError,
    BlobsUnavailableError,
    StorageError,
)
from storage.keys import check_key

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

MEBIBYTE: Final = 1024 * 1024
READ_BYTES: Final = MEBIBYTE
PART_BYTES: Final = 64 * MEBIBYTE
"""From this size on a blob goes to a bucket in parts; also the size of a part."""

_MAX_CONDITION_TRIES: Final = 4  # S3 answers 409 while another write of the key is under way


@dataclass(frozen=True, slots=True)
class BlobStat:
    """What was written: enough to tell later whether it is still the same."""

    num_bytes: int
    sha256: bytes


class BlobWriter(Protocol):
    """
    A blob in the making. Leave the block, and it is there; raise, and it never was.

    `stat` says what was written, once the block has been left.
    """

    stat: BlobStat

    def write(self, chunk: bytes, /) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
        /,
    ) -> None: ...


class Blobs(Protocol):
    """
    The port that `FolderBlobs` and `S3Blobs` fill.

    All methods raise `BlobsUnavailableError` where trying again helps, `BlobsRefusedError` where an
    operator must act, and `BadBlobKeyError` for a key that is not one of ours.
    """

    def put(self, key: str, content: bytes) -> BlobStat:
        """Raises `BlobConflictError` if other bytes lie there already."""

    def open_writer(self, key: str) -> BlobWriter:
        """For bytes that come piece by piece. Leaving the block raises what `put` raises."""

    def read(self, key: str, *, offset: int = 0, length: int | None = None) -> bytes:
        """Raises `BlobMissingError`. Shorter than `length` where the blob ends."""

    def stream(self, key: str, *, offset: int = 0) -> Iterator[bytes]:
        """Pieces of at most `READ_BYTES`. Raises `BlobMissingError` before the first."""

    def count_bytes(self, key: str) -> int:
        """Raises `BlobMissingError`."""

    def delete(self, key: str) -> None:
        """A blob that is not there is deleted."""

    def sweep(self, *, older_than_s: float) -> int:
        """Remove what writers left that died; returns how many."""

    def ping(self) -> None: ...


# In a folder


class FolderBlobs:
    """
    Blobs as files: for one host, or for hosts that share a file system.

    A file is written beside its place, synced, and linked to its name, which fails if the name is
    taken: so it appears whole or not at all, also when the power fails.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._unfinished = folder / ".unfinished"
        with _file_errors_translated():
            self._unfinished.mkdir(parents=True, exist_ok=True)

    def put(self, key: str, content: bytes) -> BlobStat:
        with self.open_writer(key) as writer:
            writer.write(content)
        return writer.stat

    def open_writer(self, key: str) -> BlobWriter:
        with _file_errors_translated():
            return _FileWriter(self._path(key), self._unfinished)

    def read(self, key: str, *, offset: int = 0, length: int | None = None) -> bytes:
        with _file_errors_translated(), self._path(key).open("rb") as file:
            file.seek(offset)
            return file.read(-1 if length is None else length)

    def stream(self, key: str, *, offset: int = 0) -> Iterator[bytes]:
        with _file_errors_translated(), self._path(key).open("rb") as file:
            file.seek(offset)
            while chunk := file.read(READ_BYTES):
                yield chunk

    def count_bytes(self, key: str) -> int:
        with _file_errors_translated():
            return self._path(key).stat().st_size

    def delete(self, key: str) -> None:
        with _file_errors_translated():
            self._path(key).unlink(missing_ok=True)

    def sweep(self, *, older_than_s: float) -> int:
        count = 0
        with _file_errors_translated():
            for path in self._unfinished.iterdir():
                with suppress(FileNotFoundError):  # its writer has just finished
                    if path.stat().st_mtime < time.time() - older_than_s:
                        path.unlink()
                        count += 1
        return count

    def ping(self) -> None:
        with _file_errors_translated():
            self._unfinished.stat()

    def _path(self, key: str) -> Path:
        return self._folder / check_key(key)


class _FileWriter:
    stat: BlobStat

    def __init__(self, path: Path, unfinished: Path) -> None:
        self._path = path
        self._temporary = unfinished / secrets.token_hex(16)
        self._file: IO[bytes] = self._temporary.open("xb")
        self._sha256 = hashlib.sha256()

    def write(self, chunk: bytes, /) -> None:
        self._sha256.update(chunk)
        with _file_errors_translated():
            self._file.write(chunk)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
        /,
    ) -> None:
        try:
            if error is None:
                with _file_errors_translated():
                    self._finish()
        finally:
            self._file.close()
            self._temporary.unlink(missing_ok=True)

    def _finish(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self.stat = BlobStat(self._file.tell(), self._sha256.digest())
        self._path.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(self._temporary, self._path)
        except FileExistsError:
            with self._path.open("rb") as there:
                if hashlib.file_digest(there, "sha256").digest() != self.stat.sha256:
                    raise BlobConflictError from None
        _sync_folder(self._path.parent)


def _sync_folder(folder: Path) -> None:
    """A file's name lasts only when its folder was synced too."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _file_errors_translated() -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise BlobMissingError from error
    except PermissionError as error:
        raise BlobsRefusedError("The folder for blobs may not be written to or read.") from error
    except OSError as error:  # a full disk, a lost mount: both may pass
        raise BlobsUnavailableError from error


# In a bucket


@dataclass(frozen=True, slots=True)
class S3Config:
    """
    Where the bucket is, and how patient we are.

    Args:
        bucket, prefix: `s3://bucket/prefix`; the prefix may be empty.
        endpoint_url: of a service that is not AWS; None: AWS.
        max_connections: as many as there are threads that read or write.
        is_checksummed: CRC32 with every request and answer, boto's own default. False for older
            compatible services, which fail on it; our SHA-256 stands in SQL in any case.
        part_bytes: size of a part, in bytes; S3 takes no less than 5 MiB.
    """

    bucket: str
    prefix: str = ""
    endpoint_url: str | None = None
    region: str | None = None
    max_connections: int = 16
    max_tries: int = 5
    connect_timeout_s: float = 5.0
    read_timeout_s: float = 30.0
    is_checksummed: bool = True
    part_bytes: int = PART_BYTES


class S3Blobs:
    """
    Blobs in a bucket. One object a process: threads share its client.

    Keys are written with If-None-Match, which AWS and SeaweedFS enforce. 412 means that the
    key is taken, perhaps by our own first try whose answer was lost: it is compared, not failed.
    """

    def __init__(self, config: S3Config) -> None:
        self._config = config
        self._client = _build_client(config)

    def put(self, key: str, content: bytes) -> BlobStat:
        with self.open_writer(key) as writer:
            writer.write(content)
        return writer.stat

    def open_writer(self, key: str) -> BlobWriter:
        return _S3Writer(self._client, self._config, self._key(key))

    def read(self, key: str, *, offset: int = 0, length: int | None = None) -> bytes:
        if length == 0:
            return b""
        with _s3_errors_translated():
            try:
                answer = self._get(key, offset, length)
                with answer["Body"] as body:
                    content: bytes = body.read()
            except _client_error() as error:
                if _code(error) == "InvalidRange":  # the offset lies behind the end
                    return b""
                raise
            return content

    def stream(self, key: str, *, offset: int = 0) -> Iterator[bytes]:
        with _s3_errors_translated(), self._get(key, offset, None)["Body"] as body:
            while chunk := body.read(READ_BYTES):
                yield chunk

    def count_bytes(self, key: str) -> int:
        with _s3_errors_translated():
            head = self._client.head_object(Bucket=self._config.bucket, Key=self._key(key))
        return head["ContentLength"]

    def delete(self, key: str) -> None:
        with _s3_errors_translated():
            self._client.delete_object(Bucket=self._config.bucket, Key=self._key(key))

    def sweep(self, *, older_than_s: float) -> int:
        count = 0
        oldest = time.time() - older_than_s
        with _s3_errors_translated():
            pages = self._client.get_paginator("list_multipart_uploads").paginate(
                Bucket=self._config.bucket, Prefix=self._config.prefix
            )
            for page in pages:
                for upload in page.get("Uploads", []):
                    if upload["Initiated"].timestamp() < oldest:
                        self._client.abort_multipart_upload(
                            Bucket=self._config.bucket,
                            Key=upload["Key"],
                            UploadId=upload["UploadId"],
                        )
                        count += 1
        return count

    def ping(self) -> None:
        with _s3_errors_translated():
            self._client.head_bucket(Bucket=self._config.bucket)

    def _get(self, key: str, offset: int, length: int | None) -> Any:
        place: Any = {"Bucket": self._config.bucket, "Key": self._key(key)}
        if offset == 0 and length is None:
            return self._client.get_object(**place)
        end = "" if length is None else str(offset + length - 1)
        return self._client.get_object(**place, Range=f"bytes={offset}-{end}")

    def _key(self, key: str) -> str:
        prefix = self._config.prefix.strip("/")
        return f"{prefix}/{check_key(key)}" if prefix else check_key(key)


class _S3Writer:
    """Holds one part, on disk above a few MiB, and sends it when it is full."""

    stat: BlobStat

    def __init__(self, client: "S3Client", config: S3Config, key: str) -> None:
        self._client = client
        self._config = config
        # Any: the types of boto3's stubs cannot follow `**`.
        self._place: Any = {"Bucket": config.bucket, "Key": key}
        self._part = tempfile.SpooledTemporaryFile(max_size=8 * MEBIBYTE)  # noqa: SIM115 - closed in __exit__
        self._sha256 = hashlib.sha256()
        self._num_bytes = 0
        self._upload_id: str | None = None
        self._sent: list[Any] = []

    def write(self, chunk: bytes, /) -> None:
        self._sha256.update(chunk)
        self._num_bytes += len(chunk)
        rest = memoryview(chunk)
        while rest:
            room = self._config.part_bytes - self._part.tell()
            self._part.write(rest[:room])
            rest = rest[room:]
            if rest:  # more follows, so this part is not the last
                with _s3_errors_translated():
                    self._send_part()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
        /,
    ) -> None:
        try:
            if error is None:
                self.stat = BlobStat(self._num_bytes, self._sha256.digest())
                with _s3_errors_translated():
                    self._finish()
        finally:
            self._part.close()
            # Also after a refused completion: that leaves the upload open, and it costs money.
            if self._upload_id is not None:
                with suppress(StorageError), _s3_errors_translated():
                    self._client.abort_multipart_upload(**self._place, UploadId=self._upload_id)

    def _send_part(self) -> None:
        if self._upload_id is None:
            self._upload_id = self._client.create_multipart_upload(**self._place)["UploadId"]
        number = len(self._sent) + 1
        self._part.seek(0)
        answer = self._client.upload_part(
            **self._place, UploadId=self._upload_id, PartNumber=number, Body=self._part
        )
        self._sent.append({"PartNumber": number, "ETag": answer["ETag"]})
        self._part.seek(0)
        self._part.truncate()

    def _finish(self) -> None:
        if self._upload_id is not None:
            self._send_part()
        for number in range(1, _MAX_CONDITION_TRIES + 1):
            try:
                self._write_once()
            except _client_error() as error:
                if _code(error) in ("PreconditionFailed", "412"):
                    self._verify()
                    return
                is_race = _code(error) in ("ConditionalRequestConflict", "409")
                # A multipart upload that lost a race is void; its bytes are not here any more.
                if not is_race or self._upload_id is not None or number == _MAX_CONDITION_TRIES:
                    raise
                time.sleep(0.1 * number)
            else:
                self._upload_id = None  # nothing is left to abort
                return

    def _write_once(self) -> None:
        if self._upload_id is None:
            self._part.seek(0)
            self._client.put_object(**self._place, Body=self._part, IfNoneMatch="*")
        else:
            self._client.complete_multipart_upload(
                **self._place,
                UploadId=self._upload_id,
                MultipartUpload={"Parts": self._sent},
                IfNoneMatch="*",
            )

    def _verify(self) -> None:
        """Equal bytes under the key are our own, written before. Read: ETags are no checksums."""
        sha256, num_bytes = hashlib.sha256(), 0
        with self._client.get_object(**self._place)["Body"] as body:
            while chunk := body.read(READ_BYTES):
                sha256.update(chunk)
                num_bytes += len(chunk)
        if BlobStat(num_bytes, sha256.digest()) != self.stat:
            raise BlobConflictError


def _build_client(config: S3Config) -> "S3Client":
    # Imported here: boto takes a third of a second, and a folder needs none of it.
    import boto3
    from botocore.config import Config

    checksums: Literal["when_supported", "when_required"] = (
        "when_supported" if config.is_checksummed else "when_required"
    )
    client: S3Client = boto3.client(
        "s3",
        endpoint_url=config.endpoint_url,
        region_name=config.region,
        config=Config(
            retries={"mode": "standard", "total_max_attempts": config.max_tries},
            connect_timeout=config.connect_timeout_s,
            read_timeout=config.read_timeout_s,
            max_pool_connections=config.max_connections,
            request_checksum_calculation=checksums,
            response_checksum_validation=checksums,
            tcp_keepalive=True,
        ),
    )
    return client


def _client_error() -> type[Any]:
    from botocore.exceptions import ClientError

    return ClientError


def _code(error: Any) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


_MISSING: Final = frozenset({"NoSuchKey", "404", "NotFound"})
_PASSING: Final = frozenset(
    {
        "InternalError",
        "ServiceUnavailable",
        "SlowDown",
        "RequestTimeout",
        "ConditionalRequestConflict",
    }
)


@contextmanager
def _s3_errors_translated() -> Iterator[None]:
    from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError

    try:
        yield
    except ClientError as error:
        status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        if _code(error) in _MISSING:
            raise BlobMissingError from error
        if status >= 500 or status == 429 or _code(error) in _PASSING:
            raise BlobsUnavailableError from error
        raise BlobsRefusedError from error
    except NoCredentialsError as error:
        raise BlobsRefusedError from error
    except BotoCoreError as error:  # timeouts, lost connections, bodies that broke off
        raise BlobsUnavailableError from error
