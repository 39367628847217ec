"""
References into buckets: `s3://bucket/key` -> bucket and key, and who may name which. No network.

The key stands in the reference as it is, without percent-encoding, as AWS's own command writes it.
What two readers could take for two things is refused: `.` and `..`, empty segments, `?` and `#`,
which would ask for a version or be cut off.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from media.errors import BadUrlError

MAX_KEY_BYTES: Final = 1024
"""S3's own limit."""

TENANT: Final = "{tenant}"
"""In a prefix: the name of whoever asks, as one whole segment."""

_BUCKET: Final = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_FORBIDDEN: Final = re.compile(r"[\x00-\x1f\x7f-\x9f\\\ud800-\udfff]")
_SAFE_TENANT: Final = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}")


@dataclass(frozen=True, slots=True)
class S3Url:
    """One object; `str()` puts the reference together again."""

    bucket: str
    key: str

    def __str__(self) -> str:
        return f"s3://{self.bucket}/{self.key}"


@dataclass(frozen=True, slots=True)
class OpenPrefix:
    """
    A part of a bucket that may be read.

    Attributes:
        prefix: ends with a slash, or is empty for the whole bucket; may hold `{tenant}`.
    """

    bucket: str
    prefix: str

    def opens(self, url: S3Url, tenant: str) -> bool:
        prefix = self.prefix
        if TENANT in prefix:
            if not _SAFE_TENANT.fullmatch(tenant):
                return False
            prefix = prefix.replace(TENANT, tenant)
        return url.bucket == self.bucket and url.key.startswith(prefix)


def is_s3_url(url: str) -> bool:
    """Tell whether this is an s3:// reference at all; it may still be a bad one."""
    return url[:5].lower() == "s3://"


def parse_s3_url(text: str) -> S3Url:
    """
    Return bucket and key.

    Raises:
        BadUrlError: no bucket or key, a key that is too long or has two meanings, or a version. The
            text repeats nothing of the reference.
    """
    bucket, _, key = text[5:].partition("/")
    if not is_s3_url(text) or not _is_bucket(bucket) or not key:
        raise BadUrlError(
            "The s3:// reference names no bucket or no object. Its form is s3://bucket/key."
        )
    if _FORBIDDEN.search(key):
        raise BadUrlError(
            "The key in the s3:// reference holds a control character, a backslash or half of a "
            "character. Copy the object to a plain key."
        )
    if len(key.encode()) > MAX_KEY_BYTES:
        raise BadUrlError(
            f"The key in the s3:// reference has more than the {MAX_KEY_BYTES} bytes that a key "
            "may have. Check where it ends."
        )
    if "?" in key or "#" in key:
        raise BadUrlError(
            "The s3:// reference holds a ? or a #. Versions and other parameters are not read: "
            "name the object alone, and copy one whose key holds these characters."
        )
    if not _is_plain_path(key):
        raise BadUrlError(
            "The key in the s3:// reference has a segment that is empty, . or .., or ends with a "
            "slash. Name the object itself."
        )
    return S3Url(bucket, key)


def parse_open_prefix(text: str) -> OpenPrefix:
    """
    Return what `s3://bucket` or `s3://bucket/prefix/` opens; a final slash is added.

    Raises:
        ValueError: it is neither, or `{tenant}` is not a segment of its own.
    """
    bucket, _, prefix = text[5:].partition("/")
    prefix = prefix.rstrip("/")
    is_plain = not prefix or (_is_plain_path(prefix) and not _FORBIDDEN.search(prefix))
    if not is_s3_url(text) or not _is_bucket(bucket) or not is_plain:
        raise ValueError("give s3://BUCKET or s3://BUCKET/PREFIX/")
    if any(TENANT in segment and segment != TENANT for segment in prefix.split("/")):
        raise ValueError(f"{TENANT} must be a whole segment, as in s3://BUCKET/{TENANT}/")
    return OpenPrefix(bucket, f"{prefix}/" if prefix else "")


def is_open(url: S3Url, tenant: str, prefixes: Iterable[OpenPrefix]) -> bool:
    """Tell whether one of these prefixes lets this tenant read the object."""
    return any(prefix.opens(url, tenant) for prefix in prefixes)


def _is_bucket(text: str) -> bool:
    return _BUCKET.fullmatch(text) is not None and ".." not in text


def _is_plain_path(text: str) -> bool:
    return not {"", ".", ".."}.intersection(text.split("/"))
