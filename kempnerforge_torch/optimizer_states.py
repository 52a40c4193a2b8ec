"""The state of an optimiser of `torch.optim`, in names that do not depend on the framework."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from jaxtyping import Shaped
from torch import Tensor

from kempnerforge_torch.copies import copied
from shared_config.parity.foreign.states import KINDS


def optimizer_state(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, Shaped[Tensor, "..."]]
) -> dict[str, np.ndarray]:
    """What an optimiser keeps, copied to the host, as `shared_config.parity.foreign.states` names it.

    Args:
        parameters: those that it was made for, by name; one that it has not updated yet may have no state.
    """
    found: dict[str, np.ndarray] = {}
    for name, parameter in parameters.items():
        for kind, value in optimizer.state.get(parameter, {}).items():
            if value is not None:
                array = copied(value) if isinstance(value, Tensor) else np.asarray(value)
                found[f"{KINDS.get(kind, kind)}.{name}"] = array
    return found
