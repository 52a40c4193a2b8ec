"""Which part of every tensor a device holds, in any parallel layout, and which layouts are impossible.

Devices form a mesh. Tensor axes are split by the mesh axes that rules give them; of what is left, FSDP splits one axis
further, "cp" counting among its devices. An example, 8 devices, dp_shard 4 of which ep 2, tp 2:

    tensor                          axes                   split by
    attention.q_proj.weight         heads, embed           tp; dp_shard and ep
    mlp.gate_w                      experts, embed, mlp    ep; dp_shard; tp
    attention_norm.weight           embed                  dp_shard and ep
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from shared_config.contract.parameters import EMBEDDING
from shared_config.contract.specs import ParameterSpec
from shared_config.contract.vision import TowerConfig
from shared_config.errors import ConfigError
from shared_config.schema.distributed import DistributedConfig
from shared_config.schema.job import JobConfig

MESH_AXES = ("pp", "dp_replicate", "dp_shard", "ep", "cp", "tp")
"""From the outermost, whose devices are farthest apart, to the innermost."""

DATA_AXES = ("dp_replicate", "dp_shard", "ep")
"""Devices along these see different micro-batches."""

TOKEN_AXES = (*DATA_AXES, "cp")
"""Devices along these see different tokens: along "cp" each has a part of every sequence of a micro-batch."""

RULES: Mapping[str, str] = {"vocab": "tp", "heads": "tp", "kv_heads": "tp", "mlp": "tp", "experts": "ep"}
"""Axis of a tensor -> the mesh axis that splits it. Others are split by FSDP alone."""

SOME_BACKENDS: Mapping[str, tuple[str, ...]] = {"pp": ("torch",)}
"""Mesh axes that not every backend has, with those that do."""

WHOLE = frozenset({"head_dim", "routes"})
"""Axes that nothing splits: a head is computed on one device, and every device routes among all experts."""


@dataclass(frozen=True)
class Layout:
    """Sizes of the mesh axes; ``dp_shard`` without the devices that ``ep`` takes of it."""

    pp: int = 1
    dp_replicate: int = 1
    dp_shard: int = 1
    ep: int = 1
    cp: int = 1
    tp: int = 1

    def size(self, *axes: str) -> int:
        """Number of devices along mesh axes."""
        return math.prod(getattr(self, axis) for axis in axes)

    @property
    def devices(self) -> int:
        """All of them."""
        return self.size(*MESH_AXES)

    @property
    def data_ranks(self) -> int:
        """Devices that see different micro-batches."""
        return self.size(*DATA_AXES)


def layout_of(config: DistributedConfig, world_size: int) -> Layout:
    """The mesh of a config that fits ``world_size`` devices.

    Raises:
        ConfigError: sizes whose product is another number, or ``ep`` that doesn't divide ``dp_shard``.
    """
    if problems := [f"distributed.{line}" for line in config.problems_on(world_size)]:
        raise ConfigError(problems)
    shard = config.resolved_dp_shard(world_size)
    return Layout(config.pp, config.dp_replicate, shard // config.ep, config.ep, config.cp, config.tp)


@dataclass(frozen=True)
class Placement:
    """How a tensor lies on the mesh.

    Attributes:
        splits: for each axis of the tensor the mesh axes that split it, the outer one first; () where it is whole.
    """

    splits: tuple[tuple[str, ...], ...]

    def shards(self, layout: Layout) -> tuple[int, ...]:
        """Parts of each axis."""
        return tuple(layout.size(*axes) for axes in self.splits)

    def largest_part(self, shape: tuple[int, ...], layout: Layout) -> tuple[int, ...]:
        """Sizes that no device's part exceeds: an axis that isn't divided evenly is cut as `torch.chunk` cuts it."""
        return tuple(-(-size // parts) for size, parts in zip(shape, self.shards(layout), strict=True))


def placement(spec: ParameterSpec, layout: Layout, *, gathered: bool = False) -> Placement:
    """How a tensor of the table lies on the mesh of a layout.

    What `RULES` name is split by tp and ep, of two axes with one rule the first. FSDP then splits one of the other axes
    over dp_shard and cp, and over ep where the tensor is outside the experts: "embed" if its size is divided, else the
    largest axis whose size is; where none is divided, and of buffers and of what stays in full precision, each of these
    devices holds all that tp and ep leave.

    Args:
        gathered: as the tensor is computed with, without what FSDP splits.
    """
    ruled = [RULES.get(axis or "") for axis in spec.axes]
    splits: list[tuple[str, ...]] = [
        (axis,) if axis is not None and layout.size(axis) > 1 and axis not in ruled[:place] else ()
        for place, axis in enumerate(ruled)
    ]
    over = tuple(axis for axis in fsdp_axes(spec) if layout.size(axis) > 1)
    place = None if spec.is_buffer or spec.full_precision or gathered else _fsdp_axis(spec, splits, layout.size(*over))
    if over and place is not None:
        splits[place] = over
    return Placement(tuple(splits))


def fsdp_axes(spec: ParameterSpec) -> tuple[str, ...]:
    """The mesh axes whose devices share what tp and ep leave of a tensor."""
    return ("dp_shard", "cp") if "experts" in spec.axes else ("dp_shard", "ep", "cp")


def _fsdp_axis(spec: ParameterSpec, splits: list[tuple[str, ...]], parts: int) -> int | None:
    """The axis to split into this many parts: one that is whole, and whose size is divisible."""
    able = [
        place
        for place, (axis, size) in enumerate(zip(spec.axes, spec.shape, strict=True))
        if not splits[place] and axis not in WHOLE and size % parts == 0
    ]
    return max(able, key=lambda place: (spec.axes[place] == "embed", spec.shape[place]), default=None)


def stage_layers(n_layers: int, pp: int) -> list[range]:
    """Layers of each pipeline stage: as many in each, the first ones with one more where the number does not divide."""
    short, longer = divmod(n_layers, pp)
    starts = [stage * short + min(stage, longer) for stage in range(pp + 1)]
    return [range(start, stop) for start, stop in itertools.pairwise(starts)]


def stage_of(name: str, n_layers: int, pp: int) -> int:
    """The pipeline stage that holds a tensor of a text model, or a moment of it: the first has the embedding, the last
    what follows the layers.
    """
    number = re.search(r"(?:^|\.)layers\.(\d+)\.", name)
    if number is None:
        return 0 if name.endswith(EMBEDDING) else pp - 1
    stages = enumerate(stage_layers(n_layers, pp))
    return next((stage for stage, layers in stages if int(number[1]) in layers), pp - 1)


def elements_held(specs: Iterable[tuple[ParameterSpec, int]], layout: Layout, *, gathered: bool = False) -> int:
    """Elements of (tensor, number of such tensors) that no device's parts exceed; ``gathered`` as for `placement`."""
    parts = (
        (placement(spec, layout, gathered=gathered).largest_part(spec.shape, layout), copies) for spec, copies in specs
    )
    return sum(math.prod(shape) * copies for shape, copies in parts)


def refusals(config: JobConfig) -> list[str]:
    """Why a model can't be trained in the layout of its config, a line for each reason; [] if it can."""
    layout = config.distributed
    found = [*config.layout_problems(), *_tensor_parallel(config, layout.tp), *_expert_parallel(config, layout.ep)]
    return [*found, *_context_parallel(config, layout.cp), *_pipeline(config, layout.pp)]


def has_axes(backend: str, layout: DistributedConfig) -> bool:
    """Whether a backend has all mesh axes that a layout makes use of."""
    return not any(getattr(layout, axis) > 1 and backend not in having for axis, having in SOME_BACKENDS.items())


def unsupported(config: JobConfig, backend: str, tower: TowerConfig | None, platform: str = "cpu") -> list[str]:
    """Why a backend can't use a layout, in which a model could be trained, on the devices of a platform, as "cpu" or
    "gpu"; a line for each reason. (XLA can't divide cuDNN's attention where it has a part of the mesh.)

    Args:
        tower: the vision tower of the job, if it has one.
    """
    layout = config.distributed
    problems = [
        f"distributed.{axis} = {size}: must be 1 for backend {backend}"
        for axis, having in SOME_BACKENDS.items()
        if (size := getattr(layout, axis)) > 1 and backend not in having
    ]
    if backend == "torch" and tower is not None and tower.n_heads % layout.tp:
        problems.append(
            f"distributed.tp = {layout.tp}: must divide vision_encoder.n_heads = {tower.n_heads} for backend torch"
        )
    if layout.tp > 1 and (backend, platform) == ("jax", "gpu"):
        problems.append(f"distributed.tp = {layout.tp}: must be 1 for backend jax on GPUs")
    return problems


def _tensor_parallel(config: JobConfig, tp: int) -> Iterator[str]:
    """Widths and heads of modalities; a vocabulary may be cut unevenly."""
    model, vlm = config.model, config.vlm
    sizes: dict[str, int] = {}
    if not config.experts_choose:
        sizes["model.ffn_hidden_dim"] = model.computed_ffn_hidden_dim
    if config.has_routers:
        sizes["width of an expert"] = model.computed_expert_ffn_hidden_dim
    if vlm is not None:
        sizes |= {f"vlm.{name}": heads for name, heads in vlm.own_heads(model).items()}
    yield from (f"distributed.tp = {tp}: must divide {name} = {size}" for name, size in sizes.items() if size % tp)
    if tp > 1 and model.qk_norm and model.qk_norm_over == "width":
        yield f"distributed.tp = {tp}: must be 1 for model.qk_norm_over = 'width'"


def _expert_parallel(config: JobConfig, ep: int) -> Iterator[str]:
    if ep > 1 and config.model.is_moe and not config.model.moe_packed_experts:
        yield f"model.moe_packed_experts = False: must be True for distributed.ep = {ep}"


def _context_parallel(config: JobConfig, cp: int) -> Iterator[str]:
    """Which tokens an expert has room for depends on those of the other parts, as experts' own choices do."""
    if cp == 1:
        return
    if config.train.seq_len % cp:
        yield f"distributed.cp = {cp}: must divide train.seq_len = {config.train.seq_len}"
    if config.vlm is not None:
        yield f"distributed.cp = {cp}: must be 1 for vlm.arch = {config.vlm.arch!r}"
    if config.model.is_moe and config.model.moe_capacity_factor > 0:
        factor = config.model.moe_capacity_factor
        yield f"model.moe_capacity_factor = {factor}: must be 0 for distributed.cp = {cp}"


def _pipeline(config: JobConfig, pp: int) -> Iterator[str]:
    if pp == 1:
        return
    if config.vlm is not None:
        yield f"distributed.pp = {pp}: must be 1 for vlm.arch = {config.vlm.arch!r}"
    if config.model.tie_embeddings:
        yield f"model.tie_embeddings = True: must be False for distributed.pp = {pp}"
    if config.model.is_moe:
        yield f"distributed.pp = {pp}: must be 1 for model.num_experts = {config.model.num_experts}"
    if config.train.grad_accum_steps < pp:
        yield f"train.grad_accum_steps = {config.train.grad_accum_steps}: must be at least distributed.pp = {pp}"
