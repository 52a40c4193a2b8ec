"""A trace of training steps, by JAX's profiler."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import jax


@contextmanager
def profile(folder: Path, wait: Callable[[], object]) -> Iterator[None]:
    """Trace what the host and the device do meanwhile, into ``plugins/profile/TIME`` of the folder: ``*.xplane.pb`` for
    TensorBoard (XProf), ``*.trace.json.gz`` for Perfetto.

    Args:
        wait: returns once the device has done what it was asked to do.
    """
    wait()
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # calls of Python functions would crowd out operations
    with jax.profiler.trace(folder, profiler_options=options):
        yield
        wait()


def step_span(step: int) -> AbstractContextManager[object]:
    """Mark what runs meanwhile as a training step, as XProf looks for it."""
    return jax.profiler.StepTraceAnnotation("step", step_num=step)
