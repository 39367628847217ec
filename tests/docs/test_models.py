"""The page of models names every family that there is, and no other."""

import re
from pathlib import Path

from engine.families import FAMILIES

PAGE = Path(__file__).parents[2] / "docs" / "models.md"


def test_page_names_the_families_that_there_are() -> None:
    rows = re.findall(r"^\| (`[^|]+`) \|", PAGE.read_text(), re.MULTILINE)
    named = [name for row in rows for name in re.findall(r"`(\w+)`", row)]

    assert {name.partition("/")[0] for name in FAMILIES} == set(named) - {"model_type"}
