"""
Multipart forms, piece by piece: a few short fields, and one file that is never held whole.

OpenAI's client sends the file last, so what it is for is known before its bytes; other clients may
turn that round, and are served too.
"""

from collections.abc import Callable
from typing import Final

from fastapi import Request
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from api.errors import InvalidRequestError

MAX_FIELD_BYTES: Final = 4 * 1024
MAX_FILENAME_CHARS: Final = 255
MAX_SHOWN_CHARS: Final = 64

FILE_FIELD: Final = "file"
FIELDS: Final = frozenset(
    {"purpose", "expires_after[anchor]", "expires_after[seconds]", FILE_FIELD}
)


class Form:
    """
    A form in the making: `feed` it, take what came of the file, and `finish` it.

    `fields` holds what was said so far; `filename` is None until the file began.
    """

    def __init__(self, boundary: bytes) -> None:
        self.fields: dict[str, str] = {}
        self.filename: str | None = None
        self.num_pending = 0
        self._pending: list[bytes] = []
        self._is_complete = False
        self._header_name = bytearray()
        self._header_value = bytearray()
        self._headers: dict[bytes, bytes] = {}
        self._name = ""
        self._value = bytearray()
        self._is_in_file = False
        callbacks: dict[str, Callable[..., None]] = {
            "on_part_begin": self._begin_part,
            "on_header_field": self._add_header_name,
            "on_header_value": self._add_header_value,
            "on_header_end": self._end_header,
            "on_headers_finished": self._end_headers,
            "on_part_data": self._add_data,
            "on_part_end": self._end_part,
            "on_end": self._end,
        }
        try:
            self._parser = MultipartParser(boundary, callbacks)  # type: ignore[arg-type]
        except FormParserError as error:
            raise _malformed() from error

    def feed(self, piece: bytes) -> None:
        """Raises `InvalidRequestError`."""
        try:
            self._parser.write(piece)
        except FormParserError as error:
            raise _malformed() from error

    def take_file_bytes(self) -> bytes:
        taken = b"".join(self._pending)
        self._pending.clear()
        self.num_pending = 0
        return taken

    def finish(self) -> None:
        """Raises `InvalidRequestError` if the form broke off, or had no file."""
        if not self._is_complete:
            raise _malformed()
        if self.filename is None:
            raise _refusal("The form has no file.", FILE_FIELD)

    def _begin_part(self) -> None:
        self._headers = {}
        self._value = bytearray()
        self._is_in_file = False

    def _add_header_name(self, source: bytes, start: int, end: int) -> None:
        self._header_name += source[start:end]

    def _add_header_value(self, source: bytes, start: int, end: int) -> None:
        self._header_value += source[start:end]

    def _end_header(self) -> None:
        self._headers[bytes(self._header_name).lower()] = bytes(self._header_value)
        self._header_name.clear()
        self._header_value.clear()

    def _end_headers(self) -> None:
        kind, options = parse_options_header(self._headers.get(b"content-disposition", b""))
        if kind != b"form-data" or b"name" not in options:
            raise _malformed()
        self._name = options[b"name"].decode(errors="replace")
        if self._name not in FIELDS:
            shown = "".join(filter(str.isprintable, self._name))[:MAX_SHOWN_CHARS]
            raise InvalidRequestError(
                f"Unknown parameter: {shown}.", param=shown, code="unknown_parameter"
            )
        if self._name == FILE_FIELD:
            if self.filename is not None:
                raise _refusal("The form has more than one file.", FILE_FIELD)
            self.filename = clean_filename(options.get(b"filename", b"").decode(errors="replace"))
            self._is_in_file = True

    def _add_data(self, source: bytes, start: int, end: int) -> None:
        if self._is_in_file:
            self._pending.append(source[start:end])
            self.num_pending += end - start
            return
        self._value += source[start:end]
        if len(self._value) > MAX_FIELD_BYTES:
            raise _refusal("A field of the form is too long.", self._name)

    def _end_part(self) -> None:
        if self._is_in_file:
            return
        if self._name in self.fields:
            raise _refusal("The form names a field twice.", self._name)
        try:
            self.fields[self._name] = self._value.decode()
        except UnicodeDecodeError as error:
            raise _malformed() from error

    def _end(self) -> None:
        self._is_complete = True


def open_form(request: Request) -> Form:
    """Raises `InvalidRequestError` if the request holds no multipart form."""
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    if kind != b"multipart/form-data" or not options.get(b"boundary"):
        raise _refusal("Send the file as multipart/form-data.", FILE_FIELD)
    return Form(options[b"boundary"])


def clean_filename(name: str) -> str:
    """The last part of a path, without control characters: shown to people, and used for nothing."""
    last = name.replace("\\", "/").rsplit("/", 1)[-1]
    return "".join(char for char in last if char.isprintable())[:MAX_FILENAME_CHARS] or "upload"


def _malformed() -> InvalidRequestError:
    return _refusal("The multipart form is malformed or broke off.")


def _refusal(message: str, param: str | None = None) -> InvalidRequestError:
    return InvalidRequestError(message, param=param, code="invalid_form")
