"""Settings: read once, and a bad one names its variable."""

from pathlib import Path

import pytest

from storage.tenants import Caps
from tasks.app import build_app, refuse_unsafe
from tasks.config import MediaLimits, load_config, parse_limits
from tasks.errors import BadSettingError, UnsafeSettingError


def test_defaults_need_nothing_but_a_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DARKROOM_HOME", str(tmp_path))

    config = load_config()

    assert f"sqlite:///{tmp_path}/darkroom.sqlite3" == config.database
    assert str(tmp_path / "blobs") == config.blob_place
    assert config.redis_url is None
    assert MediaLimits(image=1, video=1) == config.limits_of("any")


def test_limits_are_read_by_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DARKROOM_LIMIT_MM_PER_PROMPT", "image=2, video=0")
    monkeypatch.setenv("DARKROOM_MODELS", '{"big": {"image": 8}}')

    config = load_config()

    assert MediaLimits(image=8, video=1) == config.limits_of("big")
    assert MediaLimits(image=2, video=0) == config.limits_of("other")


def test_model_may_have_a_length_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DARKROOM_MODELS", '{"big": {"image": 8, "max_model_len": 4096}, "m": {}}')

    config = load_config()

    assert MediaLimits(image=8, video=1) == config.limits_of("big")
    assert [4096, None, None] == [config.max_model_len_of(m) for m in ("big", "m", "other")]


def test_formats_are_listed_with_commas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DARKROOM_IMAGE_FORMATS", "tiff, HEIC,")

    assert ("TIFF", "HEIC") == load_config().image_formats


@pytest.mark.parametrize(("given", "taken"), [("", None), ("fp8", "fp8")])
def test_no_quantization_is_written_as_nothing(
    given: str, taken: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DARKROOM_QUANTIZATION", given)
    monkeypatch.setenv("DARKROOM_KV_CACHE_DTYPE", given)

    config = load_config()

    assert taken == config.quantization
    assert (taken or "auto") == config.kv_cache_dtype


@pytest.mark.parametrize("name", ["DARKROOM_QUANTIZATION", "DARKROOM_KV_CACHE_DTYPE"])
def test_wrong_word_is_refused_by_its_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "int3")

    with pytest.raises(BadSettingError, match=name):
        load_config()


@pytest.mark.parametrize(
    ("text", "limits"),
    [
        ("image=4", {"image": 4}),
        (" image = 4 , video=0,", {"image": 4, "video": 0}),
        ('{"image": 4, "video": 0}', {"image": 4, "video": 0}),
        ("", {}),
    ],
)
def test_limits_are_written_as_for_vllm(text: str, limits: dict[str, int]) -> None:
    assert limits == parse_limits(text)


@pytest.mark.parametrize(
    "text", ["image", "image=x", "image=-1", "audio=1", "{", '{"image": true}', '{"image": {}}']
)
def test_limits_that_make_no_sense_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="give"):
        parse_limits(text)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("CHUNK_ITEMS", "0"),
        ("CHUNK_ITEMS", "many"),
        ("MEDIA_PROCESSES", "-1"),
        ("LEASE_S", "nan"),
        ("HEARTBEAT_S", "50"),
        ("MAX_BODY_BYTES", "1000000000"),
        ("MAX_OPEN_ITEMS", "-1"),
        ("MAX_IMAGE_PIXELS", "0"),
        ("BATCH_FILE_LIFETIME_S", "60"),
        ("CHAT_LIFETIME_S", "60"),
        ("CHAT_TIMEOUT_S", "inf"),
        ("LIMIT_MM_PER_PROMPT", "picture=1"),
        ("LIMIT_MM_PER_PROMPT", "image=-1"),
        ("MODELS", "{"),
        ("MODELS", '{"m": {"image": "x"}}'),
        ("MODELS", '{"m": {"max_model_len": 0}}'),
        ("MODELS", '{"m": {"length": 9}}'),
        ("REDIS_URL", "http://:secret@localhost"),
        ("BLOBS", "ftp://bucket"),
        ("METRICS_FROM", "10.0.0.1/8"),
        ("METRICS_FROM", "everywhere"),
        ("PEPPER", "secret"),
        ("PEPPER", "5ec4e7"),
    ],
)
def test_bad_value_names_its_variable(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"DARKROOM_{name}", value)

    with pytest.raises(BadSettingError, match=f"DARKROOM_{name}") as caught:
        load_config()

    assert "secret" not in str(caught.value)


def test_secrets_are_read_from_mounted_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {
        "DATABASE_URL": "postgresql://u:p@h/n",
        "REDIS_URL": "rediss://:p@h/0",
        "PEPPER": "5e" * 32,
    }
    for name, value in given.items():
        (tmp_path / name).write_text(f"{value}\n")
        monkeypatch.setenv(f"DARKROOM_{name}_FILE", str(tmp_path / name))

    config = load_config()

    assert given["DATABASE_URL"] == config.database
    assert given["REDIS_URL"] == config.redis_url
    assert given["PEPPER"] == config.pepper.get_secret_value()
    assert given["PEPPER"] not in repr(config)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("REDIS_URL", b"http://:secret@localhost"),
        ("PEPPER", b"secret"),
        ("PEPPER", b"\xff"),
        ("DATABASE_URL", b"\n"),
        ("DATABASE_URL", None),
    ],
)
def test_bad_secret_names_the_variable_of_its_file(
    name: str, content: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if content is not None:
        (tmp_path / "file").write_bytes(content)
    monkeypatch.setenv(f"DARKROOM_{name}_FILE", "file")
    monkeypatch.chdir(tmp_path)

    with pytest.raises(BadSettingError, match=f"DARKROOM_{name}_FILE: ") as caught:
        load_config()

    assert "secret" not in str(caught.value)


def test_secret_that_is_given_twice_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DARKROOM_PEPPER", "5e" * 32)
    monkeypatch.setenv("DARKROOM_PEPPER_FILE", "/run/secrets/pepper")

    with pytest.raises(BadSettingError, match="both set") as caught:
        load_config()

    assert "5e5e" not in str(caught.value)


def test_worker_with_other_limits_than_the_settings_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DARKROOM_MODELS", '{"M": {"image": 4, "max_model_len": 64}}')
    config = load_config()

    config.refuse_other_limits("M", MediaLimits(image=4))
    config.refuse_other_limits("another", MediaLimits(image=9))
    with pytest.raises(BadSettingError, match=r"image=4.*image=2"):
        config.refuse_other_limits("M", MediaLimits(image=2))


def test_safe_settings_are_taken() -> None:
    app = build_app(load_config(), "redis://127.0.0.1:1/0")

    refuse_unsafe(app, "threads", {}, is_gpu=True)
    refuse_unsafe(app, "prefork", {}, is_gpu=False)


@pytest.mark.parametrize(
    ("pool", "env", "conf", "word"),
    [
        ("solo", {}, {}, "solo"),
        ("prefork", {}, {}, "prefork"),
        ("threads", {"REMAP_SIGTERM": "SIGQUIT"}, {}, "REMAP_SIGTERM"),
        ("threads", {}, {"worker_soft_shutdown_timeout": 5.0}, "worker_soft_shutdown_timeout"),
        ("threads", {}, {"accept_content": ["json", "pickle"]}, "JSON"),
        ("threads", {}, {"result_backend": "redis://"}, "result_backend"),
        ("threads", {}, {"worker_disable_prefetch": False}, "worker_disable_prefetch"),
        ("threads", {}, {"task_time_limit": 10}, "Time limits"),
    ],
)
def test_what_is_known_to_lose_work_is_refused(
    pool: str, env: dict[str, str], conf: dict[str, object], word: str
) -> None:
    app = build_app(load_config(), "redis://127.0.0.1:1/0")
    app.conf.update(conf)

    with pytest.raises(UnsafeSettingError, match=word):
        refuse_unsafe(app, pool, env, is_gpu=True)


def test_tenants_caps_lower_limits_and_never_raise_them() -> None:
    limits = MediaLimits(image=4, video=1, frames=64)

    assert limits == limits.lowered(Caps())
    assert MediaLimits(image=2, video=0, frames=16) == limits.lowered(Caps(2, 0, 16))
    assert limits == limits.lowered(Caps(9, 9, 99))
    assert MediaLimits(frames=16) == MediaLimits().lowered(Caps(max_frames=16))


def test_frames_of_a_clip_are_a_limit_in_all_forms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DARKROOM_MODELS", '{"M": {"image": 2, "frames": 8}}')
    monkeypatch.setenv("DARKROOM_LIMIT_MM_PER_PROMPT", "frames=16,image=3")
    config = load_config()

    assert MediaLimits(image=2, frames=8) == config.limits_of("M")
    assert MediaLimits(image=3, frames=16) == config.limits_of("other")
    with pytest.raises(BadSettingError, match=r"image=2, video=1, frames=8 of 'M'"):
        config.refuse_other_limits("M", MediaLimits(image=2))
