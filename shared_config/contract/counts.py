"""Counts of parameters, floating point operations and bytes, from the config alone."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np

from shared_config.contract.capacity import choice_share
from shared_config.contract.freeze import never_trained
from shared_config.contract.moments import moments_of
from shared_config.contract.parameters import (
    EMBEDDING,
    HEAD,
    ParameterGroup,
    layer_groups,
    parameter_groups,
    parameter_table,
)
from shared_config.contract.sharding import Layout, elements_held, layout_of, stage_of
from shared_config.contract.specs import ParameterSpec
from shared_config.contract.vision import TowerConfig, adapter_table, encoder_table, vit_tower
from shared_config.schema.adapter import AdapterConfig
from shared_config.schema.job import JobConfig
from shared_config.schema.model import ModelConfig
from shared_config.schema.vlm import VLMConfig

FLOAT32, BFLOAT16 = 4, 2


def count_parameters(config: ModelConfig, vlm: VLMConfig | None = None) -> int:
    """Trained parameters; a tied head counts once, buffers do not count."""
    return _size(parameter_groups(config, vlm))


def count_active_parameters(config: ModelConfig, vlm: VLMConfig | None = None) -> int:
    """Parameters that one text token uses where there is no image: of ``num_experts`` experts only ``moe_top_k``, of
    experts that choose tokens their share of these; the shared one always.
    """
    return _active(_text_groups(config, vlm), _expert_share(config, vlm))


@dataclass(frozen=True)
class Flops:
    """Floating point operations per token at a given sequence length; a multiply-add is two."""

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


def flops_per_token(config: ModelConfig, seq_len: int, vlm: VLMConfig | None = None) -> Flops:
    """FLOPs per text token, averaged over a causal sequence of ``seq_len`` without an image.

    Matrix products: twice the active matrix weights, the output head included and the embedding lookup not.
    Attention: scores and their product with the values, 4 * head_dim * heads per visible key; masked keys do not count.
    """
    groups = [group for group in _text_groups(config, vlm) if len(group.spec.shape) > 1]
    if any(group.name == HEAD for group in groups):
        groups = [group for group in groups if group.name != EMBEDDING]
    attention = sum(
        4 * layers * config.n_heads * config.head_size * mean_visible_keys(seq_len, window)
        for window, layers in config.window_counts.items()
    )
    return Flops(2 * _active(groups, _expert_share(config, vlm)), int(attention))


def mean_visible_keys(seq_len: int, window: int | None = None) -> float:
    """Keys that a query of a causal sequence sees, on average over the sequence."""
    full = min(seq_len, window or seq_len)
    return (full * (full + 1) / 2 + (seq_len - full) * full) / seq_len


def visible_pairs(doc_ids: np.ndarray | None, shape: tuple[int, ...], window: int | None = None) -> int:
    """Pairs of a query and a key that it sees, in causal rows (B, S).

    Args:
        doc_ids: int (B, S), of which a query sees its own; None: each row is one document.
    """
    rows, length = shape
    if doc_ids is None:
        return rows * round(length * mean_visible_keys(length, window))
    lengths = [count for row in doc_ids for count in np.unique(row, return_counts=True)[1].tolist()]
    return sum(round(count * mean_visible_keys(count, window)) for count in lengths)


def experts_flops_per_token(config: ModelConfig) -> int:
    """Of a layer of experts, forward: the router, the experts that a token goes through, and the shared one."""
    layer = next(layer for layer in range(config.n_layers) if config.is_moe_layer(layer))
    groups = [ParameterGroup(name, spec, 1) for name, spec in parameter_table(config).items()]
    own = [group for group in groups if group.name.startswith(f"layers.{layer}.mlp.") and len(group.spec.shape) > 1]
    return 2 * _active(own, _expert_share(config, None))


def kv_cache_bytes(
    config: ModelConfig,
    batch_size: int,
    seq_len: int,
    element_bytes: int = BFLOAT16,
    vlm: VLMConfig | None = None,
    spare: int = 0,
) -> int:
    """Bytes of the key/value caches of a whole model; ``spare`` tokens are held beyond a sliding window."""
    lengths = {window: seq_len if window is None else min(seq_len, window + spare) for window in config.window_counts}
    tokens = sum(layers * lengths[window] for window, layers in config.window_counts.items())
    heads = config.kv_heads if vlm is None else vlm.cached_kv_heads(config)
    return 2 * batch_size * tokens * heads * config.head_size * element_bytes


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes per device for a parallel layout, activations and workspace not included."""

    parameters: int
    gradients: int
    optimizer: int
    compute_copy: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.parameters + self.gradients + self.optimizer + self.compute_copy


def training_memory(job: JobConfig, world_size: int = 1, tower: TowerConfig | None = None) -> TrainingMemory:
    """Bytes per device of float32 masters, of gradients (`gradient_bytes`), the optimiser's moments, and the bfloat16
    copy of one layer at work or, where nothing is sharded, of all; each of them on the device that holds most.

    Tensors lie as `placement` says. Pipeline stages share the layers evenly; the first has the embedding, the last what
    comes after the layers. What is frozen throughout has no gradients and no moments; patterns that freeze some of
    several equal layers don't count.

    Args:
        tower: of an encoder whose config does not describe it.

    Raises:
        ConfigError: a layout for another number of devices.
    """
    layout = layout_of(job.distributed, world_size)
    stages = stage_groups(job, tower)
    names = {group.name for stage in stages for group in stage}
    frozen = set() if job.vlm is None else _never_trained(names, job.vlm)
    trained = [[group for group in stage if group.name not in frozen] for stage in stages]
    layer = max(held_elements(_narrowed(layer), layout, gathered=True) for layer in layer_groups(job.model, job.vlm))
    is_sharded = layout.size("dp_shard", "ep", "cp") > 1
    copied = layer if is_sharded else max(held_elements(_narrowed(stage), layout, gathered=True) for stage in stages)
    gradients = max(
        sum(held_elements([group], layout) * gradient_bytes(group.spec, job, layout) for group in stage)
        for stage in trained
    )
    return TrainingMemory(
        parameters=max(held_elements(stage, layout) for stage in stages) * FLOAT32,
        gradients=gradients,
        optimizer=max(_moment_elements(stage, layout, job) for stage in trained) * FLOAT32,
        compute_copy=copied * BFLOAT16 if job.train.casts else 0,
    )


def gradient_bytes(spec: ParameterSpec, job: JobConfig, layout: Layout) -> int:
    """Bytes that training holds at a time of a number's gradient.

    Layouts sum in float32 what blocks give. On one device, which computes with bfloat16 copies, a micro-batch leaves
    bfloat16; several are added up in float32 beside it. AdamW on NVIDIA GPUs reads what one has left as it is; without
    its kernel, and for other optimisers and averages of weights, it is widened first.
    """
    if layout.devices > 1 or not job.train.casts or spec.full_precision:
        return FLOAT32
    is_read = job.train.grad_accum_steps == 1 and job.optimizer.name == "adamw" and job.optimizer.ema_decay == 0
    return BFLOAT16 if is_read else BFLOAT16 + FLOAT32


def _moment_elements(groups: Sequence[ParameterGroup], layout: Layout, job: JobConfig) -> int:
    """Elements of all moments that one device holds."""
    return sum(
        len(moments_of(job.optimizer, group.name, group.spec)) * held_elements([group], layout) for group in groups
    )


def stage_groups(job: JobConfig, tower: TowerConfig | None = None) -> list[list[ParameterGroup]]:
    """The tensors of each pipeline stage, those of its layers together where they are alike."""
    stages = job.distributed.pp
    if stages == 1:
        return [list(_job_groups(job, tower))]
    found: list[Counter[tuple[str, ParameterSpec]]] = [Counter() for _ in range(stages)]
    for name, spec in parameter_table(job.model, job.vlm).items():
        alike = re.sub(r"^layers\.\d+", "layers.*", name)
        found[stage_of(name, job.model.n_layers, stages)][alike, spec] += 1
    return [[ParameterGroup(name, spec, copies) for (name, spec), copies in stage.items()] for stage in found]


def _job_groups(job: JobConfig, tower: TowerConfig | None) -> Iterator[ParameterGroup]:
    """The language model, and by the names that a wrapper gives them the adapter and the encoder, if there are any."""
    groups = parameter_groups(job.model, job.vlm)
    if job.vlm is None or job.vision_encoder is None:
        yield from groups
        return
    config = job.vision_encoder
    encoder = vit_tower(config) if config.type == "vit" else tower or config
    width = encoder.dim if isinstance(encoder, TowerConfig) else config.feature_dim
    adapter = adapter_table(job.adapter or AdapterConfig(), width, job.model.dim)
    for part, table in (("vision_encoder", encoder_table(encoder)), ("adapter", adapter)):
        yield from (ParameterGroup(f"{part}.{name}", spec, 1) for name, spec in table.items())
    yield from (replace(group, name=f"transformer.{group.name}") for group in groups)


def _never_trained(names: Iterable[str], vlm: VLMConfig) -> set[str]:
    return never_trained(names, vlm.freeze, vlm.freeze_schedule, vlm.module_patterns)


def held_elements(groups: Iterable[ParameterGroup], layout: Layout, *, gathered: bool = False) -> int:
    """Elements of a device; buffers do not count."""
    tensors = [(group.spec, group.copies) for group in groups if not group.spec.is_buffer]
    return elements_held(tensors, layout, gathered=gathered)


def _narrowed(groups: Iterable[ParameterGroup]) -> list[ParameterGroup]:
    """What bfloat16 training computes with in bfloat16."""
    return [group for group in groups if not group.spec.full_precision]


def _text_groups(config: ModelConfig, vlm: VLMConfig | None) -> list[ParameterGroup]:
    """What text passes through where there is no image: the language model, with the text's own experts."""
    if vlm is None or vlm.text_experts() is None:
        return list(parameter_groups(config))
    others = [f".mlp.experts.{modality}." for modality in vlm.modalities if modality != "text"]
    return [group for group in parameter_groups(config, vlm) if not any(part in group.name for part in others)]


def _expert_share(config: ModelConfig, vlm: VLMConfig | None) -> Fraction:
    """Of the routed experts, the share that a text token goes through on average."""
    choosing = None if vlm is None else vlm.text_experts()
    if choosing is not None:
        return Fraction(*choice_share(*choosing))
    return Fraction(config.moe_top_k, config.num_experts) if config.is_moe else Fraction(1)


def _active(groups: Iterable[ParameterGroup], share: Fraction) -> int:
    routed, always = [], []
    for group in groups:
        (routed if is_routed_expert(group.name) else always).append(group)
    return _size(always) + int(_size(routed) * share)


def _size(groups: Iterable[ParameterGroup]) -> int:
    return sum(group.size for group in groups if not group.spec.is_buffer)


def is_routed_expert(name: str) -> bool:
    """Whether a tensor is one of the experts that a router chooses among."""
    return re.search(r"\.experts\.[\d{]", name) is not None or name.endswith((".gate_w", ".up_w", ".down_w"))
