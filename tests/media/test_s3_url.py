"""References into buckets: what is one, what has two meanings, and who may name which."""

import pytest

from media.errors import BadUrlError
from media.s3_url import S3Url, is_open, is_s3_url, parse_open_prefix, parse_s3_url
from tests.media.files import assert_fit_for_clients

LONGEST = "s3://photographs/" + "é" * 512


@pytest.mark.parametrize(
    ("text", "bucket", "key"),
    [
        ("s3://photographs/a.jpg", "photographs", "a.jpg"),
        ("S3://photographs/a b/ü%20+.jpg", "photographs", "a b/ü%20+.jpg"),
        ("s3://my.bucket-1/...", "my.bucket-1", "..."),
        (LONGEST, "photographs", "é" * 512),
    ],
)
def test_key_is_taken_as_it_stands(text: str, bucket: str, key: str) -> None:
    assert is_s3_url(text)
    assert S3Url(bucket, key) == parse_s3_url(text)
    assert f"s3://{bucket}/{key}" == str(parse_s3_url(text))


@pytest.mark.parametrize(
    "text",
    [
        "s3://",
        "s3:///a.jpg",
        "s3://photographs",
        "s3://photographs/",
        "s3:/photographs/a.jpg",
        "s3://ab/a.jpg",
        "s3://Photographs/a.jpg",
        "s3://user@photographs/a.jpg",
        "s3://photo..graphs/a.jpg",
        "s3://photographs:80/a.jpg",
        "s3://169.254.169.254:80/a.jpg",
        "s3://photographs/../secrets/a.jpg",
        "s3://photographs/a/./b.jpg",
        "s3://photographs/a/..",
        "s3://photographs//a.jpg",
        "s3://photographs/a/",
        "s3://photographs/a.jpg?versionId=3sL4kqtJlcpXroDTDmJ",
        "s3://photographs/a.jpg#part",
        "s3://photographs/a\r\nHost: b",
        "s3://photographs/a\\b",
        "s3://photographs/a\ud800",
        LONGEST + "a",
    ],
)
def test_what_is_no_plain_object_is_refused(text: str) -> None:
    with pytest.raises(BadUrlError) as caught:
        parse_s3_url(text)

    assert_fit_for_clients(caught.value)
    for word in ("photographs", "secrets", "169.254", "versionId="):
        assert word not in str(caught.value)


@pytest.mark.parametrize(
    ("opened", "tenant", "url", "may_read"),
    [
        ("s3://photographs", "a", "s3://photographs/x/y.jpg", True),
        ("s3://photographs/", "a", "s3://photographs2/y.jpg", False),
        ("s3://photographs/public", "a", "s3://photographs/public/y.jpg", True),
        ("s3://photographs/public", "a", "s3://photographs/public-not/y.jpg", False),
        ("s3://photographs/{tenant}/", "a", "s3://photographs/a/y.jpg", True),
        ("s3://photographs/{tenant}/", "a", "s3://photographs/ab/y.jpg", False),
        ("s3://photographs/{tenant}/", "b", "s3://photographs/a/y.jpg", False),
        ("s3://photographs/in/{tenant}/", "a", "s3://photographs/in/a/x/y.jpg", True),
        ("s3://photographs/{tenant}/", "..", "s3://photographs/../y.jpg", False),
        ("s3://photographs/{tenant}/", "a/b", "s3://photographs/a/b/y.jpg", False),
        ("s3://photographs/{tenant}/", "", "s3://photographs/y.jpg", False),
    ],
)
def test_prefixes_open_what_lies_below_them(
    opened: str, tenant: str, url: str, may_read: bool
) -> None:
    bucket, _, key = url.removeprefix("s3://").partition("/")

    assert may_read == is_open(S3Url(bucket, key), tenant, [parse_open_prefix(opened)])


@pytest.mark.parametrize(
    "text",
    [
        "",
        "photographs",
        "s3://",
        "s3://*",
        "s3://{tenant}/x",
        "s3://photographs/../x",
        "s3://photographs/a{tenant}/",
        "s3://photographs/a//b",
        "https://photographs/a",
    ],
)
def test_prefix_that_makes_no_sense_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="s3://"):
        parse_open_prefix(text)
