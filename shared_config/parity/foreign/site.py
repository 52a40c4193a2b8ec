"""The module in which a recorded value was computed, by its name."""

from __future__ import annotations

import re

from shared_config.parity.foreign.containers import CALL, INPUT
from shared_config.parity.traces import COTANGENT, FORWARD, GRADIENT, ROUTES, ROUTING, UPDATED

WHOLE = "the function itself"


def site_of(name: str) -> str:
    """Path of the module that computes a tensor of a trace: of what a module was given, the one that calls it; of a
    parameter's gradient, the one that has the parameter. Outside of all modules it is the function itself.
    """
    group, _, path = name.partition("/")
    if group in (GRADIENT, UPDATED):
        return path.rpartition(".")[0] or WHOLE
    if group not in (FORWARD, COTANGENT, ROUTING):
        return WHOLE
    path = path.removesuffix(ROUTES)
    own, given = re.sub(rf"{CALL}\d+", "", path), INPUT in path
    own = own.partition(INPUT)[0]
    return (own.rpartition(".")[0] if given else own) or WHOLE
