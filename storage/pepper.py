"""
The pepper: what hashes of API keys are made with, kept outside the database.

Whoever gets at the database alone can check no guess without it. It is made once, and never shown.
"""

import os
import secrets
from pathlib import Path
from typing import Final

FILENAME: Final = "pepper"
PEPPER_BYTES: Final = 32


def load(home: Path) -> bytes:
    """The pepper of this home folder; made, for its owner's eyes only, where there is none."""
    path = home / FILENAME
    if not path.exists():
        home.mkdir(parents=True, exist_ok=True)
        _make(path)
    return bytes.fromhex(path.read_text().strip())


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
