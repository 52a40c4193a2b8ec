"""Initial weights, from the parameter table: every parameter and buffer, also after meta-device materialisation.

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

import torch
from torch import Tensor, nn

from kempnerforge_torch.model.state import assign, own_tensors
from kempnerforge_torch.model.wrappers import unwrap
from shared_config.contract.initialise import initial_value
from shared_config.contract.lora import is_adapter
from shared_config.contract.parameters import parameter_table
from shared_config.contract.specs import Constant, ParameterSpec, ParameterTable
from shared_config.schema.model import ModelConfig


def init_weights(model: nn.Module, config: ModelConfig, seed: int | None = None) -> None:
    """Set every parameter and buffer of a `Transformer`, or of a pipeline stage of one.

    With a seed the values are those of `shared_config.contract.initialise`, the same bits in both backends and in every
    sharding layout; without, they come from torch's default generator. Tensors on the meta device are left alone.

    Raises:
        ValueError: if the model has tensors that the table doesn't know, or of another shape.
    """
    init_from_table(model, parameter_table(config, getattr(unwrap(model), "vlm_config", None)), seed)


def init_from_table(model: nn.Module, table: ParameterTable, seed: int | None = None, *, stream: str = "") -> None:
    """Set every parameter and buffer of a module from its own table, as `init_weights` does; adapters have another.

    Args:
        stream: prefix of the names where seeded values are drawn, so that equal names in other parts get other values.
    """
    own = {name: each for name, each in own_tensors(model).items() if not is_adapter(name)}
    problems = [
        f"{name}.shape = {tuple(tensor.shape)}: must be {table[name].shape if name in table else 'in the table'}"
        for name, tensor in own.items()
        if name not in table or tuple(tensor.shape) != table[name].shape
    ]
    if problems:
        raise ValueError("the model doesn't fit its parameter table:\n" + "\n".join(problems))
    for name, spec in table.items():
        if name in own and not own[name].is_meta:
            _initialise(own[name], stream + name, spec, seed)


@torch.no_grad()
def _initialise(tensor: Tensor, name: str, spec: ParameterSpec, seed: int | None) -> None:
    if isinstance(spec.initializer, Constant):
        tensor.fill_(spec.initializer.value)
    elif seed is not None:
        assign(tensor, initial_value(name, spec, seed))
    elif hasattr(tensor, "placements"):
        assign(tensor, _drawn_by_rank_0(tensor, spec.initializer.std))
    else:
        tensor.normal_(0.0, spec.initializer.std)


def _drawn_by_rank_0(tensor: Tensor, std: float) -> Tensor:
    """Sharded tensors: the whole tensor, drawn once, so that no two shards or replicas depend on a rank's generator."""
    whole = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device).normal_(0.0, std)
    torch.distributed.broadcast(whole, src=0)
    return whole
