"""docs/adding-a-family.md is all that a family needs: the one that it adds is built from the page alone."""

import re
import runpy
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

import engine.families
from engine.families import FAMILIES, Entry
from engine.families.cards import Card
from engine.families.protocol import Family
from tests.docs.pages import ROOT, find_blocks, read_page

NAME = "docs/adding-a-family.md"
FILE = re.compile(r"`([\w/]+/(\w+)\.py)`:\n\n```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FILES: Mapping[str, str] = {match[2]: match[3] for match in FILE.finditer(read_page(NAME))}
MAX_LINES = 120  # of the smallest adapter of a family that sees

Check = Callable[[Path], None]


def read_line(start: str) -> Any:
    """The value of a line that the page adds to a table."""
    (code,) = [b.code for b in find_blocks(read_page(NAME)) if b.code.startswith(start)]
    names: dict[str, Any] = {"Entry": Entry, "Card": Card}
    run: Callable[..., None] = exec  # what the page shows is meant to be run
    wrapped = f"{{{code}}}" if start.startswith('"') else code
    run(compile(f"line = {wrapped}", NAME, "exec"), names)
    return names["line"]


@pytest.fixture
def build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Check]]:
    """Put the page's files in their places, a text of the adapter changed, and give its own test."""
    monkeypatch.setattr(engine.families, "__path__", [*engine.families.__path__, str(tmp_path)])
    for name, entry in read_line('"toy"').items():
        monkeypatch.setitem(FAMILIES, name, entry)

    def put(was: str = "", becomes: str = "") -> Check:
        for name, code in FILES.items():
            (tmp_path / f"{name}.py").write_text(
                code.replace(was, becomes) if was and name == "toy" else code
            )
        found: Check = runpy.run_path(str(tmp_path / "test_toy.py"))[
            "test_toy_answers_as_its_reference"
        ]
        return found

    yield put
    for name in ("toy", "toy_model"):
        sys.modules.pop(f"engine.families.{name}", None)
        vars(engine.families).pop(name, None)


def test_family_of_the_page_answers_as_its_reference(
    build: Callable[..., Check], tmp_path: Path
) -> None:
    check = build()
    folder = tmp_path / "checkpoint"
    folder.mkdir()

    check(folder)

    family = FAMILIES["toy"].load_family()
    card = read_line("Card(")
    assert ("toy",) == card.model_types
    assert (card.picture, card.clip) == (family.image_slot, family.video_slot or None)
    assert {"toy_model", "toy", "test_toy"} == set(FILES)
    assert len(FILES["toy"].splitlines()) < MAX_LINES


@pytest.mark.parametrize(
    ("was", "becomes"),
    [
        ("HALF = (0.5, 0.5, 0.5)", "HALF = (0.5, 0.5, 0.4)"),
        ("Image.Resampling.BICUBIC", "Image.Resampling.NEAREST"),
        ("patches.transpose(1, 2)", "patches.transpose(1, 2).flip(1)"),
    ],
)
def test_comparison_of_the_page_finds_an_adapter_that_is_wrong(
    build: Callable[..., Check], tmp_path: Path, was: str, becomes: str
) -> None:
    assert was in FILES["toy"]
    check = build(was, becomes)
    folder = tmp_path / "checkpoint"
    folder.mkdir()

    with pytest.raises(AssertionError):
        check(folder)


def test_smallest_adapter_of_a_family_that_sees_is_small() -> None:
    lengths = {}
    adapters = {entry.load_family() for entry in FAMILIES.values()} - {Family}
    for family in adapters:
        sees = family.plan_picture is not Family.plan_picture
        if sees and adapters.isdisjoint(family.__mro__[1:]):  # no later generation of another one
            path = ROOT / f"{family.__module__.replace('.', '/')}.py"
            lengths[path.stem] = len(path.read_text("utf-8").splitlines())
    smallest = min(lengths.values())

    assert smallest < MAX_LINES
    assert f"LLaVA-1.5's has {lengths['llava']} lines" in read_page(NAME)
    assert lengths["llava"] == smallest
