"""Groups of parameters, as optimisers of PyTorch hold them. This file has no twin: in JAX they hold none."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

Group = dict[str, Any]
"""Parameters under "params", and the settings that are theirs."""


Held = tuple[Float[Tensor, "..."], Float[Tensor, "..."], dict[str, Float[Tensor, "..."]]]
"""A parameter, its gradient, and what an optimiser keeps of it."""


def with_gradients(optimizer: torch.optim.Optimizer, group: Group) -> Iterator[Held]:
    """Each parameter of a group that has a gradient; in its state the step of now is counted."""
    for parameter in group["params"]:
        if parameter.grad is not None:
            state = optimizer.state[parameter]
            state["step"] += 1
            yield parameter, parameter.grad, state
