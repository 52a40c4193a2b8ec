"""What the model of a trainer writes in the middle of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from kempnerforge_torch.model.generate import generate
from kempnerforge_torch.model.transformer import Transformer
from kempnerforge_torch.model.vlm import VLMWrapper
from kempnerforge_torch.training.averaging import evaluated_weights
from kempnerforge_torch.training.mixed_precision import matmul_precision
from shared_config.schema.job import JobConfig


class Writer(Protocol):
    """What of a trainer writes."""

    @property
    def config(self) -> JobConfig:
        """Of the run."""
        ...

    @property
    def model(self) -> Transformer | VLMWrapper:
        """With the masters."""
        ...

    @property
    def parameters(self) -> Mapping[str, Float[Tensor, "..."]]:
        """The masters, by name."""
        ...

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """That of the masters."""
        ...


def continued(trainer: Writer, prompt: Sequence[int], uniforms: np.ndarray) -> list[int]:
    """The tokens that continue a prompt, one for each of the uniform numbers (1, N) that decide them. The weights are
    those that an evaluation has.
    """
    average = evaluated_weights(trainer.config, trainer.parameters, trainer.optimizer)
    with matmul_precision(trainer.config.train.matmul_precision), average:
        tokens_BL = generate(trainer.model, [list(prompt)], uniforms.shape[1], uniforms=uniforms)
    return tokens_BL[0, len(prompt) :].tolist()
