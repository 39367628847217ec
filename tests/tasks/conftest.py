"""A migrated database (SQLite and PostgreSQL), a folder of blobs, and a real broker for all tests."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from storage.blobs import FolderBlobs
from storage.db import Database
from tasks.broker import build_client, open_broker
from tasks.config import Config, load_config
from tasks.stores import Stores
from tests.storage.conftest import (
    database,
    database_url,
    postgresql_server,
    postgresql_template,
    sqlite_template,
)
from tests.tasks.fakes import RecordingDispatcher

__all__ = [
    "database",
    "database_url",
    "postgresql_server",
    "postgresql_template",
    "sqlite_template",
]


@pytest.fixture
def config(tmp_path: Path, database_url: str) -> Config:
    return load_config(home=tmp_path, database_url=database_url, chunk_items=16)


@pytest.fixture
def stores(tmp_path: Path, database: Database) -> Stores:
    return Stores(database, FolderBlobs(tmp_path / "blobs"))


@pytest.fixture
def dispatcher(config: Config) -> Iterator[RecordingDispatcher]:
    dispatcher = RecordingDispatcher(config, "redis://127.0.0.1:1/0")
    yield dispatcher
    dispatcher.close()


@pytest.fixture(scope="session")
def broker_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with open_broker(load_config(home=tmp_path_factory.mktemp("broker"))) as url:
        yield url


@pytest.fixture
def broker(broker_server: str) -> str:
    """A broker that holds nothing."""
    with build_client(broker_server) as client:
        client.flushall()
    return broker_server
