"""The optimiser."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from shared_config.schema.base import NonNegativeFloat, Pair, PositiveFloat, Section, registered, section

Beta = Annotated[float, Field(ge=0, lt=1)]


@section
class OptimizerConfig(Section):
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101), or another that is registered. Weight decay acts on matrices,
    not on norms and biases.
    """

    name: Annotated[str, registered("optimizer")] = "adamw"
    lr: PositiveFloat = 3e-4
    weight_decay: NonNegativeFloat = 0.1
    betas: Pair[Beta] = (0.9, 0.95)
    eps: PositiveFloat = 1e-8
