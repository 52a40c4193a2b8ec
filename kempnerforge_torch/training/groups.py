"""Groups of parameters, as optimisers of PyTorch hold them. This file has no twin: in JAX they hold none."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

Group = dict[str, Any]
"""Parameters under "params", and the settings that are theirs."""


Held = tuple[Float[Tensor, "..."], Float[Tensor, "..."], dict[str, Float[Tensor, "..."]]]
"""A parameter, its gradient, and what an optimiser keeps of it."""


def with_gradients(optimizer: torch.optim.Optimizer, group: Group) -> list[Held]:
    """Each parameter of a group that has a gradient; in its state the step of now is counted."""
    parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
    held = [(parameter, parameter.grad, optimizer.state[parameter]) for parameter in parameters]
    if held:
        torch._foreach_add_([state["step"] for _, _, state in held], 1)  # pyright: ignore[reportPrivateImportUsage]
    return held
