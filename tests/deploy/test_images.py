"""What the Dockerfile builds, as far as it can be known without an engine that builds it."""

import re
import subprocess
import sys
import tomllib
from typing import Any

import pytest

from tests.deploy.commands import parse_command
from tests.deploy.files import ROOT, Stage, collect, last_json, read_dockerfile, read_env

TARGETS = ["api", "service", "worker-cpu", "worker-cuda"]


@pytest.fixture(scope="module")
def stages() -> dict[str, Stage]:
    return read_dockerfile()


@pytest.fixture(scope="module")
def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_all_targets_are_there_and_the_smallest_is_the_default(stages: dict[str, Stage]) -> None:
    assert set(TARGETS) <= set(stages)
    assert "api" == list(stages)[-1]


@pytest.mark.parametrize("target", TARGETS)
def test_image_runs_the_command_as_nobody_and_hands_signals_on(
    stages: dict[str, Stage], target: str
) -> None:
    entrypoint = last_json(stages, target, "ENTRYPOINT")

    assert ["tini", "--", "darkroom"] == entrypoint
    assert "tini" in " ".join(collect(stages, target, "RUN"))
    assert "10001:10001" == collect(stages, target, "USER")[-1]
    assert ["SIGTERM"] == collect(stages, target, "STOPSIGNAL")
    assert "/opt/darkroom/bin" in read_env(stages, target)["PATH"]


@pytest.mark.parametrize("target", TARGETS)
def test_command_of_the_image_is_one(
    stages: dict[str, Stage], target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    env = read_env(stages, target)
    for name, value in env.items():
        if name.startswith("DARKROOM_"):
            monkeypatch.setenv(name, value)
    words = last_json(stages, target, "CMD")

    if words != ["--help"]:
        given = parse_command(words)
        assert env.get("DARKROOM_DEVICE", given.get("device")) == given.get("device")
        assert env.get("DARKROOM_MODEL") == given.get("model")


def test_only_workers_hold_an_engine(stages: dict[str, Stage], pyproject: dict[str, Any]) -> None:
    extras = {name: find_extras(stages, name) for name in ("build-service", "build-worker")}
    known = set(pyproject["project"]["optional-dependencies"])

    assert {"service"} == extras["build-service"]
    assert {"engine", "fetch", "service", "video"} == extras["build-worker"] & known
    assert "torch" not in " ".join(stages["build-service"].values("RUN"))
    for target in TARGETS:
        sources = re.findall(r"--from=(\S+)", " ".join(collect(stages, target, "COPY")))
        assert ["build-worker" if "worker" in target else "build-service"] == sources


def find_extras(stages: dict[str, Stage], name: str) -> set[str]:
    found = re.findall(r'\.whl\)\[([a-z,]+)\]"', " ".join(stages[name].values("RUN")))
    assert 1 == len(found)
    return set(found[0].split(","))


def test_versions_are_those_that_were_tested(
    stages: dict[str, Stage], pyproject: dict[str, Any]
) -> None:
    runs = [run for stage in stages.values() for run in stage.values("RUN")]
    installs = [run for run in runs if "pip install" in run]
    image = re.search(r"^ARG PYTHON_IMAGE=python:([0-9.]+)-slim", read_text("Dockerfile"), re.M)

    assert 3 == len(installs)
    assert all("-c /build/constraints.txt" in run for run in installs)
    assert image is not None
    assert pyproject["project"]["requires-python"] == f">={image[1]}"
    assert f"on Python {image[1]}" in read_text("constraints.txt")


def test_nothing_is_kept_that_only_the_build_needs(stages: dict[str, Stage]) -> None:
    assert "1" == read_env(stages, "base")["PIP_NO_CACHE_DIR"]
    for stage in stages.values():
        for run in stage.values("RUN"):
            assert ("apt-get update" in run) == ("rm -rf /var/lib/apt/lists/*" in run)
            assert ("apt-get install" in run) == ("--no-install-recommends" in run)


def test_what_is_copied_exists(stages: dict[str, Stage]) -> None:
    for stage in stages.values():
        for words in stage.values("COPY"):
            *sources, _ = [word for word in words.split() if not word.startswith("--")]
            origin = re.search(r"--from=(\S+)", words)
            if origin is not None:
                assert origin[1] in stages
                made = " ".join(collect(stages, origin[1], "RUN"))
                assert all(source in made for source in sources)
            else:
                assert all((ROOT / source).exists() for source in sources)


def test_build_sees_what_the_wheel_is_made_of_and_nothing_else(pyproject: dict[str, Any]) -> None:
    lines = [line for line in read_text(".dockerignore").splitlines() if line and line[0] != "#"]
    allowed = {line.removeprefix("!") for line in lines if line.startswith("!")}
    project, wheel = pyproject["project"], pyproject["tool"]["hatch"]["build"]["targets"]["wheel"]
    needed = {"constraints.txt", "pyproject.toml", project["readme"], *project["license-files"]}

    assert "*" == lines[0], "a list of what is let in, so that no secret gets into a layer"
    assert needed | set(wheel["packages"]) == allowed
    assert all((ROOT / name).exists() for name in allowed)


def test_health_is_asked_where_the_server_answers(
    stages: dict[str, Stage], monkeypatch: pytest.MonkeyPatch
) -> None:
    from api.health import router

    check = collect(stages, "api", "HEALTHCHECK")[-1]
    found = re.search(r"http://127\.0\.0\.1:([0-9]+)(/\w+)", check)
    given = parse_command(last_json(stages, "api", "CMD"))

    assert found is not None
    assert found[2] in [getattr(route, "path", "") for route in router.routes]
    assert found[1] == str(given["port"]) == collect(stages, "api", "EXPOSE")[-1]
    assert "0.0.0.0" == given["host"]  # noqa: S104 - inside a container
    assert "NONE" == collect(stages, "service", "HEALTHCHECK")[-1]


def test_health_check_tells_a_server_from_none(
    stages: dict[str, Stage], monkeypatch: pytest.MonkeyPatch
) -> None:
    check = collect(stages, "api", "HEALTHCHECK")[-1]
    program = re.search(r'"-c", "(.+)"\]$', check)
    assert program is not None
    command = program[1].replace(":8000/", ":1/")

    run = subprocess.run([sys.executable, "-c", command], capture_output=True, check=False)

    assert 1 == run.returncode
    assert b"refused" in run.stderr


def read_text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")
