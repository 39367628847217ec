"""
What Alembic runs: the migrations, under timeouts, one process at a time.

The connection comes from the caller (`migrations.upgrade`), or from `DARKROOM_DATABASE_URL` when the
`alembic` command is used by hand.
"""

import os

from alembic import context
from sqlalchemy import Connection, text

from storage.db import build_engine
from storage.tables import Base

LOCK_TIMEOUT_MS = 5_000
"""A migration that cannot have a table soon gives up: behind it, everybody else would queue."""

STATEMENT_TIMEOUT_MS = 10 * 60_000

TURN_TIMEOUT_MS = 15 * 60_000
"""How long to wait for another process that is migrating: longer than a statement of it may take."""

LOCK_KEY = 0x6461726B  # "dark"; one number for all migrations of Darkroom on a server's database


def run(connection: Connection) -> None:
    is_sqlite = connection.dialect.name == "sqlite"
    context.configure(
        connection=connection,
        target_metadata=Base.metadata,
        compare_type=True,
        compare_server_default=True,
        transactional_ddl=True,  # on SQLite too, where Alembic does not expect it
        render_as_batch=is_sqlite,  # SQLite alters a table by copying it
    )
    with context.begin_transaction():
        if not is_sqlite:
            # Waiting for one's turn blocks nobody, waiting for a table blocks everybody.
            connection.execute(text(f"SET LOCAL lock_timeout = {TURN_TIMEOUT_MS}"))
            connection.execute(text(f"SET LOCAL statement_timeout = {TURN_TIMEOUT_MS}"))
            # Released with the transaction. A second process waits, and finds nothing to do.
            connection.execute(text(f"SELECT pg_advisory_xact_lock({LOCK_KEY})"))
            connection.execute(text(f"SET LOCAL lock_timeout = {LOCK_TIMEOUT_MS}"))
            connection.execute(text(f"SET LOCAL statement_timeout = {STATEMENT_TIMEOUT_MS}"))
        context.run_migrations()


def main() -> None:
    given: Connection | None = context.config.attributes.get("connection")
    if given is not None:
        run(given)
        return
    url = os.environ.get("DARKROOM_DATABASE_URL")
    if not url:
        raise SystemExit("Set DARKROOM_DATABASE_URL to the database that is to be migrated.")
    engine = build_engine(url).execution_options(is_write=True)
    with engine.connect() as connection:
        run(connection)


main()
