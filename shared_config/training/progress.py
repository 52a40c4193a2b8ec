"""What a person sees of a run: a bar on a terminal, plain lines elsewhere, nothing on ranks without a console.

Where printing fails (a closed pipe, a full disk) this is logged once, and the run continues silently.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from shared_config.training import streams
from shared_config.training.speed import Speed

PEAK_MEMORY = "peak_memory_bytes"
"""What the most that a device has held is called in records."""
SECONDS_BETWEEN_LINES = 10.0
STEPS_AVERAGED = 20

log = logging.getLogger(__name__)


class Pace:
    """Speed over the last steps.

    Attributes:
        seconds: what the last step took.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._steps = 0
        self._recent: deque[float] = deque(maxlen=STEPS_AVERAGED)

    def step(self, seconds: float) -> None:
        """A step has ended. The first of a process, which may hold a compilation, does not count in the average."""
        self.seconds = seconds
        self._steps += 1
        if self._steps > 1:
            self._recent.append(seconds)

    @property
    def seconds_per_step(self) -> float:
        """The average; that of the first step as long as there is no other."""
        return sum(self._recent) / len(self._recent) if self._recent else self.seconds


class Display:
    """Shows a run's progress. Use as a context manager.

    Args:
        console: where to; None shows nothing.
        total: steps of the whole run.
        speed: of its steps.
    """

    def __init__(self, console: Console | None, *, total: int, done: int, speed: Speed):
        self.pace = Pace()
        self._console = console
        self._total, self._speed = total, speed
        self._last_line = -SECONDS_BETWEEN_LINES
        self._bar: Progress | None = None
        if console is not None and console.is_terminal:
            columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[status]}"))
            self._bar = Progress(*columns, console=console)
            self._task = self._bar.add_task("training", total=total, completed=done, status="")

    def __enter__(self) -> Self:
        if self._bar is not None:
            bar, self._bar = self._bar, None
            with outlived(self._console):
                bar.start()
                self._bar = bar
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            with outlived(self._console):
                self._bar.stop()

    def say(self, message: str) -> None:
        """A line that stays."""
        say(self._console, message)

    def show(self, step: int, record: Mapping[str, float | None], important: bool = False) -> None:
        """The state after ``step``: the bar moves; without a bar there is a line now and then, and if ``important``."""
        if self._bar is not None:
            with outlived(self._console):
                self._bar.update(self._task, completed=step, status=self._status(step, record))
            return
        now = time.monotonic()
        if self._console is not None and (important or now - self._last_line >= SECONDS_BETWEEN_LINES):
            self._last_line = now
            self.say(f"step {step}/{self._total}  {self._status(step, record)}")

    def _status(self, step: int, record: Mapping[str, float | None]) -> str:
        parts = [f"{name} {value:.4f}" for name, value in record.items() if name.endswith("loss") and value is not None]
        seconds = self.pace.seconds_per_step
        if seconds > 0:
            average = self._speed.record(seconds, step)
            parts.append(f"{average['tokens_per_second']:,.0f} tokens/s")
            parts.extend(f"MFU {share:.1%}" for name, share in average.items() if name == "mfu")
        if (peak := record.get(PEAK_MEMORY)) is not None:
            parts.append(f"peak {peak / 2**30:.1f} GiB")
        if seconds > 0:
            parts.append(f"{format_duration((self._total - step) * seconds)} left")
        return "  ".join(parts)


def say(console: Console | None, message: str) -> None:
    """Print a line as it is."""
    if console is not None:
        with outlived(console):
            console.print(message, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def outlived(console: Console | None) -> Iterator[None]:
    """Context in which something is printed; if that fails the console is silent from then on."""
    try:
        yield
    except (OSError, SystemExit) as error:  # rich exits where a pipe is closed
        if console is None:
            return
        console.quiet = True
        streams.discard(console.file)
        reason = error.strerror if isinstance(error, OSError) else "Broken pipe"
        log.warning("what a run prints can't be written (%s); it goes on in silence", reason)


def format_duration(seconds: float) -> str:
    """Such as 0:05, 12:30 or 1:02:03."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
