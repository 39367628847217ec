"""How much memory a process and its children hold, now and at most, as Linux counts it."""

import re
from pathlib import Path

MEBIBYTE = 1024 * 1024
_ROW = re.compile(r"^(VmRSS|VmHWM):\s+(\d+) kB$", re.MULTILINE)


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
    total = 0
    for each in (pid, *list_children(pid)):
        try:
            rows = dict(_ROW.findall(Path(f"/proc/{each}/status").read_text()))
        except FileNotFoundError:  # it ended between the two looks
            continue
        total += int(rows.get(name, 0)) * 1024
    return total
