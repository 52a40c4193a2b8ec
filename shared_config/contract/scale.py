"""What a layout costs at scale: memory, time between two bounds, and what limits it. On paper: what hardware does is
given, not measured.

    compute      FLOPs of a device / (its peak * the share of it that matrix products reach)
    transfer     bytes sent / bandwidth + hops of a ring * latency, of the slowest link that the devices of a collective
                 need: devices lie in nodes in the order of `MESH_AXES`, the last axis innermost
    exposed      transfers that the next product waits for: of tp, ep and cp
    hidden       transfers beside products, if the bandwidth suffices: of FSDP, of copies, between stages
    bubble       (stages - 1) / micro-batches of the time of all stages' work, in the order 1F1B (Narayanan et al. 2021,
                 arXiv:2104.04473, section 2.2.1)

    fastest      the larger of (compute + exposed) * (1 + bubble) and hidden
    slowest      (compute + exposed) * (1 + bubble) + hidden
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from shared_config.contract.activations import (
    buffer_bytes,
    compute_bytes,
    kept_bytes,
    logits_bytes,
    tokens_of_device,
    widening_flops,
)
from shared_config.contract.counts import FLOAT32, flops_per_token, gradient_bytes, held_elements, stage_groups
from shared_config.contract.moments import moments_of
from shared_config.contract.parameters import ParameterGroup, layer_groups, parameter_groups
from shared_config.contract.sharding import MESH_AXES, Layout, layout_of, placement, stage_layers
from shared_config.contract.specs import ParameterSpec
from shared_config.contract.traffic import Traffic, fsdp_elements, step_traffic
from shared_config.errors import UserError
from shared_config.schema.base import shown
from shared_config.schema.job import JobConfig

Stages = Sequence[Sequence[ParameterGroup]]

HIDDEN = frozenset({"weights", "gradients", "gradients of copies", "between stages"})
"""Purposes of transfers beside products; products that depend on each other stand around all others."""


@dataclass(frozen=True)
class Hardware:
    """What a device and its network do.

    Attributes:
        flops: of dense matrix products in bfloat16, a second, at the peak.
        share: of this peak, what the products of a model reach.
        memory: bytes of a device.
        node: devices that the fast network joins.
        near, far: bytes a second that a device sends, and gets at the same time, within a node and to other nodes.
        near_latency, far_latency: seconds of a hop.
    """

    flops: float = 989e12
    share: float = 0.6
    memory: float = 80e9
    node: int = 8
    near: float = 450e9
    far: float = 50e9
    near_latency: float = 2e-6
    far_latency: float = 5e-6


HARDWARE: Mapping[str, Hardware] = {
    "h100": Hardware(),
    "h200": Hardware(memory=141e9),
    "b200": Hardware(flops=2250e12, memory=180e9, near=900e9),
}
"""As NVIDIA's data sheets have an SXM module; 400 Gb/s of network for each, ``share`` and latencies are assumptions."""


def parse_hardware(text: str) -> Hardware:
    """As "h100", "h100,memory=96e9,far=25e9" or "flops=1e15,...", what isn't given as of an h100.

    Raises:
        UserError: an unknown name or field, or a value that is not positive.
    """
    first, *rest = text.split(",")
    found = HARDWARE.get(first)
    settings = rest if found is not None else [first, *rest]
    found = found or Hardware()
    names = [field.name for field in dataclasses.fields(Hardware)]
    changes: dict[str, float] = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if name not in names or not equals:
            allowed = f"{', '.join(HARDWARE)}, or settings of {', '.join(names)} as memory=96e9"
            raise UserError(f"--hardware = {shown(text)}: {shown(setting)} must be {allowed}")
        changes[name] = _positive(text, name, value)
    return dataclasses.replace(found, **changes)


def _positive(text: str, name: str, value: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    most = 1.0 if name == "share" else math.inf
    if not (0 < number <= most and math.isfinite(number)) or (name == "node" and number != int(number)):
        allowed = {"share": "above 0 and at most 1", "node": "a positive whole number"}.get(name, "a positive number")
        raise UserError(f"--hardware = {shown(text)}: {name} must be {allowed}")
    return int(number) if name == "node" else number


@dataclass(frozen=True)
class Memory:
    """Bytes of a device: what it holds throughout, and what it holds besides at the peak of a step.

    Attributes:
        states: parameters, gradients and moments.
        gathered: two blocks and what stands outside blocks, in the dtype of the arithmetic, and the gradients of the
            largest of these in that dtype and in float32; of experts that no other device holds, copies in that dtype.
        activations: kept for the backward pass, of all micro-batches on their way; of a layer that is recomputed all.
        logits: those that exist at a time, with their gradient.
        buffers: what stages of a pipeline receive in, and an evaluation has sent.
    """

    states: int
    gathered: int
    activations: int
    logits: int
    buffers: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.states + self.gathered + self.activations + self.logits + self.buffers


@dataclass(frozen=True)
class Cost:
    """Of a step in a layout.

    Attributes:
        devices: how many.
        tokens: of a step, on all devices.
        model_flops: of a step, on all devices: forward and backward, nothing twice.
        compute, exposed, hidden: seconds, as the module has them, of a device.
        bubble: idle time of a pipeline as a share of its work.
        traffic: collectives of a device.
    """

    layout: Layout
    micro_batches: int
    tokens: int
    model_flops: float
    memory: Memory
    traffic: tuple[Traffic, ...]
    compute: float
    exposed: float
    hidden: float
    bubble: float

    @property
    def devices(self) -> int:
        """How many."""
        return self.layout.devices

    @property
    def fastest(self) -> float:
        """Seconds of a step in which all that can be hidden is."""
        return max((self.compute + self.exposed) * (1 + self.bubble), self.hidden)

    @property
    def slowest(self) -> float:
        """Seconds of a step in which nothing is hidden."""
        return (self.compute + self.exposed) * (1 + self.bubble) + self.hidden

    def utilization(self, seconds: float, hardware: Hardware) -> float:
        """Share of the devices' peak that the model's FLOPs take (Chowdhery et al. 2022, arXiv:2204.02311, app. B)."""
        return self.model_flops / (seconds * self.devices * hardware.flops)


def cost_of(job: JobConfig, devices: int, hardware: Hardware, stages: Stages | None = None) -> Cost:
    """Of a step of a text model, in the layout of its config, on the device that has most to do.

    Args:
        stages: what `stage_groups` gives for the job; None: it is found here.

    Raises:
        ConfigError: a layout for another number of devices.
    """
    layout = layout_of(job.distributed, devices)
    traffic = tuple(step_traffic(job, layout))
    seconds = {True: 0.0, False: 0.0}
    for each in traffic:
        seconds[each.purpose in HIDDEN] += transfer_seconds(each, layout, hardware)
    micro_batches = job.train.grad_accum_steps
    tokens = job.train.batch_size * job.train.seq_len * micro_batches * layout.data_ranks
    return Cost(
        layout=layout,
        micro_batches=micro_batches,
        tokens=tokens,
        model_flops=float(flops_per_token(job.model, job.train.seq_len).training) * tokens,
        memory=memory_of(job, devices, stages),
        traffic=traffic,
        compute=device_flops(job, layout) / (hardware.flops * hardware.share),
        exposed=seconds[False],
        hidden=seconds[True],
        bubble=(layout.pp - 1) / micro_batches,
    )


def memory_of(job: JobConfig, devices: int, stages: Stages | None = None) -> Memory:
    """Bytes of the device that holds most. Arguments as for `cost_of`."""
    layout, model = layout_of(job.distributed, devices), job.model
    number, stages = compute_bytes(job), stage_groups(job) if stages is None else stages
    states = max(sum(_states(group, layout, job) for group in stage) for stage in stages)
    layers = len(stage_layers(model.n_layers, layout.pp)[0])
    routed = model.is_moe and model.moe_frequency <= model.n_layers
    kinds = [False, True] if routed and model.moe_frequency > 1 else [routed]
    own = max(kept_bytes(job, layout, is_moe=is_moe) for is_moe in kinds)
    again = max(kept_bytes(job, layout, is_moe=is_moe, mode="none") for is_moe in kinds) - own
    on_their_way = min(layout.pp, job.train.grad_accum_steps)
    block = max(held_elements(groups, layout, gathered=True) for groups in layer_groups(model))
    outside = held_elements(
        [group for group in parameter_groups(model) if not group.name.startswith("layers.")], layout, gathered=True
    )
    units = 2 * block + outside if layout.size("dp_shard", "ep", "cp") > 1 else 0
    units += max(_copied_experts(stage, layout, job) for stage in stages)
    return Memory(
        states=states,
        gathered=units * number + max(block, outside) * (number + FLOAT32),
        activations=layers * on_their_way * own + again,
        logits=logits_bytes(job, layout),
        buffers=buffer_bytes(job, layout),
    )


def _states(group: ParameterGroup, layout: Layout, job: JobConfig) -> int:
    """Bytes of tensors that are trained, of their gradients and their moments, on one device."""
    kept = FLOAT32 * (1 + len(moments_of(job.optimizer, group.name, group.spec)))
    return (kept + gradient_bytes(group.spec, job, layout)) * _held(group.spec, layout) * group.copies


def _copied_experts(groups: Sequence[ParameterGroup], layout: Layout, job: JobConfig) -> int:
    """Elements of experts that no other device holds: layers cast them, and keep the copies unless computed again."""
    is_alone = layout.ep > 1 and layout.size("dp_replicate", "dp_shard", "cp") == 1
    if not is_alone or not job.train.casts or job.train.activation_checkpointing != "none":
        return 0
    return held_elements([group for group in groups if "experts" in group.spec.axes], layout, gathered=True)


def _held(spec: ParameterSpec, layout: Layout) -> int:
    """Elements of a tensor that is trained on one device."""
    if spec.is_buffer:
        return 0
    shared = fsdp_elements(spec, layout)
    return math.prod(placement(spec, layout).largest_part(spec.shape, layout)) if shared is None else shared


def device_flops(job: JobConfig, layout: Layout) -> float:
    """Of a step: forward, twice as much backward, and what is recomputed; of the stage with most layers, and the head.
    Where cp has parts of sequences, attention computes masked keys too.
    """
    model, length = job.model, job.train.seq_len
    flops = flops_per_token(model, length)
    head = 2 * model.vocab_size * model.dim
    attention = flops.attention * (2 * length / (length + 1) if layout.cp > 1 else 1)
    share = len(stage_layers(model.n_layers, layout.pp)[0]) / model.n_layers
    blocks = (flops.matmul - head + attention) * share
    times = 4 if job.train.activation_checkpointing == "full" else 3
    again = 0.0
    if job.train.activation_checkpointing == "narrow":
        routed = model.n_layers // model.moe_frequency if model.is_moe else 0
        kinds = ((False, model.n_layers - routed), (True, routed))
        again = share * sum(layers * widening_flops(job, layout, is_moe=is_moe) for is_moe, layers in kinds if layers)
    tokens = tokens_of_device(job, layout) * job.train.grad_accum_steps
    return tokens * ((times * blocks + 3 * head) / layout.tp + again)


def transfer_seconds(traffic: Traffic, layout: Layout, hardware: Hardware) -> float:
    """Of all its collectives, one after another."""
    outermost = min(MESH_AXES.index(axis) for axis in traffic.axes)
    stride = layout.size(*MESH_AXES[MESH_AXES.index(traffic.axes[-1]) + 1 :])
    is_near = layout.size(*MESH_AXES[outermost:]) <= hardware.node
    together = traffic.ranks if is_near else max(1, min(traffic.ranks, hardware.node // stride))
    hops = 1 if traffic.kind in ("send", "all-to-all") else traffic.ranks - 1
    far = 0 if is_near else hops if hops == 1 else -(-traffic.ranks // together) - 1
    latency = far * hardware.far_latency + (hops - far) * hardware.near_latency
    ways = 2 if traffic.kind == "all-reduce" else 1
    return traffic.sent / (hardware.near if is_near else hardware.far) + traffic.count * ways * latency


def candidates(job: JobConfig, devices: int, step_tokens: int) -> Iterator[JobConfig]:
    """The job in layouts of powers of two on so many devices, with as many micro-batches as a step of about so many
    tokens has; only those whose step is not larger than that.
    """
    model, rows = job.model, step_tokens // (job.train.seq_len * job.train.batch_size)
    powers = [2**power for power in range(4)]
    experts = [ep for ep in (1, 8, 64, 128) if ep == 1 or (model.is_moe and model.num_experts % ep == 0)]
    for tp, pp, cp, ep in (
        (tp, pp, cp, ep) for tp in powers for pp in (*powers, 16) for cp in (1, 2) for ep in experts
    ):
        ranks, left = divmod(devices, tp * pp * cp)
        if left or ranks % ep or ranks > rows:
            continue
        for copies in (1, 8, 64):
            if ranks % (copies * ep) == 0:
                yield _laid_out(job, tp=tp, pp=pp, cp=cp, ep=ep, dp_replicate=copies, micro_batches=rows // ranks)


def _laid_out(job: JobConfig, micro_batches: int, **sizes: int) -> JobConfig:
    layout = job.distributed.replace(dp_shard=-1, **sizes)
    return job.replace(distributed=layout, train=job.train.replace(grad_accum_steps=micro_batches))
