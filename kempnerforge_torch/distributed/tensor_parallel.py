"""Tensor parallelism (Shoeybi et al. 2019, arXiv:1909.08053): heads, widths of feed-forward layers and the vocabulary
are split over ranks that see the same tokens. The table says along which axis; the model's modules stay as they are.

    first axis of a linear map     y_r = x W_r^T           each rank has some outputs; gradients of x are summed
    second axis                    y = sum_r x_r W_r^T     each rank has some inputs; outputs are summed
    vocabulary of an embedding     x = sum_r E_r[id]       each rank has some rows, and gives 0 for others

Shapes: ... any leading axes, I inputs, O outputs, V vocabulary, D model dim, T tokens, k experts of each.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.tensor import Shard, distribute_tensor

from kempnerforge_torch.distributed.collectives import add_up, copied, summed_over
from kempnerforge_torch.distributed.expert_parallel import gather_tokens, send_rows
from kempnerforge_torch.distributed.fsdp import fsdp_place, ruled_axes
from kempnerforge_torch.distributed.mesh import Mesh
from kempnerforge_torch.distributed.ranks import local
from kempnerforge_torch.model.dispatch import Routes
from kempnerforge_torch.model.linear import linear, look_up
from kempnerforge_torch.model.moe import MoEMLP
from kempnerforge_torch.model.state import own_tensors
from kempnerforge_torch.model.wrappers import plain_modules
from shared_config.contract.specs import ParameterTable
from shared_config.errors import ConfigError

_PARTIAL = "_kempnerforge_partial"
"""Attribute of modules: see `mark_partial`."""


def split_tensors(model: nn.Module, mesh: Mesh, table: ParameterTable, gathers: bool) -> None:
    """Leave each rank along "tp" and "ep" its part of every tensor that the table splits there, and let modules compute
    with it.

    Args:
        gathers: whether ranks along "ep" gather tokens, or send rows: see `expert_parallel`.

    Raises:
        ConfigError: a tensor of a module that has no such form, or heads that can't be shared out.
    """
    places = {id(tensor): ruled_axes(name, mesh, table) for name, tensor in own_tensors(model).items()}
    parts: dict[int, nn.Parameter] = {}
    for path, module in plain_modules(model).items():
        _check_heads(path, module, mesh.layout.tp)
        if isinstance(module, MoEMLP):
            _spread_experts(module, mesh, gathers)
        for name, tensor in list(module.named_parameters(recurse=False)):
            by = places.get(id(tensor), {})
            if not by:
                continue
            if id(tensor) not in parts:
                placements = [Shard(place) for place in by.values()]
                split = distribute_tensor(tensor.detach(), mesh.axes[tuple(by)], placements, src_data_rank=None)
                parts[id(tensor)] = nn.Parameter(split, requires_grad=tensor.requires_grad)
            module.register_parameter(name, parts[id(tensor)])
            if name != "bias" and not isinstance(module, MoEMLP):
                _compute_with_parts(path, module, name, by["tp"], mesh.group("tp"))


def complete_gradients(
    gradients: Mapping[str, Float[Tensor, "..."]], model: nn.Module, mesh: Mesh | None, table: ParameterTable
) -> None:
    """Add up, in place, the gradients of tensors that all ranks along "tp" have whole and of which each has those of
    its own heads or positions, and of those that FSDP leaves whole.
    """
    if mesh is None:
        return
    whole = [local(gradient) for name, gradient in gradients.items() if fsdp_place(name, mesh, table) is None]
    if mesh.layout.tp > 1:
        partial = _partial_gradients(model)
        shared = [
            local(gradient)
            for name, gradient in gradients.items()
            if "head_dim" in table[name].axes or (name in partial and not ruled_axes(name, mesh, table))
        ]
        add_up(shared, mesh.group("tp"))
    add_up(whole, mesh.tokens.get_group())


def mark_partial(part: nn.Module) -> None:
    """Let `complete_gradients` know that each rank along "tp" uses what it has whole of a part of the model for its own
    positions.
    """
    for module in part.modules():
        setattr(module, _PARTIAL, True)


def _partial_gradients(model: nn.Module) -> set[str]:
    return {
        f"{path}.{name}"
        for path, module in plain_modules(model).items()
        if getattr(module, _PARTIAL, False)
        for name, _ in module.named_parameters(recurse=False)
    }


def _check_heads(path: str, module: nn.Module, tp: int) -> None:
    for name in ("n_heads", "n_kv_heads"):
        heads = getattr(module, name, tp)
        if isinstance(heads, int) and heads % tp:
            raise ConfigError([f"distributed.tp = {tp}: must divide {path}.{name} = {heads}"])


def some_outputs(
    module: nn.Linear, enter: Callable[[Float[Tensor, "... _I"]], Float[Tensor, "... I"]]
) -> Callable[[Float[Tensor, "... _I"]], Float[Tensor, "... O"]]:
    """The forward (..., I) -> (..., O / ranks) of a linear map whose weight is split along the first axis.

    Args:
        enter: from what each rank has of the inputs to all of them, as each rank uses them.
    """

    def forward(x: Tensor) -> Tensor:
        bias = None if module.bias is None else local(module.bias).to(x.dtype)
        return linear(enter(x), local(module.weight).to(x.dtype), bias)

    return forward


def some_inputs(
    module: nn.Linear, leave: Callable[[Float[Tensor, "... O"]], Float[Tensor, "... _O"]]
) -> Callable[[Float[Tensor, "... I"]], Float[Tensor, "... _O"]]:
    """The forward (..., I / ranks) -> (..., O) of a linear map whose weight is split along the second axis.

    Args:
        leave: from the summand of each rank to what this one is to have of the sum.
    """

    def forward(x: Tensor) -> Tensor:
        out = leave(linear(x, local(module.weight).to(x.dtype)))
        return out if module.bias is None else out + module.bias

    return forward


def _compute_with_parts(path: str, module: nn.Module, name: str, place: int, group: dist.ProcessGroup) -> None:
    changed: Any = module
    if isinstance(module, nn.Linear) and place == 0:
        changed.forward = some_outputs(module, functools.partial(copied, group=group))
        changed.factors = lambda x: (copied(x, group), local(module.weight).to(x.dtype))
    elif isinstance(module, nn.Linear):
        changed.forward = some_inputs(module, functools.partial(summed_over, group=group))
    elif isinstance(module, nn.Embedding):
        changed.forward = _some_rows(module, group)
    else:
        kind = type(module).__name__
        raise ConfigError([f"distributed.tp = {group.size()}: must be 1 with {path}.{name}, a tensor of {kind}"])


def _some_rows(module: nn.Embedding, group: dist.ProcessGroup) -> Callable[[Tensor], Tensor]:
    """Integers (...) -> (..., D). An id outside the vocabulary is looked up outside the part, which is an error."""

    def forward(ids: Tensor) -> Tensor:
        weight = local(module.weight)
        start, stop = part_of(module.num_embeddings, group)
        mine = (ids >= start) & (ids < stop)
        known = (ids >= 0) & (ids < module.num_embeddings)
        rows = torch.where(mine, ids - start, torch.where(known, 0, weight.shape[0]))
        return summed_over(torch.where(mine[..., None], look_up(weight, rows), 0), group)

    return forward


def _spread_experts(layer: MoEMLP, mesh: Mesh, gathers: bool) -> None:
    """Experts, of which each rank has some, and of these a part of their width."""
    matrices = layer._matrices

    def own_matrices(name: str, dtype: torch.dtype) -> Any:
        found = matrices(name, dtype)
        return local(found).to(dtype) if isinstance(found, Tensor) else [local(matrix) for matrix in found]

    layer._matrices = own_matrices
    if mesh.layout.ep > 1:
        (gather_tokens if gathers else send_rows)(layer, mesh.group("ep"))
    if mesh.layout.tp > 1 and layer.activation is not None:
        layer._routed = _some_widths(layer._routed, mesh.group("tp"))


def _some_widths(routed: Callable[..., Tensor], group: dist.ProcessGroup) -> Callable[..., Tensor]:
    """What experts make of tokens, of which each rank has summands, as has the gradient of their weights."""

    def summed(x_TD: Tensor, routes: Routes) -> Tensor:
        own = routes._replace(weights_Tk=copied(routes.weights_Tk, group))
        return summed_over(routed(copied(x_TD, group), own), group)

    return summed


def part_of(size: int, group: dist.ProcessGroup) -> tuple[int, int]:
    """Start and end of this rank's part of an axis that is cut as `torch.chunk` cuts it."""
    part = -(-size // group.size())
    start = min(group.rank() * part, size)
    return start, min(start + part, size)
