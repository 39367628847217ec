"""
The input of a job as one blob of lines: a file that was handed in, or made from inline requests.

What is known here is about the file as a whole. Lines are checked when they become items.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import orjson
import structlog

from api.config import MEBIBYTE
from api.errors import InvalidRequestError, MissingError
from api.schemas import MAX_MODEL_CHARS, parse_file_id
from api.services import Services
from storage import files
from storage.blobs import Blobs
from storage.db import Session
from storage.errors import BlobMissingError, NotFoundError, StorageError
from storage.ids import FileId, TenantId, new_uuid
from storage.keys import build_file_key
from tasks.identity import complete_line

log = structlog.get_logger()

MAX_SEARCH_BYTES: Final = 64 * MEBIBYTE
"""How far the name of the model is looked for. It stands in the first line of any sound file."""

INLINE_FILENAME: Final = "requests.jsonl"


@dataclass(frozen=True, slots=True)
class Manifest:
    """
    Args:
        model: of the first line that names one; empty where none does, and no line will pass.
        is_ours: written for this request and no file yet; see `create_file`.
    """

    file: FileId
    key: str
    num_bytes: int
    num_lines: int
    sha256: bytes
    model: str
    is_ours: bool

    def create_file(
        self,
        session: Session,
        tenant: TenantId,
        lifetime_s: float,
        *,
        purpose: str = "batch",
    ) -> None:
        files.create(
            session,
            file=self.file,
            tenant=tenant,
            purpose=purpose,
            filename=INLINE_FILENAME,
            num_bytes=self.num_bytes,
            num_lines=self.num_lines,
            sha256=self.sha256,
            blob_key=self.key,
            lifetime_s=lifetime_s,
        )

    def forget_file(self, session: Session) -> None:
        files.forget(session, self.file)


def find_manifest(here: Services, tenant: TenantId, shown_id: str) -> Manifest:
    """
    A file that was handed in.

    Raises:
        InvalidRequestError: there is no such file, or it is for something else.
    """
    try:
        with here.database.read() as session:
            row = files.get(session, tenant, parse_file_id(shown_id))
        model = "" if row.purpose != "batch" else _find_model(here.blobs, row.blob_key)
    except (MissingError, NotFoundError, BlobMissingError) as error:
        raise InvalidRequestError(
            "input_file_id: There is no such file.", param="input_file_id", code="file_not_found"
        ) from error
    if row.purpose != "batch":
        raise InvalidRequestError(
            f"input_file_id: This file's purpose is {row.purpose}, and batch is needed.",
            param="input_file_id",
            code="wrong_purpose",
        )
    return Manifest(
        row.id, row.blob_key, row.num_bytes, row.num_lines or 0, row.sha256, model, is_ours=False
    )


def write_manifest(
    here: Services, tenant: TenantId, requests: Sequence[Any], *, endpoint: str
) -> Manifest:
    """Write inline requests as the file that they would have been."""
    lines = [orjson.dumps(complete_line(request, endpoint)) for request in requests]
    content = b"\n".join([*lines, b""])
    file = FileId(new_uuid())
    key = build_file_key(tenant, file)
    stat = here.blobs.put(key, content)
    model = next(filter(None, map(_read_model, lines)), "")
    return Manifest(file, key, stat.num_bytes, len(lines), stat.sha256, model, is_ours=True)


def drop_blob(here: Services, file: FileId, key: str) -> None:
    """Remove a blob that got no row. If that fails, the sweeper finds it."""
    try:
        with here.database.read() as session:  # a commit whose answer was lost may need it
            is_named = files.is_named(session, file)
        if not is_named:
            here.blobs.delete(key)
    except StorageError as error:
        log.warning("blob_left", key=key, code=error.code)


def _find_model(blobs: Blobs, key: str) -> str:
    return next(filter(None, map(_read_model, _read_lines(blobs, key))), "")


def _read_lines(blobs: Blobs, key: str) -> Iterator[bytes]:
    rest, num_bytes = b"", 0
    pieces: list[bytes] = []
    for piece in blobs.stream(key):
        num_bytes += len(piece)
        if num_bytes > MAX_SEARCH_BYTES:
            return
        if b"\n" not in piece:
            pieces.append(piece)
            continue
        *lines, rest = (b"".join(pieces) + piece).split(b"\n")
        pieces = [rest]
        yield from lines
    yield b"".join(pieces)


def _read_model(line: bytes) -> str:
    try:
        model = orjson.loads(line)["body"]["model"]
    except (ValueError, LookupError, TypeError):
        return ""
    is_name = isinstance(model, str) and len(model) <= MAX_MODEL_CHARS and model.isprintable()
    return model if is_name else ""
