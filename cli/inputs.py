"""
What the command was pointed at: files, folders and globs -> inputs in a fixed order, each once.

Finding opens no file. Reading happens later, in the engine's pool, so that a folder of a million
pictures costs a list of names. It knows suffixes, not formats: what a named file holds is for
`media` to find out.
"""

import glob
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
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


@dataclass(frozen=True, slots=True)
class Input:
    """
    One picture or one clip to ask about.

    Attributes:
        path: as people wrote it, or below the folder that they named.
        frames: the pictures of a folder that is taken as a clip, in order; else empty.
    """

    path: Path
    frames: Sequence[Path] = ()


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
    found = Found()
    for path in _expand(arguments, found.inputs):
        if _is_folder(path):
            inside = list(_walk(path, found.left_out))
            found.inputs.extend(inside or [Refused(str(path), NoPicturesError())])
        else:
            found.inputs.append(Input(path))
    return Found(_without_twins(found.inputs), found.left_out)


def find_clips(arguments: Iterable[str]) -> Found:
    """Find clip files, and folders whose own pictures (not those of folders inside) are frames."""
    found = Found()
    for path in _expand(arguments, found.inputs):
        if not _is_folder(path):
            found.inputs.append(Input(path))
            continue
        try:
            names = [entry.name for entry in path.iterdir()]
        except OSError as error:
            found.inputs.append(Refused(str(path), FileError.because(error)))
            continue
        frames = [path / name for name in _pick_pictures(names, found.left_out)]
        found.inputs.append(Input(path, frames) if frames else Refused(str(path), NoFramesError()))
    return Found(_without_twins(found.inputs), found.left_out)


def _expand(arguments: Iterable[str], inputs: list[Input | Refused]) -> Iterator[Path]:
    """Yield what exists, expanding globs that no shell did; put the rest into `inputs`."""
    for argument in arguments:
        path = Path(argument)
        if os.path.lexists(path):  # first: a name may hold brackets
            yield path
            continue
        # pathlib's glob takes no absolute pattern, and its expanduser raises for unknown users.
        pattern = os.path.expanduser(argument)  # noqa: PTH111
        matches = glob.glob(pattern, recursive=True)  # noqa: PTH207
        if not matches:
            inputs.append(Refused(argument, _explain_missing(argument)))
        yield from (Path(match) for match in sorted(matches, key=natural_key))


def _explain_missing(argument: str) -> MediaError:
    if "://" in argument:
        return NotFoundError("Addresses are not fetched here. Download the file and name it.")
    if glob.has_magic(argument):
        return NotFoundError("Nothing matches this pattern.")
    return NotFoundError()


def _is_folder(path: Path) -> bool:
    return os.path.isdir(path)  # noqa: PTH112 - Path.is_dir raises where nothing may be looked at


def natural_key(name: str) -> tuple[list[int | str], str]:
    """Sort key for names as people count: frame2 before frame10, capitals among small letters."""
    parts = re.split(r"(\d+)", name)  # text and digits in turn, so like meets like
    return [int(part) if part.isdecimal() else part.casefold() for part in parts], name


def _walk(top: Path, left_out: Counter[str]) -> Iterator[Input | Refused]:
    """A folder's pictures, then those of each folder in it; every real folder once."""
    unreadable: list[Refused] = []
    visited: set[Path] = set()

    def note(error: OSError) -> None:
        unreadable.append(Refused(os.fsdecode(error.filename), FileError.because(error)))

    for root, folders, names in os.walk(top, onerror=note, followlinks=True):
        real = Path(root).resolve()
        if real in visited:  # a link leads back here
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted((name for name in folders if name[0] != "."), key=natural_key)
        for name in _pick_pictures(names, left_out):
            yield Input(Path(root, name))
    yield from unreadable


def _pick_pictures(names: Iterable[str], left_out: Counter[str]) -> list[str]:
    visible = [name for name in names if name[0] != "."]
    left_out.update(s for name in visible if (s := _suffix(name)) in UNREAD_SUFFIXES)
    return sorted((name for name in visible if _suffix(name) in PICTURE_SUFFIXES), key=natural_key)


def _suffix(name: str) -> str:
    return Path(name).suffix.lower()


def _without_twins(inputs: Sequence[Input | Refused]) -> list[Input | Refused]:
    """
    Drop a file that was reached before, however its folder was written.

    Two links to one file stay two inputs: somebody gave it two names.
    """
    real: dict[Path, Path] = {}
    once: dict[Path, Input | Refused] = {}
    for found in inputs:
        path = Path(found.path)
        if path.parent not in real:
            real[path.parent] = path.parent.resolve()
        once.setdefault(real[path.parent] / path.name, found)
    return list(once.values())


def read_picture(path: Path) -> RGBImage:
    """
    Read one picture.

    Raises:
        MediaError: of this room where the file cannot be read, of `media` where its bytes are bad.
    """
    try:
        return read_image(path)
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
            with self._found.path.open("rb") as file:
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


def _read_frame(path: Path) -> RGBImage:
    try:
        return read_picture(path)
    except MediaError as error:
        raise FrameError(f"{path.name}: {error}") from error
