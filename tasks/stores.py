"""
The database and the blobs that a process works on, opened from its settings.
"""

from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from storage.blobs import Blobs, FolderBlobs, S3Blobs, S3Config
from storage.db import Database
from tasks.config import Config


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
