"""
Why storage could not do what was asked: one small tree, each class with a stable word as its code.

Every class answers two questions: whose fault is it, and does trying again help? The errors of
SQLAlchemy, of the drivers and of boto end in `storage.db` and `storage.blobs`: no other room sees
them. The texts hold no path, address, key or statement.
"""

import inspect
from enum import StrEnum
from typing import ClassVar


class Fault(StrEnum):
    """Who can put it right."""

    CLIENT = "client"
    OPERATOR = "operator"
    SERVICE = "service"


class StorageError(Exception):
    """Storage could not do what was asked."""

    code: ClassVar[str] = "storage_error"
    fault: ClassVar[Fault] = Fault.SERVICE
    retryable: ClassVar[bool] = False

    def __init__(self, message: str | None = None) -> None:
        super().__init__(message or inspect.cleandoc(self.__doc__ or self.code))


# What the client asked for


class NotFoundError(StorageError):
    """There is nothing under this id. Check the id, and which key asks."""

    code: ClassVar[str] = "not_found"
    fault: ClassVar[Fault] = Fault.CLIENT


class IdempotencyConflictError(StorageError):
    """This Idempotency-Key was used with another body. Take a new key, or send the first body."""

    code: ClassVar[str] = "idempotency_conflict"
    fault: ClassVar[Fault] = Fault.CLIENT


class StateConflictError(StorageError):
    """The job is in a state that does not allow this."""

    code: ClassVar[str] = "state_conflict"
    fault: ClassVar[Fault] = Fault.CLIENT


class PlanChangedError(StorageError):
    """The item was cut otherwise before, and its parts may not be dropped again."""

    code: ClassVar[str] = "plan_changed"
    fault: ClassVar[Fault] = Fault.CLIENT


# What went wrong between us and the database


class StaleExpansionError(StorageError):
    """Another process has expanded these lines, or the job was cancelled. Read the job again."""

    code: ClassVar[str] = "stale_expansion"


class DatabaseUnavailableError(StorageError):
    """The database does not answer. Nothing was changed: try again."""

    code: ClassVar[str] = "database_unavailable"
    retryable: ClassVar[bool] = True


class DatabaseBusyError(DatabaseUnavailableError):
    """The database was too busy with others' transactions. Nothing was changed: try again."""

    code: ClassVar[str] = "database_busy"


class CommitUnknownError(StorageError):
    """The connection was lost while committing. Read back what is there before trying again."""

    code: ClassVar[str] = "commit_unknown"
    retryable: ClassVar[bool] = True


class DatabaseRefusedError(StorageError):
    """The database refused a statement: our own bug, or a schema of another version."""

    code: ClassVar[str] = "database_refused"


class BadDatabaseUrlError(StorageError):
    """The database URL is not understood. Give sqlite:///PATH or postgresql://USER@HOST/NAME."""

    code: ClassVar[str] = "bad_database_url"
    fault: ClassVar[Fault] = Fault.OPERATOR


class SchemaOutdatedError(StorageError):
    """The database's schema is older than this Darkroom. Run `darkroom migrate` once."""

    code: ClassVar[str] = "schema_outdated"
    fault: ClassVar[Fault] = Fault.OPERATOR


class SchemaNewerError(StorageError):
    """A newer Darkroom has migrated the database. Start that version here too."""

    code: ClassVar[str] = "schema_newer"
    fault: ClassVar[Fault] = Fault.OPERATOR


class ServedOtherwiseError(StorageError):
    """Another worker serves this model with other limits. Give all of them the same."""

    code: ClassVar[str] = "served_otherwise"
    fault: ClassVar[Fault] = Fault.OPERATOR
    retryable: ClassVar[bool] = True


class BadPepperError(StorageError, ValueError):
    """The pepper is no hexadecimal number of 16 bytes or more. Make one with `openssl rand -hex 32`."""

    code: ClassVar[str] = "bad_pepper"
    fault: ClassVar[Fault] = Fault.OPERATOR


# Blobs


class BadBlobKeyError(StorageError, ValueError):
    """A blob key holds something else than letters, digits, dots, dashes and single slashes."""

    code: ClassVar[str] = "bad_blob_key"


class BlobMissingError(StorageError):
    """There is no blob under this key."""

    code: ClassVar[str] = "blob_missing"


class BlobConflictError(StorageError):
    """Other bytes lie under this key already. Keys are written once and never overwritten."""

    code: ClassVar[str] = "blob_conflict"


class BlobsUnavailableError(StorageError):
    """The blob store does not answer, or not in time. Try again."""

    code: ClassVar[str] = "blobs_unavailable"
    retryable: ClassVar[bool] = True


class BlobsRefusedError(StorageError):
    """The blob store refuses us. Check the credentials, the bucket and its permissions."""

    code: ClassVar[str] = "blobs_refused"
    fault: ClassVar[Fault] = Fault.OPERATOR
