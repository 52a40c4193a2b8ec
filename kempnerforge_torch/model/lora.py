"""Low-rank adapters on the linear maps of a model: see `shared_config.contract.lora`."""

from __future__ import annotations

from torch import nn

from kempnerforge_torch.model.linear import Linear
from kempnerforge_torch.model.state import assign, own_tensors
from shared_config.contract.initialise import initial_value
from shared_config.contract.lora import A, B, adapted_modules, adapter_table, is_adapter
from shared_config.interchange.states import plain_name
from shared_config.schema.job import JobConfig


def add_adapters(model: nn.Module, config: JobConfig) -> None:
    """Give the maps that [lora] names their adapters, in the dtype and on the device of their weights, and freeze all
    else. They have no values before `init_adapters`. Without [lora] nothing happens.

    Raises:
        ConfigError: a target that is no map of the model.
    """
    if config.lora is None:
        return
    table, modules = adapter_table(config), {plain_name(name): module for name, module in model.named_modules()}
    for name in adapted_modules(config):
        module = modules[name]
        assert isinstance(module, Linear)
        for part in (A, B):
            value = module.weight.new_empty(table[f"{name}.{part}"].shape)
            setattr(module, part, nn.Parameter(value))
        module.lora_scale = config.lora.scale
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_adapter(name))


def init_adapters(model: nn.Module, config: JobConfig) -> None:
    """Give the adapters of a model the initial values of ``train.seed``, the same in every sharding layout."""
    own = own_tensors(model)
    for name, spec in adapter_table(config).items():
        assign(own[name], initial_value(name, spec, config.train.seed))
