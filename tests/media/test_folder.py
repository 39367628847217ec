"""Files of one folder: what is read, and that no way leads out of it."""

import asyncio
import hashlib
import os
from pathlib import Path

import pytest

from media.errors import (
    BadUrlError,
    FetchFailedError,
    FetchTooLargeError,
    FileNotAllowedError,
    FileNotReadableError,
)
from media.fetched import Fetched
from media.folder import FolderReader
from media.limits import ImageLimits
from tests.media.files import assert_fit_for_clients

LIMITS = ImageLimits(max_bytes=100)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with pictures, and secrets beside it."""
    root = tmp_path / "open"
    (root / "holiday").mkdir(parents=True)
    (root / "holiday" / "ü b.jpg").write_bytes(b"a picture")
    (tmp_path / "secret.jpg").write_bytes(b"hush")
    (tmp_path / "open-not").mkdir()
    (tmp_path / "open-not" / "a.jpg").write_bytes(b"hush")
    return root


def fetch(root: Path, url: str) -> Fetched | FetchFailedError:
    try:
        return asyncio.run(FolderReader(root).fetch(url, LIMITS))
    except FetchFailedError as error:
        return error


def assert_refused(outcome: Fetched | FetchFailedError, kind: type[FetchFailedError]) -> None:
    assert type(outcome) is kind, outcome
    assert isinstance(outcome, FetchFailedError)
    assert_fit_for_clients(outcome)
    assert not outcome.retryable
    assert outcome.facts is not None
    assert outcome.code == outcome.facts["error_code"]
    for word in ("secret", "open-not", "holiday", "Errno", "tmp"):
        assert word not in str(outcome)


@pytest.mark.parametrize("start", ["file://", "FILE://localhost"])
def test_file_comes_with_its_report(root: Path, start: str) -> None:
    outcome = fetch(root, start + str(root) + "/holiday/%C3%BC%20b.jpg")

    assert isinstance(outcome, Fetched), outcome
    assert b"a picture" == outcome.content
    assert "image/jpeg" == outcome.media_type == outcome.report.media_type
    assert ("file", None, 9) == (
        outcome.report.scheme,
        outcome.report.host,
        outcome.report.num_bytes,
    )
    assert hashlib.sha256(b"a picture").hexdigest() == outcome.report.sha256


def test_folder_that_went_away_is_an_error_of_the_file_alone(root: Path) -> None:
    reader = FolderReader(root)
    url = f"file://{root}/holiday/%C3%BC%20b.jpg"
    root.rename(root.with_name("moved"))

    with pytest.raises(FileNotReadableError) as caught:
        asyncio.run(reader.fetch(url, LIMITS))

    assert caught.value.retryable
    assert caught.value.facts is not None
    assert "moved" not in str(caught.value)
    assert str(root) not in str(caught.value)


def test_folder_that_is_a_link_itself_is_opened_by_its_real_name(
    root: Path, tmp_path: Path
) -> None:
    (tmp_path / "link").symlink_to(root)
    url = f"file://{root}/holiday/%C3%BC%20b.jpg"

    assert isinstance(fetch(tmp_path / "link", url), Fetched)


@pytest.mark.parametrize(
    "path",
    [
        *("/../secret.jpg", "/%2e%2e/secret.jpg", "/./a", "//a", "/holiday/", "/a?b", "/a#b"),
        *("/%00", "/%0a", "/%5c..%5csecret.jpg", "/%ff"),
    ],
)
def test_path_that_is_none_is_refused(root: Path, path: str) -> None:
    assert_refused(fetch(root, f"file://{root}{path}"), BadUrlError)


@pytest.mark.parametrize("url", ["file://", "file:///", "file://host/a", "file://..", "file:/a"])
def test_form_that_is_none_is_refused(root: Path, url: str) -> None:
    assert_refused(fetch(root, url), BadUrlError)


def test_what_is_outside_is_refused_whether_it_is_there_or_not(root: Path, tmp_path: Path) -> None:
    for place in ("secret.jpg", "missing.jpg", "open-not/a.jpg", "open"):
        assert_refused(fetch(root, f"file://{tmp_path}/{place}"), FileNotAllowedError)


def test_links_lead_nowhere(root: Path, tmp_path: Path) -> None:
    (root / "out.jpg").symlink_to(tmp_path / "secret.jpg")
    (root / "away").symlink_to(tmp_path / "open-not")
    (root / "inside.jpg").symlink_to(root / "holiday" / "ü b.jpg")
    (root / "loop").symlink_to(root / "loop")

    for path in ("out.jpg", "away/a.jpg", "inside.jpg", "loop", "loop/a"):
        assert_refused(fetch(root, f"file://{root}/{path}"), FileNotAllowedError)


def test_what_is_no_plain_file_is_refused_without_waiting(root: Path) -> None:
    os.mkfifo(root / "pipe")

    for path in ("pipe", "holiday"):
        assert_refused(fetch(root, f"file://{root}/{path}"), FileNotAllowedError)


def test_what_is_not_there_is_said(root: Path) -> None:
    for path in ("missing.jpg", "missing/a.jpg", "holiday/%C3%BC%20b.jpg/a", "a" * 300):
        assert_refused(fetch(root, f"file://{root}/{path}"), FileNotReadableError)


def test_largest_file_is_exact(root: Path) -> None:
    (root / "a").write_bytes(bytes(100))
    (root / "b").write_bytes(bytes(101))

    assert isinstance(fetch(root, f"file://{root}/a"), Fetched)
    assert_refused(fetch(root, f"file://{root}/b"), FetchTooLargeError)
