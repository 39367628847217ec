"""How much memory a process and its children hold, now and at most, as Linux counts it."""

import re
from collections.abc import Iterable
from pathlib import Path

MEBIBYTE = 1024 * 1024
_ROW = re.compile(r"^(VmRSS|VmHWM|RssAnon|RssShmem):\s+(\d+) kB$", re.MULTILINE)


def forget_peaks(pid: int) -> None:
    """Let the highest use of memory count from now on."""
    for each in (pid, *list_children(pid)):
        Path(f"/proc/{each}/clear_refs").write_text("5")


def read_peak(pid: int) -> int:
    """Bytes: the highest use since `forget_peaks`, each process's own, added up."""
    return _add_up(pid, "VmHWM")


def read_rss(pid: int) -> int:
    """Bytes in use now."""
    return _add_up(pid, "VmRSS")


def read_held(pids: Iterable[int]) -> int:
    """
    Bytes of these processes without the files that they map; what two of them share counts twice.

    Linux keeps these numbers, so that asking often costs nothing. Shares of pages it counts by walking
    over all of them, while the process that is watched waits.
    """
    return sum(_read(pid, "RssAnon") + _read(pid, "RssShmem") for pid in pids)


def list_children(pid: int) -> list[int]:
    """All processes below this one."""
    found: list[int] = []
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = [int(child) for child in file.read_text().split()]
        except (FileNotFoundError, ProcessLookupError):  # a thread that ended meanwhile
            continue
        for child in children:
            found += [child, *list_children(child)]
    return found


def _add_up(pid: int, name: str) -> int:
    return sum(_read(each, name) for each in (pid, *list_children(pid)))


def _read(pid: int, name: str) -> int:
    """Bytes; 0 where the process has ended, or is about to."""
    try:
        rows = dict(_ROW.findall(Path(f"/proc/{pid}/status").read_text()))
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return int(rows.get(name, 0)) * 1024
