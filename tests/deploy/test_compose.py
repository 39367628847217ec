"""What compose.yaml starts, as far as it can be known without an engine that starts it."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from api.server import DRAIN_S
from tasks.config import Config, load_config
from tasks.worker import CLOSE_S
from tests.deploy.commands import parse_command
from tests.deploy.files import (
    ROOT,
    Stage,
    fill_in,
    last_json,
    read_compose,
    read_dockerfile,
    read_env,
    read_seconds,
)
from tests.services import S3Server

OURS = {"api", "worker", "model-cpu", "model-gpu", "migrate", "keys", "bucket"}
LONG_LIVED = {"api", "worker", "model-cpu", "model-gpu", "postgres", "valkey", "s3"}


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    return read_compose()


@pytest.fixture(scope="module")
def services(compose: dict[str, Any]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = compose["services"]
    return found


@pytest.fixture(scope="module")
def stages() -> dict[str, Stage]:
    return read_dockerfile()


def words_of(service: dict[str, Any], stages: dict[str, Stage]) -> list[str]:
    """What the container runs, from the first word on."""
    target = service["build"]["target"]
    entrypoint = service.get("entrypoint") or last_json(stages, target, "ENTRYPOINT")
    command = service.get("command") or last_json(stages, target, "CMD")
    return [fill_in(word) for word in [*entrypoint, *command]]


def test_docker_compose_reads_the_file(tmp_path: Path) -> None:
    docker = shutil.which("docker")
    command = [docker or "", "compose"]
    if docker is None or subprocess.run([*command, "version"], capture_output=True).returncode:
        pytest.skip("no docker with its compose plugin")
    profiles = ["--profile", "cpu", "--profile", "gpu", "--profile", "tools"]

    run = subprocess.run(
        [*command, "-f", str(ROOT / "compose.yaml"), *profiles, "config", "--quiet"],
        capture_output=True,
        text=True,
        check=False,
    )

    assert (0, "") == (run.returncode, run.stderr)


def test_every_command_is_one_of_darkroom(
    services: dict[str, dict[str, Any]], stages: dict[str, Stage]
) -> None:
    given = {}
    for name in OURS - {"bucket"}:
        words = words_of(services[name], stages)
        assert ["tini", "--", "darkroom"] == words[:3]
        given[name] = parse_command(words[3:])

    assert given["worker"]["cpu"]
    assert "darkroom-tiny" == given["model-cpu"]["model"]
    assert "cuda" == given["model-gpu"]["device"]


def test_every_image_is_a_target_of_the_dockerfile(
    services: dict[str, dict[str, Any]], stages: dict[str, Stage]
) -> None:
    for name in OURS:
        build = services[name]["build"]
        assert build["target"] in stages
        assert f"darkroom:{build['target']}" == services[name]["image"]
        for argument in build.get("args", {}):
            assert f"ARG {argument}=" in (ROOT / "Dockerfile").read_text(encoding="utf-8")


def test_settings_are_read_and_every_model_that_is_served_is_known(
    compose: dict[str, Any],
    services: dict[str, dict[str, Any]],
    stages: dict[str, Stage],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    for name in OURS:
        environment = services[name]["environment"]
        assert compose["x-environment"] == environment
    for name, value in compose["x-environment"].items():
        if name.endswith("_FILE") and name.startswith("DARKROOM_"):
            (tmp_path / name).write_text(SECRETS[name])
            monkeypatch.setenv(name, str(tmp_path / name))
        else:
            monkeypatch.setenv(name, value)

    config = load_config()

    assert config.blob_place.startswith("s3://")
    for name in ("model-cpu", "model-gpu"):
        model = parse_command(words_of(services[name], stages)[3:])["model"]
        assert model in config.models


SECRETS = {
    "DARKROOM_DATABASE_URL_FILE": "postgresql://darkroom:x@postgres:5432/darkroom",
    "DARKROOM_REDIS_URL_FILE": "redis://:x@valkey:6379/0",
    "DARKROOM_PEPPER_FILE": "5e" * 32,
}


def test_every_secret_is_mounted_where_it_is_looked_for(
    compose: dict[str, Any], services: dict[str, dict[str, Any]]
) -> None:
    used = set()
    for name, service in services.items():
        text = repr([service.get("environment"), service.get("command")])
        wanted = set(re.findall(r"/run/secrets/([\w.]+)", text))
        assert wanted == set(service.get("secrets", [])), name
        used |= wanted

    assert used == set(compose["secrets"])
    assert all(f"./secrets/{name}" == secret["file"] for name, secret in compose["secrets"].items())
    assert "/secrets/" in (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()


def test_a_stop_leaves_time_to_drain(services: dict[str, dict[str, Any]]) -> None:
    drain_s = Config.model_fields["drain_s"].default
    for name in ("model-cpu", "model-gpu"):
        assert drain_s + CLOSE_S < read_seconds(services[name]["stop_grace_period"])
    assert DRAIN_S < read_seconds(services["api"]["stop_grace_period"])
    assert drain_s < read_seconds(services["worker"]["stop_grace_period"])


def test_whatever_runs_long_is_started_again_and_cannot_take_the_whole_host(
    compose: dict[str, Any], services: dict[str, dict[str, Any]]
) -> None:
    for name, service in services.items():
        assert re.fullmatch("[0-9]+[mg]", service["mem_limit"]), name
        assert service["logging"]["options"]["max-size"]
        assert ("unless-stopped" == service["restart"]) == (name in LONG_LIVED)
    volumes = {v.split(":")[0] for s in services.values() for v in s.get("volumes", [])}
    assert set(compose["volumes"]) == {volume for volume in volumes if volume[0] != "."}


def test_nothing_starts_before_what_it_needs(services: dict[str, dict[str, Any]]) -> None:
    for name in ("api", "worker", "model-cpu", "model-gpu"):
        wanted = services[name]["depends_on"]
        assert "service_completed_successfully" == wanted["migrate"]["condition"]
        assert "service_completed_successfully" == wanted["bucket"]["condition"]
        assert "service_healthy" == wanted["valkey"]["condition"]
    waited_for = {
        name
        for service in services.values()
        for name, wanted in service.get("depends_on", {}).items()
        if wanted["condition"] == "service_healthy"
    }
    assert {"postgres", "valkey", "s3"} == waited_for
    assert all("healthcheck" in services[name] for name in waited_for)


def test_only_this_host_reaches_the_service(services: dict[str, dict[str, Any]]) -> None:
    published = {name: service["ports"] for name, service in services.items() if "ports" in service}

    assert {"api": ["127.0.0.1:8000:8000"]} == published


def test_the_gpu_is_reserved(services: dict[str, dict[str, Any]], stages: dict[str, Stage]) -> None:
    devices = services["model-gpu"]["deploy"]["resources"]["reservations"]["devices"]
    (volume,) = services["model-gpu"]["volumes"]

    assert [{"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}] == devices
    assert read_env(stages, "worker-cuda")["HF_HOME"] == volume.split(":")[1]


def test_broker_keeps_what_it_took(services: dict[str, dict[str, Any]]) -> None:
    words = services["valkey"]["command"]
    settings = dict(zip(words[2::2], words[3::2], strict=True))

    assert {"--appendonly": "yes", "--maxmemory-policy": "noeviction"}.items() <= settings.items()


@pytest.mark.services
def test_bucket_is_made_once(
    services: dict[str, dict[str, Any]], s3_server: S3Server, s3_settings: dict[str, str]
) -> None:
    entrypoint, command = services["bucket"]["entrypoint"], services["bucket"]["command"]
    assert ["tini", "--", "python", "-c"] == entrypoint
    env = {**os.environ, **s3_settings, "DARKROOM_BLOBS": "s3://darkrooms-bucket/production"}

    runs = [
        subprocess.run([sys.executable, "-c", *command], env=env, check=False) for _ in range(2)
    ]

    names = [b["Name"] for b in s3_server.build_client().list_buckets()["Buckets"]]
    assert [0, 0] == [run.returncode for run in runs]
    assert 1 == names.count("darkrooms-bucket")
