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
from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path

from cli.errors import FileError, FrameError, NoFramesError, NoPicturesError, NotFoundError
from media.decoded import Frames, RGBImage
from media.errors import MediaError, VideoUnreadableError
from media.frames import FrameSampling, spread_evenly
from media.images import read_image
from media.limits import VIDEO_LIMITS
from media.video import decode_video

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


def load_picture(path: str) -> RGBImage:
    """
    Read one picture.

    Raises:
        MediaError: of this room where the file cannot be read, of `media` where its bytes are bad.
    """
    try:
        return read_image(Path(path))
    except OSError as error:
        raise FileError.because(error) from error


class Clip:
    """
    A clip file or a folder of frames, read when the engine asks for it.

    `indices` and `times_s` say which frames were kept once it has been read: their places in the
    source, and their times where the source has any.
    """

    def __init__(self, found: Input, num_frames: int) -> None:
        self.indices: tuple[int, ...] | None = None
        self.times_s: tuple[float, ...] | None = None
        self._found = found
        self._num_frames = num_frames

    def load(self) -> Frames:
        """
        Read the frames as one clip.

        Raises:
            MediaError: nothing can be read, or a folder's pictures differ in size.
        """
        if not self._found.frames:
            return self._load_file()
        images = self._load_folder()
        if len({(image.width_px, image.height_px) for image in images}) > 1:
            raise VideoUnreadableError(
                "The pictures in this folder differ in size, so they are no frames of one clip. "
                "Scale them to one size, or use --as images."
            )
        return Frames(
            tuple(images), source_num_frames=len(self._found.frames), indices=self.indices
        )

    def load_images(self) -> Sequence[RGBImage]:
        """Read the frames as pictures, each of its own size. Raises MediaError."""
        return self._load_folder() if self._found.frames else self._load_file().images

    def _load_file(self) -> Frames:
        try:
            with Path(self._found.path).open("rb") as file:
                encoded = file.read(VIDEO_LIMITS.max_bytes + 1)
        except OSError as error:
            raise FileError.because(error) from error
        frames = decode_video(encoded, FrameSampling(num_frames=self._num_frames))
        self.indices, self.times_s = frames.indices, frames.times_s
        return frames

    def _load_folder(self) -> list[RGBImage]:
        names = self._found.frames
        self.indices = spread_evenly(len(names), self._num_frames)
        return [_read_frame(names[index]) for index in self.indices]


def _read_frame(path: str) -> RGBImage:
    try:
        return load_picture(path)
    except MediaError as error:
        raise FrameError(f"{Path(path).name}: {error}") from error
