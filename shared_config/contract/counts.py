"""Counts of parameters, floating point operations and bytes, from the config alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from shared_config.contract.parameters import EMBEDDING, HEAD, ParameterGroup, layer_groups, parameter_groups
from shared_config.schema.distributed import DistributedConfig
from shared_config.schema.job import JobConfig
from shared_config.schema.model import ModelConfig
from shared_config.schema.vlm import VLMConfig

FLOAT32, BFLOAT16 = 4, 2


def count_parameters(config: ModelConfig, vlm: VLMConfig | None = None) -> int:
    """Trained parameters; a tied head counts once, buffers do not count."""
    return _size(parameter_groups(config, vlm))


def count_active_parameters(config: ModelConfig, vlm: VLMConfig | None = None) -> int:
    """Parameters that one text token uses: of ``num_experts`` experts only ``moe_top_k``, the shared one always."""
    groups = list(parameter_groups(config, vlm))
    if not config.is_moe:
        return _size(groups)
    routed = _routed(groups)
    return _size(groups) - routed + routed * config.moe_top_k // config.num_experts


@dataclass(frozen=True)
class Flops:
    """Floating point operations a token at a given sequence length; a multiply-add is two."""

    matmul: int
    attention: int

    @property
    def forward(self) -> int:
        """One forward pass."""
        return self.matmul + self.attention

    @property
    def training(self) -> int:
        """Forward and backward: the backward of a matrix product is two products."""
        return 3 * self.forward


def flops_per_token(config: ModelConfig, seq_len: int) -> Flops:
    """FLOPs a token of the text model, averaged over a causal sequence of ``seq_len``.

    Matrix products: twice the active matrix weights, the output head included and the embedding lookup not.
    Attention: scores and their product with the values, 4 * head_dim * heads a visible key; masked keys do not count.
    """
    sizes = {group.name: group.size for group in parameter_groups(config) if len(group.spec.shape) > 1}
    matrices = sum(sizes.values()) - (sizes.get(EMBEDDING, 0) if HEAD in sizes else 0)
    routed = _routed(parameter_groups(config))
    if config.is_moe:
        matrices += routed * config.moe_top_k // config.num_experts - routed
    keys = mean_visible_keys(seq_len, config.sliding_window)
    return Flops(2 * matrices, int(4 * config.n_layers * config.n_heads * config.head_size * keys))


def mean_visible_keys(seq_len: int, window: int | None = None) -> float:
    """Keys that a query of a causal sequence sees, on average over the sequence."""
    full = min(seq_len, window or seq_len)
    return (full * (full + 1) / 2 + (seq_len - full) * full) / seq_len


def kv_cache_bytes(config: ModelConfig, batch_size: int, seq_len: int, element_bytes: int = BFLOAT16) -> int:
    """Bytes of the key/value caches of a whole model."""
    length = min(seq_len, config.sliding_window or seq_len)
    return 2 * config.n_layers * batch_size * length * config.kv_heads * config.head_size * element_bytes


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes a device for a parallel layout, activations and workspace not included."""

    parameters: int
    gradients: int
    optimizer: int
    compute_copy: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.parameters + self.gradients + self.optimizer + self.compute_copy


def training_memory(job: JobConfig, world_size: int = 1) -> TrainingMemory:
    """Bytes a device holds of float32 masters, gradients, both Adam moments and the bfloat16 copy of one layer at work.

    Pipeline stages share the layers evenly, tensor parallelism the matrices, FSDP what is left; experts are divided
    by ``ep`` before FSDP shards them over the remaining data ranks, which comes to the same number of bytes.
    """
    layout: DistributedConfig = job.distributed
    groups = list(parameter_groups(job.model, job.vlm))
    shards = layout.pp * layout.resolved_dp_shard(world_size)
    elements = sum(group.size / (layout.tp if len(group.spec.shape) > 1 else 1) for group in groups) / shards
    owned = int(elements * FLOAT32)
    layer = max(map(_size, layer_groups(job.model, job.vlm)))
    gathered = layer if shards > layout.pp else _size(groups) // layout.pp
    copy = gathered * BFLOAT16 // layout.tp if job.train.mixed_precision == "bf16" else 0
    return TrainingMemory(owned, owned, 2 * owned, copy)


def _size(groups: Iterable[ParameterGroup]) -> int:
    return sum(group.size for group in groups if not group.spec.is_buffer)


def _routed(groups: Iterable[ParameterGroup]) -> int:
    return sum(group.size for group in groups if _is_routed_expert(group.name))


def _is_routed_expert(name: str) -> bool:
    return ".experts." in name or name.endswith((".gate_w", ".up_w", ".down_w"))
