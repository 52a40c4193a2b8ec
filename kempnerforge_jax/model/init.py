"""Initial weights, from the parameter table: every parameter and buffer, also of a model built without arrays.

| what | initial value |
|---|---|
| matrices | normal(0, init_std) |
| o_proj, down_proj, packed down_w | normal(0, init_std / sqrt(2 n_layers)) |
| norm weights | 1 |
| biases, router bias | 0 |
| cross-attention and MoT: o_proj, dense down_proj | 0 |
| router's moving average of utilisation | 1 / num_experts |
"""

from __future__ import annotations

import secrets
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kempnerforge_jax.model.state import on_device, own_variables
from kempnerforge_jax.model.wrappers import unwrap
from shared_config.contract.initialise import initial_value
from shared_config.contract.lora import is_adapter
from shared_config.contract.parameters import parameter_table
from shared_config.contract.specs import Constant, ParameterSpec, ParameterTable
from shared_config.schema.model import ModelConfig


def init_weights(
    model: nnx.Module, config: ModelConfig, seed: int | None = None, *, rngs: nnx.Rngs | None = None
) -> None:
    """Set every parameter and buffer of a `Transformer`, or of a pipeline stage of one.

    With a seed the values are those of `shared_config.contract.initialise`, the same bits in both backends and in every
    sharding layout; without, they come from ``rngs``, or from fresh entropy if there are none.

    Raises:
        ValueError: if the model has arrays that the table doesn't know, or of another shape.
    """
    init_from_table(model, parameter_table(config, getattr(unwrap(model), "vlm_config", None)), seed, rngs=rngs)


def init_from_table(
    model: nnx.Module,
    table: ParameterTable,
    seed: int | None = None,
    *,
    stream: str = "",
    rngs: nnx.Rngs | None = None,
) -> None:
    """Set every parameter and buffer of a module from its own table, as `init_weights` does; adapters have another.

    Args:
        stream: prefix of the names where seeded values are drawn, so that equal names in other parts get other values.
    """
    own = {name: each for name, each in own_variables(model).items() if not is_adapter(name)}
    problems = [
        f"{name}.shape = {tuple(variable.shape)}: must be {table[name].shape if name in table else 'in the table'}"
        for name, variable in own.items()
        if name not in table or tuple(variable.shape) != table[name].shape
    ]
    if problems:
        raise ValueError("the model doesn't fit its parameter table:\n" + "\n".join(problems))
    key = _key(rngs)
    for name, spec in table.items():
        if name in own:
            dtype = own[name].get_value().dtype
            own[name].set_value(_initial(stream + name, spec, dtype, seed, key))


def _key(rngs: nnx.Rngs | None) -> jax.Array:
    return jax.random.key(secrets.randbits(32)) if rngs is None else rngs.params()


def _initial(name: str, spec: ParameterSpec, dtype: Any, seed: int | None, key: jax.Array) -> jax.Array:
    if isinstance(spec.initializer, Constant):
        return on_device(np.full(spec.shape, spec.initializer.value, dtype), dtype)
    if seed is not None:
        return on_device(initial_value(name, spec, seed), dtype)
    values = jax.random.normal(jax.random.fold_in(key, zlib.crc32(name.encode())), spec.shape, jnp.float32)
    return (spec.initializer.std * values).astype(dtype)
