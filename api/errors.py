"""
Errors as clients see them: OpenAI's envelope for all of them, the framework's own included.

    {"error": {"message": "…", "type": "invalid_request_error", "param": "…", "code": "…"}}

The status is chosen for what a client will do: OpenAI's sends again on 408, 409, 429 and from 500
on, unless `x-should-retry: false` says that it would be in vain. Errors of storage are turned into
answers here, in one table. Texts hold no path, address, key or statement.
"""

import inspect
from collections.abc import Mapping
from typing import Any, ClassVar, Final

import orjson
import structlog
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from storage.errors import (
    BlobMissingError,
    IdempotencyConflictError,
    NotFoundError,
    StateConflictError,
    StorageError,
)

log = structlog.get_logger()

NO_RETRY: Final = {"x-should-retry": "false"}
BUSY_RETRY_S: Final = 1
QUOTA_RETRY_S: Final = 30  # OpenAI's client gives up at once when told more than 120


class ApiError(Exception):
    """The request cannot be answered."""

    status: ClassVar[int] = 400
    type: ClassVar[str] = "invalid_request_error"
    code: ClassVar[str | None] = None
    headers: ClassVar[Mapping[str, str]] = {}

    def __init__(
        self,
        message: str | None = None,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.message = message or inspect.cleandoc(self.__doc__ or "")
        super().__init__(self.message)
        self.param = param
        self.shown_code = code or self.code
        self.shown_headers = {**self.headers, **(headers or {})}


class InvalidRequestError(ApiError):
    """The request is not understood."""

    code: ClassVar[str | None] = "invalid_value"


class UnauthenticatedError(ApiError):
    """No valid API key was given. Send it as `Authorization: Bearer KEY`."""

    status: ClassVar[int] = 401
    type: ClassVar[str] = "authentication_error"
    code: ClassVar[str | None] = "invalid_api_key"
    headers: ClassVar[Mapping[str, str]] = {"www-authenticate": "Bearer"}


class ForbiddenError(ApiError):
    """This is not allowed from there."""

    status: ClassVar[int] = 403
    type: ClassVar[str] = "permission_error"
    code: ClassVar[str | None] = "forbidden"


class MissingError(ApiError):
    """There is nothing under this id. Check the id, and which key asks."""

    status: ClassVar[int] = 404
    type: ClassVar[str] = "not_found_error"
    code: ClassVar[str | None] = "not_found"


class ConflictError(ApiError):
    """The request contradicts what is there already."""

    status: ClassVar[int] = 409
    headers: ClassVar[Mapping[str, str]] = NO_RETRY


class StalledError(ApiError):
    """No more of the body came. Send the whole request again."""

    status: ClassVar[int] = 408
    code: ClassVar[str | None] = "stalled"
    headers: ClassVar[Mapping[str, str]] = {"connection": "close"}  # the rest may still come


class TooLargeError(ApiError):
    """The request is larger than this server takes."""

    status: ClassVar[int] = 413
    code: ClassVar[str | None] = "too_large"


class QuotaExceededError(ApiError):
    """The tenant has as much open work as it may have."""

    status: ClassVar[int] = 429
    type: ClassVar[str] = "rate_limit_error"
    code: ClassVar[str | None] = "quota_exceeded"
    headers: ClassVar[Mapping[str, str]] = {"retry-after": str(QUOTA_RETRY_S)}


class FailedInternallyError(ApiError):
    """Something went wrong on our side."""

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    code: ClassVar[str | None] = "internal_error"
    headers: ClassVar[Mapping[str, str]] = NO_RETRY


class UnavailableError(ApiError):
    """A part of the service does not answer at the moment. Try again."""

    status: ClassVar[int] = 503
    type: ClassVar[str] = "server_error"
    headers: ClassVar[Mapping[str, str]] = {"retry-after": str(BUSY_RETRY_S)}


class TooBusyError(UnavailableError):
    """The server holds as many requests as it has memory for. Try again."""

    code: ClassVar[str | None] = "too_busy"


class TooSlowError(ApiError):
    """No worker finished this in time, and it was cancelled."""

    status: ClassVar[int] = 504
    type: ClassVar[str] = "server_error"
    code: ClassVar[str | None] = "timeout"
    # The client has waited as long as it wanted to; a second try would only lengthen the queue.
    headers: ClassVar[Mapping[str, str]] = NO_RETRY


def build_answer(error: ApiError) -> Response:
    return build_envelope(
        error.status,
        error.message,
        type_=error.type,
        param=error.param,
        code=error.shown_code,
        headers=error.shown_headers,
    )


def build_envelope(
    status: int,
    message: str,
    *,
    type_: str,
    param: str | None = None,
    code: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> Response:
    body = {"error": {"message": message, "type": type_, "param": param, "code": code}}
    return Response(
        orjson.dumps(body), status, media_type="application/json", headers=dict(headers or {})
    )


# What storage could not do

_FROM_STORAGE: Final[Mapping[type[StorageError], type[ApiError]]] = {
    NotFoundError: MissingError,
    BlobMissingError: MissingError,
    IdempotencyConflictError: ConflictError,
    StateConflictError: ConflictError,
}


def translate_storage_error(error: StorageError) -> ApiError:
    answer = _FROM_STORAGE.get(type(error))
    if answer is not None:
        # A blob's text speaks of keys, which no client knows.
        message = None if isinstance(error, BlobMissingError) else str(error)
        return answer(message, code=None if answer is MissingError else error.code)
    if error.retryable:
        return UnavailableError(code=error.code)
    return FailedInternallyError(code=error.code)


# What did not fit a schema


def translate_validation_error(
    error: ValidationError | RequestValidationError, *, root: str | None = None
) -> InvalidRequestError:
    """The first of the errors, named by the parameter where it was found."""
    first: Any = error.errors()[0]
    places = [str(place) for place in first["loc"] if place not in ("body", "query", "path")]
    if root is not None:
        places.insert(0, root)
    where = ".".join(places) or None
    text = str(first["msg"]).removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        return InvalidRequestError(
            f"Unknown parameter: {where}.", param=where, code="unknown_parameter"
        )
    message = f"{where}: {text}" if where else text
    return InvalidRequestError(message, param=places[0] if places else None)


# For the framework


def install(app: FastAPI) -> None:
    """Make every error that a route or the framework raises an envelope."""

    @app.exception_handler(ApiError)
    async def _api_error(request: Request, error: ApiError) -> Response:
        return build_answer(error)

    @app.exception_handler(StorageError)
    async def _storage_error(request: Request, error: StorageError) -> Response:
        answer = translate_storage_error(error)
        if answer.status >= 500:
            log.error("storage_failed", code=error.code, exc_info=error)
        return build_answer(answer)

    @app.exception_handler(RequestValidationError)
    async def _invalid(request: Request, error: RequestValidationError) -> Response:
        return build_answer(translate_validation_error(error))

    @app.exception_handler(HTTPException)
    async def _http_error(request: Request, error: HTTPException) -> Response:
        texts = {
            404: f"There is no {request.method} {request.url.path} here.",
            405: f"{request.method} is not possible here.",
        }
        type_ = "not_found_error" if error.status_code == 404 else "invalid_request_error"
        return build_envelope(
            error.status_code,
            texts.get(error.status_code, str(error.detail)),
            type_=type_ if error.status_code < 500 else "server_error",
            code={404: "unknown_url", 405: "method_not_allowed"}.get(error.status_code),
            headers=error.headers,
        )
