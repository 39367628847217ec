"""What an operator says about where media come from: a bad word stops the start and names its variable."""

from pathlib import Path

import pytest

from cli.server import build_api_config
from media.errors import BucketNotAllowedError, FetchFailedError
from media.limits import IMAGE_LIMITS
from tasks.config import load_config
from tasks.errors import BadSettingError
from tasks.worker import open_fetch


@pytest.mark.parametrize(
    ("words", "variable"),
    [
        ({"media_s3_buckets": "photographs"}, "DARKROOM_MEDIA_S3_BUCKETS"),
        ({"media_s3_buckets": "s3://photographs/a-{tenant}"}, "DARKROOM_MEDIA_S3_BUCKETS"),
        (
            {"media_s3_buckets": "s3://photographs", "media_s3_profile": "missing"},
            "DARKROOM_MEDIA_S3_PROFILE",
        ),
        (
            {"media_s3_buckets": "s3://photographs", "media_s3_endpoint_url": "nowhere"},
            "DARKROOM_MEDIA_S3_ENDPOINT_URL",
        ),
        ({"media_root": "/nowhere/at/all"}, "DARKROOM_MEDIA_ROOT"),
        ({"media_root": "/"}, "DARKROOM_MEDIA_ROOT"),
        ({"media_root": "/srv", "database_url": "postgresql://h/d"}, "DARKROOM_MEDIA_ROOT"),
    ],
    ids=["bucket", "segment", "profile", "address", "folder", "root", "shared"],
)
def test_place_that_cannot_be_stops_the_start(words: dict[str, str], variable: str) -> None:
    with pytest.raises(BadSettingError, match=variable), open_fetch(load_config(**words), {}):
        pass


def test_several_buckets_may_be_opened() -> None:
    config = load_config(media_s3_buckets="s3://photographs/{tenant}/, s3://public,")

    with open_fetch(config, {}) as fetch, pytest.raises(BucketNotAllowedError):
        fetch("s3://photographs/b/a.jpg", IMAGE_LIMITS, "a")


def test_folder_may_be_opened(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"a picture")

    with open_fetch(load_config(media_root=tmp_path), {}) as fetch:
        fetched = fetch((tmp_path / "a.jpg").as_uri(), IMAGE_LIMITS, "a")

    assert b"a picture" == fetched.content


def test_files_of_this_host_are_open_to_this_host_alone(tmp_path: Path) -> None:
    config = load_config(home=tmp_path, media_root=tmp_path)

    assert build_api_config(config, "127.0.0.1").is_open
    with pytest.raises(BadSettingError, match="DARKROOM_MEDIA_ROOT"):
        build_api_config(config, "0.0.0.0")  # noqa: S104 - what must be refused


def test_nothing_is_open_unless_it_was_said() -> None:
    with open_fetch(load_config(media_root=""), {}) as fetch:
        for url in ("file:///etc/hostname", "s3://photographs/a.jpg"):
            with pytest.raises(FetchFailedError) as caught:
                fetch(url, IMAGE_LIMITS, "a")
            assert caught.value.code in ("file_not_allowed", "bucket_not_allowed")
