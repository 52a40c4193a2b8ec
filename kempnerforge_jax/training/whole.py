"""Optimisers whose steps are more than a direction that decay and learning rate are applied to. This file has no twin:
an optimiser of PyTorch does all of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from jaxtyping import Array, Float

from shared_config.contract.schedule import Rates


class WholeUpdate(NamedTuple):
    """An optimiser of one array, as `optax.GradientTransformation`.

    Attributes:
        init: parameter -> state.
        update: (gradient, state, parameter, rates, whose decay is 0 for what does not decay) -> (new parameter, state).
    """

    init: Callable[[Float[Array, "..."]], Any]
    update: Callable[[Float[Array, "..."], Any, Float[Array, "..."], Rates], tuple[Float[Array, "..."], Any]]
