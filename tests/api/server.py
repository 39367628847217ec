"""
The API as a process of its own, for tests: small limits, and nobody to notify.

    python -m tests.api.server DATABASE_URL BLOBS_FOLDER PORT [open] [large]

`large`: files of any size are taken.
"""

import sys
from pathlib import Path
from typing import Final

import structlog

from api.app import create_app
from api.config import ApiConfig, ServedModel
from api.server import build_server
from cli.garbage import settle
from storage.blobs import FolderBlobs
from storage.db import Database

PEPPER: Final = b"pepper for tests only"
MODEL: Final = "darkroom-tiny"
MAX_FILE_BYTES: Final = 4 * 1024 * 1024
MAX_BATCH_BYTES: Final = 2 * 1024 * 1024
MAX_BATCH_LINES: Final = 200
MAX_BODY_BYTES: Final = 1024 * 1024
CHAT_TIMEOUT_S: Final = 10.0


def main(database_url: str, blobs_folder: str, port: str, *words: str) -> None:
    # Tracebacks without local variables: those hold keys.
    renderer = structlog.dev.ConsoleRenderer(
        colors=False, exception_formatter=structlog.dev.plain_traceback
    )
    structlog.configure(
        processors=[structlog.contextvars.merge_contextvars, renderer],
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    config = ApiConfig(
        pepper=PEPPER,
        is_open="open" in words,
        models=(ServedModel(MODEL, created_at=1_790_000_000),),
        max_file_bytes=2**40 if "large" in words else MAX_FILE_BYTES,
        max_batch_bytes=MAX_BATCH_BYTES,
        max_batch_lines=MAX_BATCH_LINES,
        max_body_bytes=MAX_BODY_BYTES,
        chat_timeout_s=CHAT_TIMEOUT_S,
    )
    app = create_app(config, Database(database_url, pool_size=16), FolderBlobs(Path(blobs_folder)))
    server = build_server(app, config, host="127.0.0.1", port=int(port))
    settle()
    server.run()


if __name__ == "__main__":
    main(*sys.argv[1:])
