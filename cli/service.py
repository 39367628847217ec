"""
What the verbs of the service share: how they open things, and what they say when they cannot start.
"""

import json
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Any, Final

from cli.errors import CannotStartError, ExitCode
from engine.errors import EngineError
from storage.errors import BadDatabaseUrlError, DatabaseUnavailableError, StorageError
from tasks.errors import BadSettingError, TaskError

if TYPE_CHECKING:
    from storage.db import Database
    from tasks.config import Config

ENGINE_PACKAGES: Final = frozenset(
    {"huggingface_hub", "jinja2", "safetensors", "tokenizers", "torch", "tqdm", "transformers"}
)
"""What only the extra `engine` brings, as it is imported."""

RETRY_S: Final = 0.5


@contextmanager
def reported() -> Iterator[None]:
    """
    Turn what keeps a process from starting into a message for people.

    Imports of a room belong inside: what is not installed is such a thing too.

    Raises:
        CannotStartError: the message says what to change.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        extra = "engine" if package in ENGINE_PACKAGES else "service"
        raise CannotStartError(
            f"The {extra} is not installed here ({error.name} is missing). "
            f"Run pip install -e '.[{extra}]' in Darkroom's folder."
        ) from error
    except (StorageError, TaskError, EngineError) as error:
        # Who starts us again may be lucky where a database, a broker or memory was not there yet.
        code = ExitCode.UNREACHABLE if error.retryable else ExitCode.USAGE
        raise CannotStartError(str(error), code) from error
    except (OSError, ValueError) as error:
        raise CannotStartError(str(error)) from error


def read_object(option: str, text: str | None) -> Mapping[str, Any] | None:
    """
    A JSON object that an option was given.

    Raises:
        CannotStartError: it is none.
    """
    if text is None:
        return None
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise CannotStartError(f'{option} must be a JSON object, as {{"num_crops": 4}}.')
    return value


def prepare_database(config: "Config") -> None:
    """
    See that the schema is the one that this program was written for.

    Our own database is brought to it. One that was given is the operator's to migrate, once for all
    hosts: `darkroom migrate`.

    Raises:
        SchemaOutdatedError, SchemaNewerError: it is another one.
        DatabaseUnavailableError: the database does not answer.
    """
    from migrations.upgrade import check, upgrade

    with open_database(config) as database:
        if config.database_url:
            check(database)
        else:
            upgrade(database)


@contextmanager
def open_database(config: "Config") -> "Iterator[Database]":
    """
    The database, once it answers; in its folder, if it is our own.

    Raises:
        BadSettingError: its URL makes no sense.
        DatabaseUnavailableError: it does not answer for so long; the text says what the driver said.
    """
    from storage.db import Database

    if not config.database_url:
        config.home.mkdir(parents=True, exist_ok=True)
    try:
        database = Database(config.database)
    except BadDatabaseUrlError as error:
        raise BadSettingError(f"DARKROOM_DATABASE_URL: {error}") from error
    with closing(database):
        _await(database, config.start_wait_s)
        yield database


def _await(database: "Database", wait_s: float) -> None:
    """Processes of a group start in any order, also after a crash: wait before giving up."""
    from storage.db import explain

    deadline = time.monotonic() + wait_s
    is_told = False
    while True:
        try:
            database.ping()
        except DatabaseUnavailableError as error:
            reason = explain(error)
            if time.monotonic() > deadline:
                raise DatabaseUnavailableError(
                    "The database does not answer. Start it, or correct DARKROOM_DATABASE_URL. "
                    f"The driver says: {reason}"
                ) from error
            if not is_told:
                print(f"darkroom: waiting for the database: {reason}", file=sys.stderr)
                is_told = True
            time.sleep(RETRY_S)
        else:
            return
