"""What an operator says about where media come from: a bad word stops the start and names its variable."""

import asyncio
from pathlib import Path

import pytest

from cli.server import build_api_config
from media.fetched import Fetched
from media.limits import IMAGE_LIMITS
from tasks.config import Config, load_config
from tasks.errors import BadSettingError
from tasks.prefetch import Fetch
from tasks.worker import open_fetch
from tests.media.servers import Server, answering, serve


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
        (
            {"media_s3_buckets": "s3://photographs", "media_s3_region": "eu central"},
            "DARKROOM_MEDIA_S3_REGION",
        ),
        ({"media_root": "/nowhere/at/all"}, "DARKROOM_MEDIA_ROOT"),
        ({"media_root": "/"}, "DARKROOM_MEDIA_ROOT"),
        ({"media_root": "/srv", "database_url": "postgresql://h/d"}, "DARKROOM_MEDIA_ROOT"),
        ({"media_allowed_hosts": "*.internal"}, "DARKROOM_MEDIA_ALLOWED_HOSTS"),
        ({"media_allowed_networks": "10.1"}, "DARKROOM_MEDIA_ALLOWED_NETWORKS"),
        ({"media_denied_networks": "10.1.2.3/8"}, "DARKROOM_MEDIA_DENIED_NETWORKS"),
        ({"media_ports": "0"}, "DARKROOM_MEDIA_PORTS"),
        ({"media_ports": "http"}, "DARKROOM_MEDIA_PORTS"),
    ],
    ids=[
        *("bucket", "segment", "profile", "address", "region", "folder", "root", "shared"),
        *("wildcard", "network", "bits", "port", "name of a port"),
    ],
)
def test_place_that_cannot_be_stops_the_start(words: dict[str, str], variable: str) -> None:
    with pytest.raises(BadSettingError, match=variable), open_fetch(load_config(**words), {}):
        pass


def test_several_buckets_may_be_opened() -> None:
    config = load_config(media_s3_buckets="s3://photographs/{tenant}/, s3://public,")

    with open_fetch(config, {}) as fetch:
        assert "bucket_not_allowed" == fetch_one(fetch, "s3://photographs/b/a.jpg")


def test_folder_may_be_opened(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"a picture")

    with open_fetch(load_config(media_root=tmp_path), {}) as fetch:
        assert b"a picture" == fetch_one(fetch, (tmp_path / "a.jpg").as_uri())


def test_files_of_this_host_are_open_to_this_host_alone(tmp_path: Path) -> None:
    config = load_config(home=tmp_path, media_root=tmp_path)

    assert build_api_config(config, "127.0.0.1").is_open
    with pytest.raises(BadSettingError, match="DARKROOM_MEDIA_ROOT"):
        build_api_config(config, "0.0.0.0")  # noqa: S104 - what must be refused


def test_nothing_is_open_unless_it_was_said() -> None:
    with open_fetch(load_config(media_root=""), {}) as fetch:
        for url in ("file:///etc/hostname", "s3://photographs/a.jpg"):
            assert fetch_one(fetch, url) in ("file_not_allowed", "bucket_not_allowed")


def fetch_one(fetch: Fetch, url: str) -> bytes | str:
    """Its content, or the code of the error."""
    end = fetch({url: IMAGE_LIMITS}, "a")[url]
    return end.content if isinstance(end, Fetched) else end.code


PICTURE = answering(b"a picture")


@pytest.mark.parametrize(
    ("words", "end"),
    [
        ({}, "host_not_allowed"),
        ({"media_allowed_networks": "127.0.0.0/8"}, b"a picture"),
        ({"media_allowed_hosts": "other.internal, LocalHost."}, b"a picture"),
        ({"media_allowed_hosts": "other.internal"}, "host_not_allowed"),
        (
            {"media_allowed_hosts": "localhost", "media_denied_networks": "127.0.0.0/8, ::1/128"},
            "host_not_allowed",
        ),
    ],
    ids=["closed", "network", "host", "another host", "denied all the same"],
)
def test_private_hosts_and_ports_are_open_where_an_operator_says_so(
    words: dict[str, str], end: bytes | str
) -> None:
    async def scenario() -> list[bytes | str]:
        async with serve(PICTURE) as server:
            return [
                await asyncio.to_thread(fetch_with, load_config(**words, media_ports=ports), server)
                for ports in (f"8443,{server.port}", "8443")
            ]

    assert [end, "bad_url"] == asyncio.run(scenario())


def fetch_with(config: Config, server: Server) -> bytes | str:
    host = "localhost" if config.media_allowed_hosts else "127.0.0.1"
    with open_fetch(config, {}) as fetch:
        return fetch_one(fetch, f"http://{host}:{server.port}/")
