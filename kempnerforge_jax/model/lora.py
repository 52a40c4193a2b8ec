"""Low-rank adapters on the linear maps of a model: see `shared_config.contract.lora`."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx

from kempnerforge_jax.model.linear import Linear
from kempnerforge_jax.model.state import on_device, own_variables
from kempnerforge_jax.model.wrappers import plain_modules
from shared_config.contract.initialise import initial_value
from shared_config.contract.lora import A, B, adapted_modules, adapter_table
from shared_config.schema.job import JobConfig


def add_adapters(model: nnx.Module, config: JobConfig) -> None:
    """Give the maps that [lora] names their adapters, of zeros in the dtype of their weights, before `init_adapters`.
    Without [lora] nothing happens. What else is frozen: a train step asks by the names.

    Raises:
        ConfigError: a target that is no map of the model.
    """
    if config.lora is None:
        return
    table, modules = adapter_table(config), plain_modules(model)
    for name in adapted_modules(config):
        module = modules[name]
        assert isinstance(module, Linear)
        assert module.weight is not None
        for part in (A, B):
            value = jnp.zeros(table[f"{name}.{part}"].shape, module.weight.get_value().dtype)
            setattr(module, part, nnx.Param(value))
        module.lora_scale = config.lora.scale


def init_adapters(model: nnx.Module, config: JobConfig) -> None:
    """Give the adapters of a model the initial values of ``train.seed``, the same in every sharding layout."""
    own = own_variables(model)
    for name, spec in adapter_table(config).items():
        dtype = own[name].get_value().dtype
        own[name].set_value(on_device(initial_value(name, spec, config.train.seed), dtype))
