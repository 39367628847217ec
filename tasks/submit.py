"""
A submission becomes a job: manifest, file and job row, and only then a message.

Whatever it comes by (a request, a Celery message, the stream), it goes through `submit`, and is
idempotent by its key: the same submission twice is one job.
"""

import contextlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Final, Literal, Self
from uuid import UUID

import structlog
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from storage import files, jobs, tenants
from storage.db import Database
from storage.errors import IdempotencyConflictError, NotFoundError, StorageError
from storage.ids import FileId, JobId, TenantId, new_uuid
from storage.jobs import NewJob
from storage.keys import build_file_key
from storage.tables import Job
from tasks.config import DEFAULT_TENANT
from tasks.dispatch import Dispatcher
from tasks.errors import BadSubmissionError
from tasks.identity import complete_line, find_model, hash_submission
from tasks.stores import Stores

logger = structlog.get_logger(__name__)

PURPOSE: Final = "batch"

MIN_WINDOW_S: Final = 10 * 60
MAX_WINDOW_S: Final = 30 * 24 * 3600
MANIFEST_LIFETIME_S: Final = 30 * 24 * 3600
"""Of the file that inline requests become, as of an upload. A job that runs longer keeps its blob."""

_WINDOW: Final = re.compile(r"([0-9]{1,6})([hm])")
_NO_JSON: Final = "requests: hold what no JSON may hold."  # NaN, half of a surrogate pair
_FILE_ID: Final = re.compile(r"(?:file-)?([0-9a-f]{8}-?(?:[0-9a-f]{4}-?){3}[0-9a-f]{12})")


def _check_text(text: str) -> str:
    if "\0" in text:
        raise ValueError("NUL characters cannot be kept")  # PostgreSQL has no place for them
    return text


_Name = Annotated[str, Field(min_length=1, max_length=256), AfterValidator(_check_text)]
_IdempotencyKey = Annotated[str, Field(min_length=1, max_length=255), AfterValidator(_check_text)]
_MetadataKey = Annotated[str, Field(max_length=64), AfterValidator(_check_text)]
_MetadataValue = Annotated[str, Field(max_length=512), AfterValidator(_check_text)]


class Submission(BaseModel):
    """
    What a producer sends; the fields have the names of OpenAI's wire.

    Args:
        requests: the lines, as objects; `method`, `url` and `body.model` may be left out.
        input_file_id: of an uploaded file, in the place of `requests`.
        model: by default the first request's.
        tenant: whose it is. The broker is trusted: whoever may write to it may name any.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    requests: Annotated[list[dict[str, Any]], Field(min_length=1)] | None = None
    input_file_id: str | None = None
    model: _Name | None = None
    endpoint: Literal["/v1/chat/completions"] = "/v1/chat/completions"
    completion_window: str = "24h"
    tenant: _Name = DEFAULT_TENANT
    idempotency_key: _IdempotencyKey | None = None
    priority: Annotated[int, Field(ge=-10, le=10)] = 0
    image_policy: Literal["reject", "truncate", "sample", "split"] = "reject"
    on_invalid: Literal["fail", "skip"] = "fail"
    metadata: Annotated[dict[_MetadataKey, _MetadataValue], Field(max_length=16)] | None = None

    @field_validator("completion_window")
    @classmethod
    def _check_window(cls, window: str) -> str:
        parse_window(window)
        return window

    @model_validator(mode="after")
    def _check_source(self) -> Self:
        if (self.requests is None) == (self.input_file_id is None):
            raise ValueError("give either requests or input_file_id")
        if self.requests is None and self.model is None:
            raise ValueError("model must be given with input_file_id")
        return self


def parse_submission(given: object, *, default_key: str | None = None) -> Submission:
    """
    Read what came over the wire.

    Args:
        default_key: the idempotency key of one that brings none: the message's own id, so that it
            makes one job however often it is delivered.

    Raises:
        BadSubmissionError: saying what is wrong, field by field.
    """
    try:
        submission = Submission.model_validate(given, strict=True)
    except ValidationError as error:
        problems = [
            f"{'.'.join(map(str, problem['loc'])) or 'submission'}: "
            f"{problem['msg'].removeprefix('Value error, ')}"
            for problem in error.errors(include_input=False, include_url=False)[:20]
        ]
        raise BadSubmissionError("; ".join(problems)) from error
    if submission.idempotency_key is None and default_key is not None:
        submission = submission.model_copy(update={"idempotency_key": default_key})
    return submission


def parse_window(window: str) -> int:
    """`24h` or `30m` as seconds. Raises ValueError outside 10 minutes to 30 days."""
    found = _WINDOW.fullmatch(window)
    seconds = int(found[1]) * (3600 if found[2] == "h" else 60) if found else 0
    if not MIN_WINDOW_S <= seconds <= MAX_WINDOW_S:
        raise ValueError("give <n>h or <n>m, from 10m to 720h")
    return seconds


@dataclass(frozen=True, slots=True)
class Submitted:
    """
    Args:
        is_new: False where the same submission had made the job before.
    """

    job: Job
    is_new: bool


def submit(stores: Stores, dispatcher: Dispatcher, submission: Submission) -> Submitted:
    """
    Make a job of a submission, once for its key.

    Raises:
        BadSubmissionError: it cannot be run as it is.
        IdempotencyConflictError: its key was used with another body.
        NotFoundError: the tenant has no such file.
        StorageError: try again; the key makes that safe.
    """
    body_sha256 = _hash(submission)
    with stores.database.write() as session:
        tenant = tenants.get_or_create(session, submission.tenant).id
    earlier = _find_earlier(stores.database, tenant, submission.idempotency_key, body_sha256)
    if earlier is not None:
        return Submitted(earlier, is_new=False)
    manifest = _open_manifest(stores, tenant, submission)
    # Where this fails the blob stays: the commit may have gone through. Else it is collected.
    job, is_new = _create(stores.database, tenant, submission, manifest, body_sha256)
    if not is_new:
        manifest.discard(stores)
        return Submitted(job, is_new=False)
    logger.info("job_created", job=str(job.id), tenant=submission.tenant, model=job.model)
    dispatcher.send_expand(job.id)
    return Submitted(job, is_new=True)


def _hash(submission: Submission) -> bytes:
    fields = submission.model_dump()
    found = _FILE_ID.fullmatch(submission.input_file_id or "")
    if found is not None:  # as REST has it: a file's id may be written in several ways here
        fields["input_file_id"] = f"file-{UUID(found[1]).hex}"
    try:
        return hash_submission(fields)
    except ValueError as error:
        raise BadSubmissionError(_NO_JSON) from error


def _find_earlier(
    database: Database, tenant: TenantId, key: str | None, body_sha256: bytes
) -> Job | None:
    if key is None:
        return None
    with database.read() as session:
        earlier = jobs.find_by_key(session, tenant, key)
    if earlier is not None and earlier.body_sha256 != body_sha256:
        raise IdempotencyConflictError
    return earlier


@dataclass(frozen=True, slots=True)
class _Manifest:
    """A file that is there already, or a blob that has no row yet."""

    file: FileId
    key: str
    model: str
    new: Mapping[str, Any] | None = field(default=None)

    def discard(self, stores: Stores) -> None:
        if self.new is not None:
            with contextlib.suppress(StorageError):  # the collector takes what stays
                stores.blobs.delete(self.key)


def _open_manifest(stores: Stores, tenant: TenantId, submission: Submission) -> _Manifest:
    if submission.requests is None:
        file_id = _parse_file_id(submission.input_file_id or "")
        with stores.database.read() as session:
            file = files.get(session, tenant, file_id)
        if file.purpose != PURPOSE:
            raise BadSubmissionError(
                f"input_file_id: This file's purpose is {file.purpose}, and {PURPOSE} is needed."
            )
        assert submission.model is not None, "checked with the submission"
        return _Manifest(file_id, file.blob_key, submission.model)
    model = submission.model or _read_model(submission.requests[0])
    content = _encode_lines(submission.requests, model, submission.endpoint)
    file_id = FileId(new_uuid())
    key = build_file_key(tenant, file_id)
    stat = stores.blobs.put(key, content)
    row = {
        "num_bytes": stat.num_bytes,
        "num_lines": len(submission.requests),
        "sha256": stat.sha256,
        "lifetime_s": MANIFEST_LIFETIME_S,
    }
    return _Manifest(file_id, key, model, row)


def _create(
    database: Database,
    tenant: TenantId,
    submission: Submission,
    manifest: _Manifest,
    body_sha256: bytes,
) -> tuple[Job, bool]:
    with contextlib.suppress(_MadeBeforeError), database.write() as session:
        if manifest.new is not None:
            files.create(
                session,
                file=manifest.file,
                tenant=tenant,
                purpose=PURPOSE,
                filename="requests.jsonl",
                blob_key=manifest.key,
                **manifest.new,
            )
        job, is_new = jobs.create(
            session,
            NewJob(
                tenant=tenant,
                input_file=manifest.file,
                manifest_key=manifest.key,
                model=manifest.model,
                endpoint=submission.endpoint,
                body_sha256=body_sha256,
                idempotency_key=submission.idempotency_key,
                priority=submission.priority,
                window_s=parse_window(submission.completion_window),
                options={
                    "image_policy": submission.image_policy,
                    "on_invalid": submission.on_invalid,
                    "completion_window": submission.completion_window,
                },
                client_metadata=submission.metadata,
            ),
        )
        if not is_new:
            raise _MadeBeforeError  # takes the file's row back
        return job, True
    assert submission.idempotency_key is not None, "without a key every job is new"
    with database.read() as session:
        earlier = jobs.find_by_key(session, tenant, submission.idempotency_key)
    assert earlier is not None, "of those with a key none is removed"
    return earlier, False


class _MadeBeforeError(Exception):
    """The same submission came first by another way; nothing of this one is kept."""


def _read_model(request: Mapping[str, Any]) -> str:
    model = find_model(request)
    if not isinstance(model, str) or not 1 <= len(model) <= 256 or "\0" in model:
        raise BadSubmissionError("model: give it, or give it in the first request's body.")
    return model


def _encode_lines(requests: Sequence[Mapping[str, Any]], model: str, endpoint: str) -> bytes:
    lines = [complete_line(request, endpoint, model) for request in requests]
    try:
        texts = (
            json.dumps(line, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
            for line in lines
        )
        return b"".join(text.encode() + b"\n" for text in texts)
    except ValueError as error:
        raise BadSubmissionError(_NO_JSON) from error


def _parse_file_id(given: str) -> FileId:
    found = _FILE_ID.fullmatch(given)
    if found is None:
        raise NotFoundError("There is no such file.")
    return FileId(UUID(found[1]))


def job_name(job: JobId) -> str:
    """A job's id as the wire shows it."""
    return f"batch_{job.hex}"
