"""
Ctrl-C: the first lets what is under way come to its end, the second leaves at once.

Later ones end the process on the spot, whatever it waits for.
"""

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Self

from cli.errors import ExitCode


class Interrupts:
    """
    What Ctrl-C does while this is entered.

    Attributes:
        can_drain: whether anything is under way. While nothing is, the first Ctrl-C leaves too.
        is_asked: Ctrl-C was pressed: nothing new is to be begun.
    """

    def __init__(self) -> None:
        self.can_drain = False
        self.is_asked = False
        self._is_leaving = False

    def __enter__(self) -> Self:
        self._before = signal.getsignal(signal.SIGINT)
        # Only the main thread may set it; and a job in the background was told to ignore it.
        self._is_ours = (
            threading.current_thread() is threading.main_thread()
            and self._before is not signal.SIG_IGN
        )
        if self._is_ours:
            signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # Whoever was interrupted is on the way out: it may still write, but not be asked again.
        if self._is_ours and not self._is_leaving:
            signal.signal(signal.SIGINT, self._before)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._is_leaving:
            os._exit(ExitCode.INTERRUPTED)
        if self.is_asked or not self.can_drain:
            self._is_leaving = self.is_asked = True
            raise KeyboardInterrupt
        self.is_asked = True
