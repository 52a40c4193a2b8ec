"""The average of the weights, which an optimiser keeps as a moment: what is evaluated and exported in their place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar

from shared_config.contract.moments import AVERAGE
from shared_config.schema.job import JobConfig
from shared_config.schema.optimizer import OptimizerConfig

Kept = TypeVar("Kept")


class Average(NamedTuple):
    """A weight's average is the weight plus ``factor`` times its moment ``kind``."""

    kind: str
    factor: float


def average_of(optimizer: OptimizerConfig) -> Average | None:
    """The average that an optimiser keeps; None if it keeps none."""
    if optimizer.averages:
        b1 = optimizer.betas[0]
        return Average("d", -(1 - b1) / b1)
    return Average(AVERAGE, 1.0) if optimizer.ema_decay else None


def evaluated_average(config: JobConfig) -> Average | None:
    """The average that a job evaluates and exports in place of the weights; None if those themselves."""
    return average_of(config.optimizer) if config.optimizer.averages or config.eval.average else None


def averaged(average: Average, weights: Mapping[str, Kept], moments: Mapping[str, object]) -> dict[str, Kept]:
    """The weights, of any kind of array, with the average of those that have one.

    Args:
        moments: ``<kind>.<parameter>``.
    """
    apart: dict[str, Any] = {name: moments.get(f"{average.kind}.{name}") for name in weights}
    return {
        name: weight if apart[name] is None else weight + average.factor * apart[name]
        for name, weight in weights.items()
    }
