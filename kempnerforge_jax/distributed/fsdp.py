"""Fully sharded data parallelism: each device holds a part of every parameter, and gathers a block while it computes.
Each computes its own micro-batches, or its part of their sequences, within a map over the devices that see different
tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Num, Shaped

from kempnerforge_jax.distributed.mesh import Mesh
from kempnerforge_jax.distributed.sharding import Laid, of_batches, partitions
from kempnerforge_jax.model.module import Module, named_variables
from kempnerforge_jax.model.scan import PREPARED
from kempnerforge_jax.model.stack import in_first_layer
from kempnerforge_jax.model.state import State
from kempnerforge_jax.model.vlm import inner_transformer
from shared_config.contract.sharding import DATA_AXES, MESH_AXES, TOKEN_AXES
from shared_config.contract.specs import ParameterTable

_Sums = TypeVar("_Sums")


@dataclass(frozen=True)
class Part:
    """What a device holds of a parameter.

    Attributes:
        splits: axes of the array, counted from the last one (-1), each with the mesh axes that split it; not those of
            experts, which stay where they are.
        copies: mesh axes along which all hold the same.
        dtype: of the arithmetic.
    """

    splits: tuple[tuple[int, tuple[str, ...]], ...]
    copies: tuple[str, ...]
    dtype: np.dtype


@dataclass(frozen=True)
class Shards:
    """What the data ranks of a mesh hold of a model.

    Attributes:
        parts: by the name of a parameter.
        partitions: how arrays are split over the data ranks.
    """

    mesh: Mesh
    parts: tuple[tuple[str, Part], ...]
    partitions: tuple[tuple[str, P], ...]

    @property
    def ranks(self) -> int:
        """How many of them there are."""
        return self.mesh.layout.data_ranks

    @property
    def is_by_tokens_alone(self) -> bool:
        """Whether no other axis has more than one device. Then nothing is left to the compiler, which can't divide some
        kernels, as those of attention on GPUs, where it has a part of the axes.
        """
        return self.mesh.layout.devices == self.mesh.layout.size(*TOKEN_AXES)


def shards_of(
    mesh: Mesh | None, table: ParameterTable, parameters: Mapping[str, Laid], dtype: DTypeLike
) -> Shards | None:
    """What data ranks hold of the parameters, which are computed with in ``dtype``; None without a mesh."""
    if mesh is None:
        return None
    split = partitions(mesh, table, parameters, TOKEN_AXES)
    return Shards(mesh, tuple(parts_of(mesh, table, parameters, dtype).items()), tuple(split.items()))


def parts_of(mesh: Mesh, table: ParameterTable, arrays: Mapping[str, Laid], dtype: DTypeLike) -> dict[str, Part]:
    """What a data rank holds of each parameter; what the table wants in full precision keeps its dtype."""
    found = {}
    for name, partition in partitions(mesh, table, arrays, TOKEN_AXES).items():
        spec, rank = table[in_first_layer(name)], len(arrays[name].shape)
        axes = {axis - rank: (over,) if isinstance(over, str) else over for axis, over in enumerate(partition) if over}
        elsewhere = [axis for axis in axes if spec.axes[axis] == "experts"]
        splits = tuple((axis, over) for axis, over in axes.items() if axis not in elsewhere)
        used = {axis for over in axes.values() for axis in over}
        copies = tuple(axis for axis in _several(mesh, TOKEN_AXES) if axis not in used)
        found[name] = Part(splits, copies, jnp.dtype(arrays[name].dtype if spec.full_precision else dtype))
    return found


def mark_blocks(model: nnx.Module, mesh: Mesh | None, table: ParameterTable, dtype: DTypeLike) -> None:
    """Note at each block which part of it is held, for `whole_block`."""
    if mesh is None:
        return
    parameters = {n: v.get_value() for n, v in named_variables(model) if isinstance(v, nnx.Param)}
    parts = parts_of(mesh, table, parameters, dtype)
    blocks = {id(variable) for _, variable in named_variables(inner_transformer(model).layers)}
    for name, variable in named_variables(model):
        if name in parts and id(variable) in blocks:
            variable.set_metadata(part=parts[name])


def whole_block(block: Module) -> Module:
    """A copy of a block that is held in parts, whole."""
    copy = nnx.merge(*nnx.split(block))
    for _, variable in named_variables(copy):
        if (part := _marked(variable)) is not None:
            variable.set_value(whole(part, variable.get_value()))
    return copy


def gather_outside_blocks(model: nnx.Module, parts: Mapping[str, Part]) -> None:
    """Put whole parameters in place of the parts, but for the blocks."""
    for name, variable in named_variables(model):
        if name in parts and _marked(variable) is None:
            variable.set_value(whole(parts[name], variable.get_value()))


def _marked(variable: nnx.Variable[jax.Array]) -> Part | None:
    return variable.get_metadata().get("part")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def whole(part: Part, array: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
    """A parameter from the parts of all data ranks, in the dtype of the arithmetic. Backward the gradients of all ranks
    are summed, in at least float32.
    """
    array = array.astype(part.dtype)
    for axis, over in part.splits:
        array = lax.all_gather(array, over, axis=axis % array.ndim, tiled=True)
    return checkpoint_name(array, PREPARED)


def _whole_forward(part: Part, array: jax.Array) -> tuple[jax.Array, jax.Array]:
    return whole(part, array), jnp.zeros((), array.dtype)


def _whole_backward(part: Part, like: jax.Array, gradient: jax.Array) -> tuple[jax.Array]:
    gradient = gradient.astype(jnp.promote_types(gradient.dtype, jnp.float32))
    for axis, over in part.splits:
        gradient = lax.psum_scatter(gradient, over, scatter_dimension=axis % gradient.ndim, tiled=True)
    return (lax.psum(gradient, part.copies).astype(like.dtype),)


def over_ranks(
    function: Callable[[State, State, State, Num[Array, ""]], tuple[State, _Sums]],
    shards: Shards,
    given: Collection[str],
) -> Callable[[State, State, State, Num[Array, ""]], tuple[State, _Sums]]:
    """``function(parameters, buffers, batches, count) -> (arrays by name, sums)`` of one data rank, for all of them.

    A rank gets its parts of the parameters, and of batches (N, R, B, ...) its own (N, B, ...), of which "cp" has cut
    the sequences. What it returns under a parameter's name is its part of the result; sums, the same along "cp", are
    added up over ranks. What the other axes of the mesh do is for the compiler to decide.

    Args:
        given: names of the arrays that the function gives.
    """
    held = dict(shards.partitions)

    def own(parameters: State, buffers: State, batches: State, count: jax.Array) -> tuple[State, _Sums]:
        arrays, sums = function(parameters, buffers, {name: array[:, 0] for name, array in batches.items()}, count)
        return arrays, lax.psum(sums, _several(shards.mesh, DATA_AXES))

    if not _several(shards.mesh, TOKEN_AXES):
        return own
    return jax.shard_map(
        own,
        mesh=shards.mesh.axes,
        in_specs=(held, P(), of_batches(shards.mesh), P()),
        out_specs=({name: held[name] for name in given}, P()),
        axis_names=set(MESH_AXES if shards.is_by_tokens_alone else TOKEN_AXES),
        check_vma=False,
    )


def _several(mesh: Mesh, axes: Collection[str]) -> tuple[str, ...]:
    """The axes along which there are several devices: XLA can't sum along others where it divides the rest itself."""
    return tuple(axis for axis in axes if mesh.layout.size(axis) > 1)


whole.defvjp(_whole_forward, _whole_backward)
