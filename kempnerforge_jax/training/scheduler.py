"""The rates over time: numbers of `shared_config`, the same for both backends."""

from __future__ import annotations

import functools
from collections.abc import Callable

from shared_config.contract.schedule import Rates, scheduled_learning_rate, scheduled_rates
from shared_config.schema.job import JobConfig


def build_schedule(config: JobConfig) -> Callable[[int], float]:
    """Learning rate of the update number ``step``, counted from 0."""
    return functools.partial(scheduled_learning_rate, config)


def build_rates(config: JobConfig) -> Callable[[int], Rates]:
    """All rates of the update number ``step``, counted from 0."""
    return functools.partial(scheduled_rates, config)
