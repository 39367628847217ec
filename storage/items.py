"""
Items: put in by the page, leased by the chunk, ended one by one and exactly once.

Every change of a leased item is fenced: the statement names the lease, the attempt and the state it
expects, and a row that does not come back was lost to somebody else. A lease that is over is over,
even while nobody has taken the item yet: a frozen worker that wakes up commits nothing.

Order of locks: items by id, then the jobs' rows by id, so that no two transactions wait for each
other. Leasing locks no job at all.
"""

import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, cast

from sqlalchemy import (
    ColumnElement,
    and_,
    case,
    exists,
    func,
    insert,
    literal,
    or_,
    select,
    text,
    union_all,
    update,
)
from sqlalchemy.orm import Session

from storage.db import clock, is_sqlite
from storage.errors import StaleExpansionError
from storage.ids import ItemId, JobId, LeaseId, TenantId, new_uuid
from storage.states import ItemState, JobState
from storage.tables import Item, Job, Part, Result, Tenant, in_state
from storage.tenants import Caps

LEASE_S: Final = 60.0
MAX_ATTEMPTS: Final = 3
"""Charged tries after which an item fails."""

MAX_CRASHES: Final = 3
"""Crashes after which an item that ran alone fails. A crash in company never fails an item."""

SUSPECT_CRASHES: Final = 2
"""Leases lost in silence after which an item is leased alone."""

BACKOFF_BASE_S: Final = 1.0
BACKOFF_MAX_S: Final = 15 * 60.0

PAGE: Final = 500
"""Rows that one transaction of a sweep touches at most."""

_IS_OPEN: Final = or_(
    in_state(Item.state, ItemState.PENDING), in_state(Item.state, ItemState.LEASED)
)


def _unestimated(condition: ColumnElement[bool]) -> ColumnElement[bool]:
    """
    The same in a form that leads PostgreSQL to no index, and whose frequency it does not guess.

    For rows that are found by their ids or lines. What it knows of states is a minute old, when no
    item was leased and none had ended: it would look for such few among all that are.
    """
    return case((condition, literal(True)), else_=literal(False))


_IS_LEASED: Final = _unestimated(in_state(Item.state, ItemState.LEASED))

_MAX_CANDIDATES: Final = 16  # jobs that one lease looks at; the next lease looks again


@dataclass(frozen=True, slots=True)
class NewItem:
    """
    A line that was checked.

    Args:
        line: in the manifest, from 1.
        custom_id: the client's key; None where it is missing or taken, which is then the error.
        body_offset, body_length: where the line stands in the manifest, in bytes.
        error: code and message of a line that was refused; the item is failed from the start.
    """

    line: int
    custom_id: str | None
    body_offset: int
    body_length: int
    num_images: int = 0
    error: tuple[str, str] | None = None


@dataclass(frozen=True, slots=True)
class Fence:
    """What must still be true for a worker's word about an item to count."""

    item: ItemId
    lease: LeaseId
    attempt: int

    @property
    def name(self) -> str:
        """Of this try at the item, among all tries."""
        return f"{self.item}.{self.attempt}"


@dataclass(frozen=True, slots=True)
class LeasedItem:
    """An item as a worker gets it; `fence` is what it must show when it comes back."""

    fence: Fence
    job: JobId
    tenant: TenantId
    manifest_key: str
    line: int
    custom_id: str | None
    body_offset: int
    body_length: int
    num_images: int
    charged: int
    priority: int
    """Its job's: lower runs first."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """
    Items leased together.

    Args:
        is_alone: one item that may have killed workers: it must run in a step of its own.
        options: of the items' jobs.
        caps: of those jobs' tenants.
    """

    lease: LeaseId
    items: tuple[LeasedItem, ...]
    is_alone: bool
    options: Mapping[JobId, Mapping[str, Any]]
    caps: Mapping[JobId, Caps]


@dataclass(frozen=True, slots=True)
class Completion:
    """
    The text of one item, and what it took.

    Args:
        num_cached_tokens: of the prompt tokens, those that were copied and not read.
    """

    fence: Fence
    text: str
    finish_reason: str
    num_prompt_tokens: int
    num_completion_tokens: int
    details: Mapping[str, Any] = field(default_factory=dict)
    num_cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Failure:
    """
    A try that failed by the item's own fault.

    Args:
        code, message: safe to show to the client.
        is_transient: trying again may help, and is done while charged tries are left.
        retry_after_s: what the other side asked for; obeyed up to `BACKOFF_MAX_S`.
        details: kept where the item ends with it.
    """

    fence: Fence
    code: str
    message: str
    is_transient: bool
    retry_after_s: float = 0.0
    details: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """
    What a transaction did to items.

    Args:
        items: those that matched; all others were lost, and nothing was written for them.
        ended_jobs: jobs whose last item this was, if the transaction commits.
    """

    items: frozenset[ItemId]
    ended_jobs: tuple[JobId, ...] = ()


# Lines become items


def insert_page(
    session: Session,
    job: JobId,
    items: Sequence[NewItem],
    *,
    after_line: int,
    expanded_bytes: int,
) -> None:
    """
    Put in the items of the lines that follow `after_line`, and note how far we are.

    A page is put in once: who comes second, or after a cancel, finds the job's progress elsewhere.

    Args:
        after_line: the job's `num_expanded` as the caller knows it.
        expanded_bytes: where in the manifest the line after this page begins.

    Raises:
        StaleExpansionError: `num_expanded` is another by now, or the job no longer validates.
    """
    num_refused = sum(item.error is not None for item in items)
    moved = session.execute(
        update(Job)
        .where(Job.id == job, Job.state == JobState.VALIDATING, Job.num_expanded == after_line)
        .values(
            num_expanded=Job.num_expanded + len(items),
            expanded_bytes=expanded_bytes,
            num_failed=Job.num_failed + num_refused,
            last_seq=Job.last_seq + num_refused,
            version=Job.version + 1,
        )
        .returning(Job.last_seq, clock())
        .execution_options(synchronize_session=False)
    ).one_or_none()
    if moved is None:
        raise StaleExpansionError
    last_seq, now = moved
    rows = _build_rows(job, items, first_seq=last_seq - num_refused + 1, now=now)
    if is_sqlite(session):
        session.connection().exec_driver_sql(_INSERT_ON_SQLITE, list(rows))
    else:
        _copy_in(session, rows)


_COLUMNS: Final = (
    "job_id, line, custom_id, body_offset, body_length, num_images, state, not_before, attempt, "
    "charged, num_crashes, is_suspect, ended_at, seq, error_code, error_message"
)
_INSERT_ON_SQLITE: Final = f"INSERT INTO items ({_COLUMNS}) VALUES ({', '.join('?' * 16)})"  # noqa: S608


_NO_END: Final[tuple[Any, ...]] = (None, None, None, None)


def _build_rows(
    job: JobId, items: Sequence[NewItem], *, first_seq: int, now: float
) -> Iterator[tuple[Any, ...]]:
    seq = first_seq
    for item in items:
        place = (job.hex, item.line, item.custom_id, item.body_offset, item.body_length)
        state, end = ItemState.PENDING, _NO_END
        if item.error is not None:
            state, end = ItemState.FAILED, (now, seq, *item.error)
            seq += 1
        yield (*place, item.num_images, state.value, 0.0, 0, 0, 0, False, *end)


def _copy_in(session: Session, rows: Iterable[tuple[Any, ...]]) -> None:
    driver = session.connection().connection.driver_connection
    assert driver is not None, "a checked-out connection has a driver's one"
    with driver.cursor() as cursor, cursor.copy(f"COPY items ({_COLUMNS}) FROM STDIN") as copy:
        for row in rows:
            copy.write_row(row)


def refresh_statistics(session: Session) -> None:
    """
    Tell PostgreSQL's planner how many items there are by now.

    It would find out by itself within a minute or so; until then it takes the table for a small one,
    and reads all of it for each lease. Where another process is at it, nothing is done.
    """
    if not is_sqlite(session):
        session.execute(text("ANALYZE (SKIP_LOCKED) items"))


# Leasing


def lease(
    session: Session,
    *,
    model: str,
    worker: str,
    max_items: int,
    lease_s: float = LEASE_S,
    max_priority: int | None = None,
) -> Chunk | None:
    """
    Lease the best chunk for a model: by priority, then the tenant with least in flight, then age.

    The items of a chunk belong to as few jobs as possible. Suspects come last in their job, alone.

    Args:
        max_priority: of jobs with this number or a lower one only.
    """
    lease_id = LeaseId(new_uuid())
    claim = {
        "state": ItemState.LEASED,
        "attempt": Item.attempt + 1,
        "lease_id": lease_id,
        "lease_until": clock() + lease_s,
        "worker": worker,
    }
    leased: list[LeasedItem] = []
    for job in _find_candidates(session, model, max_priority):
        leased += _claim(session, job, claim, is_suspect=False, limit=max_items - len(leased))
        if not leased:
            suspects = _claim(session, job, claim, is_suspect=True, limit=1)
            if suspects:
                return _build_chunk(session, lease_id, suspects, is_alone=True)
        if len(leased) >= max_items:
            break
    return _build_chunk(session, lease_id, leased, is_alone=False) if leased else None


def _build_chunk(
    session: Session, lease_id: LeaseId, leased: Sequence[LeasedItem], *, is_alone: bool
) -> Chunk:
    # In the transaction of the lease: one that its worker knows too little of would be nobody's.
    job_ids = {item.job for item in leased}
    rows = session.execute(
        select(Job.id, Job.options, Tenant.max_images, Tenant.max_videos, Tenant.max_frames)
        .join(Tenant, Tenant.id == Job.tenant_id)
        .where(Job.id.in_(job_ids))
    ).all()
    return Chunk(
        lease_id,
        tuple(leased),
        is_alone,
        options={job: options for job, options, *_ in rows},
        caps={job: Caps(*caps) for job, _, *caps in rows},
    )


@dataclass(frozen=True, slots=True)
class _Candidate:
    id: JobId
    tenant: TenantId
    manifest_key: str
    priority: int


def _find_candidates(session: Session, model: str, max_priority: int | None) -> list[_Candidate]:
    # Asked in the order of ix_items_pending, so that no plan walks along items that have ended.
    earliest = [
        select(Item.not_before)
        .where(
            Item.job_id == Job.id,
            in_state(Item.state, ItemState.PENDING),
            Item.is_suspect.is_(is_suspect),
        )
        .order_by(Item.not_before)
        .limit(1)
        .scalar_subquery()
        for is_suspect in (False, True)
    ]
    waiting = or_(*(not_before <= clock() for not_before in earliest))
    rows = session.execute(
        select(Job.id, Job.tenant_id, Job.manifest_key, Job.priority)
        .where(
            in_state(Job.state, JobState.IN_PROGRESS),
            Job.model == model,
            Job.expires_at > clock(),
            *([] if max_priority is None else [Job.priority <= max_priority]),
            waiting,
        )
        .order_by(Job.priority, Job.id)
    )
    candidates = [_Candidate(*row) for row in rows]
    if len({candidate.tenant for candidate in candidates}) > 1:
        flights = _count_in_flight(session)
        # A stable sort: age, the order of the rows, decides what is left.
        candidates.sort(key=lambda job: (job.priority, flights[job.tenant]))
    return candidates[:_MAX_CANDIDATES]


def _count_in_flight(session: Session) -> Counter[TenantId]:
    rows = session.execute(
        select(Job.tenant_id, func.count())
        .join(Item, Item.job_id == Job.id)
        .where(in_state(Item.state, ItemState.LEASED))
        .group_by(Job.tenant_id)
    )
    return Counter(dict(rows.all()))


def _claim(
    session: Session, job: _Candidate, claim: Mapping[str, Any], *, is_suspect: bool, limit: int
) -> list[LeasedItem]:
    # A CTE that locks is never folded into the UPDATE: it runs once, and locks `limit` rows.
    picked = (
        select(Item.id)
        .where(
            Item.job_id == job.id,
            in_state(Item.state, ItemState.PENDING),
            Item.is_suspect.is_(is_suspect),
            Item.not_before <= clock(),
        )
        .order_by(Item.not_before, Item.id)
        .limit(limit)
        .with_for_update(skip_locked=True)
        .cte("picked")
    )
    rows = session.execute(
        update(Item)
        .where(Item.id == picked.c.id, _unestimated(in_state(Item.state, ItemState.PENDING)))
        .values(claim)
        .returning(
            Item.id,
            Item.lease_id,
            Item.attempt,
            Item.line,
            Item.custom_id,
            Item.body_offset,
            Item.body_length,
            Item.num_images,
            Item.charged,
        )
        .execution_options(synchronize_session=False)
    )
    return sorted(
        (
            LeasedItem(
                Fence(row.id, cast("LeaseId", row.lease_id), row.attempt),
                job.id,
                job.tenant,
                job.manifest_key,
                row.line,
                row.custom_id,
                row.body_offset,
                row.body_length,
                row.num_images,
                row.charged,
                job.priority,
            )
            for row in rows
        ),
        key=lambda item: item.fence.item,
    )


def renew(
    session: Session, leases: Iterable[LeaseId], *, lease_s: float = LEASE_S
) -> frozenset[ItemId]:
    """
    Extend all items of these leases.

    Returns:
        The items that are still ours. One that is missing was lost: stop working on it.
    """
    # In the order of all others: an UPDATE by itself locks rows as its plan meets them.
    held = (
        select(Item.id)
        .where(
            in_state(Item.state, ItemState.LEASED),
            Item.lease_id.in_(list(leases)),
            Item.lease_until > clock(),
        )
        .order_by(Item.id)
        .with_for_update()
        .cte("held")
    )
    rows = session.scalars(
        update(Item)
        .where(Item.id == held.c.id, _IS_LEASED)
        .values(lease_until=clock() + lease_s)
        .returning(Item.id)
        .execution_options(synchronize_session=False)
    )
    return frozenset(rows)


def count_waiting(session: Session, *, limit: int) -> dict[str, int]:
    """
    Items that may run now, by model: how many permits there should be.

    Args:
        limit: of each model no more are counted than this; a backlog of millions costs no more.
    """
    running = (in_state(Job.state, JobState.IN_PROGRESS), Job.expires_at > clock())
    counts = {}
    for model in session.scalars(select(Job.model).where(*running).distinct()).all():
        waiting = (
            select(literal(1))
            .select_from(Job)
            .join(Item, Item.job_id == Job.id)
            .where(
                *running,
                Job.model == model,
                in_state(Item.state, ItemState.PENDING),
                Item.not_before <= clock(),
            )
            .limit(limit)
            .subquery()
        )
        count = session.scalar(select(func.count()).select_from(waiting)) or 0
        if count:
            counts[model] = count
    return counts


# Ends


def complete(session: Session, completions: Sequence[Completion]) -> Outcome:
    """Commit results: items, results and counters in one transaction, under the fence."""
    by_item = {completion.fence.item: completion for completion in completions}
    fences = [completion.fence for completion in by_item.values()]
    matched = _update_fenced(
        session,
        fences,
        {
            "state": ItemState.COMPLETED,
            "lease_id": None,
            "lease_until": None,
            "ended_at": clock(),
            "error_code": None,
            "error_message": None,
        },
    )
    ids_by_job = _group_by_job(matched)
    rows: list[dict[str, Any]] = []
    ended: list[JobId] = []
    for job, ids in ids_by_job.items():
        done = [by_item[item] for item in ids]
        seqs, is_over = _count_ends(
            session,
            job,
            ItemState.COMPLETED,
            len(ids),
            num_prompt_tokens=sum(one.num_prompt_tokens for one in done),
            num_completion_tokens=sum(one.num_completion_tokens for one in done),
            num_cached_tokens=sum(one.num_cached_tokens for one in done),
        )
        rows += [
            {
                "item_id": one.fence.item,
                "job_id": job,
                "seq": seq,
                "attempt": one.fence.attempt,
                "text": one.text,
                "finish_reason": one.finish_reason,
                "num_prompt_tokens": one.num_prompt_tokens,
                "num_completion_tokens": one.num_completion_tokens,
                "num_cached_tokens": one.num_cached_tokens,
                "details": dict(one.details),
            }
            for seq, one in zip(seqs, done, strict=True)
        ]
        if is_over:
            ended.append(job)
    if rows:
        session.execute(insert(Result).values(created_at=clock()), rows)
    return Outcome(frozenset(matched), tuple(ended))


def find_committed(session: Session, fences: Sequence[Fence]) -> frozenset[ItemId]:
    """
    Which of these are completed under exactly this attempt.

    For a commit whose answer was lost: what is not among them is committed again, under the same
    fence, which cannot count anything twice.
    """
    attempts = {fence.item: fence.attempt for fence in fences}
    rows = session.execute(
        select(Result.item_id, Result.attempt).where(Result.item_id.in_(attempts))
    )
    return frozenset(item for item, attempt in rows if attempts[item] == attempt)


def fail(
    session: Session, failures: Sequence[Failure], *, max_attempts: int = MAX_ATTEMPTS
) -> Outcome:
    """
    Charge a try to each item: it goes back with a delay, or fails where that cannot help.

    Returns:
        All items that matched, whether they will be tried again or not.
    """
    by_item = {failure.fence.item: failure for failure in failures}
    held = _lock_fenced(session, [failure.fence for failure in by_item.values()])
    back: dict[ItemId, float] = {}
    failed: dict[ItemId, _Reason] = {}
    for item in held:
        failure = by_item[item.id]
        if failure.is_transient and item.charged + 1 < max_attempts:
            asked_s = min(failure.retry_after_s, BACKOFF_MAX_S)
            back[item.id] = max(asked_s, draw_backoff_s(item.charged))
        else:
            failed[item.id] = (failure.code, failure.message, failure.details)
    jobs = {item.id: item.job_id for item in held}
    for item_id, delay_s in back.items():
        _give_back(session, [item_id], delay_s, charged=Item.charged + 1)
    ended = _end_failed(session, jobs, failed, charged=Item.charged + 1)
    return Outcome(frozenset(jobs), ended)


def draw_backoff_s(num_failures: int) -> float:
    """Full jitter: anything from 0 to the cap, which doubles with each failure up to 15 minutes."""
    cap_s = min(BACKOFF_BASE_S * 2.0 ** min(num_failures, 30), BACKOFF_MAX_S)
    return random.uniform(0.0, cap_s)  # noqa: S311 - spreads load, hides nothing


def release(session: Session, fences: Sequence[Fence], *, wait_s: float = 0.0) -> Outcome:
    """
    Give leases back uncharged, as a drain does: the items may run elsewhere.

    Args:
        wait_s: not before so long; 0: at once.
    """
    held = _lock_fenced(session, fences)
    ids = [item.id for item in held]
    _give_back(session, ids, wait_s)
    return Outcome(frozenset(ids))


def release_all(session: Session, *, worker: str) -> Outcome:
    """Give back uncharged all that this worker holds, whichever its leases: it ends."""
    ids = session.scalars(
        select(Item.id)
        .where(in_state(Item.state, ItemState.LEASED), Item.worker == worker)
        .order_by(Item.id)
        .with_for_update()
    ).all()
    _give_back(session, ids, 0.0)
    return Outcome(frozenset(ids))


def report_crash(session: Session, suspects: Sequence[Fence]) -> Outcome:
    """Give back what was in the step that killed its process: each will run alone."""
    return _crash(session, _lock_fenced(session, suspects), are_suspects=True)


def expire_leases(session: Session, *, limit: int = PAGE) -> Outcome:
    """
    Take back one page of leases that are over, the oldest first.

    A worker that died in silence is no proof against an item: it goes back uncharged, with a delay,
    is leased alone from the second time on, and fails only if it was alone at the third.
    Rows that others hold are skipped, so that no row can starve the later ones.
    """
    over = session.execute(
        _HELD.where(in_state(Item.state, ItemState.LEASED), Item.lease_until <= clock())
        .order_by(Item.lease_until, Item.id)
        .limit(limit)
        .with_for_update(skip_locked=True)
    )
    held = sorted((_Held(*row) for row in over), key=lambda item: item.id)
    return _crash(session, held, are_suspects=False)


def end_page(session: Session, job: JobId, state: ItemState, *, limit: int = PAGE) -> Outcome:
    """
    End one page of what is left of a job that was cancelled or whose window is over.

    Args:
        state: CANCELLED or EXPIRED.

    Returns:
        The items ended; none when nothing is left.
    """
    assert state in (ItemState.CANCELLED, ItemState.EXPIRED), state
    # What waits in the order of its index, or each page would walk along all that have ended: who
    # else locks such rows, a lease, never waits for one. What is leased in the order of all others.
    for before, order in (
        (ItemState.PENDING, (Item.is_suspect, Item.not_before, Item.id)),
        (ItemState.LEASED, (Item.id,)),
    ):
        page = (
            select(Item.id)
            .where(Item.job_id == job, in_state(Item.state, before))
            .order_by(*order)
            .limit(limit)
            .with_for_update()
            .cte("page")
        )
        ended = session.scalars(
            update(Item)
            .where(
                Item.id == page.c.id,
                _unestimated(in_state(Item.state, before)),
                exists().where(Job.id == Item.job_id, _may_end(state)),
            )
            .values(state=state, lease_id=None, lease_until=None, ended_at=clock())
            .returning(Item.id)
            .execution_options(synchronize_session=False)
        ).all()
        if ended:
            _, is_over = _count_ends(session, job, state, len(ended))
            return Outcome(frozenset(ended), (job,) if is_over else ())
    return Outcome(frozenset())


def _may_end(state: ItemState) -> ColumnElement[bool]:
    if state is ItemState.CANCELLED:
        return in_state(Job.state, JobState.CANCELLING)
    return and_(in_state(Job.state, JobState.IN_PROGRESS), Job.expires_at <= clock())


def lock(session: Session, fences: Sequence[Fence]) -> frozenset[ItemId]:
    """Those of the items that are still held by these leases, which they stay while we transact."""
    return frozenset(item.id for item in _lock_fenced(session, fences))


# What has ended


@dataclass(frozen=True, slots=True)
class Ended:
    """An item that ended, as an artifact or a page of live results shows it. `seq` 0: it never ran."""

    item: ItemId
    seq: int
    line: int
    custom_id: str | None
    state: ItemState
    attempt: int
    body_offset: int
    body_length: int
    error_code: str | None
    error_message: str | None
    text: str | None
    finish_reason: str | None
    num_prompt_tokens: int | None
    num_completion_tokens: int | None
    num_cached_tokens: int | None
    details: Mapping[str, Any] | None
    ended_at: float


def list_by_line(
    session: Session, job: JobId, *, after_line: int = 0, limit: int = PAGE
) -> list[Ended]:
    """A page of a job's ended items in input order, for the artifacts."""
    rows = session.execute(
        select(*_ENDED)
        .outerjoin(Result, Result.item_id == Item.id)
        .where(
            Item.job_id == job,
            Item.line > after_line,
            _unestimated(~_IS_OPEN),
        )
        .order_by(Item.line)
        .limit(limit)
    )
    return [Ended(*row) for row in rows]


def list_by_commit(
    session: Session,
    job: JobId,
    *,
    after_seq: int = 0,
    state: ItemState | None = None,
    custom_id: str | None = None,
    limit: int = PAGE,
) -> list[Ended]:
    """
    A page of results and failures in the order of their commits: a reader never skips one.

    Args:
        state: COMPLETED or FAILED: those only. Items that never ran have no place in this order.
        custom_id: the item of this name only.
    """
    completed = select(Result.item_id, Result.seq).where(
        Result.job_id == job, Result.seq > after_seq
    )
    failed = select(Item.id, Item.seq).where(
        Item.job_id == job, in_state(Item.state, ItemState.FAILED), Item.seq > after_seq
    )
    if custom_id is not None:
        completed = completed.join(Item, Item.id == Result.item_id)
        completed = completed.where(Item.custom_id == custom_id)
        failed = failed.where(Item.custom_id == custom_id)
    if state is not None:
        completed = completed.where(literal(state is ItemState.COMPLETED))
        failed = failed.where(literal(state is ItemState.FAILED))
    page = union_all(
        select(completed.order_by(Result.seq).limit(limit).subquery()),
        select(failed.order_by(Item.seq).limit(limit).subquery()),
    ).subquery()
    item_id, seq = page.c
    rows = session.execute(
        select(*_ENDED)
        .join(page, item_id == Item.id)
        .outerjoin(Result, Result.item_id == Item.id)
        .order_by(seq)
        .limit(limit)
    )
    return [Ended(*row) for row in rows]


_ENDED: Final[tuple[Any, ...]] = (
    Item.id,
    func.coalesce(Result.seq, Item.seq, 0),
    Item.line,
    Item.custom_id,
    Item.state,
    Item.attempt,
    Item.body_offset,
    Item.body_length,
    Item.error_code,
    Item.error_message,
    Result.text,
    Result.finish_reason,
    Result.num_prompt_tokens,
    Result.num_completion_tokens,
    Result.num_cached_tokens,
    func.coalesce(Result.details, Item.error_details),
    Item.ended_at,
)


# Under the fence


@dataclass(frozen=True, slots=True)
class _Held:
    """A leased row under our lock."""

    id: ItemId
    job_id: JobId
    charged: int
    num_crashes: int
    is_suspect: bool


_HELD: Final = select(Item.id, Item.job_id, Item.charged, Item.num_crashes, Item.is_suspect)


def _is_fenced(fences: Iterable[Fence]) -> ColumnElement[bool]:
    """State, lease, attempt and time; grouped, since a chunk shares its lease and most attempts."""
    groups: dict[tuple[LeaseId, int], list[ItemId]] = {}
    for fence in fences:
        groups.setdefault((fence.lease, fence.attempt), []).append(fence.item)
    return and_(
        _IS_LEASED,
        Item.lease_until > clock(),
        or_(
            *(
                and_(Item.id.in_(ids), Item.lease_id == lease_id, Item.attempt == attempt)
                for (lease_id, attempt), ids in groups.items()
            )
        ),
    )


def _lock_fenced(session: Session, fences: Sequence[Fence]) -> list[_Held]:
    if not fences:
        return []
    rows = session.execute(_HELD.where(_is_fenced(fences)).order_by(Item.id).with_for_update())
    return [_Held(*row) for row in rows]


def _update_fenced(
    session: Session, fences: Sequence[Fence], values: Mapping[str, Any]
) -> dict[ItemId, JobId]:
    if not fences:
        return {}
    in_order = select(Item.id).where(_is_fenced(fences)).order_by(Item.id).with_for_update()
    held = in_order.cte("held")
    rows = session.execute(
        update(Item)
        .where(Item.id == held.c.id, _IS_LEASED)
        .values(values)
        .returning(Item.id, Item.job_id)
        .execution_options(synchronize_session=False)
    )
    return dict(rows.all())


def _group_by_job(jobs: Mapping[ItemId, JobId]) -> dict[JobId, list[ItemId]]:
    groups: dict[JobId, list[ItemId]] = {}
    for item, job in sorted(jobs.items(), key=lambda pair: (pair[1], pair[0])):
        groups.setdefault(job, []).append(item)
    return groups


def _give_back(
    session: Session, ids: Sequence[ItemId], delay_s: float, **values: ColumnElement[Any] | int
) -> None:
    if not ids:
        return
    session.execute(
        update(Item)
        .where(Item.id.in_(ids), in_state(Item.state, ItemState.LEASED))
        .values(
            state=ItemState.PENDING,
            lease_id=None,
            lease_until=None,
            not_before=clock() + delay_s if delay_s else 0.0,
            **values,
        )
        .execution_options(synchronize_session=False)
    )


def _crash(session: Session, held: Sequence[_Held], *, are_suspects: bool) -> Outcome:
    # A lease under which parts were answered got on, and was cut off: what kills a worker is asked
    # again and again until nothing else of the item is left to be answered. Alone, if it was in the
    # step: it would take its neighbours along each time.
    got_on = _find_parted(session, [item.id for item in held])
    is_suspect = or_(Item.is_suspect, literal(are_suspects))
    _give_back(session, sorted(got_on), draw_backoff_s(0), is_suspect=is_suspect)
    stuck = [item for item in held if item.id not in got_on]
    guilty = [item for item in stuck if item.is_suspect and item.num_crashes + 1 >= MAX_CRASHES]
    guilty_ids = {item.id for item in guilty}
    rest = [item for item in stuck if item.id not in guilty_ids]
    worst = max((item.num_crashes for item in rest), default=0)
    _give_back(
        session,
        [item.id for item in rest],
        draw_backoff_s(worst),
        num_crashes=Item.num_crashes + 1,
        charged=Item.charged + case((Item.is_suspect, 1), else_=0),
        is_suspect=or_(
            Item.is_suspect,
            literal(are_suspects),
            Item.num_crashes + 1 >= SUSPECT_CRASHES,
        ),
    )
    text = f"The worker crashed {MAX_CRASHES} times on this item, the last time with it alone."
    ended = _end_failed(
        session,
        {item.id: item.job_id for item in held},
        dict.fromkeys(guilty_ids, ("worker_crash", text, None)),
        charged=Item.charged + 1,
        num_crashes=Item.num_crashes + 1,
    )
    return Outcome(frozenset(item.id for item in held), ended)


def _find_parted(session: Session, ids: Sequence[ItemId]) -> frozenset[ItemId]:
    """Those of these items of which a part was answered under their last lease."""
    # Asked for each by itself, in the order of the key: a join may read all parts that there are.
    newest = select(func.max(Part.attempt)).where(Part.item_id == Item.id).scalar_subquery()
    rows = session.execute(select(Item.id, Item.attempt, newest).where(Item.id.in_(ids)))
    return frozenset(item for item, attempt, of_parts in rows if of_parts == attempt)


_Reason = tuple[str, str, Mapping[str, Any] | None]
"""Code, message and details."""


def _end_failed(
    session: Session,
    jobs: Mapping[ItemId, JobId],
    failed: Mapping[ItemId, "_Reason"],
    **values: ColumnElement[Any],
) -> tuple[JobId, ...]:
    """Fail items under our lock, count them, and number them; returns the jobs that ended."""
    ended: list[JobId] = []
    for job, ids in _group_by_job({item: jobs[item] for item in failed}).items():
        seqs, is_over = _count_ends(session, job, ItemState.FAILED, len(ids))
        for seq, item in zip(seqs, ids, strict=True):
            code, message, details = failed[item]
            session.execute(
                update(Item)
                .where(Item.id == item, in_state(Item.state, ItemState.LEASED))
                .values(
                    state=ItemState.FAILED,
                    lease_id=None,
                    lease_until=None,
                    ended_at=clock(),
                    seq=seq,
                    error_code=code,
                    error_message=message,
                    error_details=None if details is None else dict(details),
                    **values,
                )
                .execution_options(synchronize_session=False)
            )
        if is_over:
            ended.append(job)
    return tuple(ended)


def _count_ends(
    session: Session, job: JobId, state: ItemState, num_items: int, **tokens: int
) -> tuple[range, bool]:
    """
    Move a job's counters. The last lock that a transaction takes.

    Returns:
        Commit numbers for results and failures, and whether the job has no open item left.
    """
    counter = {
        ItemState.COMPLETED: Job.num_completed,
        ItemState.FAILED: Job.num_failed,
        ItemState.CANCELLED: Job.num_cancelled,
        ItemState.EXPIRED: Job.num_expired,
    }[state]
    num_numbered = num_items if state in (ItemState.COMPLETED, ItemState.FAILED) else 0
    sums = {name: getattr(Job, name) + count for name, count in tokens.items()}
    row = session.execute(
        update(Job)
        .where(Job.id == job)
        .values(
            {
                counter.key: counter + num_items,
                "last_seq": Job.last_seq + num_numbered,
                "version": Job.version + 1,
                **sums,
            }
        )
        .returning(
            Job.last_seq,
            Job.num_total
            - Job.num_completed
            - Job.num_failed
            - Job.num_cancelled
            - Job.num_expired,
        )
        .execution_options(synchronize_session=False)
    ).one()
    last_seq, num_open = row
    return range(last_seq - num_numbered + 1, last_seq + 1), num_open == 0
