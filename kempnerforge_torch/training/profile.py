"""A trace of training steps, by torch's profiler."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import torch


@contextmanager
def profile(folder: Path, wait: Callable[[], object]) -> Iterator[None]:
    """Trace the host and the device within the context, into a new file of the folder, ``*.pt.trace.json.gz``, for
    Perfetto and for TensorBoard's plugin for PyTorch.

    Args:
        wait: returns once the device has finished its work.
    """
    wait()
    with torch.profiler.profile(
        on_trace_ready=torch.profiler.tensorboard_trace_handler(str(folder), use_gzip=True), acc_events=True
    ):
        yield
        wait()


def step_span(step: int) -> AbstractContextManager[object]:
    """Mark the context as a training step, for TensorBoard's plugin."""
    return torch.profiler.record_function(f"ProfilerStep#{step}")
