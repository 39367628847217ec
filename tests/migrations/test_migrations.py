"""The migrations lead from an empty database to what the models say, on both databases."""

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from sqlalchemy import text

from migrations import upgrade as upgrades
from migrations.upgrade import build_config, check, find_head, find_revision, upgrade
from storage import items, jobs
from storage.db import Database
from storage.errors import DatabaseBusyError, SchemaNewerError, SchemaOutdatedError
from storage.tables import Base
from tests.services import PostgreSQL
from tests.storage.rows import completion, lease, make_job

ROOT = Path(__file__).parents[2]

SQLITE_SCHEMA = "SELECT type, name, sql FROM sqlite_master WHERE name NOT LIKE '%alembic%'"
POSTGRESQL_SCHEMA = (
    """
    SELECT table_name, column_name, data_type, character_maximum_length, is_nullable, column_default
    FROM information_schema.columns WHERE table_schema = 'public'
    """,
    """
    SELECT conrelid::regclass::text, conname, pg_get_constraintdef(oid)
    FROM pg_constraint WHERE connamespace = 'public'::regnamespace
    """,
    "SELECT tablename, indexname, indexdef FROM pg_indexes WHERE schemaname = 'public'",
)


@pytest.fixture(params=["sqlite", "postgresql"])
def empty_databases(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """Two empty databases of a kind."""
    if request.param == "sqlite":
        databases = [Database(f"sqlite:///{tmp_path / name}") for name in ("a", "b")]
        yield databases
    else:
        server: PostgreSQL = request.getfixturevalue("postgresql_server")
        with server.clone() as first, server.clone() as second:
            databases = [Database(first), Database(second)]
            yield databases
            for database in databases:
                database.close()
        return
    for database in databases:
        database.close()


def test_migrated_schema_is_what_the_models_say(empty_databases: list[Database]) -> None:
    migrated, modelled = empty_databases
    upgrade(migrated)
    Base.metadata.create_all(modelled.engine)

    assert read_schema(modelled) == read_schema(migrated)


def test_autogenerate_finds_nothing_to_do(empty_databases: list[Database]) -> None:
    database = empty_databases[0]
    upgrade(database)

    with database.engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        difference = compare_metadata(context, Base.metadata)

    assert [] == difference


def test_upgrading_twice_changes_nothing(empty_databases: list[Database]) -> None:
    database = empty_databases[0]
    upgrade(database)
    before = read_schema(database)

    upgrade(database)

    assert before == read_schema(database)


def test_two_processes_may_upgrade_at_once(empty_databases: list[Database]) -> None:
    database = empty_databases[0]
    url = database.engine.url.render_as_string(hide_password=False)
    program = (
        "import sys; from migrations.upgrade import upgrade; from storage.db import Database; "
        "upgrade(Database(sys.argv[1]))"
    )
    processes = [
        subprocess.Popen([sys.executable, "-W", "error", "-c", program, url], cwd=ROOT)
        for _ in range(3)
    ]

    assert [0, 0, 0] == [process.wait(timeout=120) for process in processes]
    assert "items" in str(read_schema(database))


def test_downgrade_leaves_nothing_behind(empty_databases: list[Database]) -> None:
    database, untouched = empty_databases
    upgrade(database)

    config = build_config()
    with database.engine.execution_options(is_write=True).connect() as connection:
        config.attributes["connection"] = connection
        command.downgrade(config, "base")

    assert read_schema(untouched) == read_schema(database)


def test_results_of_an_older_version_say_that_no_token_was_copied(
    empty_databases: list[Database],
) -> None:
    database = empty_databases[0]
    upgrade(database)
    job = make_job(database, 1)
    (leased,) = lease(database, 1).items
    with database.write() as session:
        items.complete(session, [replace(completion(leased.fence), num_cached_tokens=9)])

    config = build_config()
    with database.engine.execution_options(is_write=True).connect() as connection:
        config.attributes["connection"] = connection
        command.downgrade(config, "0007")
    upgrade(database)

    with database.read() as session:
        (ended,) = items.list_by_line(session, job)
        found = jobs.find(session, job)
    assert found is not None
    assert (12, 0) == (ended.num_prompt_tokens, ended.num_cached_tokens)
    assert (12, 0) == (found.num_prompt_tokens, found.num_cached_tokens)


@contextmanager
def next_version(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Darkroom as it may be next year: with one migration more, and little patience in tests."""
    scripts = folder / "migrations"
    if not scripts.exists():
        shutil.copytree(Path(upgrades.__file__).parent, scripts)
        (scripts / "versions" / "2099_01_01_next.py").write_text(
            "import sqlalchemy as sa\nfrom alembic import op\n"
            f"revision = 'next'\ndown_revision = {find_head()!r}\n"
            "def upgrade():\n    op.add_column('items', sa.Column('mark', sa.Integer()))\n"
        )
        env = scripts / "env.py"
        env.write_text(env.read_text().replace("TIMEOUT_MS = 5_000", "TIMEOUT_MS = 50"))

    def build_next() -> Config:
        config = build_config()
        config.set_main_option("script_location", str(scripts).replace("%", "%%"))
        return config

    with monkeypatch.context() as patch:
        patch.setattr(upgrades, "build_config", build_next)
        patch.setattr(upgrades, "RETRY_S", 0.01)
        yield


def test_only_the_schema_of_this_very_version_is_good(
    empty_databases: list[Database], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = empty_databases[0]
    with pytest.raises(SchemaOutdatedError, match="Run `darkroom migrate` once"):
        check(database)
    upgrade(database)
    check(database)
    head = find_head()

    with next_version(tmp_path, monkeypatch):
        with pytest.raises(SchemaOutdatedError, match=f"is {head} and this Darkroom needs next"):
            check(database)
        upgrade(database)
        check(database)
    with pytest.raises(SchemaNewerError, match=f"is next, and .* none after {head}"):
        check(database)
    with pytest.raises(SchemaNewerError):
        upgrade(database)

    assert "next" == find_revision(database)


def test_migration_gives_up_where_others_hold_a_table_and_changes_nothing(
    postgresql_server: PostgreSQL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with postgresql_server.clone() as url:
        database = Database(url)
        upgrade(database)
        before = read_schema(database)

        with next_version(tmp_path, monkeypatch):
            with database.write() as session:  # a read holds nothing between its statements
                session.execute(text("SELECT count(*) FROM items"))
                with pytest.raises(DatabaseBusyError):
                    upgrade(database)
                during = read_schema(database)
            upgrade(database)
            after = read_schema(database)
        database.close()

    assert before == during
    assert len(before) < len(after)


def read_schema(database: Database) -> list[Any]:
    with database.engine.connect() as connection:
        if connection.dialect.name == "sqlite":
            # The order of constraints, unlike that of columns, means nothing.
            return sorted(
                [kind, name, *sorted(split_at_constraints(sql or ""))]
                for kind, name, sql in connection.execute(text(SQLITE_SCHEMA))
            )
        return sorted(
            [str(value) for value in row]
            for query in POSTGRESQL_SCHEMA
            for row in connection.execute(text(query))
            if "alembic" not in str(row)
        )


def split_at_constraints(sql: str) -> list[str]:
    return [part.strip(" ,)") for part in re.split("(?=CONSTRAINT )", " ".join(sql.split()))]
