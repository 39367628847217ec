"""
The tables, every constraint named, the same on SQLite and on PostgreSQL.

- Times are the database's clock in seconds since 1970 (`storage.db.clock`).
- There are no relationships, so nothing is ever loaded behind our back: queries join by hand. One
  that is added takes `lazy="raise"`.
- A request's body is not here: `items.body_offset` and `body_length` point into the manifest, the
  blob that was handed in (docs/decisions/0005-request-bodies-stay-in-the-manifest.md).
- Counters on `jobs` move in the transaction that moves the items. Only ends are counted: a counter
  of leases would make every lease wait for the job's row.
"""

from enum import StrEnum
from typing import Any, Final

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    CheckConstraint,
    ColumnElement,
    Double,
    Enum,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Text,
    UniqueConstraint,
    Uuid,
    false,
    literal,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import DeclarativeBase, InstrumentedAttribute, Mapped, mapped_column

from storage.ids import FileId, ItemId, JobId, LeaseId, TenantId, WebhookId
from storage.states import FileState, ItemState, JobState

NAMES: Final = {
    "pk": "pk_%(table_name)s",
    "fk": "fk_%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
}

# SQLite gives numbers to a primary key of type INTEGER only.
SERIAL: Final = BigInteger().with_variant(Integer(), "sqlite")
JSONS: Final = JSON(none_as_null=True).with_variant(JSONB(none_as_null=True), "postgresql")


def _state(kind: type[StrEnum], name: str) -> Enum:
    """Text with a CHECK: a native enum of PostgreSQL cannot lose a value again."""
    return Enum(
        kind,
        name=name,
        native_enum=False,
        create_constraint=True,
        length=16,
        values_callable=lambda states: [state.value for state in states],
    )


def in_state(
    column: InstrumentedAttribute[ItemState] | InstrumentedAttribute[JobState],
    state: ItemState | JobState,
) -> ColumnElement[bool]:
    """
    Whether a row is in this state, with the state in the statement itself.

    PostgreSQL keeps the plan of a statement that comes again and again, whatever its parameters: a
    state among those would never lead it to the partial indexes below.
    """
    return column == literal(state, column.type, literal_execute=True)


_OPEN: Final = "'validating', 'in_progress', 'finalizing', 'cancelling'"


def _only(rows: str) -> dict[str, Any]:
    """For an index of some of the rows."""
    return {"postgresql_where": text(rows), "sqlite_where": text(rows)}


class Base(DeclarativeBase):
    metadata = MetaData(naming_convention=NAMES)
    type_annotation_map = {  # noqa: RUF012 - SQLAlchemy's own form
        TenantId: Uuid(),
        FileId: Uuid(),
        JobId: Uuid(),
        LeaseId: Uuid(),
        WebhookId: Uuid(),
        ItemId: SERIAL,
        str: Text(),
        int: Integer(),
        float: Double(),
        bool: Boolean(),
        bytes: LargeBinary(),
        dict[str, Any]: JSONS,
        list[Any]: JSONS,
        ItemState: _state(ItemState, "state"),
        JobState: _state(JobState, "state"),
        FileState: _state(FileState, "state"),
    }


class Tenant(Base):
    """Whoever hands in work. Nothing of one tenant is ever visible to another."""

    __tablename__ = "tenants"

    id: Mapped[TenantId] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    max_open_items: Mapped[int | None]
    """Items that may wait or run at a time; None: as many as there are."""
    max_open_bytes: Mapped[int | None] = mapped_column(BigInteger)
    """Bytes of the input files of jobs that have not ended; None: as many as there are."""
    created_at: Mapped[float]
    max_images: Mapped[int | None]
    max_videos: Mapped[int | None]
    max_frames: Mapped[int | None]
    """Of one prompt, the frames of one clip; None: what the model takes, which none can raise."""


class ApiKey(Base):
    """What a program shows to say whose it is. Only a hash of the secret is kept."""

    __tablename__ = "api_keys"

    id: Mapped[str] = mapped_column(String(16), primary_key=True)
    """The public part of the key: it finds the row, and may be shown."""
    tenant_id: Mapped[TenantId] = mapped_column(ForeignKey("tenants.id"), index=True)
    name: Mapped[str]
    secret_hash: Mapped[bytes]
    created_at: Mapped[float]
    expires_at: Mapped[float | None]
    revoked_at: Mapped[float | None]


class File(Base):
    """A blob with a name: handed in by a client, or made by us."""

    __tablename__ = "files"

    id: Mapped[FileId] = mapped_column(primary_key=True)
    tenant_id: Mapped[TenantId] = mapped_column(ForeignKey("tenants.id"))
    purpose: Mapped[str]
    filename: Mapped[str]
    """The client's word. Data: never in a path or a key."""
    state: Mapped[FileState]
    num_bytes: Mapped[int] = mapped_column(BigInteger)
    num_lines: Mapped[int | None]
    """Counted while the bytes came in; None where nobody did."""
    sha256: Mapped[bytes]
    blob_key: Mapped[str] = mapped_column(unique=True)
    created_at: Mapped[float]
    expires_at: Mapped[float | None]
    deleted_at: Mapped[float | None]

    # In these words by the query of a page, or neither database takes the index.
    __table_args__ = (
        Index(
            "ix_files_listed",
            "tenant_id",
            "id",
            **_only("deleted_at IS NULL AND purpose <> 'request'"),
        ),
    )


class Job(Base):
    """One submission. Everything that a poll shows stands in this row."""

    __tablename__ = "jobs"

    id: Mapped[JobId] = mapped_column(primary_key=True)
    tenant_id: Mapped[TenantId] = mapped_column(ForeignKey("tenants.id"))
    input_file_id: Mapped[FileId] = mapped_column(ForeignKey("files.id"), index=True)
    manifest_key: Mapped[str]
    """The blob of the input file, which outlives a deleted file as long as the job needs it."""
    retry_of: Mapped[JobId | None] = mapped_column(ForeignKey("jobs.id"))
    api_key_id: Mapped[str | None] = mapped_column(ForeignKey("api_keys.id"))
    """Which key asked; None where none was needed."""
    idempotency_key: Mapped[str | None] = mapped_column(String(255))
    body_sha256: Mapped[bytes]
    """Of the request that made the job: the same key with another body is a conflict."""

    endpoint: Mapped[str]
    model: Mapped[str]
    priority: Mapped[int]
    """Lower runs first."""
    window_s: Mapped[int]
    options: Mapped[dict[str, Any]]
    client_metadata: Mapped[dict[str, Any] | None]
    traceparent: Mapped[str | None]

    state: Mapped[JobState]
    version: Mapped[int] = mapped_column(BigInteger)
    """Rises with every change of the row; the ETag of a poll."""
    errors: Mapped[list[Any] | None]
    """What was wrong with the lines, by line."""

    num_expanded: Mapped[int]
    """Lines that are items by now."""
    expanded_bytes: Mapped[int] = mapped_column(BigInteger)
    """Where in the manifest the next line begins."""
    num_total: Mapped[int]
    """0 until all lines are checked, and fixed from then on."""
    num_completed: Mapped[int]
    num_failed: Mapped[int]
    num_cancelled: Mapped[int]
    num_expired: Mapped[int]
    num_prompt_tokens: Mapped[int] = mapped_column(BigInteger)
    num_completion_tokens: Mapped[int] = mapped_column(BigInteger)
    last_seq: Mapped[int] = mapped_column(BigInteger)
    """The commit number given last: results and failures are numbered in the order of commits."""
    finish_attempt: Mapped[int]
    output_file_id: Mapped[FileId | None] = mapped_column(ForeignKey("files.id"))
    error_file_id: Mapped[FileId | None] = mapped_column(ForeignKey("files.id"))

    created_at: Mapped[float]
    expires_at: Mapped[float]
    in_progress_at: Mapped[float | None]
    finalizing_at: Mapped[float | None]
    completed_at: Mapped[float | None]
    failed_at: Mapped[float | None]
    expired_at: Mapped[float | None]
    cancelling_at: Mapped[float | None]
    cancelled_at: Mapped[float | None]
    num_cached_tokens: Mapped[int] = mapped_column(BigInteger, server_default="0")
    """Of the prompt tokens, those that were copied from earlier prompts and not read again."""

    __table_args__ = (
        UniqueConstraint("tenant_id", "idempotency_key"),
        CheckConstraint(
            "num_completed + num_failed + num_cancelled + num_expired <= num_expanded",
            name="ends_within_expanded",
        ),
        # Without the fast lane, which no list shows: see `files`.
        Index("ix_jobs_listed", "tenant_id", "id", **_only("priority > -1000")),
        Index(
            "ix_jobs_twins",
            "tenant_id",
            "body_sha256",
            "id",
            **_only("priority > -1000"),
        ),
        Index("ix_jobs_chats", "created_at", **_only("priority = -1000")),
        # For the row that goes: each database looks whether a job points to it.
        *(
            Index(f"ix_jobs_{name}", name, **_only(f"{name} IS NOT NULL"))
            for name in ("retry_of", "output_file_id", "error_file_id")
        ),
        Index(
            "ix_jobs_open",
            "state",
            "model",
            "priority",
            **_only(f"state IN ({_OPEN})"),
        ),
    )


IS_OPEN: Final = text(f"jobs.state IN ({_OPEN})")
"""Whether a job has not ended, in the words of `ix_jobs_open`: SQLite takes the index for no others."""


class Item(Base):
    """One prompt of a job: the unit of result, billing and retry."""

    __tablename__ = "items"

    id: Mapped[ItemId] = mapped_column(primary_key=True, autoincrement=True)
    job_id: Mapped[JobId] = mapped_column(ForeignKey("jobs.id"))
    line: Mapped[int]
    """In the manifest, from 1."""
    custom_id: Mapped[str | None]
    """The client's key. None where a line that was refused had none, or one that was taken."""
    body_offset: Mapped[int] = mapped_column(BigInteger)
    body_length: Mapped[int]
    num_images: Mapped[int]

    state: Mapped[ItemState]
    not_before: Mapped[float]
    """0: at once. Later after a try that failed."""
    attempt: Mapped[int]
    """Leases so far. Never goes down: it is the fence."""
    charged: Mapped[int]
    """Tries that were the item's own fault. Only this decides when to give up."""
    num_crashes: Mapped[int]
    """Leases that ended with a worker's death or silence."""
    is_suspect: Mapped[bool]
    """Leased alone, so that it can take no neighbour with it."""
    lease_id: Mapped[LeaseId | None]
    lease_until: Mapped[float | None]
    worker: Mapped[str | None]
    ended_at: Mapped[float | None]
    seq: Mapped[int | None] = mapped_column(BigInteger)
    """The commit number of a failure; a completed item's stands in its result."""
    error_code: Mapped[str | None]
    error_message: Mapped[str | None]
    error_details: Mapped[dict[str, Any] | None]
    """Where its media came from, as far as they came; a completed item's stand in its result."""

    __table_args__ = (
        UniqueConstraint("job_id", "line"),
        UniqueConstraint("job_id", "custom_id"),
        CheckConstraint(
            "(state = 'leased') = (lease_id IS NOT NULL AND lease_until IS NOT NULL)",
            name="leased_has_lease",
        ),
        Index(
            "ix_items_pending",
            "job_id",
            "is_suspect",
            "not_before",
            "id",
            postgresql_where=text("state = 'pending'"),
            sqlite_where=text("state = 'pending'"),
        ),
        Index(
            "ix_items_leased",
            "lease_until",
            postgresql_where=text("state = 'leased'"),
            sqlite_where=text("state = 'leased'"),
        ),
        Index(
            "ix_items_failed",
            "job_id",
            "seq",
            postgresql_where=text("state = 'failed'"),
            sqlite_where=text("state = 'failed'"),
        ),
    )


class Result(Base):
    """What the engine gave back for an item. One an item, and only under the item's last lease."""

    __tablename__ = "results"

    item_id: Mapped[ItemId] = mapped_column(
        ForeignKey("items.id"), primary_key=True, autoincrement=False
    )
    job_id: Mapped[JobId] = mapped_column(ForeignKey("jobs.id"))
    seq: Mapped[int] = mapped_column(BigInteger)
    attempt: Mapped[int]
    text: Mapped[str]
    finish_reason: Mapped[str]
    num_prompt_tokens: Mapped[int]
    num_completion_tokens: Mapped[int]
    details: Mapped[dict[str, Any]]
    """Images as they were used, timings, model revision, sampling, seed."""
    created_at: Mapped[float]
    num_cached_tokens: Mapped[int] = mapped_column(server_default="0")

    __table_args__ = (UniqueConstraint("job_id", "seq"),)


class Part(Base):
    """A stretch of a video item, or some of an item's images, asked about by itself and answered."""

    __tablename__ = "parts"

    item_id: Mapped[ItemId] = mapped_column(
        ForeignKey("items.id"), primary_key=True, autoincrement=False
    )
    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    """Within its item, from 1."""
    plan: Mapped[bytes]
    """A digest of what the item was cut from and how: parts of two plans are never joined."""
    attempt: Mapped[int]
    """The item's, under whose lease it was answered."""
    start_s: Mapped[float | None]
    end_s: Mapped[float | None]
    """Of the stretch; None for images."""
    images: Mapped[list[Any]]
    """As they were used: a result's report."""
    text: Mapped[str | None]
    finish_reason: Mapped[str | None]
    num_prompt_tokens: Mapped[int]
    num_completion_tokens: Mapped[int]
    error_code: Mapped[str | None]
    """Of a part that failed for good, and has no text."""
    error_message: Mapped[str | None]
    num_cached_tokens: Mapped[int] = mapped_column(server_default="0")

    __table_args__ = (
        CheckConstraint("(text IS NULL) = (error_code IS NOT NULL)", name="text_or_error"),
    )


class ServedModel(Base):
    """A model that workers serve or did, with the limits that all of them have."""

    __tablename__ = "served_models"

    model: Mapped[str] = mapped_column(primary_key=True)
    max_images: Mapped[int]
    max_videos: Mapped[int]
    worker: Mapped[str]
    """Who said so last."""
    seen_at: Mapped[float]
    """When that was; 0 where it has stopped."""
    max_frames: Mapped[int | None]
    """Of one clip; None: the service sets no limit of its own."""


class ServingEngine(Base):
    """What one worker's engine has done, as the worker said last; `ServedModel` is of all of them."""

    __tablename__ = "serving_engines"

    model: Mapped[str] = mapped_column(primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    """Of the worker among those of the model, from 0: the lowest that was free when it came."""
    worker: Mapped[str]
    alive_until: Mapped[float]
    """When it is taken for gone, unless it says something before: then the number is free."""
    usage: Mapped[dict[str, Any]]


class Webhook(Base):
    """An address that wants to hear when a job ends."""

    __tablename__ = "webhooks"

    id: Mapped[WebhookId] = mapped_column(primary_key=True)
    tenant_id: Mapped[TenantId] = mapped_column(ForeignKey("tenants.id"), index=True)
    url: Mapped[str]
    sealed_secret: Mapped[bytes]
    """Encrypted: signing needs the secret itself, so a hash would not do."""
    kinds: Mapped[list[Any]]
    is_enabled: Mapped[bool]
    created_at: Mapped[float]


class Event(Base):
    """Something that happened to a job and, where a webhook wants it, a call that is due."""

    __tablename__ = "events"

    id: Mapped[int] = mapped_column(SERIAL, primary_key=True, autoincrement=True)
    tenant_id: Mapped[TenantId] = mapped_column(ForeignKey("tenants.id"))
    job_id: Mapped[JobId] = mapped_column(ForeignKey("jobs.id"))
    kind: Mapped[str]
    details: Mapped[dict[str, Any]]
    created_at: Mapped[float]
    webhook_id: Mapped[WebhookId | None] = mapped_column(ForeignKey("webhooks.id"))
    num_tries: Mapped[int] = mapped_column(server_default="0")
    not_before: Mapped[float | None]
    is_delivered: Mapped[bool] = mapped_column(server_default=false())

    __table_args__ = (
        Index(None, "job_id", "id"),
        Index(
            "ix_events_due",
            "not_before",
            postgresql_where=text("webhook_id IS NOT NULL AND NOT is_delivered"),
            sqlite_where=text("webhook_id IS NOT NULL AND NOT is_delivered"),
        ),
    )
