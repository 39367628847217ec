"""
Bring a database to the newest schema, or say how it stands; what a program calls instead of `alembic`.

A process starts only on the schema that it was written for: with an older one statements would fail
in the middle of work, and with a newer one nobody has tried it.
"""

import time
from pathlib import Path
from typing import Final

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

from storage.db import Database
from storage.errors import DatabaseBusyError, SchemaNewerError, SchemaOutdatedError

TRIES: Final = 6
RETRY_S: Final = 2.0
"""A migration waits for a table only briefly, since everybody else queues behind it; then again."""


def upgrade(database: Database, revision: str = "head") -> None:
    """
    Run the migrations that are missing, all in one transaction.

    Two processes may call at once: the second waits for the first, and finds nothing to do.

    Raises:
        SchemaNewerError: a later version of Darkroom was here.
        DatabaseBusyError: others held a table too long. Nothing was changed.
        DatabaseUnavailableError: nothing was changed.
    """
    refuse_newer(database)
    for number in range(1, TRIES + 1):
        try:
            _upgrade(database, revision)
        except DatabaseBusyError:
            if number == TRIES:
                raise
            time.sleep(RETRY_S)
        else:
            return


def _upgrade(database: Database, revision: str) -> None:
    with database.migrating() as connection:
        config = build_config()
        config.attributes["connection"] = connection
        command.upgrade(config, revision)


def check(database: Database) -> None:
    """
    Refuse a schema that is not exactly the one this program was written for.

    Raises:
        SchemaOutdatedError, SchemaNewerError: what there is, and what to do.
        DatabaseUnavailableError: nothing can be said.
    """
    refuse_newer(database)
    current, head = find_revision(database), find_head()
    if current is None:
        raise SchemaOutdatedError("The database has no tables yet. Run `darkroom migrate` once.")
    if current != head:
        raise SchemaOutdatedError(
            f"The database's schema is {current} and this Darkroom needs {head}. "
            "Run `darkroom migrate` once, then start again."
        )


def refuse_newer(database: Database) -> None:
    """Raises `SchemaNewerError` where the schema is one that this program has never heard of."""
    current = find_revision(database)
    known = {script.revision for script in _open_scripts().walk_revisions()}
    if current is not None and current not in known:
        raise SchemaNewerError(
            f"The database's schema is {current}, and this Darkroom knows none after "
            f"{find_head()}: a newer version has migrated it. Start that version here too."
        )


def find_revision(database: Database) -> str | None:
    """How far the database is; None where no migration ever ran."""
    with database.autocommit() as connection:
        return MigrationContext.configure(connection).get_current_revision()


def find_head() -> str:
    """The newest schema that this program knows."""
    head = _open_scripts().get_current_head()
    assert head is not None, "there is a first migration"
    return head


def _open_scripts() -> ScriptDirectory:
    return ScriptDirectory.from_config(build_config())


def build_config() -> Config:
    """Alembic's settings, wherever the package is installed and whichever folder is current."""
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    config.set_main_option("file_template", "%%(year)d_%%(month).2d_%%(day).2d_%%(slug)s")
    return config
