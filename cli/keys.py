"""
API keys: made, listed and revoked in the database itself, on a host that may reach it.

A key is shown once. What is kept is a hash of it, under a pepper that the servers have too.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli import service
from cli.errors import CannotStartError, ExitCode

if TYPE_CHECKING:
    from storage.db import Database
    from tasks.config import Config

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Make, list and revoke API keys, in the database of this host.",
)

Home = Annotated[
    Path,
    typer.Option(
        metavar="FOLDER",
        envvar="DARKROOM_HOME",
        help="Where the pepper and the database of a service on one host lie.",
    ),
]
DatabaseUrl = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        envvar="DARKROOM_DATABASE_URL",
        help="sqlite:///PATH or postgresql://…",
        show_default="a file in the home folder",
    ),
]
Tenant = Annotated[
    str, typer.Option(metavar="NAME", envvar="DARKROOM_TENANT", help="Whose key it is.")
]
MAX_COUNT = 2**31 - 1
MAX_BYTES = 2**63 - 1
DEFAULT_HOME = Path("~/.darkroom")
DEFAULT_TENANT = "default"


@app.command()
def create(
    name: Annotated[str, typer.Argument(help="What it is for; shown in the list.")],
    tenant: Tenant = DEFAULT_TENANT,
    days: Annotated[
        float | None,
        typer.Option(min=0.01, envvar="DARKROOM_DAYS", help="After how many days it ends."),
    ] = None,
    home: Home = DEFAULT_HOME,
    database_url: DatabaseUrl = None,
) -> None:
    """
    Make a key and write it to stdout. It cannot be had a second time.

    Servers with DARKROOM_DATABASE_URL know it by DARKROOM_PEPPER or DARKROOM_PEPPER_FILE: give the
    same here.
    """
    from storage import tenants
    from tasks.stores import load_pepper

    with (
        open_database(home, database_url) as (config, database),
        database.write() as session,
    ):
        secret = load_pepper(config)
        owner = tenants.get_or_create(session, tenant)
        lifetime_s = None if days is None else days * 86400
        _, key = tenants.create_key(
            session, owner.id, name=name, pepper=secret, lifetime_s=lifetime_s
        )
    typer.echo(key)
    typer.echo("Keep it: it is not shown again.", err=True)


@app.command("list")
def list_(
    tenant: Tenant = DEFAULT_TENANT, home: Home = DEFAULT_HOME, database_url: DatabaseUrl = None
) -> None:
    """List a tenant's keys by their public part: id, name, since when, and whether it is good."""
    from storage import tenants

    with open_database(home, database_url) as (_, database), database.read() as session:
        owner = tenants.find(session, tenant)
        rows = [] if owner is None else tenants.list_keys(session, owner.id)
    for row in rows:
        made = datetime.fromtimestamp(row.created_at, UTC).isoformat(timespec="seconds")
        state = "revoked" if row.revoked_at is not None else "in use"
        if row.expires_at is not None and state == "in use":
            end = datetime.fromtimestamp(row.expires_at, UTC).isoformat(timespec="seconds")
            state = f"until {end}"
        typer.echo(f"{row.id}\t{row.name}\t{made}\t{state}")


@app.command()
def revoke(
    key: Annotated[str, typer.Argument(metavar="KEY", help="The key, or its id from the list.")],
    tenant: Tenant = DEFAULT_TENANT,
    home: Home = DEFAULT_HOME,
    database_url: DatabaseUrl = None,
) -> None:
    """End a key at once."""
    from storage import tenants
    from storage.errors import NotFoundError

    key_id = key.split("_")[1] if key.startswith("dk_") else key
    is_revoked = False
    with open_database(home, database_url) as (_, database), database.write() as session:
        owner = tenants.find(session, tenant)
        if owner is not None:
            with suppress(NotFoundError):
                tenants.revoke_key(session, owner.id, key_id)
                is_revoked = True
    if not is_revoked:
        typer.echo("There is no such key in use.", err=True)
        raise typer.Exit(1)
    typer.echo(f"{key_id} is revoked.", err=True)


Limit = Annotated[
    str | None,
    typer.Option(metavar="N", help="A number, or `none` to leave it to the model or the settings."),
]


@app.command()
def limits(
    images: Limit = None,
    videos: Limit = None,
    frames: Limit = None,
    open_items: Limit = None,
    open_bytes: Limit = None,
    tenant: Tenant = DEFAULT_TENANT,
    home: Home = DEFAULT_HOME,
    database_url: DatabaseUrl = None,
) -> None:
    """
    Set what a tenant may bring in one prompt and have open at a time, and show it.

    A tenant's limits lower those of the model and never raise them. They hold for what is handed in
    from now on.
    """
    from storage import tenants

    given = {
        "max_images": images,
        "max_videos": videos,
        "max_frames": frames,
        "max_open_items": open_items,
        "max_open_bytes": open_bytes,
    }
    changes = {name: _read_limit(name, text) for name, text in given.items() if text is not None}
    with open_database(home, database_url) as (_, database), database.write() as session:
        owner = tenants.get_or_create(session, tenant)
        tenants.set_limits(session, owner.id, changes)
        session.refresh(owner)
        rows = [(name, getattr(owner, name)) for name in tenants.LIMITS]
    for name, limit in rows:
        typer.echo(f"{name.removeprefix('max_')}\t{'none' if limit is None else limit}")


def _read_limit(name: str, text: str) -> int | None:
    if text == "none":
        return None
    most = MAX_BYTES if name == "max_open_bytes" else MAX_COUNT
    least = 1 if name == "max_frames" else 0
    if not re.fullmatch("[0-9]{1,20}", text) or not least <= int(text) <= most:
        option = name.removeprefix("max_").replace("_", "-")
        typer.echo(f"error: --{option}: give a number from {least} to {most}, or none.", err=True)
        raise typer.Exit(ExitCode.USAGE)
    return int(text)


@contextmanager
def open_database(home: Path, url: str | None) -> "Iterator[tuple[Config, Database]]":
    """The service's settings and its database."""
    try:
        with service.reported():
            from tasks.config import load_config

            given = {} if url is None else {"database_url": url}
            config = load_config(home=home, **given)
            service.prepare_database(config)
            with service.open_database(config) as database:
                yield config, database
    except CannotStartError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(error.code) from error
