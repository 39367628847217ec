"""Rows for tests: tenants, jobs with items, and what a worker says about items that it leased."""

import hashlib
from typing import Any

from sqlalchemy import text

from storage import files, items, jobs, tenants
from storage.db import Database
from storage.ids import FileId, JobId, TenantId, new_uuid
from storage.items import Chunk, Completion, Fence, LeasedItem, NewItem
from storage.jobs import NewJob
from storage.keys import build_file_key

MODEL = "darkroom-tiny"


def make_tenant(database: Database, name: str = "tenant") -> TenantId:
    with database.write() as session:
        return tenants.get_or_create(session, name).id


def make_file(
    database: Database,
    tenant: TenantId,
    filename: str = "in.jsonl",
    *,
    purpose: str = "batch",
    num_lines: int | None = None,
) -> FileId:
    file = FileId(new_uuid())
    with database.write() as session:
        return files.create(
            session,
            file=file,
            tenant=tenant,
            purpose=purpose,
            filename=filename,
            num_bytes=1,
            num_lines=num_lines,
            sha256=bytes(32),
            blob_key=build_file_key(tenant, file),
        ).id


def new_job(
    database: Database,
    tenant: TenantId,
    body: str = "body",
    *,
    purpose: str = "batch",
    num_lines: int | None = None,
    **values: Any,
) -> NewJob:
    file = make_file(database, tenant, purpose=purpose, num_lines=num_lines)
    return NewJob(
        tenant=tenant,
        input_file=file,
        manifest_key=build_file_key(tenant, file),
        endpoint="/v1/chat/completions",
        body_sha256=hashlib.sha256(body.encode()).digest(),
        **{"model": MODEL, **values},
    )


def make_job(
    database: Database,
    num_items: int,
    *,
    tenant: TenantId | None = None,
    is_started: bool = True,
    **values: Any,
) -> JobId:
    """A job whose items wait to be leased."""
    new = new_job(database, tenant or make_tenant(database), **values)
    with database.write() as session:
        job = jobs.create(session, new)[0].id
        if num_items:
            items.insert_page(
                session, job, new_items(num_items), after_line=0, expanded_bytes=100 * num_items
            )
        if is_started:
            assert jobs.start(session, job)
    return job


def new_items(count: int, *, after_line: int = 0) -> list[NewItem]:
    return [
        NewItem(line, f"item-{line}", body_offset=100 * (line - 1), body_length=100)
        for line in range(after_line + 1, after_line + count + 1)
    ]


def lease(database: Database, count: int, *, lease_s: float = 60.0, model: str = MODEL) -> Chunk:
    with database.write() as session:
        chunk = items.lease(
            session, model=model, worker="worker-1", max_items=count, lease_s=lease_s
        )
    assert chunk is not None
    return chunk


def lease_or_none(database: Database, count: int) -> Chunk | None:
    with database.write() as session:
        return items.lease(session, model=MODEL, worker="worker-1", max_items=count)


def completion(fence: Fence, text: str = "a red circle") -> Completion:
    return Completion(fence, text, "stop", 12, 4, {"model_revision": "1"})


def completions(leased: tuple[LeasedItem, ...] | list[LeasedItem]) -> list[Completion]:
    return [completion(item.fence, f"text {item.line}") for item in leased]


def let_leases_end(database: Database) -> None:
    """Turn the clock, the only way that a database's clock can be turned: move what is compared."""
    with database.write() as session:
        session.execute(text("UPDATE items SET lease_until = 1.0 WHERE state = 'leased'"))


def let_backoff_end(database: Database) -> None:
    with database.write() as session:
        session.execute(text("UPDATE items SET not_before = 0.0 WHERE state = 'pending'"))


def let_window_end(database: Database, job: JobId) -> None:
    with database.write() as session:
        session.execute(
            text("UPDATE jobs SET expires_at = 1.0 WHERE id = :job"),
            {"job": job.hex},
        )


def put_in_fast_lane(database: Database, job: JobId) -> None:
    with database.write() as session:
        session.execute(
            text("UPDATE jobs SET priority = :priority WHERE id = :job"),
            {"priority": jobs.FAST_LANE, "job": job.hex},
        )
