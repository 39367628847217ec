"""
JSON bodies: read as they come, up to a limit, and strictly.

FastAPI would read a whole body before it asks who sends it; here the route reads it, after the
caller was admitted. Refused is what two parsers could understand differently: doubled keys, NaN,
numbers that no double holds, integers beyond 2^53, half of a surrogate pair, and nesting without
end. So is what would take far more memory parsed than it has bytes.
"""

import asyncio
import json
import math
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final, NoReturn

import orjson
from fastapi import Request
from starlette.concurrency import run_in_threadpool

from api.config import ApiConfig
from api.errors import InvalidRequestError, StalledError, TooBusyError, TooLargeError

MAX_DEPTH: Final = 32
MAX_INTEGER: Final = 2**53
MAX_KEYS: Final = 1000
"""Of one object."""
MAX_VALUES: Final = 2**20
"""Of one body, objects and arrays included: each may take a hundred bytes once it is parsed."""

_BIG_BYTES: Final = 64 * 1024  # from here on parsing is too long for the event loop
_STRING: Final = re.compile(rb'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)


class HeldBytes:
    """
    How many bytes of bodies the process holds, of all requests together. Belongs to one event loop.

    Args:
        max_bytes: over it, whoever brings more is told to come again.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._num_bytes = 0

    def add(self, num_bytes: int) -> None:
        """Raises `TooBusyError`."""
        if self._num_bytes + num_bytes > self._max_bytes:
            raise TooBusyError
        self._num_bytes += num_bytes

    def remove(self, num_bytes: int) -> None:
        self._num_bytes -= num_bytes


@asynccontextmanager
async def read_json(
    request: Request, config: ApiConfig, held: HeldBytes
) -> AsyncIterator[dict[str, Any]]:
    """
    The JSON object that the request brings, counted as held until the block is left.

    Raises:
        TooLargeError, TooBusyError, StalledError: it was not read to its end.
        InvalidRequestError: it is no clean JSON object.
    """
    if read_length(request) > config.max_body_bytes:
        raise _too_large(config.max_body_bytes)
    pieces, num_bytes = [], 0
    try:
        async for piece in read_pieces(request, config.body_timeout_s):
            if num_bytes + len(piece) > config.max_body_bytes:
                raise _too_large(config.max_body_bytes)
            held.add(len(piece))
            num_bytes += len(piece)
            pieces.append(piece)
        raw = b"".join(pieces)
        pieces.clear()
        yield parse(raw) if len(raw) < _BIG_BYTES else await run_in_threadpool(parse, raw)
    finally:
        held.remove(num_bytes)


async def read_pieces(request: Request, timeout_s: float) -> AsyncIterator[bytes]:
    """
    A body piece by piece.

    Raises:
        StalledError: no piece came for so long.
    """
    pieces = request.stream()
    while True:
        try:
            async with asyncio.timeout(timeout_s):
                piece = await anext(pieces)
        except StopAsyncIteration:
            return
        except TimeoutError as error:
            raise StalledError from error
        yield piece


def read_length(request: Request) -> int:
    """What the client announces, before anything is read; 0 where it does not say."""
    length = request.headers.get("content-length", "")
    return int(length[:20]) if length.isdecimal() else 0


def _too_large(max_bytes: int) -> TooLargeError:
    return TooLargeError(
        f"This body is larger than {max_bytes} bytes. Larger inputs go through POST /v1/files."
    )


def parse(raw: bytes) -> dict[str, Any]:
    """Raises `InvalidRequestError`."""
    _refuse_swarm(raw)
    try:
        parsed = json.loads(
            raw.decode(),  # json would take UTF-16 too
            object_pairs_hook=_build_object,
            parse_constant=_refuse_constant,
            parse_int=_build_integer,
            parse_float=_build_float,
        )
        _check_shape(parsed)
        orjson.dumps(parsed)  # half of a surrogate pair cannot be written, here or anywhere
    except RecursionError as error:
        raise _too_deep() from error
    except (ValueError, TypeError) as error:  # the texts of parsers may quote what was sent
        raise _refusal("The body is not valid JSON.") from error
    if not isinstance(parsed, dict):
        raise _refusal("The body must be a JSON object.")
    return parsed


def _refuse_swarm(raw: bytes) -> None:
    """
    Before anything is built: every comma outside of text stands behind a value, every bracket is one.

    So if there are more than twice as many of both together, there are too many values.
    """
    if len(raw) <= MAX_VALUES:
        return
    if _count_marks(raw) > 2 * MAX_VALUES and _count_marks(_STRING.sub(b"", raw)) > 2 * MAX_VALUES:
        raise _too_many_values()


def _count_marks(raw: bytes) -> int:
    return raw.count(b",") + raw.count(b"[") + raw.count(b"{")


def _build_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(pairs) > MAX_KEYS:
        raise _refusal(f"An object in the body has more than {MAX_KEYS} keys.")
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise _refusal("The body names a key twice.")
    return fields


def _refuse_constant(name: str) -> NoReturn:
    raise _refusal("NaN and Infinity are no JSON.")


def _build_integer(digits: str) -> int:
    if len(digits) > 17 or abs(int(digits)) > MAX_INTEGER:
        raise _refusal("The body holds an integer beyond 2^53.")
    return int(digits)


def _build_float(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise _refusal("The body holds a number that is too large.")
    return number


def _check_shape(parsed: Any) -> None:
    level, num_values = [parsed], 1
    for _ in range(MAX_DEPTH):
        level = [
            child
            for parent in level
            if isinstance(parent, (dict, list))
            for child in (parent.values() if isinstance(parent, dict) else parent)
        ]
        num_values += len(level)
        if num_values > MAX_VALUES:
            raise _too_many_values()
        if not level:
            return
    raise _too_deep()


def _too_deep() -> InvalidRequestError:
    return _refusal(f"The body is nested deeper than {MAX_DEPTH} levels.")


def _too_many_values() -> InvalidRequestError:
    return _refusal(f"The body holds more than {MAX_VALUES} values.")


def _refusal(message: str) -> InvalidRequestError:
    return InvalidRequestError(message, code="invalid_json")
