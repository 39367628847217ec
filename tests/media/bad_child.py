"""
Decoder processes that do, on a word in the bytes, what an attacker or a bug may do.

Only tests start them, by the pool's `entry`: the program that runs otherwise knows none of the words.
"""

import ctypes
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from media import confine
from media.child import Birth, Server, decode, serve
from media.decoded import Header, RGBImage
from media.errors import DecodersAwayError, HostPausedError, ImageUnreadableError
from media.wire import Message
from tests.media.files import Pixels

OPENING = ("socket", "unix socket", "read a file", "write a file", "list a folder")


def main(birth: Birth) -> None:
    attempts = _attempts(birth)

    def misbehave(
        server: Server, message: Message, encoded: bytes
    ) -> tuple[Sequence[RGBImage], Message]:
        match encoded[:5]:
            case b"CRASH":
                ctypes.string_at(0)
            case b"HANG.":
                time.sleep(3600)
            case b"HOG..":
                server.ask(Header(8, 8, work_bytes=1 << 20))
                return [RGBImage.of_pixels(_fill_memory())], {}
            case b"LIES.":
                server.ask(Header(-8, 8))
            case b"NEVER":
                server.ask(Header(8, 8, duration_s=math.inf))
            case b"LARGE":
                server.ask(Header(1 << 20, 1 << 20))
            case b"TIMES":
                server.tell(json.loads(encoded[5:]))
                return [], {}
            case b"AWAY.":
                raise DecodersAwayError
            case b"PAUSE":
                raise HostPausedError
            case b"RAISE":
                raise RuntimeError("a bug")
            case b"TRIES":
                raise ImageUnreadableError(json.dumps({k: _try(v) for k, v in attempts.items()}))
            case b"OPENS":  # what limits stop too; the others would do harm without the filter
                told = {name: _try(attempts[name]) for name in OPENING}
                raise ImageUnreadableError(json.dumps(told))
        return decode(server, message, encoded)

    serve(birth, misbehave)


def unfiltered(birth: Birth) -> None:
    """As on a system whose kernel has no filter of system calls."""
    confine._MACHINES.clear()
    main(birth)


def never_ready(birth: Birth) -> None:
    del birth
    sys.exit(3)


def _fill_memory() -> Pixels:
    return np.ones((1 << 14, 1 << 14, 3), np.uint8)


def _attempts(birth: Birth) -> dict[str, Callable[[], object]]:
    libc = ctypes.CDLL(None, use_errno=True)

    def call(name: str, *args: object) -> None:
        if getattr(libc, name)(*args) < 0:
            raise OSError(ctypes.get_errno(), "")

    return {
        "socket": lambda: socket.socket(),
        "unix socket": lambda: socket.socketpair(),
        "read a file": lambda: Path("/etc/hostname").read_bytes(),
        "write a file": lambda: Path("/tmp/darkroom-escape").write_bytes(b"x"),  # noqa: S108
        "remove a file": lambda: Path("/tmp/darkroom-nothing").unlink(),  # noqa: S108
        "list a folder": lambda: os.listdir("/"),  # noqa: PTH208
        "fork": lambda: call("fork"),
        "run a program": lambda: subprocess.run(["/bin/true"], check=True),
        "kill the parent": lambda: os.kill(birth.parent, 0),
        "trace the parent": lambda: call("ptrace", 16, birth.parent, 0, 0),
        "read the parent": lambda: Path(f"/proc/{birth.parent}/environ").read_bytes(),
        "raise its limits": lambda: call("setrlimit", 7, (ctypes.c_ulong * 2)(64, 64)),
        "memory that runs": lambda: _map_executable(),
        "torch": lambda: sys.modules["torch"],
        "secrets": lambda: [os.environ["DARKROOM_PEPPER"]],
        "nothing": lambda: signal.getitimer(signal.ITIMER_REAL),
    }


def _map_executable() -> None:
    import mmap

    mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)


def _try(attempt: Callable[[], object]) -> str:
    try:
        attempt()
    except OSError as error:
        return f"errno {error.errno}"
    except Exception as error:  # noqa: BLE001 - whatever stopped it is the answer
        return type(error).__name__
    return "done"
