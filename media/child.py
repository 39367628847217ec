"""
A decoder process: it decodes what its parent sends and writes the pixels into the arena.

`main` is all that such a process does, from its start by `media.pool` to its end. It decodes by the
same functions that a thread would call, so pixels are the same. Nothing that it reads can change what
it does: the parent says where bytes lie and which size is wanted, and the bytes are only decoded.
"""

import os
import signal
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from PIL import Image

from media.arena import open_view
from media.confine import confine, die_with_parent, lower_memory
from media.decoded import Fit, Header, RGBImage
from media.decoder import fit_frames
from media.errors import MediaError
from media.frames import FrameSampling
from media.images import decode_image
from media.limits import ImageLimits, VideoLimits
from media.video import decode_video, measure_clip
from media.wire import MAX_TIMES, BrokenWireError, ChildWire, Message

# Imported by Pillow and PyAV when a file asks for them, and then nothing can be opened any more.
LATE_IMPORTS: Final = ("PIL.MpoImagePlugin", "PIL.TiffImagePlugin", "av.subtitles.stream")
for _name in LATE_IMPORTS:
    with suppress(ImportError):  # the extra `video` may not be installed
        import_module(_name)
Image.preinit()

READING_BYTES: Final = 96 << 20
"""For headers and Python itself, beside twice the encoded bytes and what a header asks for."""

STRIP_BYTES: Final = 1 << 20
"""Pixels go from Pillow to the arena in strips of so many: a second whole picture is not held."""

GRACE_S: Final = 2.0
"""Behind the parent's clock comes the system's, which needs no parent: a process ends itself."""

Pixels = npt.NDArray[np.uint8]


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


Decode = Callable[["Server", Message, bytes], tuple[Sequence[RGBImage], Message]]


def main(birth: Birth) -> None:
    """Serve until the parent hangs up."""
    serve(birth, decode)


def decode(
    server: "Server", message: Message, encoded: bytes
) -> tuple[Sequence[RGBImage], Message]:
    """
    The pictures, and what else is known of them.

    Raises:
        MediaError: as the functions that threads call.
    """
    if message["say"] == "image":
        return [decode_image(encoded, _image_limits(message["limits"]), server.ask)], {}
    if message["say"] == "measure":
        limits = VideoLimits(**message["limits"])
        server.tell(measure_clip(encoded, limits, server.admit))
        return [], {}
    sampling, limits = FrameSampling(**message["sampling"]), VideoLimits(**message["limits"])
    frames = fit_frames(decode_video(encoded, sampling, limits, server.admit), server.ask)
    return frames.images, {
        "times_s": frames.times_s,
        "fps": frames.fps,
        "source_num_frames": frames.source_num_frames,
        "indices": frames.indices,
        "num_dropped": frames.num_dropped,
    }


def _image_limits(values: Message) -> ImageLimits:
    return ImageLimits(**{**values, "formats": tuple(values["formats"])})


def serve(birth: Birth, decode: Decode) -> None:
    die_with_parent(birth.parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's
    with suppress(ImportError):
        avif: Any = import_module("PIL.AvifImagePlugin")
        avif.DEFAULT_MAX_THREADS = 1  # the processes are what runs side by side
    with suppress(ImportError):
        import_module("pillow_heif").options.DECODE_THREADS = 1
    # From here on nobody reads what C libraries print about bad files.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    arena = open_view(birth.memory, birth.arena_bytes)
    wire = ChildWire(birth.reading, birth.writing)
    memory = _Memory()
    is_filtered = confine(memory.measure(birth.work_bytes + READING_BYTES))
    wire.send({"say": "ready", "is_filtered": is_filtered})
    server = Server(wire, arena, decode, memory)
    try:
        while True:
            server.answer(wire.receive())
    except BrokenWireError:
        return  # the parent has closed, or is gone


class _Memory:
    """How much of the address space may be used, counted from what is mapped when nothing is decoded."""

    def __init__(self) -> None:
        self._meter: int | None = None
        with suppress(OSError):  # not Linux, or no /proc: nothing is known, and nothing is bounded
            self._meter = os.open("/proc/self/statm", os.O_RDONLY)
        self._base_bytes = 0

    def measure(self, more_bytes: int) -> int | None:
        """What is mapped now and so much more; None where nobody knows."""
        if self._meter is None:
            return None
        num_pages = int(os.pread(self._meter, 256, 0).split()[0])
        return num_pages * os.sysconf("SC_PAGE_SIZE") + more_bytes

    def start(self, more_bytes: int) -> None:
        """Count from now on, and allow so much more."""
        self._base_bytes = self.measure(more_bytes) or 0
        self.allow(0)

    def allow(self, more_bytes: int) -> None:
        """Allow so much beside what `start` did."""
        if self._meter is not None:
            lower_memory(self._base_bytes + more_bytes)


def _describe(header: Header) -> Message:
    return {
        "width": header.width_px,
        "height": header.height_px,
        "work_bytes": header.work_bytes,
        "num_frames": header.num_frames,
        "times_s": header.times_s,
        "frame_s": header.frame_s,
        "duration_s": header.duration_s,
    }


class DroppedError(Exception):
    """The parent does not want this picture any more."""


class Server:
    """What a decoding may ask of its parent, and how its pixels get there."""

    def __init__(self, wire: ChildWire, arena: Pixels, decode: Decode, memory: _Memory) -> None:
        self._wire = wire
        self._arena = arena
        self._decode = decode
        self._memory = memory
        self._limit_s = 0.0
        self._place = 0
        self._guess: Header | None = None  # for which the parent has answered already
        self._answer: Message = {}

    def answer(self, message: Message) -> None:
        """Decode one file; say what went wrong with it, if anything."""
        num_bytes = message["num_bytes"]
        self._memory.start(READING_BYTES + 2 * num_bytes)
        encoded = self._wire.read(num_bytes)
        self._limit_s = message["limit_s"] + GRACE_S
        self._guess = Header(*message["guess"]) if "guess" in message else None
        self._answer = message.get("answer", {})
        self._start_clock()
        try:
            images, facts = self._decode(self, message, encoded)
            for index, image in enumerate(images):
                self._write(image, index)
            reply: Message = {"say": "done", **facts}
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

    def admit(self, header: Header) -> None:
        """
        Wait until the parent has room for decoding this.

        Raises:
            DroppedError: it does not want it.
        """
        self._consult({"say": "work", **_describe(header)})

    def ask(self, header: Header) -> Fit | None:
        """The same, and which size is wanted; now there is a place for the pixels."""
        if header == self._guess:
            answer = self._follow(self._answer)
        else:
            answer = self._consult({"say": "header", **_describe(header)})
        self._place = answer["start"]
        fit = answer["fit"]
        return Fit(fit[0], fit[1], Image.Resampling(fit[2]), fit[3]) if fit else None

    def tell(self, times_s: Sequence[float]) -> None:
        """The times of a clip's frames, in messages of bounded length."""
        for first in range(0, len(times_s), MAX_TIMES):
            self._wire.send({"say": "times", "times_s": times_s[first : first + MAX_TIMES]})

    def _consult(self, message: Message) -> Message:
        signal.setitimer(signal.ITIMER_REAL, 0)  # the parent may have no room just now
        self._wire.send(message)
        answer = self._wire.receive()
        self._start_clock()
        if answer["say"] == "drop":
            raise DroppedError
        return self._follow(answer)

    def _follow(self, answer: Message) -> Message:
        self._guess = None  # it has come true, or is withdrawn
        self._memory.allow(answer["work_bytes"])
        return answer

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
