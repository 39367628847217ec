"""
Where blobs lie: the layout of blob keys, as pure functions.

A key is made of our own ids and words. Nothing that a client typed is ever in one: no `custom_id`,
no file name. A key is written once; what would be overwritten gets a key of its own instead, which
is why artifacts carry the number of the finishing attempt.
"""

import re
from typing import Final

from storage.errors import BadBlobKeyError
from storage.ids import FileId, JobId, TenantId

MAX_KEY_CHARS: Final = 512  # S3 takes 1024 bytes; a prefix may come before ours

_UUID: Final = "[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"
_OURS: Final = re.compile(rf"{_UUID}/(?:files/{_UUID}|{_UUID}/(?:output|errors)\.[0-9]+\.jsonl)")
_SEGMENT: Final = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")


def build_file_key(tenant: TenantId, file: FileId) -> str:
    return f"{tenant}/files/{file}"


def build_output_key(tenant: TenantId, job: JobId, finish_attempt: int) -> str:
    return f"{tenant}/{job}/output.{finish_attempt}.jsonl"


def build_errors_key(tenant: TenantId, job: JobId, finish_attempt: int) -> str:
    return f"{tenant}/{job}/errors.{finish_attempt}.jsonl"


def is_ours(key: str) -> bool:
    """Whether a key is of a form that this file makes. What else lies beside it is not ours to touch."""
    return _OURS.fullmatch(key) is not None


def check_key(key: str) -> str:
    """
    Give the key back if it is one of ours: segments of plain characters, none hidden, none `..`.

    Raises:
        BadBlobKeyError: our own bug; it stops before a path or a request is made of it.
    """
    segments = key.split("/")
    if len(key) > MAX_KEY_CHARS or not all(_SEGMENT.fullmatch(segment) for segment in segments):
        raise BadBlobKeyError
    return key
