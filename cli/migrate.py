"""`darkroom migrate`: the database's schema, brought up to date once for all hosts, or only looked at."""

import typer

from cli.errors import ExitCode
from cli.service import open_database, reported


def run_migrate(*, is_check: bool) -> ExitCode:
    """
    Args:
        is_check: change nothing, and say by the exit code whether there is something to do.

    Raises:
        CannotStartError: the message says what to change.
    """
    with reported():
        from migrations.upgrade import check, find_head, find_revision, upgrade
        from storage.errors import SchemaNewerError, SchemaOutdatedError
        from tasks.config import load_config

        with open_database(load_config()) as database:
            if is_check:
                try:
                    check(database)
                except (SchemaNewerError, SchemaOutdatedError) as error:
                    typer.echo(str(error), err=True)
                    return ExitCode.SOME_FAILED
                typer.echo(f"The schema is up to date: {find_head()}.", err=True)
                return ExitCode.DONE
            before = find_revision(database)
            upgrade(database)
        if before == find_head():
            typer.echo(f"The schema was up to date: {before}.", err=True)
        else:
            typer.echo(f"The schema is migrated: {before or 'none'} -> {find_head()}.", err=True)
    return ExitCode.DONE
