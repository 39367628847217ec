"""The pages for people, as their tests read them: code blocks, tables, names."""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, slots=True)
class Block:
    """
    A fenced piece of code.

    Args:
        language: what stands behind the fence: sh, python, …
        line: of the page, where its first line stands.
    """

    language: str
    code: str
    line: int


def read_page(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def find_blocks(page: str) -> list[Block]:
    fenced = re.finditer(r"^```(\w+)\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    return [Block(m[1], m[2], page.count("\n", 0, m.start(2)) + 1) for m in fenced]


def find_rows(page: str) -> list[list[str]]:
    """The cells of all tables' rows."""
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in page.splitlines()
        if line.startswith("|")
    ]


def find_commands(page: str) -> list[list[str]]:
    """What people are told to type after `darkroom`: in code, fenced or indented, and in the text."""
    lines = re.findall(r"^(?:    |\t)*(?:\w+=\S+ )*darkroom ([a-z].*)$", page, re.MULTILINE)
    inline = re.findall(r"`darkroom ([a-z][^`]*)`", page)
    commands = []
    for text in lines + inline:
        bare = re.split(r"\s+(?:#|>|&|\|)", text)[0].replace("…", "").replace("...", "")
        commands.append(bare.replace('"', "").split())
    return commands


def find_variables(text: str) -> set[str]:
    return set(re.findall(r"DARKROOM_[A-Z0-9]+(?:_[A-Z0-9]+)*", text))
