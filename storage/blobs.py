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
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from io import BytesIO
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
from storage.keys import check_key, is_ours

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


class _Readable(Protocol):
    def read(self, num_bytes: int | None = ..., /) -> bytes: ...


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

    def list_keys(self, *, older_than_s: float) -> Iterator[str]:
        """
        Keys of ours whose bytes came so long ago or longer, in no order.

        For finding what nobody needs, and nothing else: a listing may be behind the truth.
        """

    def sweep(self, *, older_than_s: float) -> int:
        """Remove what writers left that died; returns how many."""

    def ping(self) -> None: ...


# In a folder


class FolderBlobs:
    """
    Blobs as files: for one host, or for hosts that share a file system.

    A file is written beside its place, synced, and linked to its name, which fails if the name is
    taken: so it appears whole or not at all, also when the power fails.

    The folder for unfinished files tells a folder that is there from one whose mount was lost: only
    where it stands is a blob missing that is not found.
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
            return _FileWriter(self._folder, check_key(key), self._unfinished)

    def read(self, key: str, *, offset: int = 0, length: int | None = None) -> bytes:
        with _file_errors_translated(), self._open(key) as file:
            file.seek(offset)
            return file.read(-1 if length is None else length)

    def stream(self, key: str, *, offset: int = 0) -> Iterator[bytes]:
        with _file_errors_translated(), self._open(key) as file:
            file.seek(offset)
            while chunk := file.read(READ_BYTES):
                yield chunk

    def count_bytes(self, key: str) -> int:
        with _file_errors_translated(), self._open(key) as file:
            return os.fstat(file.fileno()).st_size

    def delete(self, key: str) -> None:
        with _file_errors_translated():
            self._path(key).unlink(missing_ok=True)

    def list_keys(self, *, older_than_s: float) -> Iterator[str]:
        newest = time.time() - older_than_s
        for folder, subfolders, names in os.walk(self._folder):
            if Path(folder) == self._folder and self._unfinished.name in subfolders:
                subfolders.remove(self._unfinished.name)
            for name in names:
                path = Path(folder, name)
                key = path.relative_to(self._folder).as_posix()
                if is_ours(key) and _is_older(path, newest):
                    yield key

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

    def _open(self, key: str) -> IO[bytes]:
        try:
            return self._path(key).open("rb")
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
            self._unfinished.stat()  # raises where the whole folder is gone
            raise BlobMissingError from error


class _FileWriter:
    stat: BlobStat

    def __init__(self, folder: Path, key: str, unfinished: Path) -> None:
        self._folder = folder
        self._path = folder / key
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
            # On a full disk closing fails too: it tries once more to write what is buffered.
            with suppress(OSError):
                self._file.close()
            with suppress(OSError):  # the sweeper takes what stays
                self._temporary.unlink()

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
        # Every folder on the way may be new, and may be another writer's that has not synced it yet.
        for folder in self._path.relative_to(self._folder).parents:
            _sync_folder(self._folder / folder)


def _is_older(path: Path, newest: float) -> bool:
    with _file_errors_translated(), suppress(FileNotFoundError):  # deleted meanwhile
        return path.stat().st_mtime < newest
    return False


def _sync_folder(folder: Path) -> None:
    """A name lasts only when the folder that holds it was synced too."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _file_errors_translated() -> Iterator[None]:
    try:
        yield
    except PermissionError as error:
        raise BlobsRefusedError(
            "The folder for blobs may not be written to or read, or takes no hard links. Give "
            "DARKROOM_BLOBS another one, or its owner the right."
        ) from error
    except (FileExistsError, NotADirectoryError) as error:
        raise BlobsRefusedError(
            "A file stands where the folder for blobs, or one inside it, should be."
        ) from error
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
        with _s3_errors_translated():
            try:
                self._client = _build_client(config)
            except ValueError as error:
                raise BlobsRefusedError(
                    "DARKROOM_S3_ENDPOINT_URL is no URL. Give http://HOST:PORT or https://HOST."
                ) from error

    def put(self, key: str, content: bytes) -> BlobStat:
        with self.open_writer(key) as writer:
            writer.write(content)
        return writer.stat

    def open_writer(self, key: str) -> BlobWriter:
        return _S3Writer(self._client, self._config, self._key(key))

    def read(self, key: str, *, offset: int = 0, length: int | None = None) -> bytes:
        if length == 0:
            return b""
        with _s3_errors_translated(), self._open(key, offset, length) as body:
            content: bytes = body.read()
            return content

    def stream(self, key: str, *, offset: int = 0) -> Iterator[bytes]:
        with _s3_errors_translated(), self._open(key, offset, None) as body:
            while chunk := body.read(READ_BYTES):
                yield chunk

    def count_bytes(self, key: str) -> int:
        with _s3_errors_translated():
            try:
                head = self._client.head_object(Bucket=self._config.bucket, Key=self._key(key))
            except _client_error() as error:
                if _code(error) == "404":  # a HEAD does not say what is missing
                    self.ping()
                raise
        return head["ContentLength"]

    def delete(self, key: str) -> None:
        with _s3_errors_translated():
            self._client.delete_object(Bucket=self._config.bucket, Key=self._key(key))

    def list_keys(self, *, older_than_s: float) -> Iterator[str]:
        newest = time.time() - older_than_s
        with _s3_errors_translated():
            pages = self._client.get_paginator("list_objects_v2").paginate(
                Bucket=self._config.bucket, Prefix=self._prefix
            )
            for page in pages:
                for found in page.get("Contents", []):
                    key = found["Key"].removeprefix(self._prefix)
                    if is_ours(key) and found["LastModified"].timestamp() < newest:
                        yield key

    def sweep(self, *, older_than_s: float) -> int:
        count = 0
        newest = time.time() - older_than_s
        with _s3_errors_translated():
            pages = self._client.get_paginator("list_multipart_uploads").paginate(
                Bucket=self._config.bucket, Prefix=self._prefix
            )
            for page in pages:
                for upload in page.get("Uploads", []):
                    is_old = upload["Initiated"].timestamp() < newest
                    if is_old and is_ours(upload["Key"].removeprefix(self._prefix)):
                        self._client.abort_multipart_upload(
                            Bucket=self._config.bucket,
                            Key=upload["Key"],
                            UploadId=upload["UploadId"],
                        )
                        count += 1
        return count

    def ping(self) -> None:
        with _s3_errors_translated():
            try:
                self._client.head_bucket(Bucket=self._config.bucket)
            except _client_error() as error:
                if _code(error) == "404":
                    raise BlobsRefusedError(_REFUSALS["NoSuchBucket"]) from error
                raise

    @contextmanager
    def _open(self, key: str, offset: int, length: int | None) -> Iterator[_Readable]:
        place: Any = {"Bucket": self._config.bucket, "Key": self._key(key)}
        if offset or length is not None:
            end = "" if length is None else str(offset + length - 1)
            place["Range"] = f"bytes={offset}-{end}"
        try:
            answer = self._client.get_object(**place)
        except _client_error() as error:
            if _code(error) != "InvalidRange":
                raise
            yield BytesIO()  # the offset lies behind the end
            return
        # Not the body as a context: that gives what lies under it, which looks at no checksum and
        # raises urllib3's errors.
        with closing(answer["Body"]) as body:
            yield body

    @property
    def _prefix(self) -> str:
        """Ends with a slash, or `darkroom` would also be `darkroom-of-somebody-else`."""
        prefix = self._config.prefix.strip("/")
        return f"{prefix}/" if prefix else ""

    def _key(self, key: str) -> str:
        return self._prefix + check_key(key)


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
            with _file_errors_translated():  # it may be on a disk, which may be full
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
            with suppress(OSError):
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
                # An upload that is not there any more: the answer to our first try was lost.
                if _code(error) in ("PreconditionFailed", "412", "NoSuchUpload"):
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
        try:
            answer = self._client.get_object(**self._place)
        except _client_error() as error:
            if _code(error) in _MISSING:  # deleted since, or the upload was aborted: not written
                raise BlobsUnavailableError from error
            raise
        with closing(answer["Body"]) as body:
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
    # A session of its own: boto's default one keeps the keys that it found first, and making two
    # clients of it at once is not safe.
    client: S3Client = boto3.Session().client(
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
        "NoSuchUpload",  # a sweep found it too old
    }
)
_REFUSALS: Final = {
    "NoSuchBucket": "There is no such bucket. Create it, or correct DARKROOM_BLOBS.",
    "InvalidAccessKeyId": "The bucket's service does not know AWS_ACCESS_KEY_ID. Correct it.",
    "SignatureDoesNotMatch": "AWS_SECRET_ACCESS_KEY does not fit AWS_ACCESS_KEY_ID. Correct it.",
    "AccessDenied": "The bucket does not allow this with these keys. Give them the permission.",
    "RequestTimeTooSkewed": "The clock of this host is wrong, so the bucket refuses its requests.",
    "PermanentRedirect": "The bucket is in another region. Set DARKROOM_S3_REGION.",
    "AuthorizationHeaderMalformed": "The bucket is in another region. Set DARKROOM_S3_REGION.",
}


@contextmanager
def _s3_errors_translated() -> Iterator[None]:
    from botocore import exceptions as boto

    try:
        yield
    except boto.ClientError as error:
        status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        if _code(error) in _MISSING:
            raise BlobMissingError from error
        if status >= 500 or status == 429 or _code(error) in _PASSING:
            raise BlobsUnavailableError from error
        raise BlobsRefusedError(_REFUSALS.get(_code(error))) from error
    except (boto.NoCredentialsError, boto.PartialCredentialsError) as error:
        raise BlobsRefusedError(
            "There are no keys for the bucket. Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or "
            "give the host a role."
        ) from error
    except boto.ParamValidationError as error:
        raise BlobsRefusedError("DARKROOM_BLOBS names no possible bucket.") from error
    except boto.BotoCoreError as error:  # timeouts, lost connections, bodies that broke off
        raise BlobsUnavailableError from error
