"""Bring a database to the newest schema; what a program calls instead of the `alembic` command."""

from pathlib import Path

from alembic import command
from alembic.config import Config

from storage.db import Database


def upgrade(database: Database, revision: str = "head") -> None:
    """
    Run the migrations that are missing, all in one transaction.

    Two processes may call at once: the second waits for the first, and finds nothing to do.
    """
    engine = database.engine.execution_options(is_write=True)
    with engine.connect() as connection:
        config = build_config()
        config.attributes["connection"] = connection
        command.upgrade(config, revision)


def build_config() -> Config:
    """Alembic's settings, wherever the package is installed and whichever folder is current."""
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    config.set_main_option("file_template", "%%(year)d_%%(month).2d_%%(day).2d_%%(slug)s")
    return config
