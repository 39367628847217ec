"""
What happened to a job, in order. Written in the transaction that makes it happen.
"""

from collections.abc import Mapping
from typing import Any, Final

from sqlalchemy import insert, select
from sqlalchemy.orm import Session

from storage.db import clock
from storage.ids import JobId, TenantId
from storage.tables import Event

PAGE: Final = 100


def record(
    session: Session,
    tenant: TenantId,
    job: JobId,
    kind: str,
    details: Mapping[str, Any] | None = None,
) -> None:
    session.execute(
        insert(Event).values(
            tenant_id=tenant,
            job_id=job,
            kind=kind,
            details=dict(details or {}),
            created_at=clock(),
        )
    )


def list_page(
    session: Session, tenant: TenantId, job: JobId, *, after: int = 0, limit: int = PAGE
) -> list[Event]:
    """The events of a job that follow the event `after`."""
    return list(
        session.scalars(
            select(Event)
            .where(Event.job_id == job, Event.tenant_id == tenant, Event.id > after)
            .order_by(Event.id)
            .limit(limit)
        )
    )
