"""The state of a model as a flat dict, named as in the parameter table, and arrays from and to NumPy and DLPack.

Across a jit boundary goes `split(model)`: a static graph and two flat dicts of arrays.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer
from jax.typing import DTypeLike
from jaxtyping import Array, Shaped

from kempnerforge_jax.model.module import Table, named_variables
from kempnerforge_jax.model.scan import stacked
from kempnerforge_jax.model.stack import stack_layers, stacks_of, unstack_layers, unstack_shapes
from kempnerforge_jax.model.wrappers import plain_modules, unwrap, unwrapped
from shared_config.contract.parameters import aliases
from shared_config.contract.specs import check_names
from shared_config.interchange.parts import Parts
from shared_config.interchange.states import check_tied, host_array, plain_state, without_unused
from shared_config.schema.model import ModelConfig

State = dict[str, Shaped[Array, "..."]]

_Model = TypeVar("_Model", bound=nnx.Module)


def get_state(model: nnx.Module) -> State:
    """Parameters and buffers by name. A tied head has no weight of its own; stacked layers are given one by one.

    Names are plain, however the model is wrapped.
    """
    return unstack_layers({name: variable.get_value() for name, variable in own_variables(model).items()})


def set_state(model: nnx.Module, state: Mapping[str, object]) -> None:
    """Put the values of ``state`` (arrays or tensors of any library) into the model, in its dtypes and shardings.

    Args:
        model: may be wrapped.
        state: what `plain_state` accepts, `nnx.state(model)` for one; a tied weight may go by all its names. The
            final norm that mixtures of transformers don't use is left out, which is logged.

    Raises:
        UserError: lists every missing, unknown and misshapen name; the model is unchanged.
    """
    own = own_variables(model)
    values = {name: variable.get_value() for name, variable in own.items()}
    expected = {name: tuple(array.shape) for name, array in unstack_shapes(values).items()}
    given = without_unused(_untied(model, unstack_layers(plain_state(state))), expected)
    check_names(
        expected,
        {name: tuple(value.shape) for name, value in given.items()},
    )
    whole = stack_layers(given, stacks_of(values))
    for name, variable in own.items():
        variable.set_value(like(values[name], whole[name]))


def split(model: _Model, *, scan_layers: bool = False) -> tuple[nnx.GraphDef[_Model], State, State]:
    """Take a model apart for jit.

    Args:
        scan_layers: stack layers of one structure, so that `merge` gives a model that scans them: "layers.0-31..."
            stands for 32 layers along a new leading axis (`stack_layers`, `unstack_layers`).

    Returns:
        graphdef (static), parameters, and all other arrays: buffers and the rotary tables.
    """
    own: Any = unwrap(model)
    if scan_layers:
        own = stacked(own)
    graphdef = nnx.graphdef(own)
    variables = dict(named_variables(own))
    params = {name: v.get_value() for name, v in variables.items() if isinstance(v, nnx.Param)}
    buffers = {name: v.get_value() for name, v in variables.items() if not isinstance(v, nnx.Param)}
    return graphdef, params, buffers


def merge(graphdef: nnx.GraphDef[_Model], params: Mapping[str, object], buffers: Mapping[str, object]) -> _Model:
    """The model that `split` took apart, with these arrays (or tracers, or abstract arrays)."""
    tree: dict[str, Any] = {}
    for name, array in (*params.items(), *buffers.items()):
        *path, leaf = name.split(".")
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        node[leaf] = array
    return nnx.merge(graphdef, tree)


def own_variables(model: nnx.Module) -> dict[str, nnx.Variable[Shaped[Array, "..."]]]:
    """Parameters and buffers by plain name; rotary tables follow from the config and are left out."""
    return {name: v for name, v in named_variables(unwrapped(model)) if not isinstance(v, Table)}


def _untied(model: nnx.Module, state: dict[str, Any]) -> dict[str, Any]:
    """The state with each tied weight once, by the name that the model has for it."""
    tied: dict[str, str] = {}
    for path, module in plain_modules(model).items():
        config = getattr(module, "config", None)
        if isinstance(config, ModelConfig) and hasattr(module, "token_embedding"):
            prefix = f"{path}." if path else ""
            tied |= {prefix + alias: prefix + name for alias, name in aliases(config).items()}
    given = {alias: name for alias, name in tied.items() if alias in state}
    check_tied(state, given)
    return {given.get(name, name): value for name, value in reversed(state.items())}


def like(own: Shaped[Array, "..."], value: object) -> Shaped[Array, "..."]:
    """The values of an array of any library, in the dtype and sharding of ``own``, which may be abstract. Of one on the
    host, `Parts` of one too, each device reads what it is to hold.
    """
    sharding = None if isinstance(own, Tracer) else getattr(own, "sharding", None)
    if sharding is None or not (isinstance(own, jax.ShapeDtypeStruct) or own.committed):
        if isinstance(value, jax.Array):
            return value.astype(own.dtype)
        return on_device(host_array("value", value), own.dtype)
    if isinstance(value, jax.Array):
        return jax.device_put(value.astype(own.dtype), sharding)
    values = value if isinstance(value, Parts) else host_array("value", value)
    return jax.make_array_from_callback(own.shape, sharding, lambda box: values[box or ()].astype(own.dtype))


def to_numpy(array: Shaped[Array, "..."]) -> np.ndarray:
    """The values on the host; bfloat16 and float8 as `ml_dtypes`."""
    return np.asarray(array)


def from_numpy(array: np.ndarray, dtype: DTypeLike | None = None) -> Shaped[Array, "..."]:
    """An array of these values, in ``dtype`` if given. int64 becomes int32 where JAX has no 64 bits.

    Raises:
        ValueError: if values would be lost: float64 without jax_enable_x64 and without ``dtype``, integers too large.
    """
    kept = np.dtype(dtype or array.dtype)
    held = held_dtype(kept)
    if held != kept and array.size and (array.max() > np.iinfo(held).max or array.min() < np.iinfo(held).min):
        raise ValueError(f"values up to {array.max()}: must fit {held}, unless jax_enable_x64 is set")
    return on_device(array, held)


def on_device(array: np.ndarray, dtype: DTypeLike) -> Shaped[Array, "..."]:
    """The values in a dtype that JAX holds, cast on the host: `jnp.asarray` compiles a program for each shape."""
    with np.errstate(over="ignore", invalid="ignore"):
        return jax.device_put(array.astype(dtype, copy=False))


def held_dtype(dtype: DTypeLike) -> np.dtype:
    """The dtype that JAX holds for this one; that of 64-bit integers may be narrower.

    Raises:
        ValueError: float64 without jax_enable_x64.
    """
    kept = jnp.dtype(dtype)
    held = jax.dtypes.canonicalize_dtype(kept)
    if held != kept and not np.issubdtype(kept, np.integer):
        raise ValueError(f"dtype = {kept}: JAX holds {held} unless jax_enable_x64 is set; give the dtype that is meant")
    return held


def share(state: Mapping[str, object]) -> State:
    """Arrays that share the memory of another library's tensors (DLPack), on the CPU or on the same GPU, without a
    copy.

    The other library must not write to them any more: JAX takes arrays for immutable.
    """
    return {name: jnp.from_dlpack(tensor) for name, tensor in state.items()}
