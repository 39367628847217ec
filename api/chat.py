"""
/v1/chat/completions: one item through the same queue as all others, in the fast lane.

The answer is given when its result is committed. It is whole then, so a stream holds it in one
piece; what a client sees is the form that it asked for. Who leaves, or waits too long, takes the
item out of the queue.
"""

import asyncio
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import orjson
import structlog
from fastapi import APIRouter, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect

from api.answers import answer_json, describe_body, describe_json
from api.auth import Asker, Caller
from api.bodies import read_json
from api.errors import (
    ApiError,
    FailedInternallyError,
    InvalidRequestError,
    MissingError,
    TooSlowError,
    translate_validation_error,
)
from api.manifests import drop_blob, write_manifest
from api.polls import read_patience_s
from api.quotas import Quota
from api.schemas import CHAT_ENDPOINT, MAX_MODEL_CHARS, ErrorEnvelope, check_text
from api.services import Here, Services
from storage import files, items, jobs, parts
from storage.errors import StateConflictError, StorageError
from storage.items import Ended
from storage.parts import Answer
from storage.states import TERMINAL_JOB_STATES, ItemState, JobState
from storage.tables import Job
from tasks.lines import build_completion, build_error, build_parts

log = structlog.get_logger()
router = APIRouter(tags=["Chat"])

CUSTOM_ID: Final = "chat"
MAX_ANSWERS: Final = 128
LOOK_S: Final = 1.0
"""How often we look whether the client is still there."""

_GRACE_S: Final = 600  # the job's window beyond the client's patience; a cancel comes first


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True)

    include_usage: bool = False


class ChatRequest(BaseModel):
    """
    What this route must know itself. The rest of the body goes along as the line of a batch would,
    and is checked where lines are checked.
    """

    model_config = ConfigDict(
        extra="allow",
        strict=True,
        json_schema_extra={
            "examples": [
                {
                    "model": "darkroom-tiny",
                    "messages": [{"role": "user", "content": "Describe."}],
                    "max_tokens": 64,
                }
            ]
        },
    )

    model: str
    messages: list[Any] = Field(min_length=1)
    n: int | None = Field(default=None, ge=1, le=MAX_ANSWERS)
    stream: bool | None = None
    stream_options: StreamOptions | None = None


class ChatCompletion(BaseModel):
    id: str
    object: str
    created: int
    model: str
    choices: list[dict[str, Any]]
    usage: dict[str, Any]


_ANSWERS: Final[dict[int | str, dict[str, Any]]] = {
    **describe_json(ChatCompletion),
    200: {
        "model": ChatCompletion,
        "content": {"text/event-stream": {}},
        "description": "The whole answer, or with `stream` its events",
    },
    504: {"model": ErrorEnvelope, "description": "No worker finished in time"},
}


@router.post(CHAT_ENDPOINT, responses=_ANSWERS, openapi_extra=describe_body(ChatRequest))
async def create_completion(request: Request, asker: Asker, here: Here) -> Response:
    patience_s = min(here.config.chat_timeout_s, read_patience_s(request))
    job, form = await _accept(request, asker, here, patience_s)
    completion = await _wait_for_answer(request, here, job, patience_s)
    if not form.is_stream:
        return answer_json(completion)
    return StreamingResponse(
        cut_chunks(completion, has_usage=form.has_usage), media_type="text/event-stream"
    )


@dataclass(frozen=True, slots=True)
class Form:
    """How the answer is wanted: all that is kept of the body while it is waited for."""

    is_stream: bool
    has_usage: bool


async def _accept(
    request: Request, asker: Caller, here: Services, patience_s: float
) -> tuple[Job, Form]:
    async with read_json(request, here.config, here.held) as fields:
        try:
            wish = ChatRequest.model_validate(fields)
        except ValidationError as error:
            raise translate_validation_error(error) from error
        _check_model(wish.model, here)
        options = wish.stream_options or StreamOptions()
        job = await run_in_threadpool(_queue, here, asker, fields, patience_s)
        return job, Form(bool(wish.stream), options.include_usage)


def _check_model(model: str, here: Services) -> None:
    check_text("model", model, max_chars=MAX_MODEL_CHARS)
    known = here.config.model_ids
    if known and model not in known:
        raise MissingError(
            "model: This server does not run it. GET /v1/models lists what it runs.",
            param="model",
            code="model_not_found",
        )


def _queue(here: Services, asker: Caller, fields: Mapping[str, Any], patience_s: float) -> Job:
    prompt = {key: value for key, value in fields.items() if not key.startswith("stream")}
    line = {"custom_id": CUSTOM_ID, "body": prompt}
    manifest = write_manifest(here, asker.tenant, [line], endpoint=CHAT_ENDPOINT)
    window_s = math.ceil(patience_s) + _GRACE_S
    is_made = False
    try:
        with here.database.write() as session:
            Quota.read(session, asker.tenant, here.config).check(1, manifest.num_bytes)
            manifest.create_file(session, asker.tenant, window_s, purpose=files.REQUEST_PURPOSE)
            job, is_made = jobs.create(
                session,
                jobs.NewJob(
                    tenant=asker.tenant,
                    input_file=manifest.file,
                    manifest_key=manifest.key,
                    model=manifest.model,
                    endpoint=CHAT_ENDPOINT,
                    body_sha256=manifest.sha256,
                    priority=jobs.FAST_LANE,
                    window_s=window_s,
                    options={"image_policy": "reject", "on_invalid": "fail"},
                    api_key_id=asker.api_key_id,
                ),
            )
    finally:
        if not is_made:
            drop_blob(here, manifest.file, manifest.key)
    here.tell_chat_created(job.id)
    return job


async def _wait_for_answer(
    request: Request, here: Services, job: Job, patience_s: float
) -> dict[str, Any]:
    deadline = time.monotonic() + patience_s
    version = job.version
    is_over = False
    try:
        while True:
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                raise TooSlowError
            await here.watcher.wait(job.id, version, min(left_s, LOOK_S))
            now, ended, answers = await run_in_threadpool(_read, here, job)
            if ended is not None or now.state in TERMINAL_JOB_STATES:
                is_over = True
                return _read_answer(now, ended, answers)
            if await request.is_disconnected():
                raise ClientDisconnect
            version = now.version
    finally:
        if not is_over:
            # Shielded: also when the server stops, nobody should work for a client that is gone.
            await asyncio.shield(run_in_threadpool(_cancel, here, job))


def _read(here: Services, job: Job) -> tuple[Job, Ended | None, list[Answer]]:
    with here.database.read() as session:
        job = jobs.get(session, job.tenant_id, job.id)
        page = items.list_by_commit(session, job.id, limit=1)
        found = parts.list_by_item(session, [ended.item for ended in page])
    # An item that was refused counts when the whole job is settled, as in any batch.
    ended = page[0] if page and job.state is not JobState.VALIDATING else None
    return job, ended, [answer for answers in found.values() for answer in answers]


def _read_answer(job: Job, ended: Ended | None, answers: Sequence[Answer]) -> dict[str, Any]:
    if ended is None:
        raise _explain_end(job)
    if ended.state is ItemState.COMPLETED:
        completion = build_completion(job.id, job.model, ended)
        return {**completion, "parts": build_parts(answers)} if answers else completion
    status, body = build_error(ended.error_code or "", ended.error_message or "")
    kind = InvalidRequestError if status < 500 else FailedInternallyError
    raise kind(ended.error_message, param=body["error"]["param"], code=ended.error_code)


def _explain_end(job: Job) -> ApiError:
    if job.state is JobState.FAILED and job.errors:
        first = job.errors[0]
        return InvalidRequestError(first["message"], param=first.get("param"), code=first["code"])
    return TooSlowError()


def _cancel(here: Services, job: Job) -> None:
    try:
        with here.database.write() as session:
            jobs.cancel(session, job.tenant_id, job.id)
    except StateConflictError:
        return  # it ended in the meantime
    except StorageError as error:
        log.warning("chat_not_cancelled", job=str(job.id), code=error.code)
        return
    here.tell_cancelled(job.id)


def cut_chunks(completion: dict[str, Any], *, has_usage: bool) -> Iterator[bytes]:
    """A whole completion as the server-sent events that it would have been."""
    head = {
        "id": completion["id"],
        "object": "chat.completion.chunk",
        "created": completion["created"],
        "model": completion["model"],
    }
    usage: dict[str, Any] = {"usage": None} if has_usage else {}
    for choice in completion["choices"]:
        for delta, finish_reason in (
            ({"role": "assistant", "content": ""}, None),
            ({"content": choice["message"]["content"]}, None),
            ({}, choice["finish_reason"]),
        ):
            part = {"index": choice["index"], "delta": delta, "finish_reason": finish_reason}
            yield _event({**head, "choices": [part], **usage})
    if has_usage:
        yield _event({**head, "choices": [], "usage": completion["usage"]})
    yield b"data: [DONE]\n\n"


def _event(content: dict[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(content) + b"\n\n"
