"""What is logged and profiled."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

from pydantic import Field

from shared_config.schema.base import Count, PositiveInt, Section, section

MOST_TFLOPS = 1e6
"""A number above it is meant in FLOP/s."""


@section
class MetricsConfig(Section):
    """Each ``log_interval``-th step is written to metrics.jsonl in the run's folder, and to the optional loggers.

    peak_tflops: what one device does at most in dense matrix products of bfloat16, in TFLOP/s, of which ``mfu`` is a
    share; None takes it from the data sheet of a device that is known.
    """

    log_interval: PositiveInt = 1
    tensorboard: bool = False
    wandb_project: str = ""
    peak_tflops: Annotated[float, Field(gt=0, le=MOST_TFLOPS, allow_inf_nan=False)] | None = None


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
