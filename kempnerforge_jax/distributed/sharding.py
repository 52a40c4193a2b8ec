"""How the arrays of a trainer lie on a mesh.

Shapes: N micro-batches of each data rank, R data ranks, B batch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import NamedSharding, Sharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Shaped

from kempnerforge_jax.distributed.devices import Device
from kempnerforge_jax.distributed.mesh import Mesh
from kempnerforge_jax.model.stack import Stack, in_first_layer
from kempnerforge_jax.model.state import State
from shared_config.contract.sharding import DATA_AXES, MESH_AXES, placement
from shared_config.contract.specs import ParameterTable

Laid = Shaped[Array, "..."] | jax.ShapeDtypeStruct
"""What has a place on a mesh: an array, or one that is not there yet."""

_OptimizerState = TypeVar("_OptimizerState")


def partitions(
    mesh: Mesh, table: ParameterTable, arrays: Mapping[str, Laid], axes: Collection[str] = MESH_AXES
) -> dict[str, P]:
    """How each array of a model is split by some of the mesh axes: what the table lists as `placement` says, the rest
    not at all.
    """
    return {name: _partition(mesh, table, name, tuple(array.shape), axes) for name, array in arrays.items()}


def place(mesh: Mesh | None, device: Device, table: ParameterTable, arrays: State) -> State:
    """The arrays, on their devices; those of several processes each take their parts of what every process has. Of
    abstract ones the places alone.
    """
    where = _places(mesh, device, table, arrays)
    return {name: _placed(array, where[name]) for name, array in arrays.items()}


def place_batches(mesh: Mesh, ranks: range, batches: Mapping[str, np.ndarray]) -> State:
    """Arrays (N, R, B, ...) of all ranks, each of them on the devices that compute it, from those (N, r, B, ...) of
    this process's ``ranks``.
    """
    return {name: _batches_of_all(mesh, ranks, array) for name, array in batches.items()}


def _batches_of_all(mesh: Mesh, ranks: range, array: np.ndarray) -> jax.Array:
    count = mesh.layout.data_ranks

    def own(box: tuple[slice, ...] | None) -> np.ndarray:
        assert box is not None
        start, stop, _ = box[1].indices(count)
        return array[box[0], start - ranks.start : stop - ranks.start, *box[2:]]

    shape = (array.shape[0], count, *array.shape[2:])
    return jax.make_array_from_callback(shape, NamedSharding(mesh.axes, of_batches(mesh)), own)


def of_batches(mesh: Mesh) -> P:
    """How arrays (N, R, B, ...) of batches are split; where "cp" has a part of every sequence, all are (N, R, B, S)."""
    return P(None, DATA_AXES) if mesh.layout.cp == 1 else P(None, DATA_AXES, None, "cp")


def initial_state(
    mesh: Mesh | None,
    device: Device,
    table: ParameterTable,
    init: Callable[[State], _OptimizerState],
    parameters: State,
) -> _OptimizerState:
    """The state that an optimiser of optax starts with, made where it lies: what has the shape of its parameter is
    split like it, counts are whole on each device.
    """
    if mesh is None:
        return jax.device_put(init(parameters), device)
    return jax.jit(init, out_shardings=_state_shardings(mesh, table, init, parameters))(parameters)


def abstract(mesh: Mesh, table: ParameterTable, arrays: Mapping[str, Laid]) -> dict[str, jax.ShapeDtypeStruct]:
    """What `place` would give, without its values."""
    return _sharded(dict(arrays), _shardings(mesh, partitions(mesh, table, arrays)))


def abstract_batches(
    mesh: Mesh, shapes: Mapping[str, tuple[tuple[int, ...], DTypeLike]]
) -> dict[str, jax.ShapeDtypeStruct]:
    """What `place_batches` would give for the micro-batches of all ranks: arrays of these shapes (N * R, B, ...) and
    dtypes.
    """
    ranks, where = mesh.layout.data_ranks, NamedSharding(mesh.axes, of_batches(mesh))
    return {
        name: jax.ShapeDtypeStruct((shape[0] // ranks, ranks, *shape[1:]), dtype, sharding=where)
        for name, (shape, dtype) in shapes.items()
    }


def abstract_initial_state(
    mesh: Mesh | None,
    device: Device,
    table: ParameterTable,
    init: Callable[[State], _OptimizerState],
    parameters: Mapping[str, Laid],
) -> _OptimizerState:
    """What `initial_state` would give, without its values."""
    shapes = jax.eval_shape(init, parameters)
    if mesh is None:
        return jax.tree.map(lambda leaf: _placed(leaf, SingleDeviceSharding(device)), shapes)
    return _sharded(shapes, _state_shardings(mesh, table, init, parameters))


def is_abstract(state: object) -> bool:
    """Whether arrays of a tree have no values yet."""
    return any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(state))


def keep_sharded(mesh: Mesh | None, table: ParameterTable, arrays: State) -> State:
    """Within jit: the arrays, which lie as those of the model of these names do."""
    if mesh is None:
        return arrays
    return jax.lax.with_sharding_constraint(arrays, _shardings(mesh, partitions(mesh, table, arrays)))


def _state_shardings(
    mesh: Mesh, table: ParameterTable, init: Callable[..., object], parameters: Mapping[str, Laid]
) -> Any:
    """Of the state of an optimiser: what is a parameter's as that is, counts whole on each device."""
    states: Any = jax.eval_shape(init, parameters)

    def own(name: str, leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        return NamedSharding(mesh.axes, _partition(mesh, table, name, leaf.shape, MESH_AXES))

    return {name: jax.tree.map(functools.partial(own, name), each) for name, each in states.items()}


def _sharded(shapes: Any, shardings: Any) -> Any:
    """Abstract arrays, on their devices."""
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), shapes, shardings
    )


def _places(
    mesh: Mesh | None, device: Device, table: ParameterTable, arrays: Mapping[str, Laid]
) -> Mapping[str, Sharding]:
    if mesh is None:
        return dict.fromkeys(arrays, SingleDeviceSharding(device))
    return _shardings(mesh, partitions(mesh, table, arrays))


def _placed(array: Any, where: Sharding) -> Any:
    if isinstance(array, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=where)
    if isinstance(where, SingleDeviceSharding):
        return jax.device_put(array, where)
    values = np.asarray(array)
    return jax.make_array_from_callback(values.shape, where, lambda box: values[box])


def _shardings(mesh: Mesh, parts: Mapping[str, P]) -> dict[str, NamedSharding]:
    return {name: NamedSharding(mesh.axes, part) for name, part in parts.items()}


def _partition(mesh: Mesh, table: ParameterTable, name: str, shape: tuple[int, ...], wanted: Collection[str]) -> P:
    """Axes that are not divided evenly stay whole, as do arrays that the table does not know in this shape."""
    first, stack = in_first_layer(name), Stack.of(name)
    leading = 0 if stack is None or not stack.is_stacked else 1
    if first not in table or len(shape) != leading + len(table[first].shape):
        return P()
    placed = placement(table[first], mesh.layout)
    sizes = zip(placed.splits, placed.shards(mesh.layout), shape[leading:], strict=True)
    even = (axes if size % parts == 0 else () for axes, parts, size in sizes)
    return P(*[None] * leading, *(tuple(axis for axis in axes if axis in wanted) or None for axes in even))
