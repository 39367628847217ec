"""
What a decoder process and its parent say to each other: JSON objects, each behind its length.

Pixels and files are not said, they lie in the arena. Both sides read with a bound, and the parent
with a clock: what comes from a child is judged as what comes from a stranger.
"""

import json
import os
import select
import struct
import time
from typing import Any, Final

MAX_MESSAGE_BYTES: Final = 1 << 20
_LENGTH: Final = struct.Struct("<I")

Message = dict[str, Any]


class BrokenWireError(Exception):
    """The other side is gone, or does not speak as it should."""


class SilentError(Exception):
    """Nothing came in time."""


class Wire:
    """
    One side's two pipes. Used by one thread at a time.

    Args:
        reading, writing: descriptors, owned from now on.
    """

    def __init__(self, reading: int, writing: int) -> None:
        self._reading, self._writing = reading, writing
        self._come = bytearray()

    def send(self, message: Message) -> None:
        """
        Raises:
            BrokenWireError: nobody reads any more.
        """
        body = json.dumps(message, separators=(",", ":")).encode()
        rest = memoryview(_LENGTH.pack(len(body)) + body)
        try:
            while rest:  # messages are far smaller than a pipe: this does not wait
                rest = rest[os.write(self._writing, rest) :]
        except OSError as error:
            raise BrokenWireError from error

    def receive(self, timeout_s: float | None = None) -> Message:
        """
        Raises:
            BrokenWireError: the other side ended, or what came is no message.
            SilentError: no whole message came in time.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        body = self._read(_LENGTH.unpack(self._read(_LENGTH.size, deadline))[0], deadline)
        try:
            message = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise BrokenWireError from error
        if not isinstance(message, dict):
            raise BrokenWireError
        return message

    def close(self) -> None:
        os.close(self._reading)
        os.close(self._writing)

    def _read(self, num_bytes: int, deadline: float | None) -> bytes:
        if num_bytes > MAX_MESSAGE_BYTES:
            raise BrokenWireError
        while len(self._come) < num_bytes:
            if deadline is not None:
                self._wait(deadline)
            try:
                piece = os.read(self._reading, 1 << 16)
            except OSError as error:
                raise BrokenWireError from error
            if not piece:
                raise BrokenWireError
            self._come += piece
        found = bytes(self._come[:num_bytes])
        del self._come[:num_bytes]
        return found

    def _wait(self, deadline: float) -> None:
        poll = select.poll()
        poll.register(self._reading, select.POLLIN)
        if not poll.poll(max(deadline - time.monotonic(), 0) * 1000):
            raise SilentError
