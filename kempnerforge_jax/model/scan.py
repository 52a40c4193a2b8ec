"""Layers of one structure, stacked along a leading axis and run by `jax.lax.scan`: compile time that does not grow with
depth.

A stacked model is a `Transformer` whose ``layers`` hold one block per `Stack`, by its name. Layers that alternate
(dense, experts, dense, ...) make as many stacks as the period is long, which run one after the other within one step of
the scan. This file has no twin: torch compiles block by block, and has no use for scans.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any, Protocol, TypeVar

import jax
from flax import nnx
from jax.extend.core import ClosedJaxpr, Primitive
from jaxtyping import Array, Float

from kempnerforge_jax.model.attention import SCORES
from kempnerforge_jax.model.module import Module, Numbered
from kempnerforge_jax.model.stack import Stack
from kempnerforge_jax.model.stats import LayerStats

PREPARED = "prepared"
"""The `checkpoint_name` of arrays that functions with a custom gradient make while `preparing`: not kept for the
backward pass, which recomputes them.
"""
QUICK = frozenset(
    [
        *("abs", "add", "add_any", "and", "ceil", "clamp", "convert_element_type", "copy", "cos", "div", "eq", "erf"),
        *("exp", "exp2", "expm1", "floor", "ge", "gt", "integer_pow", "is_finite", "le", "log", "log1p", "logistic"),
        *("lt", "max", "min", "mul", "ne", "neg", "not", "or", "pow", "reduce_precision", "rem", "round", "rsqrt"),
        *("select_n", "sign", "sin", "sqrt", "square", "stop_gradient", "sub", "tanh", "xor"),
        *("broadcast_in_dim", "concatenate", "dynamic_slice", "expand_dims", "iota", "pad", "reshape", "rev", "slice"),
        *("split", "squeeze", "transpose"),
    ]
)
"""Operations on elements, and those that move them. A scan does them again in the backward pass, where XLA fuses them
with what reads them. Kept, their results would go to the stack of all layers and back, often in float32: of a dense
block in bfloat16 7 D + 3 F numbers of 4 bytes and 3 F of 2 for each token (D model dim, F of gate and up).
"""

log = logging.getLogger(__name__)
_preparation: ContextVar[Callable[[Module], Module] | None] = ContextVar("_preparation", default=None)


class _Breaking(Protocol):
    def breaks_after(self, layer_idx: int) -> bool: ...


class Layered(Protocol):
    """A model of layers by number, or by stack."""

    layers: Numbered

    @property
    def architecture(self) -> _Breaking:
        """Says where a stack must end."""
        ...


_Model = TypeVar("_Model", bound=Layered)


@contextlib.contextmanager
def preparing(prepare: Callable[[Module], Module]) -> Iterator[None]:
    """Within it, each layer runs as the block that ``prepare(block)`` returns, called right before."""
    token = _preparation.set(prepare)
    try:
        yield
    finally:
        _preparation.reset(token)


def _is_kept(primitive: Primitive, *_: object, **parameters: object) -> bool:
    """A policy of `jax.checkpoint` that keeps what takes long to compute: not what is `QUICK`, nor scores of attention,
    which are many, nor the results of functions that name them `PREPARED`.
    """
    function = parameters.get("call_jaxpr")  # of an operation with a gradient of its own
    within = function.eqns if isinstance(function, ClosedJaxpr) else []
    return primitive.name not in QUICK and not any(each.params.get("name") in (PREPARED, SCORES) for each in within)


def prepares() -> bool:
    """Whether blocks are `preparing`."""
    return _preparation.get() is not None


def layer_stacks(model: Layered) -> list[Stack]:
    """The layers of a model in stacks as long as possible, in order of the first layer of each."""
    layers = [int(name) for name in model.layers]
    kinds = {layer: _structure(model.layers[str(layer)]) for layer in layers}
    stacks: list[Stack] = []
    segment: list[int] = []
    for layer in layers:
        segment.append(layer)
        if model.architecture.breaks_after(layer) or layer + 1 not in kinds:
            stacks += _periodic(segment, [kinds[layer] for layer in segment])
            segment = []
    return stacks


def stacked(model: _Model) -> _Model:
    """A copy of the model with its layers stacked; arrays of other modules are shared.

    A warning is logged where none can be stacked.
    """
    stacks = layer_stacks(model)
    if len(stacks) == len(model.layers) > 1:
        log.warning(
            "scan_layers = True changes nothing: of %d layers no two can share a scan (they differ, or something "
            "happens between any two)",
            len(stacks),
        )
    copy = nnx.merge(*nnx.split(model))
    copy.layers = Numbered({stack.name: _block(stack, model) for stack in stacks})
    return copy


def periods(layers: nnx.Dict[Module]) -> Iterator[tuple[list[Stack], list[Module]]]:
    """What runs together: the stacks of one period with their blocks, or a single layer."""
    entries = [(Stack.named(name), block) for name, block in layers.items()]
    while entries:
        first = entries[0][0]
        period = first.layers.step if first.is_stacked else 1
        together, entries = entries[:period], entries[period:]
        yield [stack for stack, _ in together], [block for _, block in together]


def run_blocks(
    blocks: Sequence[Module],
    x: Float[Array, "B S D"],
    inputs: Sequence[dict[str, object]],
    remat: bool | Callable[..., bool],
    scan: bool,
) -> tuple[Float[Array, "B S D"], list[LayerStats | None]]:
    """Apply blocks one after the other; if ``scan``, once for each place of their leading axis.

    Args:
        inputs: of each block.
        remat: True, or a policy of `jax.checkpoint`: activations inside a step are recomputed in the backward pass. If
            False, a scan still recomputes what is quick; see `QUICK`.

    Returns:
        x, and the stats of each block (with a leading axis if ``scan``).
    """
    graphs, states = zip(*(nnx.split(block) for block in blocks), strict=True)

    prepare = _preparation.get()

    def step(x: jax.Array, states: tuple[nnx.State, ...]) -> tuple[jax.Array, list[LayerStats | None]]:
        stats = []
        for graph, state, own in zip(graphs, states, inputs, strict=True):
            block = nnx.merge(graph, state)
            output = (block if prepare is None else prepare(block))(x, return_stats=True, **own)
            x = output.x
            stats.append(output.stats)
        return x, stats

    if not remat and (scan or prepare is not None):
        remat = _is_kept
    if remat:
        step = jax.checkpoint(step, policy=None if remat is True else remat, prevent_cse=not scan)
    return jax.lax.scan(step, x, states) if scan else step(x, states)


def _periodic(layers: list[int], kinds: list[Any]) -> list[Stack]:
    """Stacks of consecutive layers: at each place the period whose repetitions reach furthest, the smallest of equals;
    a layer that starts none stays single.
    """
    if not layers:
        return []
    reach, period = max(((_repeated(kinds, p), -p) for p in range(1, len(layers) // 2 + 1)), default=(0, 0))
    first, end, period = layers[0], layers[0] + (reach or 1), -period if reach else 1
    stacks = [Stack(range(first + offset, end, period)) for offset in range(period)]
    return stacks + _periodic(layers[end - first :], kinds[end - first :])


def _repeated(kinds: list[Any], period: int) -> int:
    """How many layers from the first one on are whole repetitions of the first ``period``, of which there are two."""
    same = next((i for i in range(len(kinds) - period) if kinds[i] != kinds[i + period]), len(kinds) - period)
    whole = (same + period) // period * period
    return whole if whole > period else 0


def _structure(block: Any) -> Any:
    """What must be equal for blocks to share a stack: the graph, and shapes and dtypes of the arrays."""
    graph, state = nnx.split(block)
    return graph, [(path, array.shape, array.dtype) for path, array in jax.tree_util.tree_leaves_with_path(state)]


def _block(stack: Stack, model: Layered) -> Module:
    """The block of a stack, from those of a model with separate layers."""
    blocks = [model.layers[str(layer)] for layer in stack.layers]
    if not stack.is_stacked:
        return blocks[0]
    graph, _ = nnx.split(blocks[0])
    return nnx.merge(graph, stack.put([nnx.to_pure_dict(nnx.split(block)[1]) for block in blocks]))
