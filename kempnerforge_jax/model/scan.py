"""Layers of one structure, stacked along a leading axis and run by `jax.lax.scan`: compile time that depth can't raise.

A stacked model is a `Transformer` whose ``layers`` hold one block for several layers, under names that say which:
"0-31" for layers 0 to 31, "1-31:2" for every second one of them. Layers that alternate (dense, experts, dense, ...)
make as many stacks as the period is long, which run in turn within one step of the scan. This file has no twin: torch
compiles block by block, and has no use for stacks.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from kempnerforge_jax.model.module import Numbered

log = logging.getLogger(__name__)


def layer_name(group: range) -> str:
    """The name of a group of layers: "3", "0-31", "1-31:2"."""
    if len(group) == 1:
        return str(group[0])
    return f"{group[0]}-{group[-1]}" + (f":{group.step}" if group.step > 1 else "")


def layer_range(name: str) -> range:
    """The layers that a name stands for."""
    bounds, _, step = name.partition(":")
    first, _, last = bounds.partition("-")
    return range(int(first), int(last or first) + 1, int(step or 1))


def layer_groups(model: Any) -> list[range]:
    """The layers of a model in stacks as long as possible, in order of the first layer of each."""
    layers = [layer_range(name)[0] for name in model.layers]
    kinds = {layer: _structure(model.layers[str(layer)]) for layer in layers}
    groups: list[range] = []
    segment: list[int] = []
    for layer in layers:
        segment.append(layer)
        if model.architecture.breaks_after(layer) or layer + 1 not in kinds:
            groups += _periodic(segment, [kinds[layer] for layer in segment])
            segment = []
    return groups


def stacked(model: Any) -> Any:
    """A copy of the model with its layers stacked; arrays of other modules are shared.

    A warning is logged where none can be stacked.
    """
    groups = layer_groups(model)
    if len(groups) == len(model.layers) > 1:
        log.warning(
            "scan_layers = True changes nothing: of %d layers no two can share a scan (they differ, or something "
            "happens between any two)",
            len(groups),
        )
    copy = nnx.merge(*nnx.split(model))
    copy.layers = Numbered(
        {layer_name(group): _stack([model.layers[str(layer)] for layer in group]) for group in groups}
    )
    return copy


def stack_arrays(arrays: Sequence[Any]) -> Any:
    """Arrays along a new first axis; of abstract arrays an abstract one."""
    if isinstance(arrays[0], jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct((len(arrays), *arrays[0].shape), arrays[0].dtype)
    return jnp.stack(arrays)


def stacks(layers: nnx.Dict[Any]) -> Iterator[tuple[list[range], list[Any]]]:
    """What runs together: the stacks of one period, or a single layer."""
    entries = [(layer_range(name), block) for name, block in layers.items()]
    while entries:
        first = entries[0][0]
        period = first.step if len(first) > 1 else 1
        together, entries = entries[:period], entries[period:]
        yield [group for group, _ in together], [block for _, block in together]


def run_blocks(blocks: Sequence[Any], x: jax.Array, inputs: dict[str, Any], remat: Any, scan: bool) -> Any:
    """Apply blocks one after the other; if ``scan``, once for each place of their leading axis.

    Args:
        remat: True, or a policy of `jax.checkpoint`: activations inside a step are computed again in the backward pass.

    Returns:
        x, and the stats of each block (with a leading axis if ``scan``).
    """
    graphs, states = zip(*(nnx.split(block) for block in blocks), strict=True)

    def step(x: jax.Array, states: Any) -> tuple[jax.Array, list[Any]]:
        stats = []
        for graph, state in zip(graphs, states, strict=True):
            output = nnx.merge(graph, state)(x, return_stats=True, **inputs)
            x = output.x
            stats.append(output.stats)
        return x, stats

    if remat:
        step = jax.checkpoint(step, policy=None if remat is True else remat, prevent_cse=not scan)
    return jax.lax.scan(step, x, states) if scan else step(x, states)


def _periodic(layers: list[int], kinds: list[Any]) -> list[range]:
    """Groups of consecutive layers: at each place the period whose repetitions reach furthest, the smallest of equals;
    a layer that starts none stays single.
    """
    if not layers:
        return []
    reach, period = max(((_repeated(kinds, p), -p) for p in range(1, len(layers) // 2 + 1)), default=(0, 0))
    first, end, period = layers[0], layers[0] + (reach or 1), -period if reach else 1
    groups = [range(first + place, end, period) for place in range(period)]
    return groups + _periodic(layers[end - first :], kinds[end - first :])


def _repeated(kinds: list[Any], period: int) -> int:
    """How many layers from the first one on are whole repetitions of the first ``period``, of which there are two."""
    same = next((i for i in range(len(kinds) - period) if kinds[i] != kinds[i + period]), len(kinds) - period)
    whole = (same + period) // period * period
    return whole if whole > period else 0


def _structure(block: Any) -> Any:
    """What must be equal for blocks to share a stack: the graph, and shapes and dtypes of the arrays."""
    graph, state = nnx.split(block)
    return graph, [(path, array.shape, array.dtype) for path, array in jax.tree_util.tree_leaves_with_path(state)]


def _stack(blocks: Sequence[Any]) -> Any:
    if len(blocks) == 1:
        return blocks[0]
    graph, _ = nnx.split(blocks[0])
    states = [nnx.to_pure_dict(nnx.split(block)[1]) for block in blocks]
    return nnx.merge(graph, jax.tree.map(lambda *arrays: stack_arrays(arrays), *states))
