"""Groups of parameters, as optimisers of PyTorch hold them. This file has no twin: in JAX they hold none."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

Group = dict[str, Any]
"""Parameters under "params", and the settings that are theirs."""


State = dict[str, Tensor]


def with_gradients(optimizer: torch.optim.Optimizer, group: Group) -> Iterator[tuple[Tensor, Tensor, State]]:
    """Each parameter that has a gradient, its gradient, and its state, in which the step of now is counted."""
    for parameter in group["params"]:
        if parameter.grad is not None:
            state = optimizer.state[parameter]
            state["step"] += 1
            yield parameter, parameter.grad, state
