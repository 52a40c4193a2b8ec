"""What the model of a trainer writes in the middle of a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from kempnerforge_jax.model.generate import generate
from kempnerforge_jax.model.state import State, merge
from kempnerforge_jax.training.averaging import evaluated_weights
from kempnerforge_jax.training.mixed_precision import matmul_precision
from kempnerforge_jax.training.objective import Recipe
from kempnerforge_jax.training.optimizer import OptimizerState
from shared_config.schema.job import JobConfig


class Writer(Protocol):
    """What of a trainer writes."""

    @property
    def config(self) -> JobConfig:
        """Of the run."""
        ...

    @property
    def recipe(self) -> Recipe:
        """What is static in a step."""
        ...

    @property
    def parameters(self) -> State:
        """The masters, by name."""
        ...

    @property
    def buffers(self) -> State:
        """All other arrays of the model."""
        ...

    @property
    def optimizer_state(self) -> OptimizerState:
        """What the optimiser keeps."""
        ...


def continued(trainer: Writer, prompt: Sequence[int], uniforms: np.ndarray) -> list[int]:
    """The tokens that continue a prompt, one for each of the uniform numbers (1, N) that decide them. The weights are
    those that an evaluation has.
    """
    weights = evaluated_weights(trainer.config, trainer.parameters, trainer.optimizer_state)
    with matmul_precision(trainer.config.train.matmul_precision):
        model = merge(trainer.recipe.graphdef, weights, trainer.buffers)
        tokens_BL = generate(model, [list(prompt)], uniforms.shape[1], uniforms=uniforms)
    return tokens_BL[0, len(prompt) :].tolist()
