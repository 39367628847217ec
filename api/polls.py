"""Cheap polling: a version as ETag, 304 for what is known already, and waiting for the next change."""

from collections.abc import Mapping
from typing import Final

from fastapi import Request, Response

from api.answers import answer_json
from api.schemas import build_batch
from api.services import Services
from storage.states import TERMINAL_JOB_STATES
from storage.tables import Job

PATIENCE: Final = 0.8
"""Of a client's own time limit, how much a waiting answer may use."""


def show_etag(job: Job) -> str:
    return f'"{job.version}"'


def is_current(request: Request, job: Job) -> bool:
    """Whether the client says that it has this version."""
    tags = request.headers.get("if-none-match", "").split(",")
    return any(tag.strip().removeprefix("W/") in (show_etag(job), "*") for tag in tags)


def answer_job(
    job: Job, *, is_known: bool = False, headers: Mapping[str, str] | None = None
) -> Response:
    headers = {"etag": show_etag(job), "cache-control": "no-cache", **(headers or {})}
    if is_known:
        return Response(status_code=304, headers=headers)
    return answer_json(build_batch(job), headers=headers)


async def wait_for_change(request: Request, here: Services, job: Job, seconds: float) -> None:
    """Wait until the job changes; at once over if it has ended, and before the client gives up."""
    if job.state not in TERMINAL_JOB_STATES:
        seconds = min(seconds, read_patience_s(request))
        await here.watcher.wait(job.id, job.version, seconds, is_poll=True)


def read_patience_s(request: Request) -> float:
    """How long this client waits for an answer, as far as it says so, with a margin."""
    try:
        seconds = float(request.headers.get("x-stainless-read-timeout", "inf"))
    except ValueError:
        return float("inf")
    return seconds * PATIENCE if seconds > 0 else float("inf")
