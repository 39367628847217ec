"""`darkroom migrate`, and processes that refuse to start on any schema but their own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from sqlalchemy import text

from storage.db import Database
from tests.cli.conftest import Invoke


@pytest.fixture
def url(tmp_path: Path) -> str:
    """An empty database that is the operator's, as it was given to all hosts."""
    return f"sqlite:///{tmp_path / 'shared.sqlite3'}"


def test_database_is_migrated_once_and_then_left_alone(darkroom: Invoke, url: str) -> None:
    env = {"DARKROOM_DATABASE_URL": url}
    runs = [darkroom("migrate", *options, **env) for options in (["--check"], [], [], ["--check"])]

    assert [1, 0, 0, 0] == [run.exit_code for run in runs]
    assert "Run `darkroom migrate` once." in runs[0].stderr
    assert "none -> " in runs[1].stderr
    assert "was up to date" in runs[2].stderr
    assert not any(run.stdout for run in runs)


def test_what_a_newer_version_migrated_is_left_alone(darkroom: Invoke, url: str) -> None:
    env = {"DARKROOM_DATABASE_URL": url}
    darkroom("migrate", **env)
    database = Database(url)
    with database.write() as session:
        session.execute(text("UPDATE alembic_version SET version_num = 'next'"))
    database.close()
    looked, tried = darkroom("migrate", "--check", **env), darkroom("migrate", **env)

    assert (1, 2) == (looked.exit_code, tried.exit_code)
    assert "a newer version has migrated it" in looked.stderr
    assert "a newer version has migrated it" in tried.stderr


@pytest.mark.parametrize(
    ("given", "code", "words"),
    [
        ("mysql://h/x", 2, "DARKROOM_DATABASE_URL: "),
        ("postgresql://u:secret@127.0.0.1:1/x", 3, "Connection refused"),
        ("sqlite:////no/such/folder/x", 3, "unable to open"),
    ],
)
def test_database_that_is_not_there_is_told_in_a_line(
    darkroom: Invoke, given: str, code: int, words: str
) -> None:
    run = darkroom("migrate", DARKROOM_DATABASE_URL=given, DARKROOM_START_WAIT_S="0.01")

    assert code == run.exit_code
    assert words in run.stderr
    assert "secret" not in run.stderr


def test_nothing_starts_on_a_schema_that_is_not_its_own(tmp_path: Path, url: str) -> None:
    env = {
        **os.environ,
        "DARKROOM_HOME": str(tmp_path),
        "DARKROOM_DATABASE_URL": url,
        "DARKROOM_PEPPER": "00" * 32,
    }
    verbs = [["api"], ["worker", "--cpu"]]
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "cli", *verb], env=env, stderr=subprocess.PIPE, text=True
        )
        for verb in verbs
    ]
    said = [process.communicate(timeout=120)[1] for process in processes]

    assert [2, 2] == [process.returncode for process in processes]
    assert all("error: The database has no tables yet." in text for text in said)
