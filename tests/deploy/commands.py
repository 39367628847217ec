"""The `darkroom` command's own reading of words, without running what they ask for."""

from collections.abc import Iterator
from typing import Any

import typer.main

from cli.main import app


def parse_command(words: list[str]) -> dict[str, Any]:
    """
    The values of a verb's parameters. A Typer usage error says that there is no such verb or option.
    """
    command: Any = typer.main.get_command(app)
    context: Any = None
    name, rest = "darkroom", words
    while True:
        context = command.make_context(name, rest, parent=context)
        if not hasattr(command, "commands"):
            return dict(context.params)
        left = list(context._protected_args) + list(context.args)
        name, rest = left[0], left[1:]
        assert name in command.commands, f"no such verb: {name}"
        command = command.commands[name]


def find_variables() -> set[str]:
    """The environment variables of all options of all verbs."""
    return set(_walk(typer.main.get_command(app)))


def _walk(command: Any) -> Iterator[str]:
    for parameter in command.params:
        given = parameter.envvar or []
        yield from [given] if isinstance(given, str) else given
    for child in getattr(command, "commands", {}).values():
        yield from _walk(child)
