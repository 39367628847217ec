"""What is ours alone beside OpenAI's batches: results while a job runs."""

from typing import Annotated, Any, Final, Literal

import orjson
from fastapi import APIRouter, Query, Request, Response

from api.answers import ERRORS
from api.auth import Asker
from api.lines import build_live_line
from api.polls import is_current, show_etag
from api.schemas import MAX_CUSTOM_ID_CHARS, check_text, parse_job_id
from api.services import Here
from storage import items, jobs, parts
from storage.states import TERMINAL_JOB_STATES, ItemState

router = APIRouter(prefix="/v1/batches", tags=["Darkroom"])

MAX_RESULTS: Final = 1000
MAX_SEQ: Final = 2**53

_RESULTS: Final[dict[int | str, dict[str, Any]]] = {
    200: {
        "content": {"application/x-ndjson": {}},
        "description": "Lines of the output and the errors file, each with `seq` and `line`",
    },
    **ERRORS,
}


@router.get("/{batch_id}/results", response_class=Response, responses=_RESULTS)
def list_results(
    request: Request,
    batch_id: str,
    asker: Asker,
    here: Here,
    after: Annotated[int, Query(ge=0, le=MAX_SEQ)] = 0,
    limit: Annotated[int, Query(ge=1, le=MAX_RESULTS)] = MAX_RESULTS,
    status: Literal["completed", "failed"] | None = None,
    custom_id: str | None = None,
) -> Response:
    """
    Results and failures so far, in the order of their commits.

    `after` is a commit's number, not a line's: a slow line may end after later ones, and a reader
    who goes on from `X-Last-Line` never misses one. Items that were cancelled or expired before
    they ran are in the errors file only. `X-Incomplete` says whether there is, or may be, more.
    """
    if custom_id is not None:
        check_text("custom_id", custom_id, max_chars=MAX_CUSTOM_ID_CHARS)
    job_id = parse_job_id(batch_id)
    with here.database.read() as session:
        job = jobs.get(session, asker.tenant, job_id)
        page = items.list_by_commit(
            session,
            job_id,
            after_seq=after,
            state=None if status is None else ItemState(status),
            custom_id=custom_id,
            limit=limit + 1,
        )
        limit = min(limit, parts.count_fitting(session, [ended.item for ended in page]))
        parts_of = parts.list_by_item(session, [ended.item for ended in page[:limit]])
    has_more = len(page) > limit
    page = page[:limit]
    headers = {
        "x-incomplete": str(has_more or job.state not in TERMINAL_JOB_STATES).lower(),
        "x-last-line": str(page[-1].seq if page else after),
        "etag": show_etag(job),
        "cache-control": "no-cache",
    }
    if is_current(request, job):
        return Response(status_code=304, headers=headers)
    lines = [
        orjson.dumps(build_live_line(job.id, job.model, ended, parts_of.get(ended.item, ())))
        for ended in page
    ]
    content = b"".join(line + b"\n" for line in lines)
    return Response(content, media_type="application/x-ndjson", headers=headers)
