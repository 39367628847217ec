"""
Objects of buckets, through the whole way out: with SeaweedFS, which checks signatures, and with
servers of ours that say what AWS says.
"""

import asyncio
import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from media.buckets import BadProfileError, BucketConfig
from media.errors import (
    BadUrlError,
    BucketNotAllowedError,
    FetchFailedError,
    FetchTimeoutError,
    FetchTooLargeError,
    HostNotAllowedError,
    ObjectArchivedError,
    ObjectDeniedError,
    ObjectNotFoundError,
)
from media.fetch import FetchConfig
from media.fetched import Fetched
from media.limits import ImageLimits
from media.s3_url import parse_open_prefix
from media.sources import Sources
from tests.media.servers import (
    QUICK,
    Answer,
    Server,
    answering,
    endless,
    in_turn,
    redirecting,
    serve,
)
from tests.services import S3Server

LIMITS = ImageLimits(max_bytes=100_000)
FETCHING = FetchConfig(image_fetch_timeout_s=30.0, limits=replace(QUICK, min_rate_window_s=2.0))
JPEG = b"\xff\xd8\xff" + bytes(2000) + b"\xff\xd9"
KEYS = {"media": ("an id", "a secret of media")}

Outcome = Fetched | FetchFailedError


@pytest.fixture(autouse=True)
def profiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A profile `media`, one without keys, and keys in the environment, which are the blobs'."""
    lines = [
        f"[{name}]\naws_access_key_id = {key}\naws_secret_access_key = {secret}\n"
        for name, (key, secret) in KEYS.items()
    ]
    (tmp_path / "credentials").write_text("".join([*lines, "[empty]\nregion = eu-west-1\n"]))
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "the-blobs-own")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")


def config_for(
    endpoint_url: str | None, *opened: str, profile: str | None = "media"
) -> BucketConfig:
    prefixes = tuple(parse_open_prefix(text) for text in opened or ("s3://photographs",))
    return BucketConfig(prefixes, profile, endpoint_url, "us-east-1")


async def outcome_of(sources: Sources, url: str, tenant: str) -> Outcome:
    try:
        return await sources.fetch(url, LIMITS, tenant)
    except FetchFailedError as error:
        return error


async def fetch(buckets: BucketConfig | None, url: str, **words: Any) -> Outcome:
    sources = Sources(FETCHING, buckets=buckets, **words)
    outcome = await outcome_of(sources, url, "anyone")
    await sources.aclose()
    return outcome


def fetch_all(
    answer: Answer | Mapping[str, Answer],
    urls: Sequence[str],
    *,
    opened: Sequence[str] = (),
    profile: str | None = "media",
    tenant: str = "anyone",
) -> tuple[list[Outcome], Server]:
    """Fetch all of these from one server of ours; boto takes its time to begin."""

    async def scenario() -> tuple[list[Outcome], Server]:
        async with serve(answer) as server:
            endpoint_url = f"http://127.0.0.1:{server.port}"
            fetching = replace(FETCHING, ports=frozenset({server.port}))
            sources = Sources(fetching, buckets=config_for(endpoint_url, *opened, profile=profile))
            urls_here = [url.replace("{server}", endpoint_url) for url in urls]
            outcomes = [await outcome_of(sources, url, tenant) for url in urls_here]
            await sources.aclose()
            return outcomes, server

    return asyncio.run(scenario())


def fetch_from(answer: Answer, profile: str | None = "media") -> tuple[Outcome, Server]:
    (outcome,), server = fetch_all(answer, ["s3://photographs/a.jpg"], profile=profile)
    return outcome, server


def refusing(status: str, code: str, *headers: str, inside: str = "") -> Answer:
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>/srv 10.0.0.7</Message>{inside}</Error>"
    return answering(body.encode(), status, headers)


def assert_failed(
    outcome: Outcome, error_type: type[FetchFailedError], *, retryable: bool = False
) -> None:
    assert type(outcome) is error_type, outcome
    assert retryable == outcome.retryable
    assert outcome.facts is not None
    assert outcome.code == outcome.facts["error_code"]
    for secret in ("127.0.0.1", "10.0.0.7", "/srv", "photographs", "a.jpg", "hush", "secret of"):
        assert secret not in str(outcome)
    assert str(outcome).endswith(".")
    assert len(str(outcome).split(". ")) >= 2, "the text says what to do"


# With a real server


@pytest.fixture
def bucket(s3_server: S3Server, tmp_path: Path) -> BucketConfig:
    s3_server.revive()
    key, secret = (s3_server.env[name] for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"))
    (tmp_path / "credentials").write_text(
        f"[media]\naws_access_key_id = {key}\naws_secret_access_key = {secret}\n"
        f"[wrong]\naws_access_key_id = {key}\naws_secret_access_key = wrong\n"
    )
    return config_for(s3_server.endpoint_url)


@pytest.mark.services
def test_objects_of_a_real_bucket_come_with_their_report(
    s3_server: S3Server, bucket: BucketConfig
) -> None:
    key = f"{s3_server.make_prefix()}/ü b+%20.jpg"
    s3_server.build_client().put_object(
        Bucket=s3_server.bucket, Key=key, Body=JPEG, ContentType="image/jpeg"
    )
    fetched = asyncio.run(fetch(bucket, f"s3://photographs/{key}"))

    assert isinstance(fetched, Fetched), fetched
    assert JPEG == fetched.content
    assert ("s3", "photographs") == (fetched.report.scheme, fetched.report.host)
    assert "image/jpeg" == fetched.media_type
    assert (hashlib.sha256(JPEG).hexdigest(), 1) == (
        fetched.report.sha256,
        fetched.report.num_tries,
    )


@pytest.mark.services
def test_what_a_real_bucket_does_not_give_has_its_reason(
    s3_server: S3Server, bucket: BucketConfig
) -> None:
    key = f"{s3_server.make_prefix()}/a.jpg"
    s3_server.build_client().put_object(Bucket=s3_server.bucket, Key=key, Body=JPEG * 60)
    url = f"s3://photographs/{key}"

    async def scenario() -> list[Outcome]:
        elsewhere = replace(bucket, prefixes=(parse_open_prefix("s3://nobodys"),))
        return [
            await fetch(bucket, f"{url}-gone"),
            await fetch(elsewhere, "s3://nobodys/a.jpg"),
            await fetch(replace(bucket, profile="wrong"), url),
            await fetch(replace(bucket, profile=None), url),
            await fetch(bucket, url),
        ]

    outcomes = asyncio.run(scenario())

    for outcome, kind in zip(
        outcomes,
        (
            ObjectNotFoundError,
            ObjectNotFoundError,
            ObjectDeniedError,
            ObjectDeniedError,
            FetchTooLargeError,
        ),
        strict=True,
    ):
        assert_failed(outcome, kind)


# Who may read what, before anybody is asked


def test_what_is_not_opened_to_the_tenant_is_never_asked_for() -> None:
    urls = ["s3://others/a.jpg", "s3://photographs/b/a.jpg", "s3://photographs/ab/c.jpg"]
    good = ["s3://photographs/a/x.jpg", "s3://photographs/public/x.jpg"]
    outcomes, server = fetch_all(
        answering(JPEG),
        [*urls, *good],
        opened=["s3://photographs/{tenant}/", "s3://photographs/public/"],
        tenant="a",
    )

    for outcome in outcomes[: len(urls)]:
        assert_failed(outcome, BucketNotAllowedError)
    assert all(isinstance(outcome, Fetched) for outcome in outcomes[len(urls) :])
    assert len(good) == len(server.heads)


def test_without_any_opened_bucket_all_are_refused() -> None:
    assert_failed(asyncio.run(fetch(None, "s3://photographs/a.jpg")), BucketNotAllowedError)


def test_reference_that_is_none_is_never_asked_for() -> None:
    keys = ["../x", "a?versionId=1", "x" * 1025]
    outcomes, server = fetch_all(answering(JPEG), [f"s3://photographs/{key}" for key in keys])

    for outcome in outcomes:
        assert_failed(outcome, BadUrlError)
    assert [] == server.heads


# The keys


def test_request_is_signed_with_the_keys_of_the_profile_alone() -> None:
    outcome, server = fetch_from(answering(JPEG))

    assert isinstance(outcome, Fetched), outcome
    (path,) = server.paths
    assert path.startswith("/photographs/a.jpg?X-Amz-Algorithm=AWS4-HMAC-SHA256")
    assert "X-Amz-Credential=an%20id%2F" in path
    assert "the-blobs-own" not in server.heads[0]


def test_without_a_profile_nothing_is_signed() -> None:
    outcome, server = fetch_from(answering(JPEG), profile=None)

    assert isinstance(outcome, Fetched), outcome
    assert ["/photographs/a.jpg"] == server.paths


@pytest.mark.parametrize("profile", ["missing", "empty"])
def test_profile_without_keys_of_its_own_stops_the_start(profile: str) -> None:
    with pytest.raises(BadProfileError):
        Sources(FETCHING, buckets=config_for(None, profile=profile))


def test_address_that_is_none_stops_the_start() -> None:
    with pytest.raises(ValueError, match="endpoint"):
        Sources(FETCHING, buckets=config_for("nowhere"))


# What AWS may say


REFUSALS: Mapping[str, tuple[Answer, type[FetchFailedError]]] = {
    "no such key": (refusing("404 Not Found", "NoSuchKey"), ObjectNotFoundError),
    "no such bucket": (refusing("404 Not Found", "NoSuchBucket"), ObjectNotFoundError),
    "404 without a word": (answering(b"", "404 Not Found"), ObjectNotFoundError),
    # Also in these words: the requester pays, and did not say so.
    "denied": (refusing("403 Forbidden", "AccessDenied"), ObjectDeniedError),
    "wrong secret": (refusing("403 Forbidden", "SignatureDoesNotMatch"), ObjectDeniedError),
    "archived": (refusing("403 Forbidden", "InvalidObjectState"), ObjectArchivedError),
    "long key": (refusing("400 Bad Request", "KeyTooLongError"), ObjectDeniedError),
    "endless": (endless(b"HTTP/1.1 403 Forbidden\r\n\r\n", b"x" * 1000), ObjectDeniedError),
    "redirect": (redirecting("http://127.0.0.1/latest/meta-data"), FetchFailedError),
    "compressed": (answering(b"x", headers=["Content-Encoding: gzip"]), FetchFailedError),
}


def test_refusals_are_final_and_have_a_code() -> None:
    answers = {
        f"/photographs/{number}": answer for number, (answer, _) in enumerate(REFUSALS.values())
    }
    outcomes, server = fetch_all(answers, [f"s3:/{path}" for path in answers])

    for outcome, (_, kind) in zip(outcomes, REFUSALS.values(), strict=True):
        assert_failed(outcome, kind)
    assert len(REFUSALS) == len(server.heads)


def test_what_may_pass_is_tried_again() -> None:
    busy = refusing("503 Slow Down", "SlowDown")
    outcome, server = fetch_from(in_turn(busy, busy, answering(JPEG)))

    assert isinstance(outcome, Fetched), outcome
    assert 3 == len(server.heads) == outcome.report.num_tries


def test_slow_and_endless_objects_end_in_time_and_size() -> None:
    answers = {}
    answers["/photographs/slow"] = endless(
        b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n", b"x", 0.05
    )
    answers["/photographs/endless"] = endless(b"HTTP/1.1 200 OK\r\n\r\n", b"x" * 10_000)
    (slow, endless_one), _ = fetch_all(answers, [f"s3:/{path}" for path in answers])

    assert_failed(slow, FetchTimeoutError, retryable=True)
    assert_failed(endless_one, FetchTooLargeError)


def test_metadata_address_is_no_bucket() -> None:
    async def find_metadata(host: str) -> list[str]:
        return ["169.254.169.254"]

    buckets = config_for("http://buckets.test")

    assert_failed(
        asyncio.run(fetch(buckets, "s3://photographs/a.jpg", resolve=find_metadata)),
        HostNotAllowedError,
    )


def test_address_of_the_buckets_is_not_open_to_urls() -> None:
    urls = ["s3://photographs/a.jpg", "{server}/photographs/a.jpg"]
    (by_name, by_url), server = fetch_all(answering(JPEG), urls)

    assert isinstance(by_name, Fetched)
    assert_failed(by_url, HostNotAllowedError)
    assert 1 == len(server.heads)


@pytest.mark.parametrize(
    "answer",
    [
        refusing(
            "400 Bad Request", "AuthorizationHeaderMalformed", inside="<Region>eu-west-1</Region>"
        ),
        refusing("301 Moved Permanently", "PermanentRedirect", "x-amz-bucket-region: eu-west-1"),
    ],
    ids=["in the body", "in a header"],
)
def test_bucket_in_another_region_is_asked_there(answer: Answer) -> None:
    outcome, server = fetch_from(in_turn(answer, answering(JPEG)))

    assert isinstance(outcome, Fetched), outcome
    assert ["us-east-1", "eu-west-1"] == [path.split("%2F")[2] for path in server.paths]


def test_bucket_that_is_never_in_the_region_it_names_is_given_up() -> None:
    lost = refusing("301 Moved Permanently", "PermanentRedirect", "x-amz-bucket-region: eu-west-1")
    outcome, server = fetch_from(lost)

    assert_failed(outcome, ObjectDeniedError)
    assert 2 == len(server.heads)


def test_on_aws_each_bucket_has_a_name_of_its_own() -> None:
    asked: list[str] = []

    async def find_none(host: str) -> list[str]:
        asked.append(host)
        return []

    buckets = replace(config_for(None), region="eu-west-1")
    outcome = asyncio.run(fetch(buckets, "s3://photographs/a.jpg", resolve=find_none))

    assert_failed(outcome, FetchFailedError)
    assert ["photographs.s3.eu-west-1.amazonaws.com"] == asked
