"""
Whatever comes in, it ends in its own word within seconds and megabytes, and nobody else notices.

Each case is one item between two good ones of the same job, and the worker is the same for all.
DARKROOM_CORPUS=full runs the slow ones too; DARKROOM_CORPUS_REPORT names a file for the table, as
Markdown or JSON.
"""

import os
from collections.abc import Callable, Iterator

import pytest

pytest.importorskip("av", reason="the extra `video` is not installed")

from tests.corpus.cases import Case
from tests.corpus.clips import CASES as CLIPS
from tests.corpus.front import Front, check_row, open_front
from tests.corpus.images import CASES as IMAGES
from tests.corpus.memory import MEBIBYTE
from tests.corpus.prompts import LINES, PROMPTS
from tests.corpus.report import PROPERTY
from tests.corpus.urls import CASES as ADDRESSES
from tests.storage.conftest import sqlite_template

__all__ = ["sqlite_template"]

CASES = [case for cases in (IMAGES, ADDRESSES, CLIPS, PROMPTS, LINES) for case in cases]
IS_FULL = os.environ.get("DARKROOM_CORPUS") == "full"


@pytest.fixture(scope="module")
def front(tmp_path_factory: pytest.TempPathFactory, sqlite_template: bytes) -> Iterator[Front]:
    with open_front(tmp_path_factory.mktemp("corpus"), sqlite_template) as front:
        yield front


@pytest.mark.parametrize("case", CASES, ids=[case.id for case in CASES])
def test_case_ends_as_it_must_and_disturbs_nobody(
    case: Case, front: Front, record_property: Callable[[str, object], None]
) -> None:
    if case.is_slow and not IS_FULL:
        pytest.skip("slow: DARKROOM_CORPUS=full runs it")
    row = front.ask(case)
    record_property(PROPERTY, row.as_json())
    check_row(row, case)


def test_cases_that_come_again_cost_no_more_memory(front: Front) -> None:
    again = [case for case in CASES if case.id in ("I3", "I25c", "V6b", "V17c")]  # 1 to 16 MB each
    held = []
    for _ in range(5):
        for case in again:
            front.ask(case)
        held.append(front.read_rss())

    assert held[-1] - held[0] < 32 * MEBIBYTE
