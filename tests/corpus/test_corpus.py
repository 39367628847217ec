"""
Whatever comes in, it ends in its own word within seconds and megabytes, and nobody else notices.

Each case is one item between two good ones of the same job, and the worker is the same for all.
DARKROOM_CORPUS=full runs all cases, and not only one or two for each id of the list;
DARKROOM_CORPUS_REPORT names a file for the table, as Markdown or JSON.
"""

import os
import re
from collections import Counter
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
from tests.corpus.test_wire import CASES as WIRE
from tests.corpus.urls import CASES as ADDRESSES
from tests.storage.conftest import sqlite_template

__all__ = ["sqlite_template"]

CASES = [case for cases in (IMAGES, ADDRESSES, CLIPS, PROMPTS, LINES) for case in cases]
WITHOUT_LETTER = re.compile("[a-z]$")
IS_FULL = os.environ.get("DARKROOM_CORPUS") == "full"


def pick(cases: list[Case], num_each: int) -> list[Case]:
    """All cases, or the first ones of each id that are not slow."""
    picked: list[Case] = []
    counts: Counter[str] = Counter()
    for case in cases:
        id = WITHOUT_LETTER.sub("", case.id)
        counts[id] += not case.is_slow
        if IS_FULL or (not case.is_slow and counts[id] <= num_each):
            picked.append(case)
    return picked


ASKED = pick(CASES, 2)
SAMPLED = [case for number, case in enumerate((*IMAGES, *CLIPS)) if IS_FULL or number % 12 == 0]
"""Asked once more of a worker that decodes in its own threads, and not in processes that may die."""

NOT_HERE = {
    "A3": "it fails its whole job: tests/tasks/test_expand.py",
    "A16": "there are no webhooks",
    "A20": "it needs a broker, which this worker has not",
}


@pytest.fixture(scope="module")
def front(tmp_path_factory: pytest.TempPathFactory, sqlite_template: bytes) -> Iterator[Front]:
    with open_front(tmp_path_factory.mktemp("corpus"), sqlite_template) as front:
        yield front


@pytest.fixture(scope="module")
def threaded_front(
    tmp_path_factory: pytest.TempPathFactory, sqlite_template: bytes
) -> Iterator[Front]:
    folder = tmp_path_factory.mktemp("corpus-threads")
    with open_front(folder, sqlite_template, num_processes=0) as front:
        yield front


def test_each_of_the_list_is_here_or_has_a_reason() -> None:
    sizes = {"I": 34, "U": 32, "V": 17, "T": 17, "A": 20}
    listed = {
        f"{letter}{number}" for letter, size in sizes.items() for number in range(1, size + 1)
    }
    ids = [*(case.id for case in CASES), *(case.id for case in WIRE)]

    assert len(ids) == len(set(ids))
    assert {WITHOUT_LETTER.sub("", id) for id in ids} | NOT_HERE.keys() == listed


@pytest.mark.parametrize("case", ASKED, ids=[case.id for case in ASKED])
def test_case_ends_as_it_must_and_disturbs_nobody(
    case: Case, front: Front, record_property: Callable[[str, object], None]
) -> None:
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


@pytest.mark.parametrize("case", SAMPLED, ids=[case.id for case in SAMPLED])
def test_case_ends_in_threads_as_in_processes(case: Case, threaded_front: Front) -> None:
    check_row(threaded_front.ask(case), case)
