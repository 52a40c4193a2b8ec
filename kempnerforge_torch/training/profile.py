"""A trace of training steps, by torch's profiler."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import torch


@contextmanager
def profile(folder: Path, wait: Callable[[], object]) -> Iterator[None]:
    """Trace what the host and the device do meanwhile, into a new file of the folder, ``*.pt.trace.json.gz``, for
    Perfetto and for TensorBoard's plugin for PyTorch.

    Args:
        wait: returns once the device has done what it was asked to do.
    """
    wait()
    with torch.profiler.profile(
        on_trace_ready=torch.profiler.tensorboard_trace_handler(str(folder), use_gzip=True), acc_events=True
    ):
        yield
        wait()


def step_span(step: int) -> AbstractContextManager[object]:
    """Mark what runs meanwhile as a training step, as TensorBoard's plugin looks for it."""
    return torch.profiler.record_function(f"ProfilerStep#{step}")
