"""
Media that are too many to go inside the lines of a batch: uploaded once each, named by their bytes.

Whoever is cut off and starts again uploads only what is missing, and gets the same ids as before: so
the lines are the same, too, and an idempotency key finds the same batch.
"""

import hashlib
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

from cli.client import Client
from cli.errors import FileError

AT_ONCE: Final = 8
PURPOSE: Final = "vision"
LIFETIME_S: Final = 30 * 24 * 3600
MIN_LEFT_S: Final = 2 * 24 * 3600
"""How long a file that is there already must still last."""


def upload_all(
    client: Client, paths: Sequence[str], progress: Callable[[int, int], None]
) -> dict[str, str | FileError]:
    """
    The id of each file on the server, or why it cannot be read, by path.

    Args:
        progress: told how many are there, and how many there will be.

    Raises:
        UnreachableError, ServerError: what has been uploaded stays, and is found the next time.
    """
    ids = _find_known(client)
    pool = ThreadPoolExecutor(AT_ONCE)
    try:
        names = dict(zip(paths, pool.map(_name, paths), strict=True))
        paths_of = {name: path for path, name in names.items() if isinstance(name, str)}
        missing = [(name, path) for name, path in paths_of.items() if name not in ids]
        uploads = pool.map(lambda each: _upload(client, *each), missing)
        for number, (name, uploaded) in enumerate(uploads, 1):
            ids[name] = uploaded
            progress(len(paths_of) - len(missing) + number, len(paths_of))
    finally:
        pool.shutdown(cancel_futures=True)  # after Ctrl-C too: only what is under way is waited for
    return {path: ids[name] if isinstance(name, str) else name for path, name in names.items()}


def _find_known(client: Client) -> dict[str, str]:
    """Files that were uploaded before, by name; the oldest where there are several."""
    known: dict[str, str] = {}
    for file in client.list_files(PURPOSE):
        if file["expires_at"] is None or file["expires_at"] > time.time() + MIN_LEFT_S:
            known.setdefault(file["filename"], file["id"])
    return known


def _name(path: str) -> str | FileError:
    try:
        with Path(path).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256")
    except OSError as error:
        return FileError.because(error)
    return digest.hexdigest() + Path(path).suffix.lower()


def _upload(client: Client, name: str, path: str) -> tuple[str, str]:
    with Path(path).open("rb") as file:
        num_bytes = Path(path).stat().st_size
        uploaded = client.upload(file, num_bytes, name, purpose=PURPOSE, lifetime_s=LIFETIME_S)
    return name, uploaded["id"]
