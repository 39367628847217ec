"""
Lines become items: stream the manifest, check every line, insert in bulk, then send permits.

All line errors are found in one pass and reported with their lines. A run that was cut short is
taken up where its last page was committed; two runs at once cannot both insert a page, and the
second one ends without a trace.
"""

import hashlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final

import structlog

from storage import items, jobs, locks, served, tenants
from storage.errors import BlobMissingError, StaleExpansionError
from storage.ids import JobId
from storage.items import NewItem
from storage.served import Served
from storage.states import JobState
from storage.tables import Job
from storage.tenants import Caps
from tasks.bodies import ImagePolicy, check_body, read_line
from tasks.config import Config, MediaLimits
from tasks.dispatch import Dispatcher
from tasks.errors import BadLineError
from tasks.manifest import Line, read_lines
from tasks.stores import Stores

logger = structlog.get_logger(__name__)

PAGE: Final = 1000
"""Items that one transaction inserts: long enough to be fast, short enough to hold no lock long."""


class OnInvalid(StrEnum):
    """What bad lines do to their job."""

    FAIL = "fail"
    SKIP = "skip"


@dataclass(frozen=True, slots=True)
class JobOptions:
    """What `jobs.options` may say about expansion."""

    image_policy: ImagePolicy = ImagePolicy.REJECT
    on_invalid: OnInvalid = OnInvalid.FAIL

    @classmethod
    def read(cls, options: Mapping[str, Any]) -> "JobOptions":
        return cls(
            ImagePolicy(options.get("image_policy") or ImagePolicy.REJECT),
            OnInvalid(options.get("on_invalid") or OnInvalid.FAIL),
        )


def expand(
    stores: Stores, dispatcher: Dispatcher, config: Config, job_id: JobId, *, force: bool = False
) -> None:
    """
    Expand a job that is validating; any other is left as it is.

    Args:
        force: also where another process seems to be at it.

    Raises:
        StorageError: it can be done again, and the sweeper sees to it.
    """
    with stores.database.read() as session:
        job = jobs.find(session, job_id)
        word = None if job is None else served.find(session, job.model)
        caps = Caps() if job is None else tenants.get_caps(session, job.tenant_id)
    if job is None or job.state is not JobState.VALIDATING:
        return
    with locks.hold(stores.database, f"expand {job_id}") as is_ours:
        if not (is_ours or force):
            return
        try:
            limits = _choose_limits(config, job.model, word).lowered(caps)
            _expand(stores, dispatcher, config, job, limits)
        except StaleExpansionError:
            logger.info("expansion_lost", job=str(job_id))


def _choose_limits(config: Config, model: str, word: Served | None) -> MediaLimits:
    """Those of the model's workers; of the settings, where none has ever served it."""
    said = config.limits_of(model)
    if word is None:
        return said
    limits = MediaLimits(image=word.max_images, video=word.max_videos, frames=word.max_frames)
    if model in config.models and said != limits:
        logger.error("limits_differ", model=model, settings=str(said), worker=str(limits))
    return limits


def _expand(
    stores: Stores, dispatcher: Dispatcher, config: Config, job: Job, limits: MediaLimits
) -> None:
    checker = LineChecker(
        job.model, job.endpoint, limits, job.options, opened=config.opened_schemes
    )
    page: list[NewItem] = []
    num_inserted, num_lines, end = job.num_expanded, 0, 0

    def insert() -> None:
        nonlocal num_inserted
        with stores.database.write() as session:
            items.insert_page(session, job.id, page, after_line=num_inserted, expanded_bytes=end)
        num_inserted += len(page)
        page.clear()

    try:
        for line in _read(stores, job, config):
            num_lines = line.number
            if num_lines > config.max_lines:
                checker.refuse_file(
                    "too_many_lines", f"The file has more than {config.max_lines} lines.", num_lines
                )
                break
            item = checker.check(line)
            # Once the job is sure to fail, the rest is only checked.
            if line.number <= num_inserted or checker.is_failing:
                continue
            page.append(item)
            end = line.offset + line.length
            if len(page) == PAGE:
                insert()
    except BlobMissingError:
        checker.refuse_file("input_file_missing", "The content of the input file is gone.", None)
    if num_lines == 0 and not checker.errors:
        checker.refuse_file("empty_file", "The input file has no lines.", None)
    if checker.is_failing:
        with stores.database.write() as session:
            is_mine = jobs.reject(session, job.id, checker.errors)
        logger.info(
            "job_rejected", job=str(job.id), num_errors=len(checker.errors), is_mine=is_mine
        )
        return
    if page:
        insert()
    if num_inserted > PAGE:
        with stores.database.write() as session:
            items.refresh_statistics(session)
    with stores.database.write() as session:
        if checker.errors:
            jobs.note_errors(session, job.id, checker.errors)
        is_mine = jobs.start(session, job.id)
    if not is_mine:
        return
    num_waiting = num_lines - checker.num_refused
    logger.info("job_expanded", job=str(job.id), num_items=num_lines, num_waiting=num_waiting)
    if num_waiting:
        if job.priority <= jobs.FAST_LANE:
            dispatcher.send_fast_permit(job.model)
        dispatcher.send_permits_for(job.model, num_waiting)
    else:
        dispatcher.send_finish(job.id)


def _read(stores: Stores, job: Job, config: Config) -> Iterator[Line]:
    pieces = stores.blobs.stream(job.manifest_key)
    return read_lines(pieces, max_line_bytes=config.max_line_bytes)


@dataclass(slots=True)
class LineChecker:
    """Checks the lines of one file, in order: some rules are about all of them."""

    model: str
    endpoint: str
    limits: MediaLimits
    raw_options: Mapping[str, Any]
    opened: Collection[str] = ()
    errors: list[dict[str, Any]] = field(default_factory=list)
    num_refused: int = 0
    is_file_refused: bool = False
    _options: JobOptions = field(init=False)
    _seen: set[bytes] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._options = JobOptions.read(self.raw_options)

    @property
    def is_failing(self) -> bool:
        """Whether the job will not run: then nothing more need be kept of it."""
        is_strict = self._options.on_invalid is OnInvalid.FAIL
        return self.is_file_refused or (is_strict and bool(self.errors))

    def refuse_file(self, code: str, message: str, line: int | None) -> None:
        """What no option can save."""
        self.is_file_refused = True
        self.errors.append({"code": code, "message": message, "param": None, "line": line})

    def check(self, line: Line) -> NewItem:
        """The item of one line; one that is refused is an item that has failed."""
        custom_id: str | None = None
        num_images, error = 0, None
        try:
            custom_id, num_images = self._check(line)
        except BadLineError as bad:
            custom_id = bad.custom_id
            if custom_id is not None and not self._is_new(custom_id):
                custom_id = None
            self.num_refused += 1
            error = (bad.line_code, str(bad))
            self.errors.append(
                {
                    "code": bad.line_code,
                    "message": str(bad),
                    "param": bad.param,
                    "line": line.number,
                }
            )
        return NewItem(line.number, custom_id, line.offset, line.length, num_images, error)

    def _check(self, line: Line) -> tuple[str, int]:
        if line.content is None:
            raise BadLineError("line_too_long", f"This line has {line.length} bytes: too many.")
        custom_id, body = read_line(line.content, self.endpoint)
        try:
            checked = check_body(
                body,
                model=self.model,
                limits=self.limits,
                image_policy=self._options.image_policy,
                opened=self.opened,
            )
        except BadLineError as bad:
            bad.custom_id = custom_id
            raise
        if not self._is_new(custom_id):
            raise BadLineError(
                "duplicate_custom_id",
                "This custom_id stands in an earlier line. Each must be unique in its file.",
                param="custom_id",
            )
        return custom_id, checked.num_images

    def _is_new(self, custom_id: str) -> bool:
        # 16 bytes of a hash: a million ids of 256 characters would be 300 MB.
        digest = hashlib.blake2b(custom_id.encode(), digest_size=16).digest()
        if digest in self._seen:
            return False
        self._seen.add(digest)
        return True
