"""
Files: what clients handed in, and what we made for them. The bytes are a blob; this is their row.

The blob is written first and its row afterwards, so that SQL never points to bytes that are not
there. A crash between the two leaves a blob that nobody names, which the sweeper removes.
"""

from collections.abc import Sequence
from typing import Final

from sqlalchemy import delete as sql_delete
from sqlalchemy import literal, or_, select, update
from sqlalchemy.orm import Session
from sqlalchemy.sql.elements import ColumnElement

from storage.db import clock
from storage.errors import NotFoundError
from storage.ids import FileId, TenantId
from storage.states import FileState
from storage.tables import IS_OPEN, File, Job

PAGE: Final = 100

REQUEST_PURPOSE: Final = "request"
"""Of a manifest that nobody handed in as a file: the one line of a call that waits for its answer."""


def create(
    session: Session,
    *,
    file: FileId,
    tenant: TenantId,
    purpose: str,
    filename: str,
    num_bytes: int,
    sha256: bytes,
    blob_key: str,
    num_lines: int | None = None,
    lifetime_s: float | None = None,
) -> File:
    """
    Name a blob that has been written.

    Args:
        filename: the client's; kept as it is, and never part of a path or key.
        num_lines: of a manifest: what its items will count against the tenant's limit.
        lifetime_s: after which the file is gone; None: it stays.
    """
    now = session.scalars(select(clock())).one()
    row = File(
        id=file,
        tenant_id=tenant,
        purpose=purpose,
        filename=filename,
        state=FileState.PROCESSED,
        num_bytes=num_bytes,
        num_lines=num_lines,
        sha256=sha256,
        blob_key=blob_key,
        created_at=now,
        expires_at=None if lifetime_s is None else now + lifetime_s,
        deleted_at=None,
    )
    session.add(row)
    session.flush()
    return row


def get(session: Session, tenant: TenantId, file: FileId) -> File:
    """Raises `NotFoundError` for a file that is deleted, expired, another tenant's or none."""
    found = session.scalars(
        select(File).where(File.id == file, File.tenant_id == tenant, _is_there())
    ).one_or_none()
    if found is None:
        raise NotFoundError
    return found


def list_page(
    session: Session,
    tenant: TenantId,
    *,
    after: FileId | None = None,
    purpose: str | None = None,
    is_newest_first: bool = True,
    limit: int = PAGE,
) -> tuple[list[File], bool]:
    """
    A tenant's files, and whether there are more. Those of `REQUEST_PURPOSE` are left out.

    Raises:
        NotFoundError: `after` is no file of this tenant. A deleted one will do.
    """
    query = select(File).where(File.tenant_id == tenant, _is_there()).limit(limit + 1)
    # A constant of the statement, not a parameter: an index of such rows is taken for nothing else.
    query = query.where(File.purpose != literal(REQUEST_PURPOSE, literal_execute=True))
    query = query.order_by(File.id.desc() if is_newest_first else File.id)
    if purpose is not None:
        query = query.where(File.purpose == purpose)
    if after is not None:
        known = select(File.id).where(File.id == after, File.tenant_id == tenant)
        if session.scalars(known).one_or_none() is None:
            raise NotFoundError
        query = query.where(File.id < after if is_newest_first else File.id > after)
    page = list(session.scalars(query))
    return page[:limit], len(page) > limit


def delete(session: Session, tenant: TenantId, file: FileId) -> None:
    """
    Hide a file. Its blob stays as long as a job reads it.

    Raises:
        NotFoundError: as `get` does.
    """
    deleted = session.scalars(
        update(File)
        .where(File.id == file, File.tenant_id == tenant, _is_there())
        .values(deleted_at=clock())
        .returning(File.id)
        .execution_options(synchronize_session=False)
    ).one_or_none()
    if deleted is None:
        raise NotFoundError


def have_same_bytes(session: Session, tenant: TenantId, first: FileId, second: FileId) -> bool:
    """Whether both are files of this tenant, hidden or not, and hold the same."""
    rows = session.execute(
        select(File.num_bytes, File.sha256).where(
            File.id.in_((first, second)), File.tenant_id == tenant
        )
    ).all()
    return len(rows) == len({first, second}) and len(set(rows)) == 1


def is_named(session: Session, file: FileId) -> bool:
    """Whether there is a row for this file, hidden or not."""
    return session.scalars(select(File.id).where(File.id == file)).one_or_none() is not None


def find_unneeded(session: Session, keys: Sequence[str], *, grace_s: float) -> list[str]:
    """
    Those of these keys of blobs that nothing needs.

    A blob is needed while a file names it that is not deleted or expired, or has not been for long,
    and while a job that has not ended reads it.

    Args:
        grace_s: how long a file must have been gone: whoever found it before may still read.
    """
    gone = clock() - grace_s
    is_live = or_(File.deleted_at.is_(None), File.deleted_at > gone) & or_(
        File.expires_at.is_(None), File.expires_at > gone
    )
    named = select(File.blob_key).where(File.blob_key.in_(keys), is_live)
    read = select(Job.manifest_key).where(Job.manifest_key.in_(keys), IS_OPEN)
    needed = {*session.scalars(named), *session.scalars(read)}
    return [key for key in keys if key not in needed]


def forget(session: Session, file: FileId) -> None:
    """Take back a row of the same transaction, which nothing points to."""
    session.execute(
        sql_delete(File).where(File.id == file).execution_options(synchronize_session=False)
    )


def _is_there() -> ColumnElement[bool]:
    return File.deleted_at.is_(None) & or_(File.expires_at.is_(None), File.expires_at > clock())
