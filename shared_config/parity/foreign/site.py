"""The module in which a recorded value was computed: by its name, of gradients by who takes what they are of."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from shared_config.parity.foreign.containers import CALL, INPUT
from shared_config.parity.traces import COTANGENT, FORWARD, GRADIENT, ROUTES, ROUTING, UPDATED, TraceMeta, group_of

WHOLE = "the function itself"
READERS = "readers"
"""Key of `Recorded.readers` in `TraceMeta.extra`."""


def made_in(name: str, metas: Iterable[TraceMeta]) -> str:
    """Where a tensor of a trace was made, in words: a gradient where what it is of is taken.

    Args:
        metas: of traces, one of which may know who takes it.
    """
    for meta in metas:
        known = meta.extra.get(READERS)
        takers = known.get(name) if isinstance(known, Mapping) else None
        if takers:
            return " or ".join(dict.fromkeys(site_of(f"{FORWARD}/{taker}") for taker in takers))
    return f"what takes {name.partition('/')[2]}" if group_of(name) == COTANGENT else site_of(name)


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


def renamed_readers(extra: Mapping[str, object], sources: Mapping[str, tuple[str, ...]]) -> dict[str, object]:
    """What a trace says of itself, with the new names of gradients and of those that take what these are of."""
    known = extra.get(READERS)
    if not isinstance(known, Mapping):
        return dict(extra)
    new = {name: one for one, names in sources.items() for name in names}
    moved = {
        one: [new.get(f"{FORWARD}/{taker}", f"/{taker}").partition("/")[2] for taker in known.get(names[0], ())]
        for one, names in sources.items()
    }
    return {**extra, READERS: {one: takers for one, takers in moved.items() if takers}}
