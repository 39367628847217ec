"""One way out: no other module may hold a client that could be told an address."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
ROOMS = ("api", "engine", "media", "migrations", "storage", "tasks")
CLIENTS = {
    *("aiohttp", "boto3", "botocore", "ftplib", "http.client", "httpcore2", "httpx", "httpx2"),
    *("requests", "urllib.request", "urllib3"),
}
MAY = {
    "media/fetch.py": {"httpcore2"},
    "media/buckets.py": {"boto3", "botocore", "httpcore2"},  # signs addresses, and asks for none
    "storage/blobs.py": {"boto3", "botocore"},  # the operator's own bucket
}


def find_imports(path: Path) -> Iterator[str]:
    """All modules that are imported anywhere in a file, and the names that are taken from them."""
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def find_clients(path: Path) -> set[str]:
    found = list(find_imports(path))
    return {
        client
        for client in CLIENTS
        if any(name == client or name.startswith(client + ".") for name in found)
    }


def test_only_the_fetcher_may_ask_for_an_address() -> None:
    held = {
        path.relative_to(ROOT).as_posix(): clients
        for room in ROOMS
        for path in (ROOT / room).rglob("*.py")
        if (clients := find_clients(path))
    }

    assert MAY == held
