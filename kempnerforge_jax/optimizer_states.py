"""The state of an optimiser of optax, in names that do not depend on the framework."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from kempnerforge_jax.model.state import to_numpy
from kempnerforge_jax.program import path_name
from shared_config.parity.foreign.states import KINDS


def optimizer_state(state: object, parameters: object) -> dict[str, np.ndarray]:
    """What an optimiser keeps, copied to the host, as `shared_config.parity.foreign.states` names it.

    A whole number counts the updates of all parameters. A kind that occurs again, as that of a schedule, is numbered.

    Args:
        state: of optax; parts of it have the structure of the parameters.
        parameters: those that it was made for, a tree of arrays.
    """
    own = {path: leaf.shape for path, leaf in jax.tree_util.tree_flatten_with_path(parameters)[0]}
    found: dict[str, np.ndarray] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
        array = to_numpy(leaf)
        place = next((n for n in range(1, len(path)) if own.get(path[n:]) == array.shape), None)
        if place is not None:
            names, kind = [path_name(path[place:])], _kind(path[:place])
        elif array.shape == () and array.dtype.kind in "iu":
            names, kind = [path_name(other) for other in own], _kind(path)
        else:
            continue
        times = sum(f"{one}.{names[0]}" in found for one in (kind, *(f"{kind}@{n}" for n in range(1, len(path)))))
        found |= {f"{kind}@{times}.{name}" if times else f"{kind}.{name}": array for name in names}
    return found


def _kind(path: Sequence[Any]) -> str:
    own = path_name(path[-1:])
    return KINDS.get(own, own)
