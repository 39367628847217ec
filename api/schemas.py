"""
What crosses the wire: ids, requests with their limits, and objects exactly as OpenAI's client reads them.

Inside, a batch of the wire is a job. Times are whole seconds; numbers of items and tokens are whole
objects or null, never a part of one.
"""

import re
from typing import Annotated, Any, Final, Literal
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, field_validator

from api.config import MAX_WINDOW_S, MIN_WINDOW_S
from api.errors import InvalidRequestError, MissingError
from storage.ids import FileId, JobId
from storage.states import JobState
from storage.tables import File, Job

CHAT_ENDPOINT: Final = "/v1/chat/completions"
ENDPOINTS: Final = frozenset({CHAT_ENDPOINT})
UPLOAD_PURPOSES: Final = frozenset(
    {"assistants", "batch", "evals", "fine-tune", "user_data", "vision"}
)
PURPOSES: Final = UPLOAD_PURPOSES | {"assistants_output", "batch_output", "fine-tune-results"}

MIN_LIFETIME_S: Final = 3600
MAX_LIFETIME_S: Final = 30 * 24 * 3600
MAX_CUSTOM_ID_CHARS: Final = 256
MAX_MODEL_CHARS: Final = 256

# Ids

_FILE_ID: Final = re.compile(r"file-([0-9a-f]{32})")
_JOB_ID: Final = re.compile(r"batch_([0-9a-f]{32})")


def show_file_id(file: FileId) -> str:
    return f"file-{file.hex}"


def show_job_id(job: JobId) -> str:
    return f"batch_{job.hex}"


def parse_file_id(text: str) -> FileId:
    """Raises `MissingError`: what is no id of ours names nothing."""
    match = _FILE_ID.fullmatch(text)
    if match is None:
        raise MissingError
    return FileId(UUID(match[1]))


def parse_job_id(text: str) -> JobId:
    """Raises `MissingError`, as `parse_file_id`."""
    match = _JOB_ID.fullmatch(text)
    if match is None:
        raise MissingError
    return JobId(UUID(match[1]))


# Requests

_WINDOW: Final = re.compile(r"([1-9][0-9]{0,4})([hm])")


class ExpiresAfter(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    anchor: Literal["created_at"]
    seconds: int = Field(ge=MIN_LIFETIME_S, le=MAX_LIFETIME_S)


MetadataKey = Annotated[str, StringConstraints(max_length=64)]
MetadataValue = Annotated[str, StringConstraints(max_length=512)]


class CreateBatch(BaseModel):
    """The body of `POST /v1/batches`. What follows `metadata` is Darkroom's own."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        json_schema_extra={
            "examples": [
                {
                    "endpoint": CHAT_ENDPOINT,
                    "completion_window": "24h",
                    "metadata": {"album": "holiday"},
                    "requests": [
                        {
                            "custom_id": "r-1",
                            "body": {
                                "model": "darkroom-tiny",
                                "messages": [{"role": "user", "content": "Describe."}],
                            },
                        }
                    ],
                }
            ],
            "oneOf": [{"required": ["input_file_id"]}, {"required": ["requests"]}],
        },
    )

    input_file_id: str | None = None
    endpoint: str = Field(json_schema_extra={"enum": [CHAT_ENDPOINT]})
    completion_window: str = Field(
        description="Hours or minutes: 24h, 90m; from 10m to 720h.",
        json_schema_extra={"pattern": f"^{_WINDOW.pattern}$"},
    )
    metadata: dict[MetadataKey, MetadataValue] | None = Field(default=None, max_length=16)
    output_expires_after: ExpiresAfter | None = None
    requests: list[Any] | None = Field(
        default=None,
        min_length=1,
        description="Lines of an input file, instead of one; `method` and `url` may be left out.",
    )
    image_policy: Literal["reject", "truncate", "sample", "split"] = Field(
        default="reject", description="For prompts with more images than the model takes."
    )
    on_invalid: Literal["fail", "skip"] = Field(
        default="fail", description="`skip`: lines that are refused fail alone."
    )
    priority: int = Field(default=0, ge=-10, le=10, description="Lower runs first.")

    @field_validator("endpoint")
    @classmethod
    def _check_endpoint(cls, endpoint: str) -> str:
        if endpoint not in ENDPOINTS:
            raise ValueError(f"This server runs {', '.join(sorted(ENDPOINTS))} only.")
        return endpoint

    @field_validator("completion_window")
    @classmethod
    def _check_window(cls, window: str) -> str:
        read_window_s(window)
        return window

    @field_validator("metadata")
    @classmethod
    def _check_metadata(cls, metadata: dict[str, str] | None) -> dict[str, str] | None:
        if any("\0" in text for pair in (metadata or {}).items() for text in pair):
            raise ValueError("NUL characters cannot be kept.")  # PostgreSQL has no place for them
        return metadata


def read_window_s(window: str) -> int:
    """Seconds of a window such as 24h or 90m. Raises ValueError."""
    match = _WINDOW.fullmatch(window)
    seconds = int(match[1]) * {"h": 3600, "m": 60}[match[2]] if match else 0
    if not MIN_WINDOW_S <= seconds <= MAX_WINDOW_S:
        raise ValueError("Give hours or minutes, such as 24h or 90m, from 10m to 720h.")
    return seconds


def show_window(window_s: int) -> str:
    return f"{window_s // 3600}h" if window_s % 3600 == 0 else f"{window_s // 60}m"


# Answers. The models describe them at /docs; the functions build them.


class FileObject(BaseModel):
    id: str
    object: Literal["file"]
    bytes: int
    created_at: int
    expires_at: int | None
    filename: str
    purpose: str
    status: Literal["uploaded", "processed", "error"]


class FileDeleted(BaseModel):
    id: str
    object: Literal["file"]
    deleted: bool


class FilePage(BaseModel):
    object: Literal["list"]
    data: list[FileObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class BatchError(BaseModel):
    code: str | None
    message: str | None
    param: str | None
    line: int | None


class BatchErrors(BaseModel):
    object: Literal["list"]
    data: list[BatchError]


class RequestCounts(BaseModel):
    """The five sum up; OpenAI's own are the first three."""

    total: int
    completed: int
    failed: int
    expired: int
    cancelled: int


class Batch(BaseModel):
    id: str
    object: Literal["batch"]
    endpoint: str
    model: str | None
    input_file_id: str
    completion_window: str
    status: JobState
    errors: BatchErrors | None
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    in_progress_at: int | None
    expires_at: int
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: RequestCounts
    usage: dict[str, Any] | None
    metadata: dict[str, str] | None
    image_policy: str
    on_invalid: str
    priority: int


class BatchPage(BaseModel):
    object: Literal["list"]
    data: list[Batch]
    first_id: str | None
    last_id: str | None
    has_more: bool


class ErrorBody(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorEnvelope(BaseModel):
    error: ErrorBody


def build_file(file: File) -> dict[str, Any]:
    return {
        "id": show_file_id(file.id),
        "object": "file",
        "bytes": file.num_bytes,
        "created_at": int(file.created_at),
        "expires_at": _seconds(file.expires_at),
        "filename": file.filename,
        "purpose": file.purpose,
        "status": file.state.value,
    }


def build_batch(job: Job) -> dict[str, Any]:
    return {
        "id": show_job_id(job.id),
        "object": "batch",
        "endpoint": job.endpoint,
        "model": job.model or None,
        "input_file_id": show_file_id(job.input_file_id),
        "completion_window": show_window(job.window_s),
        "status": job.state.value,
        "errors": _build_errors(job),
        "output_file_id": _file_id_or_none(job.output_file_id),
        "error_file_id": _file_id_or_none(job.error_file_id),
        "created_at": int(job.created_at),
        "in_progress_at": _seconds(job.in_progress_at),
        "expires_at": int(job.expires_at),
        "finalizing_at": _seconds(job.finalizing_at),
        "completed_at": _seconds(job.completed_at),
        "failed_at": _seconds(job.failed_at),
        "expired_at": _seconds(job.expired_at),
        "cancelling_at": _seconds(job.cancelling_at),
        "cancelled_at": _seconds(job.cancelled_at),
        "request_counts": _build_counts(job),
        "usage": _build_usage(job),
        "metadata": job.client_metadata,
        "image_policy": job.options.get("image_policy", "reject"),
        "on_invalid": job.options.get("on_invalid", "fail"),
        "priority": job.priority,
    }


def _build_errors(job: Job) -> dict[str, Any] | None:
    if not job.errors:
        return None
    names = ("code", "message", "param", "line")
    return {
        "object": "list",
        "data": [{name: error.get(name) for name in names} for error in job.errors],
    }


def _build_counts(job: Job) -> dict[str, int]:
    # Lines refused so far are taken back when the whole input is refused, and counts never fall.
    is_final = job.state not in (JobState.VALIDATING, JobState.FAILED)
    counts = (
        ("total", job.num_total),
        ("completed", job.num_completed),
        ("failed", job.num_failed),
        ("expired", job.num_expired),
        ("cancelled", job.num_cancelled),
    )
    return {name: count if is_final else 0 for name, count in counts}


def _build_usage(job: Job) -> dict[str, Any]:
    return {
        "input_tokens": job.num_prompt_tokens,
        "input_tokens_details": {"cached_tokens": job.num_cached_tokens},
        "output_tokens": job.num_completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": job.num_prompt_tokens + job.num_completion_tokens,
    }


def build_page(objects: list[dict[str, Any]], *, has_more: bool) -> dict[str, Any]:
    return {
        "object": "list",
        "data": objects,
        "first_id": objects[0]["id"] if objects else None,
        "last_id": objects[-1]["id"] if objects else None,
        "has_more": has_more,
    }


def _seconds(at: float | None) -> int | None:
    return None if at is None else int(at)


def _file_id_or_none(file: FileId | None) -> str | None:
    return None if file is None else show_file_id(file)


def check_text(name: str, text: str, *, max_chars: int) -> str:
    """Raises `InvalidRequestError` for text that is too long or that no database can keep."""
    if not 0 < len(text) <= max_chars or "\0" in text:
        raise InvalidRequestError(
            f"{name}: Give 1 to {max_chars} characters, without NUL.",
            param=name,
        )
    return text
