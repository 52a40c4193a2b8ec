"""A layout applied to a model that knows nothing of it. The order lets each step find what it works on: tensors that an
axis splits, blocks that are recomputed, blocks that are compiled, blocks that are gathered.
"""

from __future__ import annotations

import logging
from typing import TypeVar

import torch
from torch import nn

from kempnerforge_torch.distributed.context_parallel import spread_sequences
from kempnerforge_torch.distributed.fsdp import shard_parameters
from kempnerforge_torch.distributed.mesh import Mesh
from kempnerforge_torch.distributed.pipeline import keep_stage
from kempnerforge_torch.distributed.sequence_parallel import can_split_stream, split_stream
from kempnerforge_torch.distributed.tensor_parallel import split_tensors
from kempnerforge_torch.model.grouped import skips_rows
from kempnerforge_torch.training.blocks import blocks, checkpoint_activations, compile_blocks
from kempnerforge_torch.training.mixed_precision import compute_dtype
from shared_config.contract.activations import gathers_tokens
from shared_config.contract.specs import ParameterTable
from shared_config.schema.job import JobConfig

AnyModule = TypeVar("AnyModule", bound=nn.Module)
_log = logging.getLogger(__name__)


def parallelize(
    model: AnyModule,
    config: JobConfig,
    mesh: Mesh | None,
    table: ParameterTable,
    device: torch.device,
    dtype: torch.dtype,
) -> AnyModule:
    """The model, in place, as a layout trains it; without a mesh on one device.

    Args:
        model: on the meta device.
        dtype: of its parameters, once they have values.
    """
    number = compute_dtype(config, dtype)
    gathers = mesh is not None and gathers_tokens(config, mesh.layout) and skips_rows(device, number)
    if mesh is not None and mesh.layout.pp > 1:
        keep_stage(model, mesh)
    if mesh is not None and mesh.layout.size("ep", "tp") > 1:
        split_tensors(model, mesh, table, gathers)
    if mesh is not None and mesh.layout.tp > 1 and can_split_stream(model, config, mesh):
        split_stream(model, mesh)
    if mesh is not None and mesh.layout.cp > 1:
        spread_sequences(model, mesh, device)
    checkpoint_activations(model, config.train.activation_checkpointing)
    if config.train.compile_model and _can_compile(config, mesh):
        in_one_program = mesh is None or mesh.layout.ep == 1 or gathers
        compile_blocks(model, device, fullgraph=in_one_program)
    if mesh is not None:
        shard_parameters(model, list(blocks(model)), mesh, table, number, dtype)
    return model


def _can_compile(config: JobConfig, mesh: Mesh | None) -> bool:
    """False, with a warning, where blocks that are computed again hold collectives: the compiled programs of two ranks
    may order these differently, and then wait for each other.
    """
    mode = config.train.activation_checkpointing
    axes = [axis for axis in ("ep", "tp", "cp") if mesh is not None and mesh.layout.size(axis) > 1]
    if mode != "none" and axes:
        _log.warning(
            "train.compile_model: with train.activation_checkpointing = %r blocks that distributed.%s splits are not "
            "compiled; 'none' compiles them", mode, axes[0],
        )  # fmt: skip
    return mode == "none" or not axes
