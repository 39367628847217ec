"""What `darkroom api` makes of its settings."""

from dataclasses import fields
from pathlib import Path

import pytest

from api.config import ApiConfig
from cli.server import build_api_config
from tasks.config import Config, load_config

LIMITS = {
    "max_file_bytes": 1001,
    "max_batch_bytes": 1002,
    "max_body_bytes": 1003,
    "max_held_bytes": 1004,
    "body_timeout_s": 5.5,
    "max_open_items": 6,
    "max_open_bytes": 1007,
    "batch_file_lifetime_s": 3608,
    "chat_timeout_s": 9.5,
}


def test_limits_of_the_api_are_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DARKROOM_HOME", str(tmp_path))
    monkeypatch.setenv("DARKROOM_MAX_LINES", "10")
    monkeypatch.setenv("DARKROOM_MODELS", '{"m": {}}')
    for name, value in LIMITS.items():
        monkeypatch.setenv(f"DARKROOM_{name.upper()}", str(value))

    built = build_api_config(load_config(), "127.0.0.1")

    assert LIMITS == {name: getattr(built, name) for name in LIMITS}
    assert 10 == built.max_batch_lines
    assert frozenset({"m"}) == built.model_ids
    own = {"pepper", "is_open", "open_tenant", "models", "model_ids", "max_batch_lines"}
    own |= {"metrics_from"}
    assert LIMITS.keys() == {field.name for field in fields(ApiConfig)} - own


def test_defaults_of_the_settings_are_those_of_the_api(tmp_path: Path) -> None:
    built = build_api_config(Config(home=tmp_path), "127.0.0.1")

    default = ApiConfig(pepper=b"x" * 16)
    names = {*LIMITS, "max_batch_lines"}
    assert {name: getattr(default, name) for name in names} == {
        name: getattr(built, name) for name in names
    }


@pytest.mark.parametrize(
    ("host", "is_shared", "is_open"),
    [("127.0.0.1", False, True), ("127.0.0.1", True, False), ("0.0.0.0", False, False)],  # noqa: S104
)
def test_only_a_service_of_this_host_alone_is_open(
    tmp_path: Path, host: str, is_shared: bool, is_open: bool
) -> None:
    shared = {"database_url": "postgresql://db/darkroom", "pepper": "5e" * 32} if is_shared else {}

    assert is_open == build_api_config(load_config(home=tmp_path, **shared), host).is_open
