"""
Decoding in processes of their own, which may die: `DecoderPool` beside the functions for threads.

Foreign bytes meet C code there, in a process that has no network, no files and no secrets, bounded
memory and little time (`media.confine`). Whatever happens to it is the error of the one file that it
had in hand; another process takes its place. The process that asks opens no container at all: it
sends the encoded bytes, is told the size, says which size it wants, and finds the pixels in memory that
both share, once written and never copied. Of a JPEG it guesses the size and says at once what it would
want; the other one asks only where the guess was wrong.
"""

import json
import logging
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from itertools import pairwise
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, Final, Self, TypeVar
from weakref import finalize

import numpy as np
import numpy.typing as npt

from media import errors
from media.arena import Arena
from media.decoded import Ask, Fit, Frames, Header, RGBImage
from media.errors import (
    DecodeMemoryError,
    DecoderFailedError,
    DecodersAwayError,
    DecodeTimeoutError,
    MediaError,
    VideoTooLargeError,
)
from media.frames import FrameSampling
from media.images import check_size, decode_image, guess_header
from media.limits import IMAGE_LIMITS, VIDEO_LIMITS, ImageLimits, VideoLimits
from media.video import DEFAULT_SAMPLING, decode_video, measure_clip
from media.wire import BrokenWireError, Message, ParentWire, SilentError

logger = logging.getLogger(__name__)

IMAGE_LIMIT_S: Final = 10.0
VIDEO_LIMIT_S: Final = 300.0
"""An hour at 60 frames a second that asks for its last frame is decoded at some 1,000 a second."""

START_LIMIT_S: Final = 60.0
"""From the start of a process until it says that it is ready, on a machine that is very busy."""

MAX_BYTES: Final = 1 << 30
MAX_BYTES_A_PROCESS: Final = 128 << 20
"""As much as a JPEG of 14 megapixels asks for."""

ARENA_BYTES: Final = 1 << 30
"""Address space, not memory: the frames of the largest clip that the limits allow, and some pictures."""

WORK_BYTES: Final = 2 << 30
CLEAR_S: Final = 0.02
"""How often one that waits for room looks whether pixels were let go."""

LOOK_S: Final = 0.5
"""How often the keeper looks whether a process that does nothing is still there."""

CLOSE_S: Final = 5.0
END_S: Final = 1.0
"""From the end of a process's pipe to its own."""

MAX_KILLED: Final = 2
"""Processes that may be killed over one file before it is taken for the reason."""

MAX_STARTS_FAILED: Final = 3
"""In a row, for a pool in which no process ever started: something is set up wrongly."""

RETRY_START_S: Final = 0.5
MAX_RETRY_START_S: Final = 8.0
"""The pause after a process that did not start; it doubles as long as none does."""

STEADY_S: Final = 5.0
"""A process that ends before that with nothing to do counts as one that did not start."""

GIVE_UP_S: Final = 60.0
"""How long files wait in a pool that had processes and has none, from the first that did not start."""

MAX_TEXT: Final = 1000
ENTRY: Final = "media.child:main"

# The environment holds secrets, so none of it is handed on, but for where the loader finds libraries.
# One thread: what runs side by side are the processes; and each heap of a thread takes address space.
# The heap keeps what pictures of ordinary size need: given back and taken again for each of them, its
# pages were a quarter of all time (640x480, glibc 2.36, 2026-11).
_ENVIRONMENT: Final = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(8 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(32 << 20),
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}
_KEPT_VARIABLES: Final = ("LD_LIBRARY_PATH",)
_START: Final = """
import json, sys
birth, entry, sys.path[:] = json.loads(sys.argv[1])
from importlib import import_module
from media.child import Birth
module, name = entry.split(":")
getattr(import_module(module), name)(Birth(**birth))
"""


Pixels = npt.NDArray[np.uint8]
Number = TypeVar("Number", int, float)
Check = Callable[[Header], None]
Decoded = tuple[Pixels, Message]
"""(num_frames, height_px, width_px, 3), and what the process said of it."""


class PoolClosedError(RuntimeError):
    """It was closed before or meanwhile."""


@dataclass(slots=True, eq=False)
class _Child:
    """
    A decoder process, its pipes and its arena.

    Attributes:
        left_s: of the time that one file may take.
        ready_at: when it said that it is, monotonic; from then on it decodes.
    """

    process: subprocess.Popen[bytes]
    wire: ParentWire
    arena: Arena
    left_s: float = 0.0
    ready_at: float | None = None

    @property
    def is_ready(self) -> bool:
        return self.ready_at is not None

    @property
    def is_steady(self) -> bool:
        """Whether it has lived for long enough to say that processes can start here."""
        return self.ready_at is not None and time.monotonic() - self.ready_at > STEADY_S

    def say(self, message: Message, behind: bytes = b"") -> None:
        """
        Raises:
            BrokenWireError, SilentError: it does not listen, or not in the time that it has left.
        """
        with self._counting():
            self.wire.send(message, self.left_s, behind)

    def listen(self) -> Message:
        """
        What it says, within the time that it has left.

        Raises:
            BrokenWireError, SilentError: it does not, or not in time.
        """
        with self._counting():
            return self.wire.receive(self.left_s)

    @contextmanager
    def _counting(self) -> Iterator[None]:
        started = time.monotonic()
        try:
            yield
        finally:
            self.left_s -= time.monotonic() - started

    @property
    def was_killed(self) -> bool:
        """Whether, having ended, it was killed from outside: by the system that needs memory, perhaps."""
        with suppress(subprocess.TimeoutExpired):
            return self.process.wait(END_S) == -signal.SIGKILL
        return False

    def end(self) -> None:
        """Whatever it does. Views of its arena stay good."""
        self.process.kill()
        self.process.wait()
        self.wire.close()
        self.arena.close()


@dataclass(slots=True)
class _Claim:
    """
    What one decoding may have.

    Attributes:
        file_bytes: the encoded file, which the process has a copy of.
        work_bytes: of the process's own memory.
        place: of its pixels: where in the arena, and (num_frames, height_px, width_px, 3).
    """

    file_bytes: int
    work_bytes: int = 0
    place: tuple[int, tuple[int, ...]] | None = None
    is_admitted: bool = False

    @property
    def num_bytes(self) -> int:
        pixel_bytes = math.prod(self.place[1]) if self.place else 0
        return self.file_bytes + self.work_bytes + pixel_bytes

    def as_message(self, fit: Fit | None) -> Message:
        return {
            "say": "go",
            "start": self.place and self.place[0],
            "work_bytes": self.work_bytes,
            "fit": fit and [fit.width_px, fit.height_px, fit.resample.value, fit.may_draft],
        }


@dataclass(frozen=True, slots=True)
class _Guess:
    """What a file's header may say, and which size is wanted then."""

    header: Header
    fit: Fit | None

    @property
    def shape(self) -> tuple[int, ...]:
        return _shape_of(self.header, self.fit)

    def as_list(self) -> list[int]:
        return [self.header.width_px, self.header.height_px, self.header.work_bytes]


class DecoderPool:
    """
    Processes that end are replaced. While none can be started files wait, and it is tried again.

    Args:
        num_processes: None for one a core.
        max_bytes: that decodings may hold at a time, with the pixels that callers still have; one
            that needs more waits until it is alone. None for MAX_BYTES, or more for many processes.
        image_limits: of images for which a call brings none.
        image_limit_s, video_limit_s: on the clock, for one file, waiting for room not counted.
        entry: `module:function` that a process runs; another one makes tests' processes misbehave.

    Raises:
        DecodersAwayError: no process starts.
    """

    def __init__(
        self,
        num_processes: int | None = None,
        *,
        max_bytes: int | None = None,
        image_limits: ImageLimits = IMAGE_LIMITS,
        image_limit_s: float = IMAGE_LIMIT_S,
        video_limit_s: float = VIDEO_LIMIT_S,
        entry: str = ENTRY,
    ) -> None:
        self.num_processes = num_processes or count_cores()
        self._max_bytes = max_bytes or max(MAX_BYTES, self.num_processes * MAX_BYTES_A_PROCESS)
        self._image_limits = image_limits
        self._image_limit_s = image_limit_s
        self._video_limit_s = video_limit_s
        self._entry = entry
        self._lock = threading.RLock()
        self._idle_changed = threading.Condition(self._lock)
        self._room_changed = threading.Condition(self._lock)
        self._buried = threading.Condition(self._lock)
        self._children: set[_Child] = set()
        # The last to come is the first to go: its caches are warm.
        self._idle: deque[_Child] = deque()
        self._turns: deque[object] = deque()  # who waits for room
        self._let_go: deque[tuple[Arena, int, int]] = deque()  # pixels that nobody has any more
        self._num_working = 0
        self._working_bytes = 0
        self._held_bytes = 0
        self._has_started = False  # any process, ever
        self._num_starts_failed = 0  # in a row; of several at once the first one counts
        self._failing_since = self._next_start = 0.0  # monotonic
        self._is_closed = False
        self._errands: SimpleQueue[Any] = SimpleQueue()
        # A child ends with the thread that started it, so that is one which stays.
        self._keeper = threading.Thread(target=self._keep, name="decoder-keeper", daemon=True)
        self._keeper.start()
        self._errands.put(self._fill)
        try:
            self._give(self._take())
        except BaseException:
            self.close()
            raise

    def decode_image(
        self, encoded: bytes, limits: ImageLimits | None = None, ask: Ask | None = None
    ) -> RGBImage:
        """
        As `media.images.decode_image`, with the same pixels; they lie in memory of the pool until
        nobody has them any more.

        Raises:
            MediaError: as that function.
            DecoderFailedError, DecodeTimeoutError, DecodeMemoryError: what became of the process.
            DecodersAwayError: there are no processes, and have been none for `GIVE_UP_S`.
            PoolClosedError: it was closed.
        """
        limits = limits or self._image_limits
        if not 0 < len(encoded) <= limits.max_bytes:  # in that function's own words
            return decode_image(encoded, limits)
        order = {"say": "image", "limits": _describe(limits), "limit_s": self._image_limit_s}
        check = partial(_check_image, limits=limits)
        guess = _guess(encoded, ask, check)
        pixels, _ = self._decode(encoded, order, ask, check, guess)
        return RGBImage.of_pixels(pixels[0])

    def decode_video(
        self,
        encoded: bytes,
        sampling: FrameSampling = DEFAULT_SAMPLING,
        limits: VideoLimits = VIDEO_LIMITS,
        ask: Ask | None = None,
    ) -> Frames:
        """
        As `media.video.decode_video`, each frame of the size that `ask` wants.

        Raises:
            MediaError, PoolClosedError: as `decode_image`.
        """
        if not 0 < len(encoded) <= limits.max_bytes:  # in that function's own words
            return decode_video(encoded, sampling, limits)
        order = {
            "say": "video",
            "sampling": _describe(sampling),
            "limits": _describe(limits),
            "limit_s": self._video_limit_s,
        }
        check = partial(_check_clip, limits=limits)
        return _build_frames(*self._decode(encoded, order, ask, check))

    def measure_clip(self, encoded: bytes, limits: VideoLimits = VIDEO_LIMITS) -> tuple[float, ...]:
        """
        As `media.video.measure_clip`.

        Raises:
            MediaError, PoolClosedError: as `decode_image`.
        """
        if not 0 < len(encoded) <= limits.max_bytes:  # in that function's own words
            return measure_clip(encoded, limits)
        order = {"say": "measure", "limits": _describe(limits), "limit_s": self._video_limit_s}
        check = partial(_check_clip, limits=limits)
        _, message = self._decode(encoded, order, None, check)
        times_s: tuple[float, ...] = message["times_s"]
        return times_s

    @property
    def pids(self) -> frozenset[int]:
        """Of the processes that there are now."""
        with self._lock:
            return frozenset(child.process.pid for child in self._children)

    @property
    def num_ready(self) -> int:
        """Processes that decode, or would."""
        with self._lock:
            return sum(child.is_ready for child in self._children)

    @property
    def num_bytes(self) -> int:
        """Granted to decodings, or in pixels that somebody still has."""
        with self._lock:
            self._clear()
            return self._working_bytes + self._held_bytes

    def close(self) -> None:
        """End all processes; who waits for one gets `PoolClosedError`. Pixels stay good."""
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
            self._idle_changed.notify_all()
            self._room_changed.notify_all()
        self._errands.put(None)
        self._keeper.join()
        with self._lock:
            idle = list(self._idle)
            self._idle.clear()
            for child in self._children.difference(idle):
                child.process.kill()  # whoever has it in hand sees its end, and buries it
        for child in idle:
            self._bury(child)
        with self._lock:
            self._buried.wait_for(lambda: not self._children, CLOSE_S)
            self._clear()
            self._let_go = deque()  # what is let go from now on takes its arena along

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- one file ----------------------------------------------------------------------------------

    def _decode(
        self,
        encoded: bytes,
        order: Message,
        ask: Ask | None,
        check: Check,
        guess: _Guess | None = None,
    ) -> Decoded:
        num_killed = 0
        while True:
            child = self._take()
            is_sound = False
            try:
                decoded = self._talk(child, encoded, order, ask, check, guess)
                is_sound = True
            except _FullError:
                continue
            except BrokenWireError as error:
                if child.was_killed and num_killed < MAX_KILLED:  # not by the file
                    num_killed += 1
                    continue
                logger.warning("decoder_died pid=%d", child.process.pid)
                raise DecoderFailedError from error
            except SilentError as error:
                logger.warning("decoder_too_slow pid=%d", child.process.pid)
                raise DecodeTimeoutError from error
            except _SoundError as answer:
                is_sound = True
                raise answer.error from answer.error.__cause__
            else:
                return decoded
            finally:
                if is_sound:
                    self._give(child)
                else:
                    self._bury(child)
                    self._errands.put(self._fill)

    def _talk(
        self,
        child: _Child,
        encoded: bytes,
        order: Message,
        ask: Ask | None,
        check: Check,
        guess: _Guess | None,
    ) -> Decoded:
        """
        Raises:
            _SoundError: the process answered; the error is the file's, or `ask`'s.
            _FullError: callers hold too much of this process's arena.
            BrokenWireError, SilentError, MediaError: the process is of no use any more.
        """
        claim = _Claim(len(encoded))
        times_s: list[float] = []
        order = {**order, "num_bytes": len(encoded)}
        try:
            if guess:
                self._extend(child, claim, guess.header.work_bytes, guess.shape)
                order |= {"guess": guess.as_list(), "answer": claim.as_message(guess.fit)}
            child.left_s = order["limit_s"]
            child.say(order, behind=encoded)
            while True:
                message = child.listen()
                said = message.get("say")
                if said in ("work", "header"):
                    if guess:  # a wrong one: what was given for it is of no use
                        self._withdraw(child, claim)
                        guess = None
                    header = _read_header(message)
                    fit = self._decide(child, header, ask if said == "header" else None, check)
                    shape = _shape_of(header, fit) if said == "header" else None
                    self._extend(child, claim, header.work_bytes, shape)
                    child.say(claim.as_message(fit))
                elif said == "done" and claim.place:
                    return self._hand_over(child, claim, *claim.place), message
                elif said == "times" and order["say"] == "measure":
                    times_s += _read_times(message, times_s[-1] if times_s else None)
                    if len(times_s) > order["limits"]["max_source_frames"]:
                        raise DecoderFailedError
                elif said == "done" and times_s:
                    return _NO_PIXELS, {"times_s": tuple(times_s)}
                else:
                    raise _read_end(message)
        finally:
            self._withdraw(child, claim)

    def _decide(self, child: _Child, header: Header, ask: Ask | None, check: Check) -> Fit | None:
        """Which size is wanted. Where the answer is an error, the process is told to drop the file."""
        try:
            check(header)
            return ask(header) if ask else None
        except BaseException as error:
            child.say({"say": "drop"})
            if child.listen().get("say") != "dropped":
                raise
            raise _SoundError(error) from None

    def _extend(
        self, child: _Child, claim: _Claim, work_bytes: int, shape: tuple[int, ...] | None
    ) -> None:
        """Claim memory to work with and a place for pixels; the first time when there is room for it."""
        if shape is not None:
            start = self._find_room(child, math.prod(shape))
            with self._lock:
                if claim.place:  # its size turned out to be another one
                    child.arena.free(claim.place[0])
                before, claim.place = claim.num_bytes, (start, shape)
                if claim.is_admitted:
                    self._working_bytes += claim.num_bytes - before
        if not claim.is_admitted:
            claim.work_bytes = min(work_bytes, WORK_BYTES)
            self._admit(claim)

    def _hand_over(
        self, child: _Child, claim: _Claim, start: int, shape: tuple[int, ...]
    ) -> Pixels:
        """The pixels where they are; when the last view of them goes, so does their place."""
        num_bytes = math.prod(shape)
        pixels = child.arena.view(start, num_bytes)
        with self._lock:
            claim.place = None
            self._working_bytes -= num_bytes
            self._held_bytes += num_bytes
        # It may run at any moment in any thread, also one that holds our lock: it only leaves word.
        finalize(pixels, self._let_go.append, (child.arena, start, num_bytes)).atexit = False
        return pixels.reshape(shape)

    def _clear(self) -> None:
        """Free what nobody looks at any more. With the lock."""
        while self._let_go:
            arena, start, num_bytes = self._let_go.popleft()
            arena.free(start)
            self._held_bytes -= num_bytes

    # --- bytes -------------------------------------------------------------------------------------

    def _find_room(self, child: _Child, num_bytes: int) -> int:
        if num_bytes > child.arena.num_bytes:
            raise DecodeMemoryError
        with self._lock:
            self._clear()
            start = child.arena.find_room(num_bytes)
        if start is None:  # the next process has an arena of its own
            raise _FullError
        return start

    def _admit(self, claim: _Claim) -> None:
        """Wait for one's turn and for room. Pixels that are held never stop a decoding that is alone."""
        turn = object()
        with self._lock:
            self._turns.append(turn)
            try:
                while not (self._turns[0] is turn and self._has_room(claim.num_bytes)):
                    if self._is_closed:
                        raise PoolClosedError("The decoder pool was closed.")
                    self._room_changed.wait(CLEAR_S)
                    self._clear()
                claim.is_admitted = True
                self._num_working += 1
                self._working_bytes += claim.num_bytes
            finally:
                self._turns.remove(turn)
                self._room_changed.notify_all()

    def _has_room(self, num_bytes: int) -> bool:
        used = self._working_bytes + self._held_bytes
        return self._num_working == 0 or used + num_bytes <= self._max_bytes

    def _withdraw(self, child: _Child, claim: _Claim) -> None:
        """Give back what was claimed, but for pixels that were handed over."""
        with self._lock:
            if claim.is_admitted:
                self._num_working -= 1
                self._working_bytes -= claim.num_bytes
                self._room_changed.notify_all()
            if claim.place:
                child.arena.free(claim.place[0])
            claim.is_admitted, claim.place = False, None

    # --- processes ---------------------------------------------------------------------------------

    def _take(self) -> _Child:
        """A process that has nothing to do, once there is one."""
        while True:
            with self._lock:
                while not self._idle:
                    if self._is_closed:
                        raise PoolClosedError("The decoder pool was closed.")
                    if self._is_given_up():
                        raise DecodersAwayError
                    self._idle_changed.wait(LOOK_S)
                if self._is_closed:
                    raise PoolClosedError("The decoder pool was closed.")
                child = self._idle.pop()
            if child.process.poll() is None:
                return child
            self._bury_ended(child)

    def _is_given_up(self) -> bool:
        """Whether nobody need wait for a process any more. With the lock."""
        if not self._num_starts_failed or any(child.is_ready for child in self._children):
            return False
        if not self._has_started:
            return self._num_starts_failed >= MAX_STARTS_FAILED
        return time.monotonic() - self._failing_since > GIVE_UP_S

    def _give(self, child: _Child) -> None:
        with self._lock:
            if not self._is_closed:
                self._idle.append(child)
                self._idle_changed.notify()
                return
        self._bury(child)

    def _bury(self, child: _Child) -> None:
        child.end()
        with self._lock:
            self._children.discard(child)
            self._buried.notify_all()

    def _bury_ended(self, child: _Child) -> None:
        """Of one that ended while it had nothing to do: no file is to blame."""
        logger.warning("decoder_died pid=%d while idle", child.process.pid)
        self._bury(child)
        if not child.is_steady:  # or files would wait for ever for one that lives
            self._note_failed_start()
        self._errands.put(self._fill)

    def _keep(self) -> None:
        """The keeper's work: have as many processes as there should be."""
        looked = time.monotonic()
        while True:
            with suppress(Empty):
                errand = self._errands.get(timeout=LOOK_S)
                if errand is None:
                    return
                errand()
            if time.monotonic() > looked + LOOK_S:
                self._look()
                looked = time.monotonic()

    def _look(self) -> None:
        """Who ended while doing nothing is replaced before somebody needs it."""
        with self._lock:
            self._clear()
            if any(child.is_steady for child in self._children):
                self._num_starts_failed = 0
            ended = [child for child in self._idle if child.process.poll() is not None]
            for child in ended:
                self._idle.remove(child)
        for child in ended:
            self._bury_ended(child)
        self._fill()

    def _fill(self) -> None:
        while True:
            with self._lock:
                num_wanted = self.num_processes
                if self._num_starts_failed:  # one at a time, until one comes
                    num_wanted = min(self.num_ready + 1, num_wanted)
                is_full = len(self._children) >= num_wanted
                if is_full or self._is_closed or time.monotonic() < self._next_start:
                    return
            try:
                self._start()
            except (OSError, MemoryError, RuntimeError) as error:  # the last of threads
                logger.error("decoder_not_started reason=%s", repr(error))  # noqa: TRY400 - enough
                self._note_failed_start()
                return

    def _start(self) -> None:
        with ExitStack() as handed, ExitStack() as undone:
            arena = Arena(ARENA_BYTES)
            undone.callback(arena.close)
            reading, childs_writing = _open_pipe(undone, handed)
            childs_reading, writing = _open_pipe(handed, undone)
            birth = {
                "parent": os.getpid(),
                "reading": childs_reading,
                "writing": childs_writing,
                "memory": arena.fd,
                "arena_bytes": arena.num_bytes,
                "work_bytes": WORK_BYTES,
            }
            paths = [str(Path(path).absolute()) for path in sys.path]
            kept = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
            process = subprocess.Popen(  # noqa: S603 - our own interpreter and program
                [sys.executable, "-I", "-S", "-c", _START, json.dumps([birth, self._entry, paths])],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env={**_ENVIRONMENT, **kept},
                cwd="/",
                pass_fds=(childs_reading, childs_writing, arena.fd),
                start_new_session=True,
            )
            child = _Child(process, ParentWire(reading, writing), arena)
            undone.pop_all()
            undone.callback(self._bury, child)
            with self._lock:
                self._children.add(child)
            threading.Thread(target=self._welcome, args=(child,), daemon=True).start()
            undone.pop_all()

    def _welcome(self, child: _Child) -> None:
        """Wait until a process that was started is ready, in a thread of its own."""
        child.left_s = START_LIMIT_S
        try:
            message = child.listen()
        except (BrokenWireError, SilentError):
            message = {}
        if message.get("say") != "ready":
            if not self._is_closed:
                logger.error("decoder_not_ready pid=%d", child.process.pid)
            self._bury(child)
            self._note_failed_start()
            return
        if not message.get("is_filtered"):
            logger.warning("decoder_not_filtered: this system has no filter of system calls")
        with self._lock:
            child.ready_at = time.monotonic()
            self._has_started = True
        self._give(child)
        self._errands.put(self._fill)

    def _note_failed_start(self) -> None:
        with self._lock:
            now = time.monotonic()
            if not self._num_starts_failed:
                self._failing_since = now
            if now >= self._next_start:
                doubled = 2.0 ** min(self._num_starts_failed, 10)
                pause_s = min(RETRY_START_S * doubled, MAX_RETRY_START_S)
                self._next_start = now + pause_s
                self._num_starts_failed += 1
            self._idle_changed.notify_all()


class _FullError(Exception):
    """There is no place in this arena: callers hold too much of it."""


class _SoundError(Exception):
    """A file's error, from a process that may go on."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error


def _open_pipe(reads: ExitStack, writes: ExitStack) -> tuple[int, int]:
    """Its ends, reading and writing, each closed with a stack."""
    reading, writing = os.pipe()
    reads.callback(os.close, reading)
    writes.callback(os.close, writing)
    return reading, writing


def count_cores() -> int:
    """That this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _shape_of(header: Header, fit: Fit | None) -> tuple[int, ...]:
    if fit is None:
        return header.num_frames, header.height_px, header.width_px, 3
    return header.num_frames, fit.height_px, fit.width_px, 3


def _guess(encoded: bytes, ask: Ask | None, check: Check) -> _Guess | None:
    """So that a process need not ask, and nobody wait for it; it does ask where it finds otherwise."""
    header = guess_header(encoded)
    if header is None:
        return None
    try:
        check(header)
        return _Guess(header, ask(header) if ask else None)
    except Exception:  # noqa: BLE001 - whoever says no is asked again, of what the process found
        return None


@lru_cache(maxsize=64)
def _describe(value: ImageLimits | VideoLimits | FrameSampling) -> Message:
    return asdict(value)


# A child may have been taken over: what it says is judged like a stranger's words.


def _read_header(message: Message) -> Header:
    values: list[int] = []
    for name in ("width", "height", "work_bytes", "num_frames"):
        value = message.get(name)
        if type(value) is not int or not 0 <= value < 1 << 40:
            raise DecoderFailedError
        values.append(value)
    width, height, work_bytes, num_frames = values
    if not width or not height or not num_frames:
        raise DecoderFailedError
    times_s = _read_numbers(message.get("times_s"), num_frames, float)
    frame_s = _read_number(message.get("frame_s"), float)
    duration_s = _read_number(message.get("duration_s"), float)
    return Header(width, height, work_bytes, num_frames, times_s, frame_s, duration_s)


def _read_number(given: object, kind: type[Number]) -> Number | None:
    if given is not None and (type(given) is not kind or not _is_finite(given)):
        raise DecoderFailedError
    return given


def _is_finite(given: object) -> bool:
    return not isinstance(given, float) or math.isfinite(given)


def _read_numbers(given: object, count: int, kind: type[Number]) -> tuple[Number, ...] | None:
    if given is None:
        return None
    if not isinstance(given, list) or len(given) != count:
        raise DecoderFailedError
    if any(type(value) is not kind or not _is_finite(value) for value in given):
        raise DecoderFailedError
    return tuple(given)


def _check_image(header: Header, limits: ImageLimits) -> None:
    check_size((header.width_px, header.height_px), limits)


def _check_clip(header: Header, limits: VideoLimits) -> None:
    frame_px = header.width_px * header.height_px
    if (
        header.num_frames > limits.max_frames
        or frame_px > limits.max_pixels
        or frame_px * header.num_frames > limits.max_kept_pixels
    ):
        raise VideoTooLargeError


_NO_PIXELS: Final = np.empty(0, np.uint8)


def _read_times(message: Message, last_s: float | None) -> tuple[float, ...]:
    """Times of a clip's frames, which go on after `last_s`; the first of all is 0."""
    given = message.get("times_s")
    times_s = _read_numbers(given, len(given) if isinstance(given, list) else 0, float)
    if not times_s or (last_s is None and times_s[0] != 0):
        raise DecoderFailedError
    if not all(before <= after < math.inf for before, after in pairwise((last_s or 0.0, *times_s))):
        raise DecoderFailedError
    return times_s


def _build_frames(pixels: Pixels, message: Message) -> Frames:
    return Frames(
        images=tuple(RGBImage.of_pixels(frame) for frame in pixels),
        times_s=_read_numbers(message.get("times_s"), len(pixels), float),
        fps=_read_number(message.get("fps"), float),
        source_num_frames=_read_number(message.get("source_num_frames"), int),
        indices=_read_numbers(message.get("indices"), len(pixels), int),
        num_dropped=_read_number(message.get("num_dropped"), int),
    )


def _read_end(message: Message) -> Exception:
    """Why there are no pixels."""
    if message.get("say") == "out_of_memory":
        return DecodeMemoryError()
    kind, text = getattr(errors, str(message.get("error")), None), message.get("text")
    if not (isinstance(kind, type) and issubclass(kind, MediaError) and isinstance(text, str)):
        return DecoderFailedError()
    # Whether it may pass, and what a host is like, is not for a process to say.
    if kind.retryable or issubclass(kind, errors.FetchFailedError):
        return DecoderFailedError()
    return _SoundError(kind(text[:MAX_TEXT]))
