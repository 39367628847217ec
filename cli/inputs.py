"""
What the command was pointed at: files, folders and globs -> inputs in a fixed order, each once.

Finding opens no file. Reading happens later, in the engine's pool, so that a folder of a million
pictures costs a list of names. It knows suffixes, not formats: what a named file holds is for
`media` to find out.
"""

import glob
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from threading import Lock

from cli.errors import (
    FileError,
    FrameError,
    NoFramesError,
    NoMemoryError,
    NoPicturesError,
    NotAClipError,
    NotFoundError,
)
from media.decoded import Frames, RGBImage
from media.errors import BadSegmentsError, MediaError
from media.frames import FrameSampling, choose_untimed
from media.images import find_format, read_image
from media.limits import IMAGE_LIMITS, STILL_FORMATS, VIDEO_LIMITS, ImageLimits
from media.segments import Cut, Look, plan_window
from media.video import (
    ANIMATION_FORMATS,
    count_source_frames,
    decode_video,
    gather_frames,
    measure_clip,
    plan_frames,
)

PICTURE_SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".avif")
)
UNREAD_SUFFIXES = frozenset((".heic", ".heif", ".tif", ".tiff", ".jxl", ".jp2", ".svg"))
"""Pictures that are not read here: leaving them out without a word would look like a bug."""
CLIP_SUFFIXES = frozenset((".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi", ".ts", ".mts"))


@dataclass(frozen=True, slots=True)
class Input:
    """
    One picture or one clip to ask about.

    Attributes:
        path: as people wrote it, or below the folder that they named.
        frames: the pictures of a folder that is taken as a clip, in order; else empty.
    """

    path: str
    frames: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Refused:
    """An argument, or a folder below one, that leaves nothing to ask about; `problem` says why."""

    path: str
    problem: MediaError


@dataclass(frozen=True, slots=True)
class Found:
    """Inputs in order, and how many files of folders were left out, by suffix."""

    inputs: list[Input | Refused] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)


def find_pictures(arguments: Iterable[str]) -> Found:
    """
    Find files as they are named and, in folders, whatever has a picture's suffix.

    Arguments keep their order; within one, names sort as people count (2 before 10). Hidden files
    of folders are left out, links are followed. An argument that leads nowhere is refused.
    """
    inputs: list[Input | Refused] = []
    left_out: set[str] = set()
    for path in _expand(arguments, inputs):
        if _is_folder(path):
            inside = list(_walk(path, left_out))
            inputs.extend(inside or [Refused(path, NoPicturesError())])
        else:
            inputs.append(Input(path))
    return Found(_without_twins(inputs), Counter(map(_suffix, left_out)))


def find_clips(arguments: Iterable[str]) -> Found:
    """Find clip files, and folders whose own pictures (not those of folders inside) are frames."""
    inputs: list[Input | Refused] = []
    left_out: set[str] = set()
    for path in _expand(arguments, inputs):
        if not _is_folder(path):
            inputs.append(Input(path))
            continue
        try:
            names = os.listdir(path)  # noqa: PTH208 - Path.iterdir would rewrite the folder's name
        except OSError as error:
            inputs.append(Refused(path, FileError.because(error)))
            continue
        frames = _pick_pictures(path, names, UNREAD_SUFFIXES, left_out)
        inputs.append(Input(path, frames) if frames else Refused(path, NoFramesError()))
    return Found(_without_twins(inputs), Counter(map(_suffix, left_out)))


# Paths stay the texts that people wrote, for they are told of them: pathlib turns ./a//b into a/b.


def _expand(arguments: Iterable[str], inputs: list[Input | Refused]) -> Iterator[str]:
    """Yield what exists, expanding globs that no shell did; put the rest into `inputs`."""
    for argument in arguments:
        if os.path.lexists(argument):  # first: a name may hold brackets
            yield argument
            continue
        # pathlib's glob takes no absolute pattern, and its expanduser raises for unknown users.
        pattern = os.path.expanduser(argument)  # noqa: PTH111
        matches = glob.glob(pattern, recursive=True)  # noqa: PTH207
        if not matches:
            inputs.append(Refused(argument, _explain_missing(argument, pattern)))
        yield from sorted(matches, key=natural_key)


def _explain_missing(argument: str, expanded: str) -> MediaError:
    if not argument:
        return NotFoundError("The path is empty. The current folder is written as a dot.")
    if "://" in argument:
        return NotFoundError("Addresses are not fetched here. Download the file and name it.")
    if glob.has_magic(argument):
        return NotFoundError("Nothing matches this pattern.")
    try:
        os.lstat(expanded)
    except (FileNotFoundError, NotADirectoryError):
        return NotFoundError()
    except OSError as error:  # a folder on the way may not be looked into
        return FileError.because(error)
    return NotFoundError()


def _is_folder(path: str) -> bool:
    return os.path.isdir(path)  # noqa: PTH112 - Path.is_dir raises where nothing may be looked at


def _may_be_read(path: str) -> bool:
    """Tell pipes, devices and folders from files; what cannot be told is tried, and says why."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)  # noqa: PTH116
    except OSError:
        return True


def natural_key(name: str) -> tuple[list[int | str], str]:
    """Sort key for names as people count: frame2 before frame10, capitals among small letters."""
    parts = re.split(r"(\d+)", name)  # text and digits in turn, so like meets like
    return [int(part) if part.isdecimal() else part.casefold() for part in parts], name


def _walk(top: str, left_out: set[str]) -> Iterator[Input | Refused]:
    """A folder's pictures, then those of each folder in it; every real folder once."""
    unreadable: list[Refused] = []
    visited: set[str] = set()

    def note(error: OSError) -> None:
        unreadable.append(Refused(os.fsdecode(error.filename), FileError.because(error)))

    for root, folders, names in os.walk(top, onerror=note, followlinks=True):
        real = os.path.realpath(root)
        if real in visited:  # a link leads back here
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted((name for name in folders if name[0] != "."), key=natural_key)
        suffixes = UNREAD_SUFFIXES | CLIP_SUFFIXES
        yield from map(Input, _pick_pictures(root, names, suffixes, left_out))
    yield from unreadable


def _pick_pictures(
    folder: str, names: Iterable[str], noted: Set[str], left_out: set[str]
) -> list[str]:
    """Paths of the pictures among the files of a folder; those with noted suffixes are left out."""
    visible = sorted((name for name in names if name[0] != "."), key=natural_key)
    real = os.path.realpath(folder)
    left_out.update(os.path.join(real, name) for name in visible if _suffix(name) in noted)  # noqa: PTH118
    paths = (os.path.join(folder, name) for name in visible if _suffix(name) in PICTURE_SUFFIXES)  # noqa: PTH118
    return [path for path in paths if _may_be_read(path)]


def _suffix(name: str) -> str:
    return Path(name).suffix.lower()


def _without_twins(inputs: Sequence[Input | Refused]) -> list[Input | Refused]:
    """
    Drop a file that was reached before, however its folder was written.

    Two links to one file stay two inputs: somebody gave it two names.
    """
    real: dict[str, str] = {}
    once: dict[tuple[str, str], Input | Refused] = {}
    for found in inputs:
        folder, name = os.path.split(found.path.rstrip(os.sep) or found.path)
        if name in ("", ".", ".."):
            folder, name = found.path, ""
        if folder not in real:
            real[folder] = os.path.realpath(folder)
        once.setdefault((real[folder], name), found)
    return list(once.values())


def load_picture(path: str, limits: ImageLimits = IMAGE_LIMITS) -> RGBImage:
    """
    Read one picture.

    Raises:
        MediaError: of this room where the file cannot be read, of `media` where its bytes are bad.
    """
    with _own_errors():
        return read_image(Path(path), limits)


@contextmanager
def _own_errors() -> Iterator[None]:
    """What the machine says of one file becomes that file's error, and costs no other."""
    try:
        yield
    except OSError as error:
        raise FileError.because(error) from error
    except MemoryError as error:
        raise NoMemoryError from error


class ClipReader:
    """
    Reads a clip file or a folder of frames when the engine asks for it.

    `indices` and `times_s` say which frames were kept once it has been read: their places in the
    source, and their times where the source has any. `num_dropped` says how many were left out since
    they look like the one before, where that was asked for.
    """

    def __init__(self, found: Input, sampling: FrameSampling) -> None:
        self.indices: tuple[int, ...] | None = None
        self.times_s: tuple[float, ...] | None = None
        self.num_dropped: int | None = None
        self._found = found
        self._sampling = sampling
        self._lock = Lock()
        self._images: Sequence[RGBImage] = ()

    def load(self) -> Frames:
        """
        Read the frames as one clip.

        Raises:
            MediaError: nothing can be read, or a folder's pictures differ in size.
        """
        with _own_errors():
            if self._found.frames:
                frames = gather_frames(self._found.frames, _load_frame, self._sampling)
            else:
                frames = decode_video(self._read_file(), self._sampling)
        self.indices, self.times_s = frames.indices, frames.times_s
        self.num_dropped = frames.num_dropped
        return frames

    def plan(self, cut: Cut) -> Sequence[Look]:
        """
        Where the window of a clip is cut.

        Raises:
            MediaError: it cannot be read or cut; a folder's frames have no times.
        """
        if self._found.frames:
            raise BadSegmentsError("A folder of frames has no times, so it has no segments.")
        with _own_errors():
            times_s = measure_clip(self._read_file())
        start_s, end_s = self._sampling.start_s, self._sampling.end_s
        return plan_window(times_s, cut, start_s=start_s, end_s=end_s)

    def build_loaders(self) -> Sequence[Callable[[], RGBImage]]:
        """
        One call for each frame that is shown as a picture of its own; a folder's may differ in size.

        A file is read here, to count its frames, and decoded with the first call: so many clips may
        be waiting without one frame in memory. Where frames that look alike are to be left out, it is
        decoded here as well: nothing else says how many will be left.

        Raises:
            MediaError: there is no clip to count. The calls raise it too.
        """
        frames = self._found.frames
        if self._sampling.min_change is not None:
            num_loaders = self.load().num_frames
        elif frames:
            self.indices = choose_untimed(len(frames), self._sampling)
            return [partial(_load_frame, frames[index], IMAGE_LIMITS) for index in self.indices]
        else:
            with _own_errors():
                num_loaders = len(plan_frames(self._read_file(), self._sampling))
        return [partial(self._take, index, num_loaders) for index in range(num_loaders)]

    def _take(self, index: int, num_loaders: int) -> RGBImage:
        with self._lock:
            if not self._images:
                self._images = self.load().images
            # Fewer than were planned, where some are damaged: their neighbour stands in.
            image = self._images[min(index, len(self._images) - 1)]
            if index == num_loaders - 1:  # the last one; nobody holds a clip that was shown
                self._images = ()
            return image

    def _read_file(self) -> bytes:
        with Path(self._found.path).open("rb") as file:
            encoded = file.read(VIDEO_LIMITS.max_bytes + 1)
        name = find_format(encoded)
        is_still = name in STILL_FORMATS and (
            name not in ANIMATION_FORMATS or count_source_frames(encoded) == 1
        )
        if is_still:
            raise NotAClipError
        return encoded


def _load_frame(path: str, limits: ImageLimits) -> RGBImage:
    try:
        return load_picture(path, limits)
    except MediaError as error:
        raise FrameError(f"{Path(path).name}: {error}") from error
