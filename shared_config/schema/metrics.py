"""What is logged and profiled."""

from __future__ import annotations

from collections.abc import Iterator

from shared_config.schema.base import Count, PositiveInt, Section, section


@section
class MetricsConfig(Section):
    """Each ``log_interval``-th step is written to metrics.jsonl in the run's folder, and to the optional loggers."""

    log_interval: PositiveInt = 1
    tensorboard: bool = False
    wandb_project: str = ""


@section
class ProfilingConfig(Section):
    """Steps ``start_step`` to ``end_step`` (exclusive, counted from 0) are traced by the backend's profiler; none if
    they are equal.

    dir: folder of the traces, within that of the run (``checkpoint.dir``).
    """

    start_step: Count = 0
    end_step: Count = 0
    dir: str = "profile"

    def problems(self) -> Iterator[str]:
        if self.end_step < self.start_step:
            yield f"end_step = {self.end_step}: must be at least start_step = {self.start_step}"
