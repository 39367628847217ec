"""
The database and the blobs that a process works on, and the pepper, opened from its settings.
"""

from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from storage import pepper
from storage.blobs import Blobs, FolderBlobs, S3Blobs, S3Config
from storage.db import Database
from storage.errors import BadPepperError
from tasks.config import Config
from tasks.errors import BadSettingError


@dataclass(frozen=True, slots=True)
class Stores:
    """Where the truth lies. Threads share it."""

    database: Database
    blobs: Blobs

    def close(self) -> None:
        self.database.close()


def open_stores(config: Config, *, num_threads: int = 8) -> Stores:
    """
    Open both.

    Args:
        num_threads: of this process that will read or write at once.
    """
    if not config.database_url:
        config.home.mkdir(parents=True, exist_ok=True)
    return Stores(
        Database(config.database, pool_size=num_threads),
        open_blobs(config, max_connections=num_threads),
    )


def open_blobs(config: Config, *, max_connections: int = 16) -> Blobs:
    place = config.blob_place
    if not place.startswith("s3://"):
        return FolderBlobs(Path(place).expanduser().absolute())
    parts = urlsplit(place)
    return S3Blobs(
        S3Config(
            bucket=parts.netloc,
            prefix=parts.path.strip("/"),
            endpoint_url=config.s3_endpoint_url,
            region=config.s3_region,
            max_connections=max_connections,
            is_checksummed=config.s3_checksums,
        )
    )


def load_pepper(config: Config) -> bytes:
    """
    What API keys are hashed with: as it was given, or that of the home folder.

    Raises:
        BadSettingError: it cannot be read; or there is a database that other hosts may share and
            no pepper, so that each host would make its own and refuse the keys of the others.
    """
    given = config.pepper.get_secret_value()
    if given:
        return pepper.parse(given)
    if config.database_url:
        raise BadSettingError(
            "DARKROOM_PEPPER or DARKROOM_PEPPER_FILE must be set beside DARKROOM_DATABASE_URL: every "
            "host checks API keys with the same one. Make it once with `openssl rand -hex 32`, or "
            f"name the file {pepper.FILENAME!r} in DARKROOM_HOME that keys were made with before."
        )
    try:
        return pepper.load(config.home)
    except BadPepperError as error:
        raise BadSettingError(f"DARKROOM_HOME ({pepper.FILENAME}): {error}") from error
