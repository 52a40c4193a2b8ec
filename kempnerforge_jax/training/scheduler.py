"""The learning rate over time: numbers of `shared_config`, the same for both backends."""

from __future__ import annotations

import functools
from collections.abc import Callable

from shared_config.contract.schedule import scheduled_learning_rate
from shared_config.schema.job import JobConfig


def build_schedule(config: JobConfig) -> Callable[[int], float]:
    """Learning rate of the update number ``step``, counted from 0."""
    return functools.partial(scheduled_learning_rate, config)
