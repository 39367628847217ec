"""
What a decoder process and its parent say to each other: JSON objects, each behind its length, and
encoded files behind the object that announces them.

Pixels are not said, they lie in the arena. The parent reads and writes with a clock, and judges what
comes from a child as what comes from a stranger.
"""

import fcntl
import json
import os
import select
import struct
import time
from contextlib import suppress
from typing import Any, Final

MAX_MESSAGE_BYTES: Final = 1 << 20

MAX_TIMES: Final = 1 << 15
"""Of a clip's frames, in one message: 24 bytes each at most."""

PIPE_BYTES: Final = 256 << 10
"""A file of ordinary size is sent at once, and nobody waits for its reader. Pages are taken as they fill."""

_LENGTH: Final = struct.Struct("<I")
_ENCODER: Final = json.JSONEncoder(separators=(",", ":"))

Message = dict[str, Any]


class BrokenWireError(Exception):
    """The other side is gone, or does not speak as it should."""


class SilentError(Exception):
    """Nothing came in time."""


class ChildWire:
    """
    The child's side, which waits for its parent as long as there is one.

    Args:
        reading, writing: descriptors, owned from now on.
    """

    def __init__(self, reading: int, writing: int) -> None:
        self._reading, self._writing = open(reading, "rb"), writing  # noqa: SIM115

    def send(self, message: Message) -> None:
        """
        Raises:
            BrokenWireError: nobody reads any more.
        """
        rest = memoryview(_pack(message))
        try:
            while rest:
                rest = rest[os.write(self._writing, rest) :]
        except OSError as error:
            raise BrokenWireError from error

    def receive(self) -> Message:
        """
        Raises:
            BrokenWireError: the parent has hung up.
        """
        message: Message = json.loads(self.read(_LENGTH.unpack(self.read(_LENGTH.size))[0]))
        return message

    def read(self, num_bytes: int) -> bytes:
        """What was announced, read straight into the place where it stays."""
        found = self._reading.read(num_bytes)
        if len(found) < num_bytes:
            raise BrokenWireError
        return found


class ParentWire:
    """
    The parent's side. Used by one thread at a time.

    Args:
        reading, writing: descriptors, owned from now on.
    """

    def __init__(self, reading: int, writing: int) -> None:
        self._reading, self._writing = reading, writing
        self._come = bytearray()
        os.set_blocking(writing, False)
        with suppress(OSError, AttributeError):  # the system has a limit, or none
            fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        self._to_read, self._to_write = select.poll(), select.poll()
        self._to_read.register(reading, select.POLLIN)
        self._to_write.register(writing, select.POLLOUT)

    def send(self, message: Message, timeout_s: float, behind: bytes = b"") -> None:
        """
        Args:
            behind: what the message announces.

        Raises:
            BrokenWireError: nobody reads any more.
            SilentError: not all of it was taken in time.
        """
        deadline = time.monotonic() + timeout_s
        rest = [memoryview(_pack(message)), memoryview(behind)]
        while rest:
            try:
                num_taken = os.writev(self._writing, rest)
            except BlockingIOError:
                _wait(self._to_write, deadline)
                continue
            except OSError as error:
                raise BrokenWireError from error
            while rest and num_taken >= len(rest[0]):
                num_taken -= len(rest.pop(0))
            if rest:
                rest[0] = rest[0][num_taken:]

    def receive(self, timeout_s: float) -> Message:
        """
        Raises:
            BrokenWireError: the child ended, or what came is no message.
            SilentError: no whole message came in time.
        """
        deadline = time.monotonic() + timeout_s
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

    def _read(self, num_bytes: int, deadline: float) -> bytes:
        if num_bytes > MAX_MESSAGE_BYTES:
            raise BrokenWireError
        while len(self._come) < num_bytes:
            _wait(self._to_read, deadline)
            piece = os.read(self._reading, 1 << 16)
            if not piece:
                raise BrokenWireError
            self._come += piece
        found = bytes(self._come[:num_bytes])
        del self._come[:num_bytes]
        return found


def _pack(message: Message) -> bytes:
    body = _ENCODER.encode(message).encode()
    return _LENGTH.pack(len(body)) + body


def _wait(until: select.poll, deadline: float) -> None:
    if not until.poll(max(deadline - time.monotonic(), 0) * 1000):
        raise SilentError
