"""The databases of the storage tests, SQLite and PostgreSQL, with the log of all changes; a broker."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.stack import Broker
from tests.storage.conftest import (
    database,
    database_url,
    postgresql_server,
    postgresql_template,
    sqlite_template,
)

__all__ = [
    "database",
    "database_url",
    "postgresql_server",
    "postgresql_template",
    "sqlite_template",
]


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Broker]:
    """One of this test's own, which it may kill."""
    broker = Broker(tmp_path / "valkey")
    yield broker
    broker.kill()
