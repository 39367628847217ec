"""One API process on SQLite and one on PostgreSQL for all tests; each test is a tenant of its own."""

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx2
import openai
import pytest

from storage import invariants, tenants
from storage.blobs import FolderBlobs
from storage.db import Database
from storage.ids import TenantId
from tests import asking
from tests.api.server import PEPPER
from tests.api.worker import Worker
from tests.services import PostgreSQL, find_free_ports, postgresql_server
from tests.storage.conftest import postgresql_template, sqlite_template

__all__ = ["postgresql_server", "postgresql_template", "sqlite_template"]

ROOT = Path(__file__).parents[2]
START_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Service:
    """A running API, and what it stands on."""

    url: str
    database: Database
    blobs: FolderBlobs
    process: subprocess.Popen[bytes]

    @property
    def worker(self) -> Worker:
        return Worker(self.database, self.blobs)

    def make_key(
        self,
        name: str,
        *,
        max_open_items: int | None = None,
        max_open_bytes: int | None = None,
    ) -> str:
        """A key of the tenant of this name."""
        with self.database.write() as session:
            tenant = tenants.get_or_create(
                session, name, max_open_items=max_open_items, max_open_bytes=max_open_bytes
            )
            return tenants.create_key(session, tenant.id, name="test", pepper=PEPPER)[1]

    def find_tenant(self, name: str) -> TenantId:
        with self.database.read() as session:
            tenant = tenants.find(session, name)
        assert tenant is not None
        return tenant.id


@dataclass(frozen=True)
class Client:
    """OpenAI's own client in strict mode, and a plain one, with the same key."""

    api: openai.OpenAI
    http: httpx2.Client
    key: str
    tenant: str


@contextmanager
def start_service(url: str, folder: Path, *words: str) -> Iterator[Service]:
    (port,) = find_free_ports(1)
    log = (folder / "server.log").open("wb")
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "tests.quickly",
            "tests.api.server",
            url,
            str(folder / "blobs"),
            str(port),
            *words,
        ],
        cwd=ROOT,
        stderr=log,
    )
    database = Database(url, pool_size=8)
    try:
        wait_for(f"http://127.0.0.1:{port}/readyz", process)
        yield Service(f"http://127.0.0.1:{port}", database, FolderBlobs(folder / "blobs"), process)
    finally:
        process.terminate()
        code = process.wait(timeout=60)
        log.close()
        database.close()
    assert code in (0, -15), (folder / "server.log").read_text()[-4000:]
    assert "request_crashed" not in (folder / "server.log").read_text()


def wait_for(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        assert process.poll() is None, "the server ended"
        try:
            if asking.get(url).status_code == 200:
                return
        except httpx2.TransportError:
            time.sleep(0.05)
    pytest.fail("the server did not get ready")


@pytest.fixture(scope="session")
def sqlite_service(
    sqlite_template: bytes, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("api-sqlite")
    (folder / "darkroom.sqlite3").write_bytes(sqlite_template)
    with start_service(f"sqlite:///{folder / 'darkroom.sqlite3'}", folder) as service:
        yield service
        check_invariants(service)


@pytest.fixture(scope="session")
def postgresql_service(
    postgresql_server: PostgreSQL,
    postgresql_template: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("api-postgresql")
    with (
        postgresql_server.clone(postgresql_template) as url,
        start_service(url, folder) as service,
    ):
        yield service
        check_invariants(service)


def check_invariants(service: Service) -> None:
    with service.database.read() as session:
        assert [] == invariants.find_violations(session)


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.services)])
def service(request: pytest.FixtureRequest) -> Service:
    found: Service = request.getfixturevalue(f"{request.param}_service")
    return found


@pytest.fixture
def client(service: Service, request: pytest.FixtureRequest) -> Iterator[Client]:
    """A client of a tenant of this test's own."""
    with open_client(service, request.node.name) as client:
        yield client


@pytest.fixture
def stranger(service: Service, request: pytest.FixtureRequest) -> Iterator[Client]:
    """A client of another tenant."""
    with open_client(service, f"stranger to {request.node.name}") as client:
        yield client


@contextmanager
def open_client(service: Service, tenant: str, **limits: int) -> Iterator[Client]:
    key = service.make_key(tenant, **limits)
    with (
        openai.OpenAI(
            base_url=f"{service.url}/v1",
            api_key=key,
            max_retries=2,
            timeout=asking.ANSWER_S,
            http_client=openai.DefaultHttpxClient(verify=asking.TLS, trust_env=False),
            _strict_response_validation=True,
        ) as api,
        httpx2.Client(
            base_url=service.url,
            headers={"authorization": f"Bearer {key}"},
            timeout=asking.ANSWER_S,
            verify=asking.TLS,
            trust_env=False,
        ) as http,
    ):
        yield Client(api, http, key, tenant)
