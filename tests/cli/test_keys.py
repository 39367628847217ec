"""API keys, on one host and over several: one pepper, given to each of them, or a clear refusal."""

import os
import secrets
import subprocess
import sys
from pathlib import Path

import pytest

from storage import pepper, tenants
from storage.db import Database
from tasks.config import load_config
from tasks.errors import BadSettingError
from tasks.stores import load_pepper
from tests.cli.conftest import Invoke
from tests.storage.conftest import sqlite_template

__all__ = ["sqlite_template"]

PEPPER = secrets.token_hex(32)


@pytest.fixture
def shared_url(tmp_path: Path, sqlite_template: bytes) -> str:
    """A migrated database that is no host's own."""
    path = tmp_path / "shared.sqlite3"
    path.write_bytes(sqlite_template)
    return f"sqlite:///{path}"


def test_keys_are_made_listed_and_revoked(darkroom: Invoke, tmp_path: Path) -> None:
    home = {"DARKROOM_HOME": str(tmp_path)}
    made = darkroom("keys", "create", "night run", **home)
    listed = darkroom("keys", "list", **home)
    revoked = darkroom("keys", "revoke", made.stdout.strip(), **home)
    after = darkroom("keys", "list", **home)
    twice = darkroom("keys", "revoke", made.stdout.strip(), **home)

    key_id = made.stdout.split("_")[1]
    assert made.stdout.startswith("dk_")
    assert key_id in listed.stdout
    assert "night run" in listed.stdout
    assert made.stdout.split("_")[2].strip() not in listed.stdout
    assert (0, 1) == (revoked.exit_code, twice.exit_code)
    assert "revoked" in after.stdout


def test_limits_of_a_tenant_are_set_shown_and_taken_back(darkroom: Invoke, tmp_path: Path) -> None:
    home = {"DARKROOM_HOME": str(tmp_path)}
    darkroom(
        "keys", "limits", "--tenant", "team", "--images", "2", "--open-bytes", "9000000000", **home
    )
    shown = darkroom("keys", "limits", "--tenant", "team", "--frames", "16", **home)
    after = darkroom("keys", "limits", "--tenant", "team", "--images", "none", **home)
    other = darkroom("keys", "limits", **home)
    wrong = [
        darkroom("keys", "limits", option, text, **home)
        for option, text in (("--frames", "0"), ("--images", "-1"), ("--open-items", "9999999999"))
    ]

    assert [
        "images\t2",
        "videos\tnone",
        "frames\t16",
        "open_items\tnone",
        "open_bytes\t9000000000",
    ] == shown.stdout.splitlines()
    assert "images\tnone" == after.stdout.splitlines()[0]
    assert "frames\t16" in after.stdout
    assert all(line.endswith("\tnone") for line in other.stdout.splitlines())
    assert [2, 2, 2] == [one.exit_code for one in wrong]
    assert "--open-items: give a number from 0 to 2147483647, or none." in wrong[2].stderr


def test_pepper_is_made_once_for_its_owner_only(tmp_path: Path) -> None:
    first, second = pepper.load(tmp_path / "home"), pepper.load(tmp_path / "home")

    assert first == second
    assert 32 == len(first)
    assert 0o600 == (tmp_path / "home" / "pepper").stat().st_mode & 0o777
    assert ["pepper"] == [path.name for path in (tmp_path / "home").iterdir()]


def test_key_of_one_host_is_good_on_another_by_the_same_pepper(
    darkroom: Invoke, tmp_path: Path, shared_url: str
) -> None:
    secret = tmp_path / "secret"
    secret.write_text(f"{PEPPER}\n")
    made = darkroom(
        "keys",
        "create",
        "night run",
        DARKROOM_HOME=str(tmp_path / "one"),
        DARKROOM_DATABASE_URL=shared_url,
        DARKROOM_PEPPER_FILE=str(secret),
    )
    key = made.stdout.strip()
    elsewhere = load_config(home=tmp_path / "two", database_url=shared_url, pepper=PEPPER)
    another = load_config(
        home=tmp_path / "three", database_url=shared_url, pepper=secrets.token_hex(32)
    )
    database = Database(shared_url)
    with database.read() as session:
        found = tenants.find_by_key(session, key, pepper=load_pepper(elsewhere))
        refused = tenants.find_by_key(session, key, pepper=load_pepper(another))
    database.close()

    assert 0 == made.exit_code, made.stderr
    assert found is not None
    assert None is refused
    assert not (tmp_path / "one" / "pepper").exists()


def test_shared_database_without_a_pepper_makes_no_keys(
    darkroom: Invoke, tmp_path: Path, shared_url: str
) -> None:
    home = {"DARKROOM_HOME": str(tmp_path), "DARKROOM_DATABASE_URL": shared_url}
    run = darkroom("keys", "create", "a", **home)

    assert 2 == run.exit_code
    assert run.stderr.startswith("error: DARKROOM_PEPPER or DARKROOM_PEPPER_FILE must be set")
    assert not (tmp_path / "pepper").exists()


def test_api_without_the_shared_pepper_does_not_start(tmp_path: Path, shared_url: str) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "cli", "api"],
        env={
            **os.environ,
            "DARKROOM_HOME": str(tmp_path),
            "DARKROOM_DATABASE_URL": shared_url,
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )

    assert (2, "") == (run.returncode, run.stdout)
    assert run.stderr.startswith("error: DARKROOM_PEPPER or DARKROOM_PEPPER_FILE must be set")


def test_pepper_of_a_home_goes_on_where_its_file_is_named(
    tmp_path: Path, shared_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = load_pepper(load_config(home=tmp_path))
    monkeypatch.setenv("DARKROOM_PEPPER_FILE", str(tmp_path / "pepper"))
    after = load_pepper(load_config(database_url=shared_url))

    assert before == after


@pytest.mark.parametrize("text", ["pepper", "abcd", ""])
def test_bad_pepper_of_a_home_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "pepper").write_text(text)

    with pytest.raises(BadSettingError, match="DARKROOM_HOME"):
        load_pepper(load_config(home=tmp_path))


def test_empty_variables_count_as_unset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DARKROOM_PEPPER", "")
    monkeypatch.setenv("DARKROOM_PEPPER_FILE", "")

    assert pepper.load(tmp_path) == load_pepper(load_config(home=tmp_path))
