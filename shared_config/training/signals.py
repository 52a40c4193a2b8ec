"""Requests from outside to stop: a run after its step, imports at once, any other work by KeyboardInterrupt."""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any, Self

INTERRUPTED = 130
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SECONDS_BEFORE_SECOND_INTERRUPT = 1.0


class Interrupts:
    """What SIGINT does to a process that is a command from its start to its end.

    It raises KeyboardInterrupt, again if a callback of the interpreter has swallowed it. It ends the process at once,
    cleaning nothing up, as long as nobody catches that, and within `ending_at_once`. Where SIGINT is ignored, or
    handled by others, it stays so.

    Attributes:
        came: whether there was one.
        at_once: the status with which it ends the process; None raises.
    """

    def __init__(self) -> None:
        self.came = False
        self.at_once: int | None = None
        self._next_hook = sys.unraisablehook

    def take(self) -> None:
        """Begin to handle them, at once until `caught`."""
        is_default = signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if is_default and threading.current_thread() is threading.main_thread():
            self.at_once = INTERRUPTED
            signal.signal(signal.SIGINT, self._handle)
            atexit.register(self._end)
            self._next_hook, sys.unraisablehook = sys.unraisablehook, self._raise_later

    def caught(self) -> None:
        """From here on KeyboardInterrupt is caught, and is raised."""
        self.at_once = None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.at_once is not None:
            os._exit(self.at_once)
        self.came = True
        raise KeyboardInterrupt

    def _end(self) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # what follows is not Python's any more
        if self.at_once == INTERRUPTED:
            os._exit(INTERRUPTED)  # after a KeyboardInterrupt within `exec` Python would end by the signal itself

    def _raise_later(self, unraisable: Any) -> None:
        if not issubclass(unraisable.exc_type, KeyboardInterrupt):
            self._next_hook(unraisable)
            return
        again = threading.Timer(0.01, os.kill, (os.getpid(), signal.SIGINT))
        again.daemon = True
        again.start()


INTERRUPTS = Interrupts()
"""Of this process."""


@contextlib.contextmanager
def ending_at_once(status: int = INTERRUPTED) -> Iterator[None]:
    """Context in which SIGINT ends a command's own process at once: for imports, as packages swallow or print a
    KeyboardInterrupt. Nothing that is to be cleaned up may be there.
    """
    before, INTERRUPTS.at_once = INTERRUPTS.at_once, status
    try:
        yield
    finally:
        INTERRUPTS.at_once = before


class StopRequest:
    """Context in which SIGINT, SIGTERM and SIGHUP are noted rather than obeyed; the handlers from before come back
    after it. SIGHUP stays ignored where it is (as by nohup).

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
            heard = [each for each in STOPPING if each != signal.SIGHUP or signal.getsignal(each) != signal.SIG_IGN]
            self._before = {number: signal.signal(number, self._note) for number in heard}
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
                with contextlib.suppress(OSError):  # the terminal may be gone
                    os.write(2, b"\nstopping after this step; interrupt again to stop at once\n")
        elif number == signal.SIGINT and now - self._time > SECONDS_BEFORE_SECOND_INTERRUPT:
            raise KeyboardInterrupt
