"""Who comes in: keys that end, and a server without keys that only its own host may ask."""

from collections.abc import Iterator
from pathlib import Path

import httpx2
import openai
import pytest

from api.config import ApiConfig, BadApiConfigError, check_binding
from storage import tenants
from tests import asking
from tests.api.conftest import Client, Service, start_service
from tests.api.inputs import build_line, submit
from tests.api.server import PEPPER


@pytest.fixture(scope="module")
def open_service(
    sqlite_template: bytes, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("open")
    (folder / "db").write_bytes(sqlite_template)
    with start_service(f"sqlite:///{folder / 'db'}", folder, "open") as service:
        yield service


def get(service: Service, path: str = "/v1/batches", **headers: str) -> httpx2.Response:
    return asking.get(f"{service.url}{path}", headers=headers)


def test_revoked_key_is_refused_at_once(service: Service, client: Client) -> None:
    tenant = service.find_tenant(client.tenant)
    assert 200 == client.http.get("/v1/batches").status_code
    with service.database.write() as session:
        tenants.revoke_key(session, tenant, client.key.split("_")[1])

    with pytest.raises(openai.AuthenticationError) as caught:
        client.api.batches.list()

    assert "invalid_api_key" == caught.value.code


def test_expired_key_is_refused(service: Service) -> None:
    with service.database.write() as session:
        tenant = tenants.get_or_create(session, "late")
        _, key = tenants.create_key(session, tenant.id, name="old", pepper=PEPPER, lifetime_s=-1.0)

    assert 401 == get(service, authorization=f"Bearer {key}").status_code


def test_open_server_needs_no_key(open_service: Service) -> None:
    assert 200 == get(open_service).status_code
    assert 200 == get(open_service, authorization="Bearer unused").status_code


def test_open_server_still_knows_a_key(open_service: Service) -> None:
    key = open_service.make_key("somebody")
    batches = openai.OpenAI(base_url=f"{open_service.url}/v1", api_key="unused").batches
    client = Client(
        openai.OpenAI(base_url=f"{open_service.url}/v1", api_key="unused"),
        httpx2.Client(),
        "",
        "default",
    )
    batch = submit(client, build_line(1))
    client.http.close()

    assert [batch.id] == [one.id for one in batches.list()]
    assert [] == get(open_service, authorization=f"Bearer {key}").json()["data"]
    assert 401 == get(open_service, authorization=f"Bearer {key[:-1]}0x").status_code


@pytest.mark.parametrize(
    "headers",
    [
        {"host": "evil.example"},
        {"host": "darkroom.evil.example:80"},
        {"host": "10.0.0.7:8000"},
        {"host": "[::1"},
        {"host": "127.0.0.1@evil.example"},
        {"host": "evil.example#127.0.0.1"},
        {"host": ""},
        {"origin": "http://[evil"},
        {"origin": "https://evil.example"},
        {"origin": "null"},
        {"origin": "http://127.0.0.1:1"},
    ],
)
def test_open_server_answers_no_other_page(open_service: Service, headers: dict[str, str]) -> None:
    for path in ("/v1/batches", "/metrics"):
        answer = get(open_service, path, **headers)

        assert (403, "permission_error") == (answer.status_code, answer.json()["error"]["type"])


def test_open_server_answers_its_own_page(open_service: Service) -> None:
    assert 200 == get(open_service, origin=open_service.url).status_code


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.7", "darkroom.example"])  # noqa: S104
def test_open_server_is_not_bound_beyond_its_host(host: str) -> None:
    with pytest.raises(BadApiConfigError):
        check_binding(host, ApiConfig(pepper=b"", is_open=True))

    check_binding(host, ApiConfig(pepper=b"x" * 16))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "[::1]", "localhost"])
def test_open_server_is_bound_to_loopback(host: str) -> None:
    check_binding(host, ApiConfig(pepper=b"", is_open=True))


def test_keys_are_not_hashed_without_a_pepper() -> None:
    with pytest.raises(BadApiConfigError):
        ApiConfig(pepper=b"short")


def test_keys_stand_in_no_log(service: Service, client: Client) -> None:
    client.http.get(f"/v1/batches?key={client.key}")
    log = Path(str(service.blobs._folder)).parent / "server.log"

    assert "request_answered" in log.read_text()
    assert client.key.split("_")[2] not in log.read_text()
