"""
`darkroom worker`: a process that serves one model, or the cpu queue, until it is told to stop.
"""

import os
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from cli.errors import CannotStartError
from engine.errors import EngineError

if TYPE_CHECKING:
    from tasks.config import Config


def run_worker(
    *,
    model: str | None,
    limits: str | None,
    max_model_len: int | None,
    device: str,
    dtype: str,
) -> int:
    """
    Start a worker; return the number that its process ends with.

    Args:
        model: None for a worker of the cpu queue.
        limits: as `image=4`; None for those of the settings.

    Raises:
        CannotStartError: the message says what to change.
    """
    try:
        from tasks.broker import open_broker
        from tasks.config import MediaLimits, load_config, parse_limits
        from tasks.engines import EngineOptions, load_engine
        from tasks.errors import TaskError
        from tasks.logs import configure_logging
        from tasks.worker import run_cpu_worker, run_gpu_worker
    except ModuleNotFoundError as error:
        raise CannotStartError(
            f"The service is not installed here ({error.name} is missing). "
            "Run pip install -e '.[service]' in Darkroom's folder."
        ) from error
    configure_logging()
    env = dict(os.environ)
    try:
        config = load_config()
        prepare_database(config)
        with open_broker(config) as url:
            if model is None:
                return run_cpu_worker(config, url, env=env)
            chosen = (
                config.limits_of(model)
                if limits is None
                else MediaLimits.model_validate(parse_limits(limits))
            )
            options = EngineOptions(model, chosen, max_model_len, device, dtype)
            with closing(load_engine(options)) as engine:
                return run_gpu_worker(config, url, engine, model, env=env)
    except ModuleNotFoundError as error:
        raise CannotStartError(
            f"The engine is not installed here ({error.name} is missing). "
            "Run pip install -e '.[engine]' in Darkroom's folder."
        ) from error
    except (TaskError, EngineError, ValueError) as error:
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

    Path(config.home).mkdir(parents=True, exist_ok=True)
    with closing(Database(config.database)) as database:
        upgrade(database)
