"""Alive, ready, measured; and what starting the API costs."""

import asyncio
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import httpx2
import pytest
from fastapi import FastAPI

from api import metrics
from api.app import create_app
from api.config import ApiConfig
from api.metrics import Metrics
from engine.usage import EngineUsage
from storage import served
from storage.blobs import FolderBlobs
from storage.db import Database
from storage.ids import JobId
from tasks.config import load_config
from tests import asking
from tests.api.conftest import Client, Service
from tests.api.inputs import ENDPOINT, build_line, submit
from tests.waiting import wait_until

ROOT = Path(__file__).parents[2]


def ask(
    app: FastAPI, method: str, path: str, *, client: str = "127.0.0.1", **options: object
) -> httpx2.Response:
    async def send() -> httpx2.Response:
        transport = httpx2.ASGITransport(app, raise_app_exceptions=False, client=(client, 4711))
        async with httpx2.AsyncClient(transport=transport, base_url="http://127.0.0.1") as asker:
            return await asker.request(method, path, **options)  # type: ignore[arg-type]

    return asyncio.run(send())


def be_silent() -> None:
    raise ConnectionError("redis://user:secret@10.0.0.7")


@pytest.fixture
def database(sqlite_template: bytes, tmp_path: Path) -> Database:
    (tmp_path / "db").write_bytes(sqlite_template)
    return Database(f"sqlite:///{tmp_path / 'db'}")


def test_live_and_ready_server_says_so(service: Service) -> None:
    alive = asking.get(f"{service.url}/healthz")

    def is_ready() -> bool:
        ready = asking.get(f"{service.url}/readyz").json()
        return bool({"database": "ok", "blobs": "ok"} == ready.get("checks"))

    assert {"status": "alive"} == alive.json()
    wait_until(is_ready)  # where it takes two seconds to look, it is not


def test_server_whose_broker_is_silent_is_alive_but_not_ready(
    database: Database, tmp_path: Path
) -> None:
    app = create_app(
        ApiConfig(pepper=b"", is_open=True),
        database,
        FolderBlobs(tmp_path),
        pings={"broker": be_silent},
    )

    ready = ask(app, "GET", "/readyz")

    assert 503 == ready.status_code
    assert "No answer from: broker." == ready.json()["error"]["message"]
    assert ready.headers["retry-after"]
    assert 200 == ask(app, "GET", "/healthz").status_code


def test_database_that_is_away_is_a_503_that_is_tried_again(tmp_path: Path) -> None:
    app = create_app(
        ApiConfig(pepper=b"x" * 16),
        Database("postgresql://nobody@127.0.0.1:1/none"),
        FolderBlobs(tmp_path),
    )
    key = f"dk_{'0' * 16}_{'0' * 64}"

    answer = ask(app, "GET", "/v1/batches", headers={"authorization": f"Bearer {key}"})

    assert (503, "server_error") == (answer.status_code, answer.json()["error"]["type"])
    assert "1" == answer.headers["retry-after"]
    assert "127.0.0.1" not in answer.text


def test_job_is_kept_when_nobody_can_be_told(database: Database, tmp_path: Path) -> None:
    told: list[JobId] = []

    def fail(job: JobId) -> None:
        told.append(job)
        be_silent()

    app = create_app(
        ApiConfig(pepper=b"", is_open=True),
        database,
        FolderBlobs(tmp_path),
        notify_created=fail,
        notify_cancelled=fail,
    )
    body = {"requests": [build_line(1)], "endpoint": ENDPOINT, "completion_window": "24h"}

    made = ask(app, "POST", "/v1/batches", json=body)
    cancelled = ask(app, "POST", f"/v1/batches/{made.json()['id']}/cancel")

    assert (200, 200) == (made.status_code, cancelled.status_code)
    assert 2 == len(told)


def test_our_own_bug_is_an_envelope_with_an_id(database: Database, tmp_path: Path) -> None:
    app = create_app(ApiConfig(pepper=b"", is_open=True), database, FolderBlobs(tmp_path))

    @app.get("/bug")
    def divide() -> float:
        return 1 / 0

    answer = ask(app, "GET", "/bug")

    assert (500, "server_error") == (answer.status_code, answer.json()["error"]["type"])
    assert "false" == answer.headers["x-should-retry"]
    assert answer.headers["x-request-id"]
    assert "ZeroDivision" not in answer.text


def test_metrics_count_requests_by_route_and_open_work(service: Service, client: Client) -> None:
    submit(client, build_line(1))
    client.http.get("/v1/batches/batch_x")

    def read() -> str:
        return asking.get(f"{service.url}/metrics").text

    # Somebody may have asked a moment ago: then open work is what it was.
    wait_until(lambda: "darkroom_open_jobs{" in read())
    text = read()
    assert (
        'darkroom_http_requests_total{method="GET",route="/v1/batches/{batch_id}",status="404"}'
        in text
    )
    assert 'darkroom_open_jobs{state="validating"}' in text
    assert "batch_x" not in text


def test_metrics_tell_of_the_engines_of_workers_that_are_alive(database: Database) -> None:
    usage = {
        "encode_s": 1.5,
        "prefill_s": 2.0,
        "decode_s": 4.0,
        "num_patches": 1564,
        "num_prompt_tokens": 421,
        "num_tokens": 64,
        "num_cached_tokens": 9,
        "waited_for_media_s": 0.25,
        "floor_s": 3.5,
        "num_running": 7,
        "num_waiting": 6,
        "num_preparing": 5,
    }
    unknown = {**usage, "floor_s": None, "decode_s": 5.0}
    report_usage(database, "host-17-aa", usage)
    report_usage(database, "host-18-bb", unknown)
    report_usage(database, "host-19-cc", usage, alive_s=-1.0)
    shown = [line for line in expose(database) if line.startswith("darkroom_engine_")]
    with database.write() as session:
        for worker in ("host-17-aa", "host-18-bb"):
            served.leave(session, "M", worker=worker)
    left = [line for line in expose(database) if line.startswith("darkroom_engine_")]

    assert [
        'darkroom_engine_seconds_total{model="M",work="encode",worker="0"} 1.5',
        'darkroom_engine_seconds_total{model="M",work="encode",worker="1"} 1.5',
        'darkroom_engine_seconds_total{model="M",work="prefill",worker="0"} 2.0',
        'darkroom_engine_seconds_total{model="M",work="prefill",worker="1"} 2.0',
        'darkroom_engine_seconds_total{model="M",work="decode",worker="0"} 4.0',
        'darkroom_engine_seconds_total{model="M",work="decode",worker="1"} 5.0',
    ] == [line for line in shown if "_engine_seconds" in line]
    assert [
        'darkroom_engine_waited_for_media_seconds_total{model="M",worker="0"} 0.25',
        'darkroom_engine_patches_total{model="M",worker="0"} 1564.0',
        'darkroom_engine_prompt_tokens_total{model="M",worker="0"} 421.0',
        'darkroom_engine_tokens_total{model="M",worker="0"} 64.0',
        'darkroom_engine_floor_seconds_total{model="M",worker="0"} 3.5',
        'darkroom_engine_running{model="M",worker="0"} 7.0',
        'darkroom_engine_waiting{model="M",worker="0"} 6.0',
        'darkroom_engine_preparing{model="M",worker="0"} 5.0',
    ] == [line for line in shown if "_engine_seconds" not in line and 'worker="0"' in line]
    assert not any("floor" in line and 'worker="1"' in line for line in shown)
    assert [] == left


def report_usage(
    database: Database, worker: str, usage: dict[str, Any], alive_s: float = 60.0
) -> None:
    with database.write() as session:
        served.report(session, "M", worker=worker, usage=usage, alive_s=alive_s)


def expose(database: Database) -> list[str]:
    """What a process says that was never asked before."""
    return Metrics().expose(database).decode().splitlines()


def test_names_of_usage_are_those_of_the_engine() -> None:
    """Storage hands them through, and the API must not import what makes them."""
    assert {field.name for field in fields(EngineUsage)} == {
        *metrics._SECONDS,
        *metrics._TOTALS,
        *metrics._NOW,
        "num_cached_tokens",
    }


@pytest.mark.parametrize(
    ("address", "status"),
    [
        ("127.0.0.1", 200),
        ("::1", 200),
        ("10.1.2.3", 200),
        ("::ffff:10.1.2.3", 200),
        ("fd00::7", 200),
        ("11.1.2.3", 403),
        ("::ffff:11.1.2.3", 403),
        ("fe80::7", 403),
    ],
)
def test_metrics_are_for_the_networks_that_were_named(
    address: str, status: int, database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DARKROOM_METRICS_FROM", "10.0.0.0/8, fd00::/8")
    config = ApiConfig(pepper=b"x" * 16, metrics_from=load_config().metrics_from)
    app = create_app(config, database, FolderBlobs(tmp_path))

    assert status == ask(app, "GET", "/metrics", client=address).status_code
    forwarded = {"x-forwarded-for": "127.0.0.1"}
    assert 403 == ask(app, "GET", "/metrics", client=address, headers=forwarded).status_code


def test_metrics_are_not_for_those_behind_a_proxy(service: Service) -> None:
    answer = asking.get(f"{service.url}/metrics", headers={"x-forwarded-for": "10.0.0.7"})

    assert 403 == answer.status_code


def test_importing_the_api_loads_neither_torch_nor_boto() -> None:
    names = {"torch", "transformers", "boto3", "celery"}
    program = f"import sys, api.app, api.server; print(*sorted({names}.intersection(sys.modules)))"

    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )

    assert (0, "", "") == (run.returncode, run.stdout.strip(), run.stderr)
