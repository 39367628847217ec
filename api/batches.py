"""
/v1/batches, as OpenAI's wire has it. A batch of the wire is a job in every other room.

Creating one is safe to repeat: by an idempotency key, or, without one, by the body that a client
sends again because an answer was lost.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Final

from fastapi import APIRouter, Header, Query, Request, Response
from pydantic import ValidationError
from starlette.concurrency import run_in_threadpool

from api.answers import answer_json, describe_body, describe_json
from api.auth import Asker, Caller, Described, admit
from api.bodies import read_json
from api.errors import (
    InvalidRequestError,
    MissingError,
    translate_validation_error,
)
from api.manifests import Manifest, drop_blob, find_manifest, write_manifest
from api.polls import answer_job, is_current, wait_for_change
from api.quotas import Quota
from api.schemas import (
    Batch,
    BatchPage,
    CreateBatch,
    build_batch,
    build_page,
    parse_file_id,
    parse_job_id,
    read_window_s,
    show_file_id,
)
from api.services import Here, Services
from storage import files, jobs
from storage.db import Session
from storage.errors import IdempotencyConflictError, NotFoundError
from storage.tables import Job
from tasks.identity import hash_submission

router = APIRouter(prefix="/v1/batches", tags=["Batches"])

MAX_KEY_CHARS: Final = 255
TWIN_WITHIN_S: Final = 600.0
"""How long a body that comes again without a key, by a client that says so, is the same request."""


@router.post("", responses=describe_json(Batch), openapi_extra=describe_body(CreateBatch))
async def create_batch(
    request: Request,
    asker: Asker,
    here: Here,
    idempotency_key: Annotated[str | None, Header()] = None,
    x_stainless_retry_count: Annotated[str | None, Header(include_in_schema=False)] = None,
) -> Response:
    key = _check_key(idempotency_key)
    is_resent = (x_stainless_retry_count or "0") != "0"
    async with read_json(request, here.config, here.held) as fields:
        try:
            wish = CreateBatch.model_validate(fields)
        except ValidationError as error:
            raise translate_validation_error(error) from error
        if (wish.input_file_id is None) == (wish.requests is None):
            raise InvalidRequestError(
                "Give either input_file_id or requests.",
                param="input_file_id",
            )
        submission = Submission(here, asker, fields, wish, key, is_resent=is_resent)
        job, is_new = await run_in_threadpool(submission.submit)
    return answer_job(job, headers={} if is_new else {"idempotent-replayed": "true"})


def _check_key(key: str | None) -> str | None:
    if key is not None and not (
        0 < len(key) <= MAX_KEY_CHARS and key.isascii() and key.isprintable()
    ):
        raise InvalidRequestError(
            f"Idempotency-Key: Give 1 to {MAX_KEY_CHARS} printable ASCII characters.",
            param="Idempotency-Key",
        )
    return key


class Submission:
    """One request for a batch, on its way into the database."""

    def __init__(
        self,
        here: Services,
        asker: Caller,
        fields: Mapping[str, Any],
        wish: CreateBatch,
        key: str | None,
        *,
        is_resent: bool,
    ) -> None:
        self._here = here
        self._asker = asker
        self._fields = fields
        self._wish = wish
        self._key = key
        self._is_resent = is_resent

    def submit(self) -> tuple[Job, bool]:
        """
        Returns:
            The job, and whether this request made it.

        Raises:
            InvalidRequestError, QuotaExceededError: nothing was made.
        """
        self._sha256 = hash_submission(self._fields)
        # 1. A replay is answered first: its input file may be gone by now.
        with self._here.database.read() as session:
            earlier = self._find_earlier(session)
        if earlier is not None:
            return earlier, False
        # 2. The manifest: there already, or written now. No transaction is open meanwhile.
        manifest = self._bring_manifest()
        # 3. The job, if nobody was quicker.
        is_new = False
        try:
            with self._here.database.write() as session:
                job, is_new = self._make_job(session, manifest)
        except IdempotencyConflictError:  # somebody was quicker: with the same bytes?
            with self._here.database.read() as session:
                earlier = self._find_earlier(session)
            if earlier is None:
                raise
            return earlier, False
        finally:
            if manifest.is_ours and not is_new:
                drop_blob(self._here, manifest.file, manifest.key)
        if is_new:
            self._here.tell_created(job.id)
        return job, is_new

    def _find_earlier(self, session: Session) -> Job | None:
        tenant, sha256 = self._asker.tenant, self._sha256
        if self._key is not None:
            try:
                return jobs.find_replayed(session, tenant, self._key, sha256)
            except IdempotencyConflictError:
                earlier = self._find_same_bytes(session, self._key)
                if earlier is None:
                    raise
                return earlier
        if not self._is_resent:
            return None
        return jobs.find_twin(
            session,
            tenant,
            api_key_id=self._asker.api_key_id,
            body_sha256=sha256,
            within_s=TWIN_WITHIN_S,
        )

    def _find_same_bytes(self, session: Session, key: str) -> Job | None:
        """The job of this key, if all is the same but that its input was uploaded once more."""
        tenant, given = self._asker.tenant, self._wish.input_file_id
        earlier = jobs.find_by_key(session, tenant, key)
        if earlier is None or given is None:
            return None
        fields = {**self._fields, "input_file_id": show_file_id(earlier.input_file_id)}
        if hash_submission(fields) != earlier.body_sha256:
            return None
        try:
            again = parse_file_id(given)
        except MissingError:
            return None
        is_same = files.have_same_bytes(session, tenant, again, earlier.input_file_id)
        return earlier if is_same else None

    def _bring_manifest(self) -> Manifest:
        wish = self._wish
        if wish.requests is not None:
            return write_manifest(
                self._here, self._asker.tenant, wish.requests, endpoint=wish.endpoint
            )
        assert wish.input_file_id is not None, "one of the two is given"
        return find_manifest(self._here, self._asker.tenant, wish.input_file_id)

    def _make_job(self, session: Session, manifest: Manifest) -> tuple[Job, bool]:
        tenant, wish = self._asker.tenant, self._wish
        if self._key is None:
            jobs.lock_body(session, tenant, self._sha256)
            earlier = self._find_earlier(session)
            if earlier is not None:
                return earlier, False
        if manifest.is_ours:
            manifest.create_file(session, tenant, self._here.config.batch_file_lifetime_s)
        else:
            files.get(session, tenant, manifest.file)  # deleted in between: then there is no job
        quota = Quota.read(session, tenant, self._here.config)
        job, is_new = jobs.create(
            session,
            jobs.NewJob(
                tenant=tenant,
                input_file=manifest.file,
                manifest_key=manifest.key,
                model=manifest.model,
                endpoint=wish.endpoint,
                body_sha256=self._sha256,
                idempotency_key=self._key,
                priority=wish.priority,
                window_s=read_window_s(wish.completion_window),
                options=_build_options(wish),
                client_metadata=wish.metadata,
                api_key_id=self._asker.api_key_id,
            ),
        )
        if not is_new:
            if manifest.is_ours:
                manifest.forget_file(session)
            return job, False
        quota.check(manifest.num_lines, manifest.num_bytes)
        errors = self._find_errors(manifest)
        if errors:
            jobs.reject(session, job.id, errors)
            job = jobs.get(session, tenant, job.id)
        return job, True

    def _find_errors(self, manifest: Manifest) -> list[dict[str, Any]]:
        """What is wrong with the input as a whole. Its lines are checked when they become items."""
        config = self._here.config
        if manifest.num_lines == 0:
            return [_error("empty_file", "The input file is empty.")]
        if manifest.num_bytes > config.max_batch_bytes:
            return [
                _error(
                    "file_too_large",
                    f"The input has {manifest.num_bytes} bytes, and {config.max_batch_bytes} are allowed.",
                )
            ]
        if manifest.num_lines > config.max_batch_lines:
            return [
                _error(
                    "too_many_lines",
                    f"The input has {manifest.num_lines} lines, and {config.max_batch_lines} are allowed.",
                    line=config.max_batch_lines + 1,
                )
            ]
        return []


def _error(code: str, message: str, *, line: int | None = None) -> dict[str, Any]:
    return {"code": code, "message": message, "param": "input_file_id", "line": line}


def _build_options(wish: CreateBatch) -> dict[str, Any]:
    options: dict[str, Any] = {"image_policy": wish.image_policy, "on_invalid": wish.on_invalid}
    if wish.output_expires_after is not None:
        options["output_lifetime_s"] = wish.output_expires_after.seconds
    return options


@router.get("", responses=describe_json(BatchPage))
def list_batches(
    asker: Asker,
    here: Here,
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
) -> Response:
    try:
        after_job = None if after is None else parse_job_id(after)
        with here.database.read() as session:
            page, has_more = jobs.list_page(session, asker.tenant, after=after_job, limit=limit)
    except (MissingError, NotFoundError) as error:
        raise InvalidRequestError("after: There is no such batch.", param="after") from error
    return answer_json(build_page([build_batch(job) for job in page], has_more=has_more))


@router.get("/{batch_id}", responses=describe_json(Batch))
async def retrieve_batch(
    request: Request,
    batch_id: str,
    _shown: Described,
    here: Here,
    wait: Annotated[int, Query(ge=0, le=60, description="Seconds to wait for a change.")] = 0,
) -> Response:
    """
    The state of a batch. `?wait=30` answers at the next change, or after 30 seconds.

    The ETag is the version: with `If-None-Match`, a batch that has not changed is a 304.
    """

    # Asked more often than all the rest together: one trip through a thread, not one for the key too.
    def read() -> Job:
        asker = admit(request, here)
        with here.database.read() as session:
            return jobs.get(session, asker.tenant, parse_job_id(batch_id))

    job = await run_in_threadpool(read)
    is_known = is_current(request, job)
    if wait and (is_known or "if-none-match" not in request.headers):
        await wait_for_change(request, here, job, wait)
        job = await run_in_threadpool(read)
        is_known = is_current(request, job)
    return answer_job(job, is_known=is_known)


@router.post("/{batch_id}/cancel", responses=describe_json(Batch))
def cancel_batch(batch_id: str, asker: Asker, here: Here) -> Response:
    """Stop a batch. What has ended by then is in its files; asking twice is as good as once."""
    job_id = parse_job_id(batch_id)
    with here.database.write() as session:
        job = jobs.cancel(session, asker.tenant, job_id)
    here.tell_cancelled(job.id)
    return answer_job(job)
