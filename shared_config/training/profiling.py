"""Which steps of a run are traced, and where the trace goes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

from shared_config.interchange.files import file_errors
from shared_config.interchange.outputs import writable_folder
from shared_config.schema.job import JobConfig

Trace = Callable[[Path], AbstractContextManager[None]]


class Profiler:
    """Starts and ends the trace of the steps that ``[profiling]`` asks for; within, `before` is called ahead of each
    step.

    Attributes:
        steps: those that are traced, counted from 0.
    """

    def __init__(self, config: JobConfig, first_step: int, trace: Trace, say: Callable[[str], None]):
        """
        Args:
            first_step: of this run, which may continue from a checkpoint.
            trace: the backend's profiler, which writes to a folder what happens within it.

        Raises:
            UserError: the folder can't be written.
        """
        self.asked = range(config.profiling.start_step, config.profiling.end_step)
        self.steps = range(max(self.asked.start, first_step), min(self.asked.stop, config.train.max_steps))
        self.folder = Path(config.checkpoint.dir) / config.profiling.dir
        self.trace, self.say = trace, say
        self.running: ExitStack | None = None
        if self.steps:
            writable_folder(self.folder)

    def __enter__(self) -> Self:
        if self.asked and not self.steps:
            last = self.asked.stop - 1
            self.say(f"note: profiling.start_step = {self.asked.start}: no step up to {last} is left to be profiled")
        return self

    def before(self, step: int) -> None:
        """Start the trace before the first traced step, end it after the last."""
        if self.running is not None and step not in self.steps:
            self._end()
        elif self.running is None and step in self.steps:
            self.running = ExitStack()
            self.running.enter_context(self.trace(self.folder))

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.running is not None:
            self._end()

    def _end(self) -> None:
        assert self.running is not None
        running, self.running = self.running, None
        with file_errors(self.folder, "the profile can't be written"):
            running.close()
        self.say(f"profile {self.folder}")
