"""
A decoder process: it decodes what lies in the arena and writes the pixels back into it.

`main` is all that such a process does, from its start by `media.pool` to its end. It decodes by the
same functions that a thread would call, so pixels are the same. Nothing that it reads can change what
it does: the parent says where bytes lie and which size is wanted, and the bytes are only decoded.
"""

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
from PIL import AvifImagePlugin, Image, MpoImagePlugin, TiffImagePlugin

from media.arena import open_view
from media.confine import confine, die_with_parent, lower_memory
from media.decoded import Ask, Fit, Header, RGBImage
from media.errors import MediaError
from media.images import decode_image
from media.limits import ImageLimits
from media.wire import BrokenWireError, Message, Wire

# Pillow imports these two when a file asks for them, and then nothing can be opened any more.
LATE_IMPORTS: Final = (MpoImagePlugin, TiffImagePlugin)

READING_BYTES: Final = 96 << 20
"""For headers and Python itself, beside twice the encoded bytes and what a header asks for."""

STRIP_BYTES: Final = 1 << 20
"""Pixels go from Pillow to the arena in strips of so many: a second whole picture is not held."""

GRACE_S: Final = 2.0
"""Behind the parent's clock comes the system's, which needs no parent: a process ends itself."""

Pixels = npt.NDArray[np.uint8]
Decode = Callable[[Message, bytes, Ask], list[RGBImage]]


@dataclass(frozen=True, slots=True)
class Birth:
    """
    What a decoder process is told at its start.

    Attributes:
        parent: its process id.
        reading, writing, memory: descriptors of its pipes and of its arena.
        arena_bytes: the arena's size.
        work_bytes: the most that one decoding may be granted.
    """

    parent: int
    reading: int
    writing: int
    memory: int
    arena_bytes: int
    work_bytes: int


def main(birth: Birth) -> None:
    """Serve until the parent hangs up."""
    serve(birth, decode)


def decode(message: Message, encoded: bytes, ask: Ask) -> list[RGBImage]:
    """
    Raises:
        MediaError: as the functions that threads call.
    """
    limits = message["limits"]
    return [
        decode_image(encoded, ImageLimits(**{**limits, "formats": tuple(limits["formats"])}), ask)
    ]


def serve(birth: Birth, decode: Decode) -> None:
    die_with_parent(birth.parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's
    AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # the processes are what runs side by side
    # From here on nobody reads what C libraries print about bad files.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    arena = open_view(birth.memory, birth.arena_bytes)
    wire = Wire(birth.reading, birth.writing)
    meter = _open_meter()
    is_filtered = confine(_mapped_bytes(meter) + birth.work_bytes + READING_BYTES)
    wire.send({"say": "ready", "is_filtered": is_filtered})
    server = _Server(wire, arena, decode, meter)
    try:
        while True:
            server.answer(wire.receive())
    except BrokenWireError:
        return  # the parent has closed, or is gone


def _open_meter() -> int | None:
    try:
        return os.open("/proc/self/statm", os.O_RDONLY)
    except OSError:  # not Linux
        return None


def _mapped_bytes(meter: int | None) -> int:
    if meter is None:
        return 0
    return int(os.pread(meter, 256, 0).split()[0]) * os.sysconf("SC_PAGE_SIZE")


class DroppedError(Exception):
    """The parent does not want this picture any more."""


class _Server:
    def __init__(self, wire: Wire, arena: Pixels, decode: Decode, meter: int | None) -> None:
        self._wire = wire
        self._arena = arena
        self._decode = decode
        self._meter = meter
        self._limit_s = 0.0
        self._base_bytes = 0  # of address space, without what the header asks for
        self._place = 0

    def answer(self, message: Message) -> None:
        """Decode one file; say what went wrong with it, if anything."""
        self._limit_s = message["limit_s"] + GRACE_S
        self._start_clock()
        self._wire.send({"say": "begun"})
        num_bytes = message["num_bytes"]
        self._base_bytes = _mapped_bytes(self._meter) + READING_BYTES + 2 * num_bytes
        lower_memory(self._base_bytes)
        try:
            encoded = self._arena[message["start"] :][:num_bytes].tobytes()
            images = self._decode(message, encoded, self._ask)
            for index, image in enumerate(images):
                self._write(image, index)
            reply: Message = {"say": "done"}
        except DroppedError:
            reply = {"say": "dropped"}
        except MediaError as error:
            reply = {"say": "refused", "error": type(error).__name__, "text": str(error)}
        except MemoryError:
            reply = {"say": "out_of_memory"}
        signal.setitimer(signal.ITIMER_REAL, 0)
        self._wire.send(reply)

    def _start_clock(self) -> None:
        """Nothing in Python handles this signal: it ends the process, whatever code is running."""
        signal.setitimer(signal.ITIMER_REAL, self._limit_s)

    def _ask(self, header: Header) -> Fit | None:
        signal.setitimer(signal.ITIMER_REAL, 0)  # the parent may have no room just now
        self._wire.send(
            {
                "say": "header",
                "width": header.width_px,
                "height": header.height_px,
                "work_bytes": header.work_bytes,
                "num_frames": header.num_frames,
            }
        )
        answer = self._wire.receive()
        self._start_clock()
        if answer["say"] == "drop":
            raise DroppedError
        lower_memory(self._base_bytes + answer["work_bytes"])
        self._place = answer["start"]
        fit = answer["fit"]
        return Fit(fit[0], fit[1], Image.Resampling(fit[2])) if fit else None

    def _write(self, image: RGBImage, index: int) -> None:
        width, height = image.width_px, image.height_px
        picture_bytes = width * height * 3
        to = self._arena[self._place + index * picture_bytes :][:picture_bytes]
        to = to.reshape(height, width, 3)
        step = max(STRIP_BYTES // (width * 3), 1)
        if height <= step:
            to[:] = image.view()
            return
        for top in range(0, height, step):
            bottom = min(top + step, height)
            to[top:bottom] = np.asarray(image.image.crop((0, top, width, bottom)))
