"""The average of the weights, in place of the weights, for an evaluation."""

from __future__ import annotations

from kempnerforge_jax.model.state import State
from kempnerforge_jax.training.optimizer import OptimizerState, arrays_by_kind
from shared_config.contract.averaging import averaged, evaluated_average
from shared_config.schema.job import JobConfig


def evaluated_weights(config: JobConfig, parameters: State, state: OptimizerState) -> State:
    """The parameters, or their averages, where the job evaluates these."""
    average = evaluated_average(config)
    if average is None:
        return parameters
    kept = arrays_by_kind(state).get(average.kind, {})
    return averaged(average, parameters, {f"{average.kind}.{name}": array for name, array in kept.items()})
