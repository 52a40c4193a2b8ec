"""What a device sends and receives during a training step of PyTorch, in any parallel layout of a text model.

    weights      gathered by FSDP, a block at a time, forward and again backward; the rest of the model once for both
    gradients    scattered sums of FSDP after each micro-batch, then sums over copies of the model
    sums         of what tp splits: outputs of o_proj and down_proj forward, inputs of the others backward
    positions    of the stream, where tp divides them: gathered before attention and feed-forward parts, the sums of
                 these scattered, and the other way round backward, in place of sums but those within mixtures
    tokens       gathered along ep, with their routes, and sums of what experts make of them scattered; backward the
                 gradients of results are gathered, sums of those of tokens and of weights of routes scattered,
                 of tokens by an exchange of summands where these are narrow; or, as `gathers_tokens` says:
    rows         of tokens that go to experts on other devices and come back, forward and backward
    keys         and values of a block, gathered along cp, their gradients scattered; what routers measure
    boundary     between pipeline stages: the residual stream forward, its gradient backward

Sources: Rajbhandari et al. 2020 (arXiv:1910.02054, section 7) for FSDP, Shoeybi et al. 2019 (arXiv:1909.08053,
section 3) and Korthikanti et al. 2022 (arXiv:2205.05198) for tp, Lepikhin et al. 2021 (arXiv:2006.16668) for ep,
Narayanan et al. 2021 (arXiv:2104.04473, section 3) for pp. The counts are those of this project's PyTorch backend:
tests/distributed/test_traffic.py counts what runs.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from shared_config.contract.activations import (
    compute_bytes,
    gathers_tokens,
    logits_rows,
    stream_parts,
    tokens_of_device,
)
from shared_config.contract.counts import FLOAT32, is_routed_expert
from shared_config.contract.parameters import EMBEDDING, ParameterGroup, parameter_groups
from shared_config.contract.sharding import TOKEN_AXES, Layout, fsdp_axes, placement, stage_layers
from shared_config.contract.specs import ParameterSpec
from shared_config.schema.job import JobConfig

INDEX = 8
"""Bytes of the number of an expert."""
CROSS_ENTROPY_SUMS = 3
"""Where tp splits the vocabulary: of a token the highest logit, the sum of exponentials, the logit of the label."""


@dataclass(frozen=True)
class Traffic:
    """Collectives of one kind that a device takes part in during a step.

    Attributes:
        purpose: what for, in a word or two.
        kind: "all-gather", "reduce-scatter", "all-reduce", "all-to-all" or "send".
        axes: of the mesh, along which the ``ranks`` devices lie.
        count: how often.
        bytes: of its operands or its results, whichever are more, all times together. Of an exchange the rows sent.
    """

    purpose: str
    kind: str
    axes: tuple[str, ...]
    ranks: int
    count: int
    bytes: int

    @property
    def sent(self) -> float:
        """Bytes that leave the device, as many as reach it, by the algorithms of a ring (Rabenseifner 2004): a
        reduction of all parts is a scattered one, and a gathering; of exchanged rows those for others, if experts get
        equal shares.
        """
        if self.kind == "send":
            return float(self.bytes)
        ways = 2 if self.kind == "all-reduce" else 1
        return ways * self.bytes * (self.ranks - 1) / self.ranks


def step_traffic(job: JobConfig, layout: Layout) -> list[Traffic]:
    """All of a step but scalars and counts by expert, of the device with the most; what is sent along one device is
    left out.

    A capacity of experts, which can only make rows fewer, is not taken into account.
    """
    step = _Step(job, layout, list(_largest_stage(job, layout.pp)))
    parts = (step.weights(), step.whole_gradients(), step.tensor_parallel(), step.expert_parallel())
    found = [each for part in (*parts, step.context_parallel(), step.pipeline()) for each in part]
    return [each for each in found if each.ranks > 1 and each.bytes]


@functools.lru_cache(maxsize=1024)
def fsdp_elements(spec: ParameterSpec, layout: Layout) -> int | None:
    """Elements that a device holds of a tensor that FSDP splits, padding included; None if FSDP leaves it alone.

    What no axis of can be divided is split unevenly along the first, unless tp or ep splits it.
    """
    if spec.full_precision or spec.is_buffer:
        return None
    ranks = layout.size(*fsdp_axes(spec))
    split, ruled = placement(spec, layout), placement(spec, layout, gathered=True)
    part = list(ruled.largest_part(spec.shape, layout))
    if split != ruled:
        return math.prod(split.largest_part(spec.shape, layout))
    if not any(ruled.splits):
        return -(-part[0] // ranks) * math.prod(part[1:])
    return math.prod(part) if ranks == 1 and not all(ruled.splits) else None


def _largest_stage(job: JobConfig, pp: int) -> Iterator[ParameterGroup]:
    """The tensors of a stage that has most layers, of each kind its share of them, and of what comes before the layers
    or after them the larger: as much as any stage has, and more if the stages differ in layers.
    """
    groups = list(parameter_groups(job.model, job.vlm))
    if pp == 1:
        yield from groups
        return
    layers = len(stage_layers(job.model.n_layers, pp)[0])
    ends = [[group for group in groups if (group.name == EMBEDDING) == first] for first in (True, False)]
    before, after = ([group for group in end if not group.name.startswith("layers.")] for end in ends)
    yield from max(before, after, key=lambda end: sum(group.size for group in end))
    for group in groups:
        if group.name.startswith("layers."):
            yield replace(group, copies=-(-group.copies * layers // job.model.n_layers))


@dataclass(frozen=True)
class _Step:
    job: JobConfig
    layout: Layout
    groups: Sequence[ParameterGroup]

    @property
    def micro_batches(self) -> int:
        return self.job.train.grad_accum_steps

    @property
    def layers(self) -> int:
        """Of a stage that has most."""
        return len(stage_layers(self.job.model.n_layers, self.layout.pp)[0])

    @property
    def moe_layers(self) -> int:
        """Of these, with experts; their share of them."""
        model = self.job.model
        every = model.n_layers // model.moe_frequency if model.is_moe else 0
        return -(-every * self.layers // model.n_layers)

    @property
    def again(self) -> int:
        """How often a block is computed once more, for the backward pass."""
        return int(self.job.train.activation_checkpointing != "none")

    def exchange(self, purpose: str, kind: str, axes: Sequence[str], count: int, size: int) -> Traffic:
        """``count`` times per micro-batch, ``size`` bytes in all of these."""
        several = tuple(axis for axis in axes if self.layout.size(axis) > 1)
        number = self.micro_batches
        return Traffic(purpose, kind, several, self.layout.size(*several), count * number, size * number)

    def weights(self) -> Iterator[Traffic]:
        """Of each unit that is gathered together: of blocks, of what stands outside them, of experts that ep splits."""
        layout, layers = self.layout, self.layers
        blocks, experts, rest = 0, 0, 0
        for group in self.groups:
            held = (fsdp_elements(group.spec, layout) or 0) * group.copies
            if not group.name.startswith("layers."):
                rest += held
            elif "experts" in group.spec.axes and layout.ep > 1:
                experts += held
            else:
                blocks += held
        parts = bool(self.job.model.moe_shared_experts) + self.job.model.moe_shared_expert_gate
        shared = self.moe_layers * parts * (layout.ep > 1 and layout.size("dp_replicate", "dp_shard", "cp") > 1)
        yield from self._gathered(("dp_shard", "ep", "cp"), layers + shared, blocks, rest)
        if experts:
            yield from self._gathered(("dp_shard", "cp"), self.moe_layers, experts, 0)

    def _gathered(self, axes: tuple[str, ...], units: int, blocks: int, rest: int) -> Iterator[Traffic]:
        ranks, others = self.layout.size(*axes), int(rest > 0)
        whole = ranks * (2 * blocks + rest) * compute_bytes(self.job)
        yield self.exchange("weights", "all-gather", axes, 2 * units + others, whole)
        summed = (blocks + rest) * FLOAT32
        yield self.exchange("gradients", "reduce-scatter", axes, units + others, summed * ranks)
        yield self.exchange("gradients of copies", "all-reduce", ("dp_replicate",), units + others, summed)

    def whole_gradients(self) -> Iterator[Traffic]:
        """Once a step: of tensors that FSDP leaves whole, and of those that all heads or positions share."""
        trained = [group for group in self.groups if not group.spec.is_buffer]
        whole = sum(
            math.prod(placement(group.spec, self.layout).largest_part(group.spec.shape, self.layout)) * group.copies
            for group in trained
            if fsdp_elements(group.spec, self.layout) is None
        )
        shared = sum(
            (fsdp_elements(group.spec, self.layout) or 0) * group.copies
            for group in trained
            if "head_dim" in group.spec.axes or (self.stream > 1 and self._sees_positions(group))
        )
        for purpose, axes, size in (
            ("gradients of whole tensors", TOKEN_AXES, whole),
            ("gradients of norms", ("tp",), shared),
        ):
            each = self.exchange(purpose, "all-reduce", axes, 1, size * FLOAT32)
            yield Traffic(purpose, each.kind, each.axes, each.ranks, 1, size * FLOAT32)

    def tensor_parallel(self) -> Iterator[Traffic]:
        """Forward the outputs of what is split by its inputs, backward the inputs of what is split by its outputs;
        where the stream is divided, only of shared experts.
        """
        model, tokens = self.job.model, tokens_of_device(self.job, self.layout)
        size, ends = tokens * model.dim * compute_bytes(self.job), 2 if self.layout.pp == 1 else 1
        linear = [
            (group.spec.axes, group.copies)
            for group in self.groups
            if len(group.spec.shape) == 2
            and group.name.startswith("layers.")
            and not is_routed_expert(group.name)
            and (self.stream == 1 or ".shared_expert." in group.name)
        ]
        outputs = sum(copies for axes, copies in linear if axes[0] in ("heads", "kv_heads", "mlp"))
        inputs = sum(copies for axes, copies in linear if axes[1] in ("heads", "mlp"))
        ends_with_sum = bool(model.moe_shared_experts) and not model.moe_shared_expert_gate
        unshared = 0 if ends_with_sum else self.moe_layers
        last = 0 if self.ends_with_norm else (self.layers if self.stream == 1 else self.moe_layers) - unshared
        forward = inputs + self.again * (inputs - last)
        routed = self.moe_layers * (self.summed * FLOAT32 + compute_bytes(self.job)) * tokens * model.dim
        routed += self.moe_layers * tokens * model.moe_top_k * FLOAT32
        yield self.exchange("sums of blocks", "all-reduce", ("tp",), forward + outputs, (forward + outputs) * size)
        yield from self._positions(size)
        yield self.exchange("sums of embedding and head", "all-reduce", ("tp",), ends, ends * size)
        yield self.exchange("sums of experts", "all-reduce", ("tp",), self.moe_layers * (self.summed + 2), routed)
        logits = CROSS_ENTROPY_SUMS * tokens * FLOAT32
        chunks = -(-tokens // logits_rows(self.job, self.layout))
        yield self.exchange("cross entropy", "all-reduce", ("tp",), CROSS_ENTROPY_SUMS * chunks, logits)

    def _positions(self, size: int) -> Iterator[Traffic]:
        """Gathered before both parts of a layer and after the last, also backward where they were scattered or cut, as
        at the first layer; scattered after products, also backward where they were gathered for them.
        """
        if self.stream == 1:
            return
        dense = self.layers - self.moe_layers
        gathered = 2 * self.layers * (2 + self.again) + 2
        scattered = 2 * (self.layers + dense) + self.again * (self.layers + dense * self.ends_with_norm)
        yield self.exchange("positions", "all-gather", ("tp",), gathered, gathered * size)
        yield self.exchange("sums of positions", "reduce-scatter", ("tp",), scattered, scattered * size)

    @property
    def stream(self) -> int:
        """Parts of the positions along tp."""
        return stream_parts(self.job, self.layout)

    def _sees_positions(self, group: ParameterGroup) -> bool:
        """Whether a tensor of a layer is whole on every rank along tp and used for its own positions."""
        splits = placement(group.spec, self.layout, gathered=True).splits
        of_mixture = "routes" in group.spec.axes or ".shared_expert" in group.name
        return group.name.startswith("layers.") and not of_mixture and not any("tp" in axes for axes in splits)

    def expert_parallel(self) -> Iterator[Traffic]:
        """Tokens, or there and back, forward and backward."""
        model, number, layers = self.job.model, compute_bytes(self.job), self.moe_layers
        tokens, forward = tokens_of_device(self.job, self.layout), 1 + self.again
        if not gathers_tokens(self.job, self.layout):
            rows, times = tokens * model.moe_top_k * model.dim * number, layers * 2 * (1 + forward)
            yield self.exchange("rows of experts", "all-to-all", ("ep",), times, times * rows)
            return
        all_tokens, kinds = layers * self.layout.ep * tokens, 2 + model.moe_gradient_scale
        routes = model.moe_top_k * (INDEX + (kinds - 1) * FLOAT32)
        gathered = all_tokens * (model.dim * number * (forward + 1) + routes * forward)
        wide = int(number >= FLOAT32)
        summed = all_tokens * FLOAT32 * (model.dim * (self.summed + wide) + model.moe_top_k)
        narrow = all_tokens * model.dim * number * (1 - wide)
        yield self.exchange("tokens of experts", "all-gather", ("ep",), layers * ((1 + kinds) * forward + 1), gathered)
        yield self.exchange("sums of tokens", "reduce-scatter", ("ep",), layers * (self.summed + 1 + wide), summed)
        yield self.exchange("gradients of tokens", "all-to-all", ("ep",), layers * (1 - wide), narrow)

    @property
    def summed(self) -> int:
        """How often results of routed experts are summed: not again for the backward pass where they end a layer."""
        return 1 + self.again * (self.job.model.moe_shared_experts > 0 or self.ends_with_norm)

    @property
    def ends_with_norm(self) -> bool:
        """Whether a norm follows the last product of a layer, and needs what comes of it for its own gradient."""
        return self.job.model.norm_placement != "before"

    def context_parallel(self) -> Iterator[Traffic]:
        """Keys and values of whole sequences; logits, scores and choices of all experts."""
        model, cp = self.job.model, self.layout.cp
        tokens, times, heads = (
            tokens_of_device(self.job, self.layout) * cp,
            1 + self.again,
            model.kv_heads // self.layout.tp,
        )
        keys = 2 * self.layers * tokens * heads * model.head_size * compute_bytes(self.job)
        measured = self.moe_layers * tokens * (2 * model.num_experts * FLOAT32 + model.moe_top_k * INDEX)
        yield self.exchange("keys and values", "all-gather", ("cp",), times * self.layers, times * keys)
        yield self.exchange("gradients of keys and values", "reduce-scatter", ("cp",), self.layers, keys)
        yield self.exchange(
            "what routers measure", "all-gather", ("cp",), times * 3 * self.moe_layers, times * measured
        )

    def pipeline(self) -> Iterator[Traffic]:
        """What a stage gives to the next, and the gradient that it gives to the one before; of two each has one."""
        size = tokens_of_device(self.job, self.layout) * self.job.model.dim * compute_bytes(self.job)
        sides = 2 if self.layout.pp > 2 else 1
        yield self.exchange("between stages", "send", ("pp",), sides, sides * size)
