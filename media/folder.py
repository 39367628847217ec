"""
Files below one folder that an operator opens: `file:///folder/cat.jpg` in, bytes and a report out.

For a service whose clients and files are on one host. The path is opened segment by segment, each
below the one before and never through a symbolic link, so that nothing that is renamed or linked
meanwhile leads out of the folder.
"""

import asyncio
import hashlib
import mimetypes
import os
import re
import stat
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Final
from urllib.parse import unquote

from media.errors import (
    BadUrlError,
    FetchFailedError,
    FetchTooLargeError,
    FileNotAllowedError,
    FileNotReadableError,
)
from media.fetched import UNKNOWN_MEDIA_TYPE, Fetched, FetchReport
from media.limits import ImageLimits, VideoLimits

_FORM: Final = re.compile(r"file://(?:localhost)?(/[^?#]+)", re.IGNORECASE)
_FORBIDDEN: Final = re.compile(r"[\x00-\x1f\x7f-\x9f\\\ufffd\ud800-\udfff]")
_NOT_THERE: Final = FetchReport("file", None, None, 0, None, 0.0, 0, 1, None)


def is_file_url(url: str) -> bool:
    """Tell whether this is a file:// URL at all; it may still be a bad one."""
    return url[:7].lower() == "file://"


class FolderReader:
    """Reads the files of one folder; threads and loops may share it."""

    def __init__(self, root: Path) -> None:
        """
        Raises:
            ValueError: there is no such folder, or it is the root of everything.
        """
        try:
            self._root = root.resolve(strict=True)
        except OSError as error:
            raise ValueError("there is no such folder") from error
        if not self._root.is_dir() or self._root == Path(self._root.anchor):
            raise ValueError("give a folder, and not the root of all")

    async def fetch(self, url: str, limits: ImageLimits | VideoLimits) -> Fetched:
        """
        Return one file.

        Raises:
            BadUrlError: no plain file:///PATH.
            FileNotAllowedError: it is outside of the folder, or no plain file; whether something is
                there is not said.
            FileNotReadableError: it is not there, or cannot be read.
            FetchTooLargeError: more than `limits.max_bytes`.
        """
        try:
            return await asyncio.to_thread(self.read, url, limits)
        except FetchFailedError as error:
            error.facts = asdict(replace(_NOT_THERE, error_code=error.code))
            raise

    def read(self, url: str, limits: ImageLimits | VideoLimits) -> Fetched:
        """As `fetch`, in this thread, and with no report of a failure."""
        started = time.monotonic()
        segments = self._find(url)
        with _open_below(self._root, segments) as file:
            content = _read_all(file, limits)
        media_type = mimetypes.guess_type(segments[-1])[0] or UNKNOWN_MEDIA_TYPE
        report = replace(
            _NOT_THERE,
            media_type=media_type,
            num_bytes=len(content),
            sha256=hashlib.sha256(content).hexdigest(),
            fetch_ms=round((time.monotonic() - started) * 1000, 1),
        )
        return Fetched(content, media_type, report)

    def _find(self, url: str) -> Sequence[str]:
        """The segments below the folder."""
        found = _FORM.fullmatch(url)
        path = "" if found is None else unquote(found[1])
        segments = path.split("/")[1:]
        if not segments or _FORBIDDEN.search(path) or {"", ".", ".."}.intersection(segments):
            raise BadUrlError(
                "The URL of the file is none that is read. Write the scheme file and the whole path, "
                "percent-encoded, without .. or empty segments and without a host."
            )
        own = self._root.parts[1:]
        if len(segments) <= len(own) or tuple(segments[: len(own)]) != own:
            raise FileNotAllowedError
        return segments[len(own) :]


@contextmanager
def _open_below(root: Path, segments: Sequence[str]) -> Iterator[int]:
    """The file that these lead to, open for reading."""
    try:
        here = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:  # it was moved away, or no more files can be opened just now
        raise FileNotReadableError(retryable=True) from error
    try:
        for number, segment in enumerate(segments, 1):
            is_last = number == len(segments)
            # Without waiting: to open a pipe would wait for somebody who writes.
            flags = os.O_NONBLOCK | os.O_NOCTTY if is_last else os.O_DIRECTORY
            try:
                there = os.open(segment, os.O_RDONLY | os.O_NOFOLLOW | flags, dir_fd=here)
            except OSError as error:
                raise _say(error, here, segment) from error
            os.close(here)
            here = there
        if not stat.S_ISREG(os.fstat(here).st_mode):
            raise FileNotAllowedError
        yield here
    finally:
        os.close(here)


def _say(error: OSError, folder: int, segment: str) -> FetchFailedError:
    try:
        is_link = stat.S_ISLNK(os.stat(segment, dir_fd=folder, follow_symlinks=False).st_mode)
    except OSError:
        is_link = False
    return FileNotAllowedError() if is_link else FileNotReadableError()


def _read_all(file: int, limits: ImageLimits | VideoLimits) -> bytes:
    # One byte more than may be: a file may grow while it is read.
    if os.fstat(file).st_size > limits.max_bytes:
        raise _too_large(limits)
    pieces, num_left = [], limits.max_bytes + 1
    try:
        while piece := os.read(file, min(num_left, 1 << 20)):
            pieces.append(piece)
            num_left -= len(piece)
    except OSError as error:
        raise FileNotReadableError from error
    if num_left <= 0:
        raise _too_large(limits)
    return b"".join(pieces)


def _too_large(limits: ImageLimits | VideoLimits) -> FetchTooLargeError:
    return FetchTooLargeError(
        f"The file has more than the {limits.max_bytes} bytes that it may. Scale it down, or cut it."
    )
