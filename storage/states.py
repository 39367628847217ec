"""
The states of jobs and items, and the moves between them. Pure: no SQL, no SQLAlchemy.

Terminal states stay: a failed item that a client wants again is an item of a new job.
"""

from collections.abc import Mapping
from enum import StrEnum
from typing import Final


class ItemState(StrEnum):
    PENDING = "pending"
    LEASED = "leased"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"


class JobState(StrEnum):
    """The eight words of OpenAI's wire, and never a ninth."""

    VALIDATING = "validating"
    FAILED = "failed"
    IN_PROGRESS = "in_progress"
    FINALIZING = "finalizing"
    COMPLETED = "completed"
    EXPIRED = "expired"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"


class FileState(StrEnum):
    UPLOADED = "uploaded"
    PROCESSED = "processed"
    ERROR = "error"


ITEM_MOVES: Final[Mapping[ItemState, frozenset[ItemState]]] = {
    ItemState.PENDING: frozenset({ItemState.LEASED, ItemState.CANCELLED, ItemState.EXPIRED}),
    ItemState.LEASED: frozenset(
        {
            ItemState.PENDING,
            ItemState.COMPLETED,
            ItemState.FAILED,
            ItemState.CANCELLED,
            ItemState.EXPIRED,
        }
    ),
    ItemState.COMPLETED: frozenset(),
    ItemState.FAILED: frozenset(),
    ItemState.CANCELLED: frozenset(),
    ItemState.EXPIRED: frozenset(),
}

JOB_MOVES: Final[Mapping[JobState, frozenset[JobState]]] = {
    JobState.VALIDATING: frozenset({JobState.FAILED, JobState.IN_PROGRESS, JobState.CANCELLING}),
    JobState.IN_PROGRESS: frozenset({JobState.FINALIZING, JobState.CANCELLING}),
    # A job whose window ended writes its artifacts like any other, and is `expired` afterwards.
    JobState.FINALIZING: frozenset({JobState.COMPLETED, JobState.EXPIRED}),
    JobState.CANCELLING: frozenset({JobState.CANCELLED}),
    JobState.FAILED: frozenset(),
    JobState.COMPLETED: frozenset(),
    JobState.EXPIRED: frozenset(),
    JobState.CANCELLED: frozenset(),
}

TERMINAL_ITEM_STATES: Final = frozenset(state for state, to in ITEM_MOVES.items() if not to)
TERMINAL_JOB_STATES: Final = frozenset(state for state, to in JOB_MOVES.items() if not to)
