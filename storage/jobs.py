"""
Jobs: made once, read by everyone who polls, and moved by whoever does the work.

Functions that a client's request ends in take the tenant and find nothing of another's. Those of
the workers and the sweeper take the job alone. Every move names the state that it expects.
"""

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from sqlalchemy import (
    ColumnElement,
    Select,
    case,
    delete,
    func,
    literal,
    or_,
    select,
    type_coerce,
    update,
)
from sqlalchemy.orm import Session, defer
from sqlalchemy.orm.attributes import set_committed_value

from storage.db import clock, head_of, insert_or_skip, is_sqlite
from storage.errors import IdempotencyConflictError, NotFoundError, StateConflictError
from storage.ids import FileId, JobId, TenantId, new_uuid
from storage.states import ItemState, JobState
from storage.tables import IS_OPEN, JSONS, File, Item, Job, in_state

PAGE: Final = 100

FAST_LANE: Final = -1000
"""The priority of a job of one item whose client waits at the line. Such jobs are not listed."""

# A constant of the statement, not a parameter: an index of such rows is taken for nothing else.
_IS_LISTED: Final[ColumnElement[bool]] = Job.priority > literal(FAST_LANE, literal_execute=True)

_NUM_OPEN: Final[ColumnElement[int]] = (
    Job.num_total - Job.num_completed - Job.num_failed - Job.num_cancelled - Job.num_expired
)


@dataclass(frozen=True, slots=True)
class NewJob:
    """
    What a submission asks for, checked.

    Args:
        body_sha256: of the request, in a canonical form: it tells a replay from a conflict.
        window_s: how long the job may take, in seconds.
        options: image policy, what to do with bad lines, and so on; the other rooms' business.
    """

    tenant: TenantId
    input_file: FileId
    manifest_key: str
    model: str
    endpoint: str
    body_sha256: bytes
    idempotency_key: str | None = None
    priority: int = 0
    window_s: int = 24 * 3600
    options: Mapping[str, Any] = field(default_factory=dict)
    client_metadata: Mapping[str, Any] | None = None
    retry_of: JobId | None = None
    api_key_id: str | None = None
    traceparent: str | None = None


def create(session: Session, new: NewJob) -> tuple[Job, bool]:
    """
    Make a job, or find the one that the same request has made before.

    Returns:
        The job, and whether it is new: only then is there something to send after the commit.

    Raises:
        IdempotencyConflictError: the key was used with another body.
    """
    made = session.scalars(
        insert_or_skip(session, Job)
        .values(
            id=new_uuid(),
            tenant_id=new.tenant,
            input_file_id=new.input_file,
            manifest_key=new.manifest_key,
            retry_of=new.retry_of,
            api_key_id=new.api_key_id,
            idempotency_key=new.idempotency_key,
            body_sha256=new.body_sha256,
            endpoint=new.endpoint,
            model=new.model,
            priority=new.priority,
            window_s=new.window_s,
            options=dict(new.options),
            client_metadata=None if new.client_metadata is None else dict(new.client_metadata),
            traceparent=new.traceparent,
            state=JobState.VALIDATING,
            version=1,
            created_at=clock(),
            expires_at=clock() + new.window_s,
            **dict.fromkeys(_COUNTERS, 0),
        )
        .on_conflict_do_nothing(index_elements=[Job.tenant_id, Job.idempotency_key])
        .returning(Job)
    ).one_or_none()
    if made is not None:
        return made, True
    assert new.idempotency_key is not None, "nothing else is unique"
    earlier = find_replayed(session, new.tenant, new.idempotency_key, new.body_sha256)
    assert earlier is not None, "it was in the way"
    return earlier, False


def find_replayed(
    session: Session, tenant: TenantId, idempotency_key: str, body_sha256: bytes
) -> Job | None:
    """
    The job that this very request has made before.

    Raises:
        IdempotencyConflictError: the key was used with another body.
    """
    earlier = session.scalars(
        select(Job).where(Job.tenant_id == tenant, Job.idempotency_key == idempotency_key)
    ).one_or_none()
    if earlier is not None and earlier.body_sha256 != body_sha256:
        raise IdempotencyConflictError
    return earlier


def find_twin(
    session: Session,
    tenant: TenantId,
    *,
    api_key_id: str | None,
    body_sha256: bytes,
    within_s: float,
) -> Job | None:
    """
    The newest job without an idempotency key that the same body made a short while ago; no chat.

    For a client that sends again because an answer was lost. Whoever makes a job without a key calls
    `lock_body` first, in the same transaction: then the first try is visible here or still waits.
    """
    return session.scalars(
        select(Job)
        .where(
            Job.tenant_id == tenant,
            Job.api_key_id.is_not_distinct_from(api_key_id),
            # No key, said so that SQLite does not go by it: it would take all keyless jobs for one.
            func.coalesce(Job.idempotency_key, "") == "",
            Job.body_sha256 == body_sha256,
            Job.created_at > clock() - within_s,
            _IS_LISTED,
        )
        .order_by(Job.id.desc())
        .limit(1)
    ).one_or_none()


def lock_body(session: Session, tenant: TenantId, body_sha256: bytes) -> None:
    """Let one transaction at a time make a job of this body. On SQLite every writer is alone."""
    if not is_sqlite(session):
        digest = hashlib.sha256(tenant.bytes + body_sha256).digest()
        number = int.from_bytes(digest[:8], "big", signed=True)
        session.execute(select(func.pg_advisory_xact_lock(number)))


_COUNTERS: Final = (
    "num_expanded",
    "expanded_bytes",
    "num_total",
    "num_completed",
    "num_failed",
    "num_cancelled",
    "num_expired",
    "num_prompt_tokens",
    "num_completion_tokens",
    "num_cached_tokens",
    "last_seq",
    "finish_attempt",
)


def get(session: Session, tenant: TenantId, job: JobId) -> Job:
    """Raises `NotFoundError`, for another tenant's job as for none."""
    found = session.scalars(_fresh().where(Job.id == job, Job.tenant_id == tenant)).one_or_none()
    if found is None:
        raise NotFoundError
    return found


def read_versions(session: Session, watched: Collection[JobId]) -> dict[JobId, int]:
    """The version of each of these jobs: one statement for everyone who waits for a change."""
    return dict(session.execute(select(Job.id, Job.version).where(Job.id.in_(watched))).all())


def find(session: Session, job: JobId) -> Job | None:
    """A job by its id alone: for workers, never for a request."""
    return session.scalars(_fresh().where(Job.id == job)).one_or_none()


def find_by_key(session: Session, tenant: TenantId, idempotency_key: str) -> Job | None:
    """The job that a tenant made under this key: asked before anything is stored for a new one."""
    return session.scalars(
        _fresh().where(Job.tenant_id == tenant, Job.idempotency_key == idempotency_key)
    ).one_or_none()


def _fresh() -> Select[Job]:
    return select(Job).execution_options(populate_existing=True)


def list_page(
    session: Session, tenant: TenantId, *, after: JobId | None = None, limit: int = PAGE
) -> tuple[list[Job], bool]:
    """
    A tenant's jobs but those of the fast lane, newest first, and whether there are more.

    Of a job's errors only the first `HEAD` are there: a job may have 50,000, and a page 100 jobs.

    Args:
        after: the last job of the page before; jobs that are made meanwhile shift nothing.

    Raises:
        NotFoundError: `after` is no job of this tenant.
    """
    head = type_coerce(head_of(Job.errors), JSONS)
    query = select(Job, head).options(defer(Job.errors, raiseload=True))
    query = query.where(Job.tenant_id == tenant, _IS_LISTED)
    query = query.order_by(Job.id.desc()).limit(limit + 1)
    if after is not None:
        get(session, tenant, after)
        query = query.where(Job.id < after)
    page = []
    for job, errors in session.execute(query):
        set_committed_value(job, "errors", errors)
        page.append(job)
    return page[:limit], len(page) > limit


# Moves


def start(session: Session, job: JobId) -> bool:
    """
    All lines are items now: fix the total and let the items be leased.

    Returns:
        Whether this call did it; False if another had, or the job was cancelled meanwhile.
    """
    return _move(
        session,
        job,
        JobState.VALIDATING,
        state=JobState.IN_PROGRESS,
        num_total=Job.num_expanded,
        in_progress_at=clock(),
    )


def reject(session: Session, job: JobId, errors: Sequence[Mapping[str, Any]]) -> bool:
    """The input did not validate: nothing of it runs, and its items go. Returns as `start` does."""
    is_mine = _move(
        session,
        job,
        JobState.VALIDATING,
        state=JobState.FAILED,
        failed_at=clock(),
        errors=[dict(error) for error in errors],
        num_expanded=0,
        num_failed=0,
    )
    if is_mine:
        session.execute(
            delete(Item).where(Item.job_id == job).execution_options(synchronize_session=False)
        )
    return is_mine


def note_errors(session: Session, job: JobId, errors: Sequence[Mapping[str, Any]]) -> bool:
    """Keep what was wrong with lines of a job that runs all the same."""
    return _move(session, job, JobState.VALIDATING, errors=[dict(error) for error in errors])


def cancel(session: Session, tenant: TenantId, job: JobId) -> Job:
    """
    Stop a job: nothing more of it is leased. Twice is as good as once.

    Its open items are ended by `items.end_page`, page by page, afterwards.

    Raises:
        NotFoundError: the tenant has no such job.
        StateConflictError: the job has ended, or is about to.
    """
    cancelling = {"state": JobState.CANCELLING, "cancelling_at": clock()}
    if not _move(
        session,
        job,
        JobState.VALIDATING,
        Job.tenant_id == tenant,
        num_total=Job.num_expanded,
        **cancelling,
    ):
        _move(session, job, JobState.IN_PROGRESS, Job.tenant_id == tenant, **cancelling)
    found = get(session, tenant, job)
    if found.state not in (JobState.CANCELLING, JobState.CANCELLED):
        raise StateConflictError(f"A job that is {found.state} cannot be cancelled.")
    return found


def start_finishing(session: Session, job: JobId) -> Job | None:
    """
    Take the next number for writing a job's artifacts, if all its items have ended.

    Whoever calls again, after a crash or in parallel, gets a number of its own, so that no two ever
    write the same key; `finish` takes the word of the newest only.

    Returns:
        The job with its new `finish_attempt`, or None if it has open items or has ended.
    """
    number = {"finish_attempt": Job.finish_attempt + 1}
    is_mine = (
        _move(
            session,
            job,
            JobState.IN_PROGRESS,
            _NUM_OPEN == 0,
            state=JobState.FINALIZING,
            finalizing_at=clock(),
            **number,
        )
        or _move(session, job, JobState.FINALIZING, **number)
        or _move(session, job, JobState.CANCELLING, _NUM_OPEN == 0, **number)
    )
    return find(session, job) if is_mine else None


def finish(
    session: Session,
    job: JobId,
    *,
    finish_attempt: int,
    output_file: FileId | None,
    error_file: FileId | None,
) -> JobState | None:
    """
    Point to the artifacts and end the job.

    Returns:
        The state it ended in, or None: a newer attempt is on its way, or it has ended already.
    """
    files = {"output_file_id": output_file, "error_file_id": error_file}
    newest = Job.finish_attempt == finish_attempt
    for before, condition, after, stamp in (
        (JobState.CANCELLING, newest, JobState.CANCELLED, "cancelled_at"),
        (JobState.FINALIZING, newest & (Job.num_expired > 0), JobState.EXPIRED, "expired_at"),
        (JobState.FINALIZING, newest & (Job.num_expired == 0), JobState.COMPLETED, "completed_at"),
    ):
        if _move(session, job, before, condition, state=after, **files, **{stamp: clock()}):
            return after
    return None


def _move(
    session: Session,
    job: JobId,
    expected: JobState,
    *conditions: ColumnElement[bool],
    **values: Any,
) -> bool:
    moved = session.execute(
        update(Job)
        .where(Job.id == job, Job.state == expected, *conditions)
        .values(version=Job.version + 1, **values)
        .returning(Job.id)
        .execution_options(synchronize_session=False)
    ).one_or_none()
    return moved is not None


# What the sweeper looks for


def list_unexpanded(
    session: Session, *, older_than_s: float, after: JobId | None = None, limit: int = PAGE
) -> list[JobId]:
    """Jobs that have waited for their expansion too long: the message was lost, or its process."""
    return _list(
        session,
        in_state(Job.state, JobState.VALIDATING),
        Job.created_at < clock() - older_than_s,
        after=after,
        limit=limit,
    )


def list_ended(session: Session, *, after: JobId | None = None, limit: int = PAGE) -> list[JobId]:
    """Jobs whose items have all ended, but which have not."""
    begun = (JobState.IN_PROGRESS, JobState.FINALIZING, JobState.CANCELLING)
    is_begun = or_(*(in_state(Job.state, state) for state in begun))
    return _list(session, is_begun, _NUM_OPEN == 0, after=after, limit=limit)


def list_past_window(session: Session, *, limit: int = PAGE) -> list[JobId]:
    """Jobs whose window is over while items are open: `items.end_page` with EXPIRED."""
    return _list(
        session,
        in_state(Job.state, JobState.IN_PROGRESS),
        Job.expires_at <= clock(),
        _NUM_OPEN > 0,
        limit=limit,
    )


def list_unread(session: Session, *, limit: int = PAGE) -> list[JobId]:
    """Jobs whose window is over, and whose lines have not all become items: `reject`."""
    return _list(
        session, in_state(Job.state, JobState.VALIDATING), Job.expires_at <= clock(), limit=limit
    )


def list_cancelling(session: Session, *, limit: int = PAGE) -> list[JobId]:
    """Cancelled jobs with open items: `items.end_page` with CANCELLED."""
    return _list(session, in_state(Job.state, JobState.CANCELLING), _NUM_OPEN > 0, limit=limit)


def _list(
    session: Session, *conditions: ColumnElement[bool], after: JobId | None = None, limit: int
) -> list[JobId]:
    if after is not None:
        conditions = (*conditions, Job.id > after)
    return list(session.scalars(select(Job.id).where(*conditions).order_by(Job.id).limit(limit)))


@dataclass(frozen=True, slots=True)
class OpenWork:
    """What a tenant's quota is compared with."""

    num_items: int
    num_bytes: int


def measure_open_work(session: Session, tenant: TenantId) -> OpenWork:
    """
    Items that wait or run, and the bytes of the input files of jobs that have not ended.

    A job that still validates counts with all its lines. Reads the rows of jobs and files only.
    """
    num_items = case(
        (Job.state == JobState.VALIDATING, func.coalesce(File.num_lines, Job.num_expanded)),
        else_=_NUM_OPEN,
    )
    row = session.execute(
        select(
            func.coalesce(func.sum(num_items), 0), func.coalesce(func.sum(File.num_bytes), 0)
        ).where(
            File.id == Job.input_file_id,
            Job.tenant_id == tenant,
            IS_OPEN,
        )
    ).one()
    return OpenWork(int(row[0]), int(row[1]))


def count_open(session: Session) -> dict[JobState, int]:
    """Jobs of all tenants that have not ended, by state."""
    rows = session.execute(select(Job.state, func.count()).where(IS_OPEN).group_by(Job.state))
    return dict(rows.all())


def count_items(session: Session, job: JobId) -> dict[ItemState, int]:
    """A job's items by state, counted one by one: for checks, not for polls."""
    rows = session.execute(
        select(Item.state, func.count()).where(Item.job_id == job).group_by(Item.state)
    )
    return dict(rows.all())
