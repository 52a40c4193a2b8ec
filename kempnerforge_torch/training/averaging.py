"""The average of the weights, in place of the weights, for an evaluation."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from kempnerforge_torch.distributed.ranks import local
from kempnerforge_torch.training.optimizer import get_optimizer_state
from shared_config.contract.averaging import averaged, evaluated_average
from shared_config.schema.job import JobConfig


@contextlib.contextmanager
def evaluated_weights(
    config: JobConfig, parameters: Mapping[str, Float[Tensor, "..."]], optimizer: torch.optim.Optimizer
) -> Iterator[None]:
    """Within it the parameters are their averages, where the job evaluates these."""
    average = evaluated_average(config)
    if average is None:
        yield
        return
    own = {name: local(parameter.detach()) for name, parameter in parameters.items()}
    moments = {name: local(moment) for name, moment in get_optimizer_state(optimizer, parameters).items()}
    saved = {name: value.clone() for name, value in own.items()}
    for name, value in averaged(average, own, moments).items():
        own[name].copy_(value)
    try:
        yield
    finally:
        for name, value in saved.items():
            own[name].copy_(value)
