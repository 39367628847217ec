"""The databases of the storage tests: SQLite and PostgreSQL, with the log of all changes."""

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
