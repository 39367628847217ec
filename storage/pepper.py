"""
The pepper: what hashes of API keys are made with, kept outside the database.

Whoever gets at the database alone can check no guess without it. Hosts that share a database share
one pepper, which is handed to each of them; a service on one host makes its own, once, and never
shows it.
"""

import os
import secrets
from pathlib import Path
from typing import Final

from storage.errors import BadPepperError

FILENAME: Final = "pepper"
PEPPER_BYTES: Final = 32
MIN_PEPPER_BYTES: Final = 16


def load(home: Path) -> bytes:
    """
    The pepper of this home folder; made, for its owner's eyes only, where there is none.

    Raises:
        BadPepperError: something else lies in its place.
    """
    path = home / FILENAME
    if not path.exists():
        home.mkdir(parents=True, exist_ok=True)
        _make(path)
    try:
        return parse(path.read_text(encoding="ascii"))
    except UnicodeDecodeError as error:
        raise BadPepperError from error


def parse(text: str) -> bytes:
    """Read a pepper as people hand it over: hexadecimal digits. Raises `BadPepperError`."""
    try:
        pepper = bytes.fromhex(text.strip())
    except ValueError as error:
        raise BadPepperError from error
    if len(pepper) < MIN_PEPPER_BYTES:
        raise BadPepperError
    return pepper


def _make(path: Path) -> None:
    # Written beside its place and linked to it: two processes may start at once, and a reader never
    # finds half of one.
    draft = path.with_name(f".{FILENAME}.{secrets.token_hex(8)}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_hex(PEPPER_BYTES) + "\n")
        try:
            os.link(draft, path)
        except FileExistsError:
            return
    finally:
        draft.unlink()
