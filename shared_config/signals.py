"""Requests from outside to stop a run."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any, Self

SECONDS_BEFORE_SECOND_INTERRUPT = 1.0


class StopRequest:
    """Context in which SIGINT and SIGTERM are noted rather than obeyed; the handlers from before come back after it.

    A second SIGINT more than a second after the first raises KeyboardInterrupt. (Launchers pass an interrupt on that
    the terminal has sent already, so two at once are one.) Outside the main thread, where there are no handlers,
    nothing is noted.

    Attributes:
        signal: the number of the first signal, 0 before.
    """

    def __init__(self, announce: bool = True):
        self.signal = 0
        self._time = 0.0
        self._announce = announce
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.signal:
            self.signal, self._time = number, now
            if self._announce:
                os.write(2, b"\nstopping after this step; interrupt again to stop at once\n")
        elif number == signal.SIGINT and now - self._time > SECONDS_BEFORE_SECOND_INTERRUPT:
            raise KeyboardInterrupt
