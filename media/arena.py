"""
The memory that a decoder process and its parent share, in which pixels are handed over.

It has no name in any file system, so that nothing is left when both processes are killed. The parent
alone says which stretch is for what; a child only writes where it was told to. Pages are real from
their first use on, and those of large pictures are given back to the system when these are let go.
"""

import fcntl
import mmap
import os
import tempfile
from bisect import insort
from typing import Final

import numpy as np
import numpy.typing as npt

KEPT_BYTES: Final = 16 << 20
"""At its start an arena keeps its pages: there lie the pictures of ordinary size, one after another."""


class Arena:
    """
    Used by one thread at a time; the pool's lock sees to that.

    Args:
        num_bytes: how much can lie in it together; what nobody has used costs nothing.
    """

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = _round_up(num_bytes)
        self.fd = _open_nameless(self.num_bytes)
        try:
            self._map = mmap.mmap(self.fd, self.num_bytes)
        except OSError:  # no address space is left
            os.close(self.fd)
            raise
        self._blocks: list[tuple[int, int]] = []  # (start, end) of what is in use, ascending

    def find_room(self, num_bytes: int) -> int | None:
        """Take the lowest free stretch of this size and return where it starts; None: there is none."""
        size, start = _round_up(num_bytes), 0
        for block_start, block_end in self._blocks:
            if block_start - start >= size:
                break
            start = block_end
        if start + size > self.num_bytes:
            return None
        insort(self._blocks, (start, start + size))
        return start

    def view(self, start: int, num_bytes: int) -> npt.NDArray[np.uint8]:
        """
        One of the taken stretches, flat.

        NOTE: each call makes an array that owns nothing and views no array. Views of it keep it alive,
        as numpy passes over no array whose base is another type; so its end is that of all of them.
        """
        return np.frombuffer(self._map, np.uint8, num_bytes, start)

    def free(self, start: int) -> None:
        """Let go of what starts here."""
        block = next(block for block in self._blocks if block[0] == start)
        self._blocks.remove(block)
        if block[1] > KEPT_BYTES and hasattr(mmap, "MADV_REMOVE"):
            self._map.madvise(mmap.MADV_REMOVE, start, block[1] - start)

    def close(self) -> None:
        """Nothing new will lie in it. The memory itself goes with the last view of it."""
        os.close(self.fd)


def open_view(fd: int, num_bytes: int) -> npt.NDArray[np.uint8]:
    """The child's side: the same memory, by its inherited descriptor, which is closed."""
    shared = mmap.mmap(fd, num_bytes)
    os.close(fd)
    return np.frombuffer(shared, np.uint8)


def _round_up(num_bytes: int) -> int:
    return max(-(-num_bytes // mmap.PAGESIZE), 1) * mmap.PAGESIZE


def _open_nameless(num_bytes: int) -> int:
    if not hasattr(os, "memfd_create"):  # not Linux
        with tempfile.TemporaryFile() as file:
            os.ftruncate(file.fileno(), num_bytes)
            return os.dup(file.fileno())
    fd = os.memfd_create("darkroom-pixels", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, num_bytes)
    # Who reads behind the end of a file is killed: a child must not be able to do that to its parent.
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    return fd
