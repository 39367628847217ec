"""
Jobs through the whole service, with an engine that answers at once: `python -m bench.queue`.

What is measured is everything but the model: how long a submission takes, how many lines a second
become items, how many items a second are leased, run and committed, how long a poll takes meanwhile,
what the export costs, and how much memory each process needs. API, workers, broker and database are
processes of their own, as in production; see `bench.service`. PostgreSQL is durable (fsync on).

One JSON line to stdout for each database. The text that comes out is compared with what went in.
"""

import argparse
import base64
import http.client
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Final

from sqlalchemy import text

from bench.polls import Polls, pick, summarize
from bench.service import MODEL, ROOT, Service, open_service
from storage import jobs
from storage.ids import JobId
from storage.states import TERMINAL_JOB_STATES, JobState
from storage.tables import Job
from tasks.logs import configure_logging

NUM_SUBMITS: Final = 50
PICTURE: Final = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAUAAAAFCAYAAACNbyblAAAAHElEQVQI12P4//8/w38GIAXDIBKE0DHxgljNBAAO9TXL0Y4OHwAA"
    "AABJRU5ErkJggg=="
)
RUN_S: Final = 1800.0
PIECE_BYTES: Final = 1 << 20
MAX_RSS_MIB: Final = 400.0


class Client:
    """As much of OpenAI's wire as the benchmark needs, with nothing around it that takes time."""

    def __init__(self, service: Service) -> None:
        self._port = service.port
        self._headers = {"Authorization": f"Bearer {service.api_key}"}

    def upload(self, file: Path) -> str:
        """Stream a file of lines to the API; returns its id."""
        boundary = "bench-queue"
        before = (
            f'--{boundary}\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
            f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="in.jsonl"\r\n'
            "Content-Type: application/jsonl\r\n\r\n"
        ).encode()
        after = f"\r\n--{boundary}--\r\n".encode()

        def stream() -> Iterator[bytes]:
            yield before
            with file.open("rb") as content:
                while piece := content.read(PIECE_BYTES):
                    yield piece
            yield after

        return str(
            self._ask(
                "POST",
                "/v1/files",
                stream(),
                {
                    "Content-Type": f"multipart/form-data; boundary={boundary}",
                    "Content-Length": str(len(before) + file.stat().st_size + len(after)),
                },
            )["id"]
        )

    def create(self, file_id: str, **more: Any) -> str:
        """Make a batch of an uploaded file; returns its id."""
        body = {
            "input_file_id": file_id,
            "endpoint": "/v1/chat/completions",
            "completion_window": "24h",
            **more,
        }
        headers = {"Content-Type": "application/json", "Idempotency-Key": os.urandom(8).hex()}
        return str(self._ask("POST", "/v1/batches", json.dumps(body).encode(), headers)["id"])

    def retrieve(self, batch_id: str) -> dict[str, Any]:
        return self._ask("GET", f"/v1/batches/{batch_id}")

    def read_lines(self, file_id: str) -> Iterator[bytes]:
        with closing(self._connect()) as connection:
            connection.request("GET", f"/v1/files/{file_id}/content", headers=self._headers)
            with connection.getresponse() as answer:
                if answer.status != 200:
                    raise RuntimeError(f"content of a file: {answer.status}")
                yield from answer

    def _ask(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> dict[str, Any]:
        with closing(self._connect()) as connection:
            connection.request(method, path, body, {**self._headers, **(headers or {})})
            with connection.getresponse() as answer:
                content = answer.read()
        if answer.status != 200:
            raise RuntimeError(f"{method} {path}: {answer.status} {content[:500]!r}")
        found: dict[str, Any] = json.loads(content)
        return found

    def _connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self._port, timeout=300)


def write_lines(file: Path, num: int) -> None:
    """Requests of one small picture and a text each, as a client would write them."""
    url = f"data:image/png;base64,{base64.b64encode(PICTURE).decode()}"
    with file.open("w", encoding="utf-8") as out:
        for number in range(num):
            content = [
                {"type": "image_url", "image_url": {"url": url}},
                {"type": "text", "text": f"What is shown in picture {number}?"},
            ]
            body = {"model": MODEL, "messages": [{"role": "user", "content": content}]}
            line = {
                "custom_id": f"item-{number}",
                "method": "POST",
                "url": "/v1/chat/completions",
                "body": {**body, "max_tokens": 64},
            }
            out.write(json.dumps(line) + "\n")


def measure_submits(service: Service, client: Client) -> dict[str, float]:
    """Batches of one line, one after the other, and until all of them have ended."""
    file = service.folder / "one.jsonl"
    write_lines(file, 1)
    file_id = client.upload(file)
    taken, made = [], []
    for _ in range(NUM_SUBMITS):
        started = time.perf_counter()
        made.append(client.create(file_id))
        taken.append((time.perf_counter() - started) * 1000)
    for batch_id in made:
        wait_for_end(service, batch_id)
    taken.sort()
    return {
        "num": NUM_SUBMITS,
        "p50_ms": round(pick(taken, 0.5), 1),
        "p99_ms": round(pick(taken, 0.99), 1),
    }


def wait_for_end(service: Service, batch_id: str) -> Job:
    job_id = JobId(_parse(batch_id))
    deadline = time.monotonic() + RUN_S
    while time.monotonic() < deadline:
        with service.database.read() as session:
            job = jobs.find(session, job_id)
        assert job is not None, "it was made"
        if job.state in TERMINAL_JOB_STATES:
            return job
        time.sleep(0.2)
    raise RuntimeError("the job does not end")


def _parse(batch_id: str) -> Any:
    from uuid import UUID

    return UUID(batch_id.removeprefix("batch_"))


def measure_run(
    service: Service, client: Client, file_id: str, num_items: int, num_workers: int, rate: float
) -> dict[str, Any]:
    """One job from its making to its files, polled all the while."""
    cpu_before, messages_before = service.read_cpu_s(), service.count_messages()
    started = time.perf_counter()
    batch_id = client.create(file_id)
    create_ms = (time.perf_counter() - started) * 1000
    with Polls(
        service.port, f"/v1/batches/{batch_id}", api_key=service.api_key, rate=rate
    ) as polls:
        job = wait_for_end(service, batch_id)
    cpu = {
        kind: round(spent - cpu_before.get(kind, 0.0), 2)
        for kind, spent in service.read_cpu_s().items()
    }
    if job.state is not JobState.COMPLETED or job.num_completed != num_items:
        raise RuntimeError(f"the job is {job.state}, {job.num_completed} of {num_items} completed")
    assert job.in_progress_at is not None
    assert job.finalizing_at is not None
    assert job.completed_at is not None
    check_output(client, client.retrieve(batch_id), num_items)
    expand_s = job.in_progress_at - job.created_at
    run_s = job.finalizing_at - job.in_progress_at
    export_s = job.completed_at - job.finalizing_at
    return {
        "workers": num_workers,
        "create_ms": round(create_ms, 1),
        "expand_lines_s": round(num_items / expand_s),
        "claim_to_commit_items_s": round(num_items / run_s),
        "export_lines_s": round(num_items / export_s),
        "status_while_expanding": summarize(polls.between(job.created_at, job.in_progress_at)),
        "status_while_running": summarize(polls.between(job.in_progress_at, job.finalizing_at)),
        "messages": service.count_messages() - messages_before,
        "cpu_s": cpu,
    }


def check_output(client: Client, batch: dict[str, Any], num_items: int) -> None:
    """
    Raises:
        RuntimeError: the output is not one line for each line of the input, in its order.
    """
    number = 0
    for line in client.read_lines(batch["output_file_id"]):
        found = json.loads(line)
        answer = found["response"]["body"]["choices"][0]["message"]["content"]
        expected = f"> What is shown in picture {number}?"
        if (found["custom_id"], answer) != (f"item-{number}", expected):
            raise RuntimeError(f"line {number + 1} of the output: {line[:300]!r}")
        number += 1
    if number != num_items or batch["error_file_id"] is not None:
        raise RuntimeError(f"{number} lines of output for {num_items} of input")


def measure(
    database: str,
    *,
    num_items: int,
    workers: Sequence[int] = (1, 4),
    rate: float = 100.0,
    **settings: str,
) -> dict[str, Any]:
    """
    All figures of one database.

    Args:
        database: sqlite, postgresql, or a URL.
        workers: numbers of GPU workers, rising; each runs a job of its own.
        rate: polls a second.
        settings: as `open_service` takes them.
    """
    load_before = os.getloadavg()
    with open_service(database, max_lines=num_items, **settings) as service:
        service.start_worker()
        client = Client(service)
        submits = measure_submits(service, client)
        file = service.folder / "many.jsonl"
        write_lines(file, num_items)
        started = time.perf_counter()
        file_id = client.upload(file)
        upload_s = time.perf_counter() - started
        runs = []
        num_running = 1
        for num_workers in workers:
            for _ in range(num_workers - num_running):
                service.start_worker()
            num_running = max(num_workers, num_running)
            runs.append(measure_run(service, client, file_id, num_items, num_running, rate))
        return {
            "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "commit": _read_commit(),
            "database": _describe_database(service),
            "items": num_items,
            "input_bytes": file.stat().st_size,
            "settings": settings,
            "upload_s": round(upload_s, 2),
            "submit": submits,
            "polls_s": rate,
            "runs": runs,
            "peak_rss_mib": service.read_peaks_mib(),
            "machine": _describe_machine(),
            "load": {"before": load_before, "after": os.getloadavg()},
        }


def _describe_database(service: Service) -> str:
    dialect = service.database.engine.dialect.name
    query = "SELECT sqlite_version()" if dialect == "sqlite" else "SHOW server_version"
    with service.database.read() as session:
        version = session.execute(text(query)).scalar_one()
    return f"{dialect} {str(version).split()[0]}"


def _describe_machine() -> dict[str, Any]:
    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "processor": names[0] if names else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory / 2**30, 1),
        "system": platform.release(),
        "python": platform.python_version(),
    }


def _read_commit() -> str | None:
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty"],  # noqa: S607 - whichever git is on the path
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return found.stdout.strip() or None


def main() -> int:
    options = _options()
    configure_logging()
    # A service that is left behind would work on for ever: its processes have sessions of their own.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    databases = ["postgresql", "sqlite"] if options.database == "both" else [options.database]
    settings = dict(options.set)
    is_good = True
    for database in databases:
        found = measure(
            database,
            num_items=options.items,
            workers=options.workers,
            rate=options.rate,
            **settings,
        )
        print(json.dumps(found), flush=True)
        for problem in find_problems(found, options.max_rss):
            print(problem, file=sys.stderr)
            is_good = False
    return 0 if is_good else 1


def find_problems(found: dict[str, Any], max_rss_mib: float) -> Iterator[str]:
    """What must not be, whatever the rates are."""
    for kind, peak in found["peak_rss_mib"].items():
        if peak > max_rss_mib:
            yield f"{kind} had {peak} MiB of memory, more than {max_rss_mib}"
    for run in found["runs"]:
        num_bad = sum(
            run[f"status_while_{what}"].get("num_bad", 0) for what in ("expanding", "running")
        )
        if num_bad:
            yield f"with {run['workers']} workers, {num_bad} polls had no answer or an error"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument(
        "--database", default="both", help="sqlite, postgresql, both, or the URL of an empty one"
    )
    parser.add_argument("--items", type=_read_count, default=20_000, help="lines of a job")
    parser.add_argument(
        "--workers",
        type=_read_rising,
        default=[1, 4],
        help="numbers of GPU workers, rising, as 1,4: a job for each",
    )
    parser.add_argument("--rate", type=_read_count, default=100, help="polls a second")
    parser.add_argument(
        "--set",
        type=_read_setting,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a variable DARKROOM_NAME of all processes",
    )
    parser.add_argument(
        "--max-rss",
        type=float,
        default=MAX_RSS_MIB,
        metavar="MIB",
        help="more resident memory in any process ends in exit code 1",
    )
    return parser.parse_args()


# argparse shows these errors with the option's name before them.


def _read_count(word: str) -> int:
    if not word.isdecimal() or int(word) < 1:
        raise argparse.ArgumentTypeError("give a whole number of 1 or more")
    return int(word)


def _read_rising(words: str) -> list[int]:
    numbers = [_read_count(word) for word in words.split(",")]
    if numbers != sorted(set(numbers)):
        raise argparse.ArgumentTypeError("give rising numbers, as 1,4: workers are added")
    return numbers


def _read_setting(word: str) -> tuple[str, str]:
    name, equals, value = word.removeprefix("DARKROOM_").partition("=")
    if not (name and equals):
        raise argparse.ArgumentTypeError("give NAME=VALUE, as CHUNK_ITEMS=128")
    return name, value


if __name__ == "__main__":
    sys.exit(main())
