"""
Why the command cannot do what it was asked to, and the numbers that it ends with.

`FileError` and its kin extend media's tree, so that one raised while the engine reads a file ends
in that file's result and nowhere else. Their texts name no path: the line that shows them does.
Trying again never helps: the person has to change something.
"""

from enum import IntEnum
from typing import ClassVar, Self

from media.errors import MediaError


class ExitCode(IntEnum):
    """What a shell is told."""

    DONE = 0
    SOME_FAILED = 1
    USAGE = 2
    UNREACHABLE = 3
    INTERRUPTED = 130  # 128 and SIGINT, as shells count


class CannotStartError(Exception):
    """The engine or the service cannot be started as asked. The message says what to change."""

    def __init__(self, message: str, code: ExitCode = ExitCode.USAGE) -> None:
        super().__init__(message)
        self.code = code


class EngineStoppedError(Exception):
    """The engine gave up on the whole run, not on one input."""


class FileError(MediaError):
    """The file cannot be read. Check that it is there and that you may read it."""

    code: ClassVar[str] = "file_unreadable"

    @classmethod
    def because(cls, error: OSError) -> Self:
        return cls(f"It cannot be read: {error.strerror or type(error).__name__}.")


class NotFoundError(FileError):
    """There is no such file or folder."""

    code: ClassVar[str] = "file_not_found"


class NoPicturesError(FileError):
    """There are no pictures in this folder. A file with an unusual name is tried if you name it."""

    code: ClassVar[str] = "no_pictures"


class NoFramesError(NoPicturesError):
    """There are no pictures in this folder to take as frames. To describe clips in it, name them."""


class FrameError(FileError):
    """A frame of the folder cannot be used. Remove it or replace it."""

    code: ClassVar[str] = "frame_unreadable"


class NotAClipError(FileError):
    """It is a picture, not a clip: use `darkroom caption`. Frames are described as a folder."""

    code: ClassVar[str] = "not_a_clip"


class NoMemoryError(FileError):
    """It does not fit into memory. Scale it down, or look at fewer frames with --frames."""

    code: ClassVar[str] = "no_memory"
