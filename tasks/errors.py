"""
Why the service could not do what was asked: one small tree, each class with a stable word as its code.

Every class answers two questions: whose fault is it, and does trying again help? The texts of the
client's faults go to clients; those of the operator's name the variable that has to change.
"""

import inspect
from typing import ClassVar

from storage.errors import Fault


class TaskError(Exception):
    """The service could not do what was asked."""

    code: ClassVar[str] = "task_error"
    fault: ClassVar[Fault] = Fault.SERVICE
    retryable: ClassVar[bool] = False

    def __init__(self, message: str | None = None) -> None:
        super().__init__(message or inspect.cleandoc(self.__doc__ or self.code))


# What keeps a process from starting


class BadSettingError(TaskError):
    """A setting cannot work. Correct the variable that is named, and start again."""

    code: ClassVar[str] = "bad_setting"
    fault: ClassVar[Fault] = Fault.OPERATOR


class UnsafeSettingError(BadSettingError):
    """A setting of Celery or Redis is known to lose work. Leave it out."""

    code: ClassVar[str] = "unsafe_setting"


class BrokerUnavailableError(TaskError):
    """The broker does not answer. Start it, or correct DARKROOM_REDIS_URL."""

    code: ClassVar[str] = "broker_unavailable"
    fault: ClassVar[Fault] = Fault.OPERATOR
    retryable: ClassVar[bool] = True


# What a client handed in


class BadSubmissionError(TaskError, ValueError):
    """The submission cannot be read. Correct it and send it again."""

    code: ClassVar[str] = "bad_submission"
    fault: ClassVar[Fault] = Fault.CLIENT


class BadLineError(TaskError, ValueError):
    """
    A line of a manifest cannot be run as it is.

    Args:
        code: a stable word, as the client finds it in the job's errors.
        param: the field to blame.
    """

    fault: ClassVar[Fault] = Fault.CLIENT

    def __init__(self, code: str, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.line_code = code
        self.param = param
        self.custom_id: str | None = None


# What ends a worker


class EngineLostError(TaskError):
    """Nothing more comes from this process's engine. The process must end; another one goes on."""

    code: ClassVar[str] = "engine_lost"
    retryable: ClassVar[bool] = True


class DeviceLostError(EngineLostError):
    """The device that the engine runs on is gone. The process must end; another one goes on."""

    code: ClassVar[str] = "device_lost"


class DecodersLostError(EngineLostError):
    """No decoder process starts on this machine any more. The process must end; another one goes on."""

    code: ClassVar[str] = "decoders_lost"
