"""Arrays that lie on devices of many processes: brought to the host of the first, or each process's own parts."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental.multihost_utils import process_allgather

from kempnerforge_jax.distributed.processes import is_main
from kempnerforge_jax.model.stack import Stack, unstack_layers
from kempnerforge_jax.model.state import State
from shared_config.interchange.parts import Part, Parts


def host_copies(arrays: State) -> dict[str, np.ndarray]:
    """Copies of all arrays on the first process, {} on others; all put each together. Stacked layers are given one by
    one.
    """
    found: dict[str, np.ndarray] = {}
    for name, array in arrays.items():
        whole = np.array(array if array.is_fully_addressable else process_allgather(array, tiled=True))
        if is_main():
            found[name] = whole
    return unstack_layers(found)


def own_parts(arrays: State) -> dict[str, Parts]:
    """Copies, on the host, of what this process is to write of each array: what its devices hold, unless one before
    them holds the same. Stacked layers are given one by one.
    """
    return dict(pair for name, array in arrays.items() for pair in _layers(name, _own_part(array)))


def _own_part(array: jax.Array) -> Parts:
    if array.is_fully_addressable:
        held = (Part((0,) * array.ndim, np.array(array)),)
    else:
        shards = [shard for shard in array.addressable_shards if shard.replica_id == 0]
        held = tuple(Part(_start(shard.index), np.array(shard.data)) for shard in shards)
    return Parts(array.shape, np.dtype(array.dtype), held)


def _start(box: tuple[slice, ...]) -> tuple[int, ...]:
    return tuple(side.start or 0 for side in box)


def _layers(name: str, parts: Parts) -> Iterator[tuple[str, Parts]]:
    stack = Stack.of(name)
    if stack is None or not stack.is_stacked:
        yield name, parts
        return
    for index, layer in enumerate(stack.layers):
        yield stack.parameter(layer, name), parts.layer(index)
