"""
What the verbs of the service share: how they open things, and what they say when they cannot start.
"""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Final

from cli.errors import CannotStartError, ExitCode
from engine.errors import EngineError
from storage.errors import StorageError
from tasks.errors import TaskError

if TYPE_CHECKING:
    from tasks.config import Config

ENGINE_PACKAGES: Final = frozenset(
    {"huggingface_hub", "jinja2", "safetensors", "tokenizers", "torch", "tqdm", "transformers"}
)
"""What only the extra `engine` brings, as it is imported."""


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
    except (StorageError, TaskError) as error:
        # Who starts us again may be lucky where a database or a broker was not there yet.
        code = ExitCode.UNREACHABLE if error.retryable else ExitCode.USAGE
        raise CannotStartError(str(error), code) from error
    except (EngineError, OSError, ValueError) as error:
        raise CannotStartError(str(error)) from error


def prepare_database(config: "Config") -> None:
    """
    Bring our own database to the newest schema.

    One that was given is the operator's to migrate, before the workers start: `alembic upgrade head`.
    """
    if config.database_url:
        return
    from migrations.upgrade import upgrade
    from storage.db import Database

    config.home.mkdir(parents=True, exist_ok=True)
    with closing(Database(config.database)) as database:
        upgrade(database)
