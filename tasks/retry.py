"""
What an error means for its item: the one table. Try again, fail it, give it back, or end the worker.

A client's fault fails the item at once, with a stable code: the same bytes fail again tomorrow. What
may pass is tried again with a delay, a few times. What was no fault of the item's is given back
without a charge. What took the engine away ends the process.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

from engine.errors import EngineError, ResultError
from media.errors import FetchFailedError, HostPausedError, MediaError
from storage.errors import BlobMissingError, NotFoundError, StorageError
from storage.items import Failure, Fence
from tasks.errors import BadLineError, EngineLostError
from tasks.prefetch import StoreAwayError

INTERNAL: Final = "internal_error"
INTERNAL_TEXT: Final = "The service failed on this request. It was tried again without success."


class Act(StrEnum):
    FAIL = "fail"
    RETRY = "retry"
    RELEASE = "release"
    EXIT = "exit"


@dataclass(frozen=True, slots=True)
class Verdict:
    """
    Args:
        code, message: what the client is told if the item ends here.
        retry_after_s: what the other side asked for.
        media: where the item's pictures and clips came from, as far as they came.
    """

    act: Act
    code: str
    message: str
    retry_after_s: float = 0.0
    media: Sequence[Mapping[str, Any]] = ()

    def as_failure(self, fence: Fence) -> Failure:
        is_transient = self.act is Act.RETRY
        details = {"media": list(self.media)} if self.media else None
        message = clean(self.message)
        return Failure(fence, self.code, message, is_transient, self.retry_after_s, details)


def clean(text: str) -> str:
    """PostgreSQL keeps no NUL in a text, and half of a surrogate pair is no text anywhere."""
    return text.replace("\0", "\ufffd").encode("utf-8", "replace").decode()


def judge(error: Exception | ResultError) -> Verdict:
    if isinstance(error, ResultError | StoreAwayError) and error.code == StoreAwayError.code:
        return Verdict(Act.RELEASE, error.code, INTERNAL_TEXT)
    match error:
        case ResultError() | EngineError():
            message = error.message if isinstance(error, ResultError) else str(error)
            return Verdict(_again_if(error.retryable), error.code, message)
        case HostPausedError():  # others were told to wait, and this item was not tried
            return Verdict(Act.RELEASE, error.code, str(error), error.retry_after_s or 0.0)
        case FetchFailedError():
            wait_s = error.retry_after_s or 0.0
            return Verdict(_again_if(error.retryable), error.code, str(error), wait_s)
        case MediaError():
            return Verdict(_again_if(error.retryable), error.code, str(error))
        case BadLineError():
            return Verdict(Act.FAIL, error.line_code, str(error))
        case NotFoundError():
            return Verdict(Act.FAIL, "file_not_found", "There is no uploaded file with this id.")
        case BlobMissingError():
            return Verdict(Act.FAIL, "input_file_missing", "The content of a file is gone.")
        case EngineLostError():
            return Verdict(Act.EXIT, error.code, INTERNAL_TEXT)
        case StorageError(retryable=True):
            return Verdict(Act.RELEASE, error.code, INTERNAL_TEXT)
        case _:  # our own bug: charged, so that it ends
            return Verdict(Act.RETRY, INTERNAL, INTERNAL_TEXT)


def _again_if(retryable: bool) -> Act:
    return Act.RETRY if retryable else Act.FAIL
