"""
A stand-in for the rooms that do the work: expands, runs and finishes jobs by storage's own functions.

It is as small as it can be and knows no queue: a test calls it when something should happen. The
text of an item is "text of " and its custom_id; a prompt that says "please fail" fails, and one that
says "in parts" has two.
"""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from storage import files, items, jobs, parts
from storage.blobs import Blobs
from storage.db import Database
from storage.errors import StaleExpansionError
from storage.ids import FileId, JobId, new_uuid
from storage.items import Completion, Failure, NewItem
from storage.keys import build_errors_key, build_output_key
from storage.parts import Answer, NewPart
from storage.states import ItemState, JobState
from storage.tables import Job
from tasks.lines import build_line

ENDPOINT = "/v1/chat/completions"


@dataclass(frozen=True)
class Worker:
    database: Database
    blobs: Blobs

    def expand(self, job_id: JobId) -> None:
        job = self.find(job_id)
        if job.state is not JobState.VALIDATING or job.num_expanded:
            return
        new, errors = [], []
        offset = 0
        names: set[str] = set()
        models: set[str] = set()
        for line, raw in enumerate(self.blobs.read(job.manifest_key).splitlines(True), 1):
            error = find_error(raw, names, models)
            custom_id = None if error else json.loads(raw)["custom_id"]
            if error is not None:
                errors.append({"code": error, "message": error, "param": None, "line": line})
            refusal = None if error is None else (error, error)
            new.append(NewItem(line, custom_id, offset, len(raw), 0, refusal))
            offset += len(raw)
        with suppress(StaleExpansionError), self.database.write() as session:  # cancelled meanwhile
            if errors and job.options["on_invalid"] == "fail":
                jobs.reject(session, job_id, errors)
                return
            items.insert_page(session, job_id, new, after_line=0, expanded_bytes=offset)
            if errors:
                jobs.note_errors(session, job_id, errors)
            jobs.start(session, job_id)

    def run(self, job_id: JobId, max_items: int = 1000) -> int:
        """Lease and end items of this job's model, oldest first; returns how many."""
        with self.database.write() as session:
            chunk = items.lease(
                session, model=self.find(job_id).model, worker="stand-in", max_items=max_items
            )
        if chunk is None:
            return 0
        done, failed, kept = [], [], []
        for item in chunk.items:
            raw = self.blobs.read(
                item.manifest_key, offset=item.body_offset, length=item.body_length
            )
            if b"in parts" in raw:
                kept += [NewPart(item.fence, b"plan", build_answer(number)) for number in (1, 2)]
            if b"please fail" in raw:
                failed.append(Failure(item.fence, "bad_image", "No.", is_transient=False))
            else:
                text = f"text of {item.custom_id}"
                done.append(Completion(item.fence, text, "stop", 12, 4, num_cached_tokens=3))
        with self.database.write() as session:
            parts.keep(session, kept)
            items.complete(session, done)
            items.fail(session, failed)
        return len(chunk.items)

    def end_rest(self, job_id: JobId, state: ItemState) -> None:
        with self.database.write() as session:
            while items.end_page(session, job_id, state).items:
                pass

    def finish(self, job_id: JobId) -> None:
        with self.database.write() as session:
            job = jobs.start_finishing(session, job_id)
        if job is None:
            return
        with self.database.read() as session:
            ended = items.list_by_line(session, job_id)
            of = parts.list_by_item(session, [one.item for one in ended])
        is_output = [one.state is ItemState.COMPLETED for one in ended]
        lines = [
            json.dumps(build_line(job.id, job.model, one, of.get(one.item, ()))).encode() + b"\n"
            for one in ended
        ]
        output = [line for line, is_mine in zip(lines, is_output, strict=True) if is_mine]
        errors = [line for line, is_mine in zip(lines, is_output, strict=True) if not is_mine]
        attempt = job.finish_attempt
        output_key = build_output_key(job.tenant_id, job_id, attempt)
        errors_key = build_errors_key(job.tenant_id, job_id, attempt)
        has_files = job.priority > jobs.FAST_LANE  # nobody fetches those of a chat
        output_file = self._store(job, output_key, output) if has_files else None
        error_file = self._store(job, errors_key, errors) if has_files else None
        with self.database.write() as session:
            jobs.finish(
                session,
                job_id,
                finish_attempt=attempt,
                output_file=output_file,
                error_file=error_file,
            )

    def _store(self, job: Job, key: str, lines: list[bytes]) -> FileId | None:
        if not lines:
            return None
        stat = self.blobs.put(key, b"".join(lines))
        file = FileId(new_uuid())
        with self.database.write() as session:
            files.create(
                session,
                file=file,
                tenant=job.tenant_id,
                purpose="batch_output",
                filename="output.jsonl",
                num_bytes=stat.num_bytes,
                sha256=stat.sha256,
                blob_key=key,
            )
        return file

    def complete(self, job_id: JobId) -> None:
        """All of it."""
        self.expand(job_id)
        while self.run(job_id):
            pass
        self.finish(job_id)

    def find(self, job_id: JobId) -> Job:
        with self.database.read() as session:
            job = jobs.find(session, job_id)
        assert job is not None
        return job

    @contextmanager
    def working(self, step: Callable[[JobId], Any] | None = None) -> Iterator[None]:
        """Meanwhile, complete every job that appears."""
        is_over = threading.Event()

        def work() -> None:
            while not is_over.wait(0.05):
                with self.database.read() as session:
                    waiting = jobs.list_unexpanded(session, older_than_s=-1.0)
                for job_id in waiting:
                    (step or self.complete)(job_id)

        thread = threading.Thread(target=work)
        thread.start()
        try:
            yield
        finally:
            is_over.set()
            thread.join()


def build_answer(number: int) -> Answer:
    image = {"index": 0, "kind": "video", "num_frames": 1, "times_s": [10.0 * number - 5]}
    return Answer(
        number, 10.0 * number - 10, 10.0 * number, [image], f"part {number}", "stop", 7, 3
    )


def find_error(raw: bytes, names: set[str], models: set[str]) -> str | None:
    if not raw.strip():
        return "blank_line"
    try:
        line = json.loads(raw)
        name, model = line["custom_id"], line["body"]["model"]
    except (ValueError, KeyError, TypeError):
        return "invalid_json_line"
    if name in names:
        return "duplicate_custom_id"
    names.add(name)
    if line["url"] != ENDPOINT:
        return "wrong_url"
    if line["method"] != "POST":
        return "wrong_method"
    models.add(model)
    return "two_models" if len(models) > 1 else None
