"""
/v1/files: bytes come in and go out as streams; none is ever held whole.

An upload is written under a key of its own, and gets its row when it is complete: one that breaks
off leaves nothing.
"""

import asyncio
from collections.abc import Iterator
from typing import Annotated, Any, Final, Literal
from urllib.parse import quote

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import ValidationError
from starlette.concurrency import run_in_threadpool

from api.answers import answer_json, describe_json
from api.auth import Asker, Caller
from api.bodies import read_length, read_pieces
from api.config import MEBIBYTE, ApiConfig
from api.errors import InvalidRequestError, MissingError, TooLargeError, translate_validation_error
from api.manifests import drop_blob
from api.multipart import FILE_FIELD, Form, open_form
from api.schemas import (
    MAX_LIFETIME_S,
    MIN_LIFETIME_S,
    PURPOSES,
    UPLOAD_PURPOSES,
    ExpiresAfter,
    FileDeleted,
    FileObject,
    FilePage,
    build_file,
    build_page,
    parse_file_id,
    show_file_id,
)
from api.services import Here, Services
from storage import files
from storage.blobs import Blobs, BlobStat
from storage.errors import NotFoundError, StorageError
from storage.ids import FileId, new_uuid
from storage.keys import build_file_key
from storage.tables import File

router = APIRouter(prefix="/v1/files", tags=["Files"])

PIECE_BYTES: Final = MEBIBYTE
_FORM_BYTES: Final = 64 * 1024  # what a form may hold beside its file

_UPLOAD_FORM: Final[dict[str, Any]] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["purpose", "file"],
                    "properties": {
                        "purpose": {"type": "string", "enum": sorted(UPLOAD_PURPOSES)},
                        "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
                        "expires_after[seconds]": {
                            "type": "integer",
                            "minimum": MIN_LIFETIME_S,
                            "maximum": MAX_LIFETIME_S,
                        },
                        "file": {"type": "string", "format": "binary"},
                    },
                    "additionalProperties": False,
                    "dependentRequired": {
                        "expires_after[anchor]": ["expires_after[seconds]"],
                        "expires_after[seconds]": ["expires_after[anchor]"],
                    },
                }
            }
        },
    }
}


@router.post("", responses=describe_json(FileObject), openapi_extra=_UPLOAD_FORM)
async def create_file(request: Request, asker: Asker, here: Here) -> Response:
    _check_sizes(0, read_length(request), here.config)
    form = open_form(request)
    file = FileId(new_uuid())
    upload = Upload(here.blobs, build_file_key(asker.tenant, file))
    await run_in_threadpool(upload.open)
    try:
        num_read = 0
        async for piece in read_pieces(request, here.config.body_timeout_s):
            num_read += len(piece)
            form.feed(piece)
            _check_sizes(upload.num_bytes + form.num_pending, num_read, here.config)
            if form.num_pending >= PIECE_BYTES:
                await run_in_threadpool(upload.write, form.take_file_bytes())
        await run_in_threadpool(upload.write, form.take_file_bytes())
        form.finish()
        purpose, lifetime_s = read_fields(form, here.config)
    except BaseException as error:
        # Shielded: when the server stops, a half-written blob should still be let go of.
        await asyncio.shield(run_in_threadpool(upload.drop, error))
        raise
    row = await run_in_threadpool(
        _name_upload, here, asker, file, upload, form, purpose, lifetime_s
    )
    return answer_json(build_file(row))


def _check_sizes(num_bytes: int, num_read: int, config: ApiConfig) -> None:
    """The whole is checked too: what stands behind the form's end, and is no file, may have none."""
    if num_bytes > config.max_file_bytes or num_read > config.max_file_bytes + _FORM_BYTES:
        raise TooLargeError(f"A file has {config.max_file_bytes} bytes at most.", param=FILE_FIELD)


class Upload:
    """A blob in the making that counts its lines."""

    def __init__(self, blobs: Blobs, key: str) -> None:
        self.key = key
        self.num_bytes = 0
        self._num_line_ends = 0
        self._last = b"\n"
        self._blobs = blobs

    @property
    def num_lines(self) -> int:
        """The last line needs no end."""
        return self._num_line_ends + (self._last != b"\n")

    def open(self) -> None:
        self._writer = self._blobs.open_writer(self.key)
        self._writer.__enter__()

    def write(self, piece: bytes) -> None:
        if piece:
            self._writer.write(piece)
            self.num_bytes += len(piece)
            self._num_line_ends += piece.count(b"\n")
            self._last = piece[-1:]

    def drop(self, error: BaseException) -> None:
        self._writer.__exit__(type(error), error, error.__traceback__)

    def finish(self) -> BlobStat:
        self._writer.__exit__(None, None, None)
        return self._writer.stat


def _name_upload(
    here: Services,
    asker: Caller,
    file: FileId,
    upload: Upload,
    form: Form,
    purpose: str,
    lifetime_s: int | None,
) -> File:
    assert form.filename is not None, "a finished form has a file"
    stat = upload.finish()
    try:
        with here.database.write() as session:
            return files.create(
                session,
                file=file,
                tenant=asker.tenant,
                purpose=purpose,
                filename=form.filename,
                num_bytes=stat.num_bytes,
                num_lines=upload.num_lines if purpose == "batch" else None,
                sha256=stat.sha256,
                blob_key=upload.key,
                lifetime_s=lifetime_s,
            )
    except StorageError:
        drop_blob(here, file, upload.key)
        raise


def read_fields(form: Form, config: ApiConfig) -> tuple[str, int | None]:
    """
    The purpose, and a lifetime in seconds; None: it stays.

    Raises:
        InvalidRequestError: one of them is missing or not allowed.
    """
    purpose = form.fields.get("purpose", "")
    if purpose not in UPLOAD_PURPOSES:
        raise InvalidRequestError(
            f"purpose: Give one of {', '.join(sorted(UPLOAD_PURPOSES))}.", param="purpose"
        )
    anchor = form.fields.get("expires_after[anchor]")
    seconds = form.fields.get("expires_after[seconds]")
    if anchor is None and seconds is None:
        return purpose, config.batch_file_lifetime_s if purpose == "batch" else None
    try:
        number = int(seconds) if seconds is not None and seconds.isdecimal() else seconds
        after = ExpiresAfter.model_validate({"anchor": anchor, "seconds": number})
    except ValidationError as error:
        raise translate_validation_error(error, root="expires_after") from error
    except ValueError as error:  # thousands of digits
        raise InvalidRequestError(
            "expires_after.seconds: This is no number of seconds.", param="expires_after"
        ) from error
    return purpose, after.seconds


@router.get("", responses=describe_json(FilePage))
def list_files(
    asker: Asker,
    here: Here,
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
    order: Literal["asc", "desc"] = "desc",
    purpose: Annotated[str | None, Query(json_schema_extra={"enum": sorted(PURPOSES)})] = None,
) -> Response:
    if purpose is not None and purpose not in PURPOSES:
        raise InvalidRequestError("purpose: This is none.", param="purpose")
    try:
        after_file = None if after is None else parse_file_id(after)
        with here.database.read() as session:
            page, has_more = files.list_page(
                session,
                asker.tenant,
                after=after_file,
                purpose=purpose,
                is_newest_first=order == "desc",
                limit=limit,
            )
    except (MissingError, NotFoundError) as error:
        raise InvalidRequestError("after: There is no such file.", param="after") from error
    return answer_json(build_page([build_file(row) for row in page], has_more=has_more))


@router.get("/{file_id}", responses=describe_json(FileObject))
def retrieve_file(file_id: str, asker: Asker, here: Here) -> Response:
    with here.database.read() as session:
        row = files.get(session, asker.tenant, parse_file_id(file_id))
    return answer_json(build_file(row))


@router.delete("/{file_id}", responses=describe_json(FileDeleted))
def delete_file(file_id: str, asker: Asker, here: Here) -> Response:
    """Hide a file. Batches that were made from it go on."""
    file = parse_file_id(file_id)
    with here.database.write() as session:
        files.delete(session, asker.tenant, file)
    return answer_json({"id": show_file_id(file), "object": "file", "deleted": True})


@router.get(
    "/{file_id}/content",
    response_class=Response,
    responses={
        **describe_json(FileObject),
        200: {"content": {"application/octet-stream": {}}, "description": "The bytes"},
    },
)
def retrieve_content(file_id: str, asker: Asker, here: Here) -> Response:
    with here.database.read() as session:
        row = files.get(session, asker.tenant, parse_file_id(file_id))
    pieces = here.blobs.stream(row.blob_key)
    first = next(pieces, b"")  # a blob that is missing is an error before the answer has begun
    return StreamingResponse(
        _chain(first, pieces),
        media_type="application/octet-stream",
        headers={
            "content-length": str(row.num_bytes),
            # Never a type that a browser would show: the bytes are whatever the client put in.
            "content-disposition": f"attachment; filename*=UTF-8''{quote(row.filename, safe='')}",
        },
    )


def _chain(first: bytes, rest: Iterator[bytes]) -> Iterator[bytes]:
    yield first
    yield from rest
