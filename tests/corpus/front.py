"""
The whole way of an item, for one case at a time: handed in here, run there, looked at here again.

The worker is a process of its own and stays the same for all cases: what one of them breaks or leaves
behind, the next ones meet.
"""

import asyncio
import json
import os
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from storage import files, items, jobs, tenants
from storage.blobs import FolderBlobs
from storage.db import Database
from storage.ids import FileId, JobId, new_uuid
from storage.items import Ended
from storage.keys import build_file_key
from storage.states import ItemState
from tasks.config import DEFAULT_TENANT, load_config
from tasks.stores import Stores
from tasks.submit import PURPOSE, Submission, submit
from tests.corpus import memory
from tests.corpus.cases import (
    MOVES,
    OK,
    PLANTED,
    ROOT,
    STAR,
    WORD,
    Case,
    build_body,
    build_line,
    data_url,
    image_part,
    sample,
    video_part,
)
from tests.corpus.texts import find_leaks
from tests.media.servers import Answer, Server, serve
from tests.tasks.fakes import MODEL, RecordingDispatcher

# Of a row, by the clock: what takes longer hangs. A GIF of 100,000 frames, which Pillow plays one by
# one, has taken 11 beside other tests on cores at a third of their speed.
MAX_S = 40.0
LIMITS = {"image": 4, "video": 1}
BAD_LINE = 2


def ask_good(custom_id: str, name: str, question: str) -> bytes:
    image = image_part(data_url(sample(name)))
    return build_line(build_body(image, question=question), custom_id)


GOOD = {
    1: (ask_good("before", "small.png", "Describe the image."), STAR),
    3: (ask_good("after", "word.png", "What does the text say?"), WORD),
}
"""The lines around the one of a case, and what the model says to them."""


@dataclass(frozen=True)
class Row:
    """One line of the table: how a case ended."""

    id: str
    what: str
    expected: str
    got: str
    ms: int
    growth_mb: float
    text: str
    note: str

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


class Front:
    """The stores that both sides share, the worker's process, and servers for it to fetch from."""

    def __init__(self, stores: Stores, process: "subprocess.Popen[str]", log: Path) -> None:
        self._stores = stores
        self._process = process
        self._log = log
        config = load_config(home=log.parent)
        self._dispatcher = RecordingDispatcher(config, "redis://127.0.0.1:1/0")
        with stores.database.write() as session:
            self._tenant = tenants.get_or_create(session, DEFAULT_TENANT).id
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._servers: list[Any] = []
        # Nothing of the machine, and no word that was planted, belongs into a text.
        self._secrets = (PLANTED, str(log.parent), str(ROOT), socket.gethostname(), "sqlite")

    def warm_up(self) -> None:
        """Load the model, and what a first picture and clip load, so that no case pays for it."""
        clip = video_part(data_url(sample("clip.mp4"), "video/mp4"))
        line = build_line(build_body(clip, question="Describe the video."), "first")
        assert MOVES == self.run([GOOD[1][0], line, GOOD[3][0]], {})[BAD_LINE].text

    def read_rss(self) -> int:
        """Bytes that the worker and its decoder processes hold now."""
        return memory.read_rss(self._process.pid)

    def ask(self, case: Case) -> Row:
        """
        Run one case between two good items.

        Raises:
            AssertionError: a neighbour, a server or a text is not as it must be; how the case itself
                ended is `check_row`'s to judge.
        """
        asked = case.ask(self)
        lines = asked.line_end.join((GOOD[1][0], asked.line, GOOD[3][0]))
        end = asked.line_end if asked.tail is None else asked.tail
        job = self._submit(asked.head + lines + end)
        before = memory.read_rss(self._process.pid)
        memory.forget_peaks(self._process.pid)
        started = time.perf_counter()
        self._run(job, asked.network)
        seconds = time.perf_counter() - started
        growth = memory.read_peak(self._process.pid) - before
        self._close_servers()
        ended = self._list_ended(job)
        bad = ended[BAD_LINE]
        row = Row(
            case.id,
            case.what,
            case.expected,
            OK if bad.state is ItemState.COMPLETED else str(bad.error_code),
            round(seconds * 1000),
            round(growth / memory.MEBIBYTE, 1),
            (bad.text or "") if bad.state is ItemState.COMPLETED else (bad.error_message or ""),
            case.note,
        )
        check_texts(self._list_texts(job, ended), (*self._secrets, *asked.secrets))
        for line, (_, said) in GOOD.items():
            assert said == ended[line].text, f"the good item of line {line}"
        assert [0] * len(asked.canaries) == [each.num_connections for each in asked.canaries]
        return row

    def run(self, lines: Sequence[bytes], network: Mapping[str, Any]) -> dict[int, Ended]:
        """Run a job of these lines to its end; what each ended in, by its number from 1. Servers end."""
        job = self._submit(b"\n".join(lines))
        self._run(job, network)
        self._close_servers()
        return self._list_ended(job)

    @property
    def pid(self) -> int:
        """Of the worker."""
        return self._process.pid

    def upload(self, content: bytes, filename: str = "upload.bin") -> str:
        return f"file-{self._store(content, filename, 'vision').hex}"

    @property
    def folder(self) -> Path:
        return self._log.parent

    def serve(
        self,
        answer: Answer | Mapping[str, Answer],
        address: str = "127.0.0.1",
        tls: ssl.SSLContext | None = None,
    ) -> Server:
        serving = serve(answer, address, tls)
        self._servers.append(serving)
        server: Server = self._wait_for(serving.__aenter__())
        return server

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._dispatcher.close()

    def _close_servers(self) -> None:
        while self._servers:
            self._wait_for(self._servers.pop().__aexit__(None, None, None))

    def _wait_for(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(timeout=60)

    def _store(self, content: bytes, filename: str, purpose: str) -> FileId:
        file = FileId(new_uuid())
        key = build_file_key(self._tenant, file)
        stat = self._stores.blobs.put(key, content)
        with self._stores.database.write() as session:
            files.create(
                session,
                file=file,
                tenant=self._tenant,
                purpose=purpose,
                filename=filename,
                num_bytes=stat.num_bytes,
                sha256=stat.sha256,
                blob_key=key,
                num_lines=content.count(b"\n") if purpose == PURPOSE else None,
            )
        return file

    def _submit(self, manifest: bytes) -> JobId:
        file = self._store(manifest, "requests.jsonl", PURPOSE)
        submission = Submission(input_file_id=f"file-{file.hex}", model=MODEL, on_invalid="skip")
        return submit(self._stores, self._dispatcher, submission).job.id

    def _run(self, job: JobId, network: Mapping[str, Any]) -> None:
        order = {"job": str(job), "network": dict(network)}
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        word = self._process.stdout.readline()
        assert "ended\n" == word, f"the worker died: {self._log.read_text()[-4000:]}"

    def _list_ended(self, job: JobId) -> dict[int, Ended]:
        found: dict[int, Ended] = {}
        with self._stores.database.read() as session:
            while page := items.list_by_line(session, job, after_line=max(found, default=0)):
                found |= {ended.line: ended for ended in page}
        return found

    def _list_texts(self, job: JobId, ended: Mapping[int, Ended]) -> list[str]:
        """All that its client may read of errors."""
        with self._stores.database.read() as session:
            found = jobs.find(session, job)
        assert found is not None
        texts = [error["message"] for error in found.errors or ()]
        return texts + [each.error_message for each in ended.values() if each.error_message]


def check_row(row: Row, case: Case) -> None:
    """Fail unless it ended as it must, within the time and memory that one item may cost."""
    assert case.expected == row.got, row.text
    if case.says is not None:
        assert case.says == row.text
    assert row.ms < MAX_S * 1000
    assert row.growth_mb < case.max_growth_mb


def check_texts(texts: list[str], secrets: tuple[str, ...]) -> None:
    for text in texts:
        assert [] == find_leaks(text, secrets), text


@contextmanager
def open_front(
    folder: Path, template: bytes, num_processes: int = 1, **settings: str
) -> Iterator[Front]:
    """
    Start the worker, for the block.

    Args:
        num_processes: that decode; 0 for the worker's own threads.
        template: an empty SQLite database.
        settings: of the worker, by the names of their variables.
    """
    # Where the worker stands, for scripts that would read a file there.
    (folder / "clip.mp4").write_bytes(sample("clip.mp4"))
    (folder / "darkroom.sqlite3").write_bytes(template)
    stores = Stores(
        Database(f"sqlite:///{folder / 'darkroom.sqlite3'}"), FolderBlobs(folder / "blobs")
    )
    env = {name: value for name, value in os.environ.items() if not name.startswith("DARKROOM_")}
    env |= {
        "DARKROOM_HOME": str(folder),
        "DARKROOM_MEDIA_PROCESSES": str(num_processes),
        "DARKROOM_MODELS": json.dumps({MODEL: LIMITS}),
        "DARKROOM_MAX_LINE_BYTES": str(16 * memory.MEBIBYTE),
        "DARKROOM_MEDIA_S3_BUCKETS": "s3://photographs/{tenant}",
        "DARKROOM_REDIS_URL": f"redis://:{PLANTED}@127.0.0.1:1/0",
        "PYTHONPATH": str(ROOT),
        **settings,
    }
    log = folder / "worker.log"
    with (
        log.open("w") as errors,
        subprocess.Popen(
            [sys.executable, "-m", "tests.quickly", "tests.corpus.worker"],
            cwd=folder,
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        ) as process,
    ):
        front = Front(stores, process, log)
        try:
            front.warm_up()
            yield front
        finally:
            front.close()
            stores.close()
            assert process.stdin is not None
            process.stdin.close()
            code = process.wait(60)
    said = log.read_text()
    assert 0 == code, said[-4000:]
    assert PLANTED not in said
