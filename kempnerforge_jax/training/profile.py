"""A trace of training steps, by JAX's profiler."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import jax


@contextmanager
def profile(folder: Path, wait: Callable[[], object]) -> Iterator[None]:
    """Trace the host and the device within the context, into ``plugins/profile/TIME`` of the folder: ``*.xplane.pb``
    for TensorBoard (XProf), ``*.trace.json.gz`` for Perfetto.

    Args:
        wait: returns once the device has finished its work.
    """
    wait()
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # calls of Python functions would crowd out operations
    with jax.profiler.trace(folder, profiler_options=options):
        yield
        wait()


def step_span(step: int) -> AbstractContextManager[object]:
    """Mark the context as a training step, for XProf."""
    return jax.profiler.StepTraceAnnotation("step", step_num=step)
