"""How much open work a tenant may have: told at once, with the limit and the use, never by a silent wait."""

from dataclasses import dataclass
from typing import Self

from api.config import ApiConfig
from api.errors import NO_RETRY, QuotaExceededError
from storage import jobs, tenants
from storage.db import Session
from storage.ids import TenantId


@dataclass(frozen=True, slots=True)
class Quota:
    """What is in use before a new job, and how much may be; None: there is no limit."""

    used: jobs.OpenWork
    max_items: int | None
    max_bytes: int | None

    @classmethod
    def read(cls, session: Session, tenant: TenantId, config: ApiConfig) -> Self:
        """Under a lock of the tenant's row: two jobs at once cannot share what is left."""
        row = tenants.get_locked(session, tenant)
        return cls(
            jobs.measure_open_work(session, tenant),
            config.max_open_items if row.max_open_items is None else row.max_open_items,
            config.max_open_bytes if row.max_open_bytes is None else row.max_open_bytes,
        )

    def check(self, num_items: int, num_bytes: int) -> None:
        """Raises `QuotaExceededError` if a job of this size would be too much."""
        _check("items", self.max_items, self.used.num_items, num_items)
        _check("bytes", self.max_bytes, self.used.num_bytes, num_bytes)


def _check(name: str, limit: int | None, used: int, more: int) -> None:
    if limit is not None and used + more > limit:
        raise QuotaExceededError(
            f"This has {more} {name}; {used} of at most {limit} open {name} are in use.",
            headers=NO_RETRY if more > limit else None,  # it never fits
        )
