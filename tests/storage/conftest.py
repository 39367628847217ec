"""Each test of a room that speaks SQL runs twice: on SQLite in a file, and on a real PostgreSQL."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from migrations.upgrade import upgrade
from storage import invariants
from storage.db import Database
from tests.services import PostgreSQL, postgresql_server

__all__ = [
    "database",
    "database_url",
    "postgresql_server",
    "postgresql_template",
    "sqlite_template",
]


def build(url: str) -> None:
    database = Database(url)
    upgrade(database)
    with database.write() as session:
        invariants.install_log(session)
    database.close()


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("sqlite") / "template.sqlite3"
    build(f"sqlite:///{path}")
    return path.read_bytes()


@pytest.fixture(scope="session")
def postgresql_template(postgresql_server: PostgreSQL) -> str:
    return postgresql_server.make_template(build)


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.services)])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The URL of a migrated, empty database whose changes are logged."""
    if request.param == "sqlite":
        path = tmp_path / "darkroom.sqlite3"
        path.write_bytes(request.getfixturevalue("sqlite_template"))
        yield f"sqlite:///{path}"
        return
    server: PostgreSQL = request.getfixturevalue("postgresql_server")
    with server.clone(request.getfixturevalue("postgresql_template")) as url:
        yield url


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    """An empty database; when the test is over, L1 to L7 must hold in what it left."""
    database = Database(database_url, pool_size=16)
    yield database
    with database.read() as session:
        violations = invariants.find_violations(session)
    database.close()
    assert [] == violations
