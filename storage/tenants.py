"""
Tenants and their API keys.

A key reads `dk_<id>_<secret>`: the id finds the row, and the secret is compared with a hash under a
pepper that is not in the database. The whole key is shown once, when it is made.
"""

import hashlib
import hmac
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from sqlalchemy import or_, select, update
from sqlalchemy.orm import Session

from storage.db import clock, insert_or_skip
from storage.errors import NotFoundError
from storage.ids import TenantId, new_uuid
from storage.tables import ApiKey, Tenant

LIMITS: Final = ("max_images", "max_videos", "max_frames", "max_open_items", "max_open_bytes")
"""What a tenant's row may say; None leaves it to the model or the settings."""

_KEY: Final = re.compile(r"dk_([0-9a-f]{16})_([0-9a-f]{64})")


def get_or_create(
    session: Session,
    name: str,
    *,
    max_open_items: int | None = None,
    max_open_bytes: int | None = None,
) -> Tenant:
    """The tenant of this name; an existing one keeps its limits."""
    session.execute(
        insert_or_skip(session, Tenant)
        .values(
            id=new_uuid(),
            name=name,
            max_open_items=max_open_items,
            max_open_bytes=max_open_bytes,
            created_at=clock(),
        )
        .on_conflict_do_nothing(index_elements=[Tenant.name])
    )
    return session.scalars(select(Tenant).where(Tenant.name == name)).one()


def find(session: Session, name: str) -> Tenant | None:
    return session.scalars(select(Tenant).where(Tenant.name == name)).one_or_none()


def get_name(session: Session, tenant: TenantId) -> str:
    return session.scalars(select(Tenant.name).where(Tenant.id == tenant)).one()


@dataclass(frozen=True, slots=True)
class Caps:
    """What one prompt of a tenant's may bring; None: what the model takes."""

    max_images: int | None = None
    max_videos: int | None = None
    max_frames: int | None = None


def get_caps(session: Session, tenant: TenantId) -> Caps:
    """Raises `NoResultFound` for no tenant: a job has one."""
    row = session.execute(
        select(Tenant.max_images, Tenant.max_videos, Tenant.max_frames).where(Tenant.id == tenant)
    ).one()
    return Caps(*row)


def set_limits(session: Session, tenant: TenantId, limits: Mapping[str, int | None]) -> None:
    """
    Change some of a tenant's `LIMITS`.

    They hold for jobs that are expanded from now on, and for what workers lease from now on.
    """
    unknown = limits.keys() - set(LIMITS)
    if unknown:
        raise ValueError(f"no limits of a tenant: {', '.join(sorted(unknown))}")
    if limits:
        session.execute(
            update(Tenant)
            .where(Tenant.id == tenant)
            .values(**limits)
            .execution_options(synchronize_session=False)
        )


def get_locked(session: Session, tenant: TenantId) -> Tenant:
    """The tenant's row, under a lock: who compares its open work with its limits comes one by one."""
    return session.scalars(
        select(Tenant).where(Tenant.id == tenant).with_for_update(key_share=True)
    ).one()


def create_key(
    session: Session, tenant: TenantId, *, name: str, pepper: bytes, lifetime_s: float | None = None
) -> tuple[ApiKey, str]:
    """
    Make a key.

    Returns:
        The row, and the key itself, which cannot be had a second time.
    """
    key_id, secret = secrets.token_hex(8), secrets.token_hex(32)
    now = session.scalars(select(clock())).one()
    row = ApiKey(
        id=key_id,
        tenant_id=tenant,
        name=name,
        secret_hash=_hash(secret, pepper),
        created_at=now,
        expires_at=None if lifetime_s is None else now + lifetime_s,
        revoked_at=None,
    )
    session.add(row)
    session.flush()
    return row, f"dk_{key_id}_{secret}"


def find_by_key(session: Session, key: str, *, pepper: bytes) -> Tenant | None:
    """Whose key this is; None if it is malformed, unknown, wrong, revoked or expired."""
    parts = _KEY.fullmatch(key)
    if parts is None:
        return None
    key_id, secret = parts.groups()
    row = session.execute(
        select(Tenant, ApiKey.secret_hash)
        .join(ApiKey, ApiKey.tenant_id == Tenant.id)
        .where(
            ApiKey.id == key_id,
            ApiKey.revoked_at.is_(None),
            or_(ApiKey.expires_at.is_(None), ApiKey.expires_at > clock()),
        )
    ).one_or_none()
    # Compared even when there is no row, so that the time tells nothing about ids.
    expected = row[1] if row is not None else bytes(32)
    is_right = hmac.compare_digest(expected, _hash(secret, pepper))
    return row[0] if row is not None and is_right else None


def list_keys(session: Session, tenant: TenantId) -> list[ApiKey]:
    return list(
        session.scalars(
            select(ApiKey).where(ApiKey.tenant_id == tenant).order_by(ApiKey.created_at, ApiKey.id)
        )
    )


def revoke_key(session: Session, tenant: TenantId, key_id: str) -> None:
    """Raises `NotFoundError` if the tenant has no such key in use."""
    revoked = session.scalars(
        update(ApiKey)
        .where(ApiKey.id == key_id, ApiKey.tenant_id == tenant, ApiKey.revoked_at.is_(None))
        .values(revoked_at=clock())
        .returning(ApiKey.id)
        .execution_options(synchronize_session=False)
    ).one_or_none()
    if revoked is None:
        raise NotFoundError


def _hash(secret: str, pepper: bytes) -> bytes:
    # One round will do: 32 random bytes cannot be guessed, unlike a password.
    return hashlib.sha256(pepper + secret.encode()).digest()
