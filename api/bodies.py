"""
JSON bodies: read as they come, up to a limit, and strictly.

FastAPI would read a whole body before it asks who sends it; here the route reads it, after the
caller was admitted. Refused is what two parsers could understand differently: doubled keys, NaN,
integers beyond 2^53, half of a surrogate pair, and nesting without end.
"""

import hashlib
import json
from dataclasses import dataclass
from typing import Any, Final, NoReturn

import orjson
from fastapi import Request
from starlette.concurrency import run_in_threadpool

from api.errors import InvalidRequestError, TooLargeError

MAX_DEPTH: Final = 32
MAX_INTEGER: Final = 2**53

_BIG_BYTES: Final = 64 * 1024  # from here on parsing is too long for the event loop


@dataclass(frozen=True, slots=True)
class Body:
    """A parsed JSON object. `sha256` is of a canonical form: spaces and the order of keys are nothing."""

    fields: dict[str, Any]
    sha256: bytes


async def read_json(request: Request, *, max_bytes: int) -> Body:
    """Raises `TooLargeError`, or `InvalidRequestError` for anything that is no clean JSON object."""
    raw = await _read(request, max_bytes)
    if len(raw) < _BIG_BYTES:
        return parse(raw)
    return await run_in_threadpool(parse, raw)


async def _read(request: Request, max_bytes: int) -> bytes:
    refuse_length(request, max_bytes)
    pieces, num_bytes = [], 0
    async for piece in request.stream():
        num_bytes += len(piece)
        if num_bytes > max_bytes:
            raise _too_large(max_bytes)
        pieces.append(piece)
    return b"".join(pieces)


def refuse_length(request: Request, max_bytes: int) -> None:
    """Refuse by the length that the client announces, before anything is read."""
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length[:20]) > max_bytes:
        raise _too_large(max_bytes)


def _too_large(max_bytes: int) -> TooLargeError:
    return TooLargeError(
        f"This body is larger than {max_bytes} bytes. Larger inputs go through POST /v1/files."
    )


def parse(raw: bytes) -> Body:
    try:
        parsed = json.loads(
            raw,
            object_pairs_hook=_build_object,
            parse_constant=_refuse_constant,
            parse_int=_build_integer,
        )
        _check_depth(parsed)
        canonical = orjson.dumps(parsed, option=orjson.OPT_SORT_KEYS)
    except RecursionError as error:
        raise _too_deep() from error
    except (ValueError, TypeError) as error:  # the texts of parsers may quote what was sent
        raise InvalidRequestError("The body is not valid JSON.", code="invalid_json") from error
    if not isinstance(parsed, dict):
        raise InvalidRequestError("The body must be a JSON object.", code="invalid_json")
    return Body(parsed, hashlib.sha256(canonical).digest())


def _build_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise InvalidRequestError("The body names a key twice.", code="invalid_json")
    return fields


def _refuse_constant(name: str) -> NoReturn:
    raise InvalidRequestError("NaN and Infinity are no JSON.", code="invalid_json")


def _build_integer(digits: str) -> int:
    if len(digits) > 17 or abs(int(digits)) > MAX_INTEGER:
        raise InvalidRequestError("The body holds an integer beyond 2^53.", code="invalid_json")
    return int(digits)


def _check_depth(parsed: Any) -> None:
    level = [parsed]
    for _ in range(MAX_DEPTH):
        level = [
            child
            for parent in level
            if isinstance(parent, (dict, list))
            for child in (parent.values() if isinstance(parent, dict) else parent)
        ]
        if not level:
            return
    raise _too_deep()


def _too_deep() -> InvalidRequestError:
    return InvalidRequestError(
        f"The body is nested deeper than {MAX_DEPTH} levels.", code="invalid_json"
    )
