"""
The last item has ended: write the artifacts, in input order, and end the job.

Safe to run twice: each run writes under keys of its own, with the number of its attempt, and only
the newest may point the job to them. A line of the input is a line of one of the two files, in every
state that a job ends in but `failed`.
"""

from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Final

import structlog

from storage import events, files, items, jobs, locks, parts
from storage.blobs import BlobStat, BlobWriter
from storage.errors import StorageError
from storage.ids import FileId, ItemId, JobId, new_uuid
from storage.keys import build_errors_key, build_output_key
from storage.states import JobState
from storage.tables import Job
from tasks.lines import build_line, encode_line, is_output
from tasks.stores import Stores

logger = structlog.get_logger(__name__)

PURPOSE: Final = "batch_output"
PAGE: Final = 500


@dataclass(slots=True)
class Artifact:
    """A file in the making; it is begun with its first line, so an empty one is never made."""

    key: str
    filename: str
    num_lines: int = 0
    writer: BlobWriter | None = None
    stat: BlobStat | None = None


class _SupersededError(Exception):
    """A newer attempt is on its way: nothing of this one is kept."""


def finish(stores: Stores, job_id: JobId, *, force: bool = False) -> JobState | None:
    """
    Write a job's artifacts and end it, if all its items have ended.

    Args:
        force: also where another process seems to be at it.

    Returns:
        The state it ended in; None where there was nothing to do, or somebody else does it.

    Raises:
        StorageError: it can be done again, and the sweeper sees to it.
    """
    with locks.hold(stores.database, f"finish {job_id}") as is_ours:
        if not (is_ours or force):
            return None
        with stores.database.write() as session:
            job = jobs.start_finishing(session, job_id)
        if job is None:
            return None
        artifacts = _write(stores, job)
        state = None
        with suppress(_SupersededError):
            state = _end(stores, job, artifacts)
        if state is None:
            _discard(stores, artifacts)
        else:
            logger.info("job_ended", job=str(job_id), state=str(state), num_items=job.num_total)
        return state


def _write(stores: Stores, job: Job) -> tuple[Artifact, Artifact]:
    number = job.finish_attempt
    name = f"batch_{job.id.hex}"
    output = Artifact(build_output_key(job.tenant_id, job.id, number), f"{name}_output.jsonl")
    errors = Artifact(build_errors_key(job.tenant_id, job.id, number), f"{name}_error.jsonl")
    if job.priority == jobs.FAST_LANE:  # whoever waits for the answer reads it from the item
        return output, errors
    with ExitStack() as open_writers:
        after_line = 0
        while True:
            page, parts_of = _read_page(stores, job.id, after_line)
            if not page:
                break
            for item in page:
                artifact = output if is_output(item) else errors
                if artifact.writer is None:
                    artifact.writer = open_writers.enter_context(
                        stores.blobs.open_writer(artifact.key)
                    )
                line = build_line(job.id, job.model, item, parts_of.get(item.item, ()))
                artifact.writer.write(encode_line(line))
                artifact.num_lines += 1
            after_line = page[-1].line
        num_lines = output.num_lines + errors.num_lines
        assert num_lines == job.num_total, f"{num_lines} lines of {job.num_total}"
    for artifact in (output, errors):
        if artifact.writer is not None:
            artifact.stat = artifact.writer.stat
    return output, errors


def _read_page(
    stores: Stores, job: JobId, after_line: int
) -> tuple[list[items.Ended], dict[ItemId, list[parts.Answer]]]:
    with stores.database.read() as session:
        page = items.list_by_line(session, job, after_line=after_line, limit=PAGE)
        page = page[: parts.count_fitting(session, [item.item for item in page])]
        return page, parts.list_by_item(session, [item.item for item in page])


def _end(stores: Stores, job: Job, artifacts: tuple[Artifact, Artifact]) -> JobState:
    with stores.database.write() as session:
        ids: list[FileId | None] = []
        for artifact in artifacts:
            if artifact.stat is None:
                ids.append(None)
                continue
            file = files.create(
                session,
                file=FileId(new_uuid()),
                tenant=job.tenant_id,
                purpose=PURPOSE,
                filename=artifact.filename,
                num_bytes=artifact.stat.num_bytes,
                sha256=artifact.stat.sha256,
                blob_key=artifact.key,
                lifetime_s=job.options.get("output_lifetime_s"),
            )
            ids.append(file.id)
        state = jobs.finish(
            session,
            job.id,
            finish_attempt=job.finish_attempt,
            output_file=ids[0],
            error_file=ids[1],
        )
        if state is None:
            raise _SupersededError
        events.record(session, job.tenant_id, job.id, f"batch.{state}")
    return state


def _discard(stores: Stores, artifacts: tuple[Artifact, Artifact]) -> None:
    for artifact in artifacts:
        if artifact.stat is not None:
            with suppress(StorageError):
                stores.blobs.delete(artifact.key)
