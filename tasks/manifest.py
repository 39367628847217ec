"""
The manifest: the JSONL blob that a job was handed in as, read by lines or by the items' ranges.

Offsets and lengths are of bytes as uploaded; the end of a line, `\\n` or `\\r\\n`, is no part of it.
A byte order mark before the first line is skipped.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from storage.blobs import Blobs
from storage.errors import BlobMissingError
from storage.items import LeasedItem

MAX_GAP_BYTES: Final = 64 * 1024
"""Between two lines: one read that wastes as much costs less than a second request to a bucket."""

MAX_READ_BYTES: Final = 32 * 1024 * 1024

_BOM: Final = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class Line:
    """
    One line of a manifest.

    Args:
        number: from 1.
        offset, length: of its content, in bytes.
        content: None where it is longer than what is read.
    """

    number: int
    offset: int
    length: int
    content: bytes | None


def read_lines(pieces: Iterable[bytes], *, max_line_bytes: int) -> Iterator[Line]:
    """
    Cut a stream of bytes into its lines, however it is cut into pieces.

    Memory is bounded by `max_line_bytes` and a piece, whatever stands in the file.
    """
    number, offset = 1, 0
    begun: list[bytes] = []  # pieces of a line whose end has not come
    num_begun = 0  # bytes of it, also of those that are no longer kept
    for piece in pieces:
        ends = piece.split(b"\n")
        for end in ends[:-1]:
            content = b"".join((*begun, end)) if begun or num_begun else end
            yield _build_line(number, offset, content, num_begun + len(end), max_line_bytes)
            number += 1
            offset += num_begun + len(end) + 1
            begun, num_begun = [], 0
        num_begun += len(ends[-1])
        if num_begun > max_line_bytes + 2:
            begun = []
        elif ends[-1]:
            begun.append(ends[-1])
    if num_begun:
        yield _build_line(number, offset, b"".join(begun), num_begun, max_line_bytes)


def _build_line(number: int, offset: int, content: bytes, length: int, max_bytes: int) -> Line:
    is_whole = len(content) == length
    if number == 1 and content.startswith(_BOM):
        content, offset, length = content[3:], offset + 3, length - 3
    if content.endswith(b"\r"):
        content, length = content[:-1], length - 1
    return Line(number, offset, length, content if is_whole and length <= max_bytes else None)


def read_bodies(
    blobs: Blobs, items: Sequence[LeasedItem]
) -> Iterator[tuple[LeasedItem, bytes | None]]:
    """
    Read the lines of leased items, neighbours together; None where the manifest is gone.

    Raises:
        StorageError: as the blobs do, before the items of that read.
    """
    for group in _group(items):
        start = group[0].body_offset
        end = max(item.body_offset + item.body_length for item in group)
        try:
            content = blobs.read(group[0].manifest_key, offset=start, length=end - start)
        except BlobMissingError:
            yield from ((item, None) for item in group)
            continue
        for item in group:
            at = item.body_offset - start
            yield item, content[at : at + item.body_length]


def _group(items: Sequence[LeasedItem]) -> Iterator[list[LeasedItem]]:
    group: list[LeasedItem] = []
    for item in sorted(items, key=lambda item: (item.manifest_key, item.body_offset)):
        if group:
            last = group[-1]
            gap = item.body_offset - last.body_offset - last.body_length
            num_bytes = item.body_offset + item.body_length - group[0].body_offset
            if (
                item.manifest_key != last.manifest_key
                or gap > MAX_GAP_BYTES
                or num_bytes > MAX_READ_BYTES
            ):
                yield group
                group = []
        group.append(item)
    if group:
        yield group
