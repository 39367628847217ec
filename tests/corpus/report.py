"""The table of all cases that ran: for the terminal, and for a file where one is named."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

PROPERTY = "corpus"
COLUMNS = ("case", "what", "expected", "got", "ms", "MB")


def report(terminal: pytest.TerminalReporter, path: str | None) -> None:
    """
    Show the table of this run, if it has one.

    Args:
        path: of the file to write it to; None for the terminal, where there is room.
    """
    reports = [each for kind in ("passed", "failed") for each in terminal.getreports(kind)]
    rows = sort_rows(
        [value for each in reports for name, value in each.user_properties if name == PROPERTY]
    )
    if not rows:
        return
    if path:
        write_report(Path(path), rows)
    terminal.section("corpus of bad input")
    num_as_they_must = sum(row["expected"] == row["got"] for row in rows)
    terminal.write_line(f"{num_as_they_must} of {len(rows)} cases ended as they must")
    if path or terminal.verbosity > 0:
        for line in list_lines(rows):
            terminal.write_line(line)


def write_report(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """As JSON or Markdown, by the name's end."""
    if path.suffix == ".json":
        path.write_text(json.dumps(list(rows), indent=1, ensure_ascii=False), encoding="utf-8")
        return
    lines = [
        "| " + " | ".join((*COLUMNS, "what is said", "note")) + " |",
        "|" + "---|" * (len(COLUMNS) + 2),
    ]
    for row in rows:
        cells = (*_cells(row), row["text"][:200], row["note"])
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def list_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The table as lines of equal columns."""
    table = [COLUMNS, *map(_cells, rows)]
    widths = [max(len(cells[at]) for cells in table) for at in range(len(COLUMNS))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()
        for cells in table
    ]


def sort_rows(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """In the order of the list: by the letter, the number, and the place in its family."""
    return sorted(rows, key=lambda row: ("IUVTA".index(row["id"][0]), *_number(row["id"])))


def _number(id: str) -> tuple[int, str]:
    digits = "".join(letter for letter in id if letter.isdigit())
    return int(digits), id


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        row["id"],
        row["what"],
        row["expected"],
        row["got"],
        str(row["ms"]),
        f"{row['growth_mb']:.1f}",
    )
