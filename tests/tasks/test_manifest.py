"""Lines and their places, however the bytes come."""

import itertools
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from storage.blobs import FolderBlobs
from storage.ids import ItemId, JobId, LeaseId, TenantId, new_uuid
from storage.items import Fence, LeasedItem
from tasks.manifest import Line, read_bodies, read_lines


def cut(content: bytes, *cuts: int) -> list[bytes]:
    places = sorted({0, len(content), *(cut % (len(content) + 1) for cut in cuts)})
    return [content[a:b] for a, b in itertools.pairwise(places)]


def read(content: bytes, *cuts: int, max_line_bytes: int = 1000) -> list[Line]:
    return list(read_lines(cut(content, *cuts), max_line_bytes=max_line_bytes))


def test_line_ends_of_any_kind_are_left_out_and_offsets_are_of_the_file() -> None:
    lines = read(b"\xef\xbb\xbfone\r\ntwo\n\nfour")

    assert [
        Line(1, 3, 3, b"one"),
        Line(2, 8, 3, b"two"),
        Line(3, 12, 0, b""),
        Line(4, 13, 4, b"four"),
    ] == lines


def test_long_line_is_counted_and_not_kept() -> None:
    lines = read(b"a" * 50 + b"\nb\n" + b"c" * 20, 10, 20, 30, 55, max_line_bytes=20)

    assert [Line(1, 0, 50, None), Line(2, 51, 1, b"b"), Line(3, 53, 20, b"c" * 20)] == lines


@given(
    content=st.binary(max_size=60).map(lambda raw: raw.replace(b"z", b"\n")),
    cuts=st.lists(st.integers(0, 60), max_size=8),
)
def test_lines_are_the_same_for_any_split_of_the_bytes(content: bytes, cuts: list[int]) -> None:
    assert read(content, max_line_bytes=9) == read(content, *cuts, max_line_bytes=9)


def lease(offset: int, length: int, key: str, **values: Any) -> LeasedItem:
    fence = Fence(ItemId(offset), LeaseId(new_uuid()), 1)
    job, tenant = JobId(new_uuid()), TenantId(new_uuid())
    return LeasedItem(fence, job, tenant, key, 1, "c", offset, length, 0, 0, 0, **values)


def test_bodies_are_read_by_their_places_across_manifests(tmp_path: Path) -> None:
    blobs = FolderBlobs(tmp_path)
    blobs.put("t/a", b"one\ntwo\n" + b"x" * 100_000 + b"\nlast")
    blobs.put("t/b", b"other")
    items = [lease(100_009, 4, "t/a"), lease(0, 3, "t/a"), lease(4, 3, "t/a"), lease(0, 5, "t/b")]

    bodies = [body for _, body in read_bodies(blobs, items)]

    assert [b"one", b"two", b"last", b"other"] == bodies
