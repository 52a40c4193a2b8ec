"""What each level of a model returns (routers, mixtures of experts, blocks, transformers), and the getters of their
stats.

A documented call (``router(x)``, ``model(tokens)``) returns what the level computes, and keeps the stats of its routers
for the getters, in this module and in those within it. ``run`` always returns the same struct, with the stats in it,
and keeps nothing. Levels call each other with ``return_stats=True``, which is the same through a module's ``__call__``,
where hooks and compilers are.

Shapes: B batch, S positions of the residual stream, T = B * S tokens, D model dim, V vocabulary, E experts (_E of a
modality, each its own number), k assignments of each token, C tokens that an expert may take, S_out positions with
logits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int, Num
from torch import Tensor, nn

from kempnerforge_torch.model.embedding import FactoredLogits
from kempnerforge_torch.model.kv_cache import KVCache
from kempnerforge_torch.model.wrappers import unwrap
from shared_config.contract.routing import RouterId, by_router


class RouterStats(NamedTuple):
    """What one call of a router counted, and its losses, over the valid tokens.

    Attributes:
        aux_loss: scalar, at least float32: the balancing loss, unweighted, with the graph.
        z_loss: scalar, at least float32: mean(logsumexp(logits)^2) (Zoph et al. 2022, arXiv:2202.08906), unweighted,
            with the graph.
        expert_counts: int32 (E,), assignments to each expert, before any capacity.
        entropy: scalar, at least float32: mean entropy of the tokens' distributions over experts, in nats, without a
            graph.
    """

    aux_loss: Float[Tensor, ""]
    z_loss: Float[Tensor, ""]
    expert_counts: Int[Tensor, "E"]
    entropy: Float[Tensor, ""]


class MoEStats(NamedTuple):
    """What one call of a mixture of experts counted, and its losses, over the valid tokens.

    Attributes:
        aux_loss, z_loss, expert_counts, entropy: as in `RouterStats`.
        dropped: int32 scalar, assignments beyond the capacity.
    """

    aux_loss: Float[Tensor, ""]
    z_loss: Float[Tensor, ""]
    expert_counts: Int[Tensor, "E"]
    entropy: Float[Tensor, ""]
    dropped: Int[Tensor, ""]


LayerStats = MoEStats | dict[str, MoEStats]
"""The stats of a layer's mixture, or modality -> those of its mixture."""
LayerCounts = Int[Tensor, "E"] | dict[str, Int[Tensor, "_E"]]
"""int32 (E,) of a layer's experts, or modality -> (_E,) of its experts."""


class RouterOutput(NamedTuple):
    """What a router of tokens computes.

    Attributes:
        weights: (T, k), at least float32: how much each assignment counts.
        indices: int64 (T, k), the experts chosen, best first.
        stats: what it counted, and its losses.
    """

    weights: Float[Tensor, "T k"]
    indices: Int[Tensor, "T k"]
    stats: RouterStats


class ExpertChoiceOutput(NamedTuple):
    """What a router whose experts choose tokens computes.

    Attributes:
        weights: (C, E), at least float32: scores of the tokens taken; 0 where an expert takes fewer than C.
        tokens: int64 (C, E), the tokens that each expert takes, best first.
        scores: (T, E), at least float32, of all tokens.
    """

    weights: Float[Tensor, "C E"]
    tokens: Int[Tensor, "C E"]
    scores: Float[Tensor, "T E"]


class MoEOutput(NamedTuple):
    """What a mixture of experts computes.

    Attributes:
        x: (B, S, D), in the dtype of its input.
        stats: what it counted, and the losses of its router.
    """

    x: Float[Tensor, "... D"]
    stats: MoEStats


class MoMaOutput(NamedTuple):
    """What mixtures of modality-aware experts compute.

    Attributes:
        x: (B, S, D), in the dtype of the input.
        stats: modality -> what its mixture counted.
    """

    x: Float[Tensor, "B S D"]
    stats: dict[str, MoEStats]


class BlockOutput(NamedTuple):
    """What a block computes.

    Attributes:
        x: the residual stream (B, S, D), or that of each modality, in the dtype of the input.
        stats: what its mixture of experts counted, by modality where there are several; None if dense.
        kv_cache: the one given, which was written to; None if none was given.
    """

    x: Float[Tensor, "B S D"] | dict[str, Float[Tensor, "B _S D"]]
    stats: LayerStats | None
    kv_cache: KVCache | None = None


class TransformerOutput(NamedTuple):
    """What a transformer computes.

    Attributes:
        logits: (B, S_out, V), or the residual stream (B, S_out, D) of a model without head; in the dtype of the
            weights. Also the stream where there are ``factors``.
        stats: layer -> what its mixtures of experts counted, and their losses; {} if dense.
        kv_caches: those given, which were written to; None if none were given.
        factors: of the logits, where these were asked for instead; else None.
    """

    logits: Float[Tensor, "B S_out V"]
    stats: dict[int, LayerStats]
    kv_caches: list[KVCache] | None = None
    factors: FactoredLogits | None = None


class StatsGetters(nn.Module):
    """Base of routers and mixtures: the getters of the stats that a documented call kept.

    They report the last plain call of this module, or of one that holds it: ``model(tokens)`` sets those of all its
    routers. `run`, and what runs inside compiled code, leaves them alone.
    """

    num_experts: int
    _last: RouterStats | MoEStats | None = None

    def keep_stats(self, stats: RouterStats | MoEStats) -> None:
        """Make the getters report this call. Inside compiled code nothing happens."""
        if not torch.compiler.is_compiling():
            self._last = stats

    @property
    def aux_loss(self) -> Float[Tensor, ""]:
        """Scalar: the balancing loss of the last documented call, with the graph; 0 before any."""
        return self._zeros() if self._last is None else self._last.aux_loss

    @property
    def z_loss(self) -> Float[Tensor, ""]:
        """Scalar: the router z-loss of the last documented call, with the graph; 0 before any."""
        return self._zeros() if self._last is None else self._last.z_loss

    @property
    def expert_counts(self) -> Int[Tensor, "E"]:
        """int32 (E,): the assignments to each expert in the last documented call; 0 before any."""
        if self._last is None:
            return self._zeros(self.num_experts, dtype=torch.int32)
        return self._last.expert_counts

    def _zeros(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Where the weights are; at least float32 if no dtype is given."""
        weight = next(self.parameters(), torch.zeros(()))
        dtype = torch.promote_types(weight.dtype, torch.float32) if dtype is None else dtype
        return torch.zeros(shape, dtype=dtype, device=weight.device)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles drop the last stats, which belong to a graph."""
        return {name: value for name, value in self.__dict__.items() if name != "_last"}


class ModelGetters(nn.Module):
    """Base of transformers: the getters of the stats that a documented call kept. `run` leaves them alone."""

    layers: nn.ModuleDict

    def __init__(self) -> None:
        super().__init__()
        self._last_stats: dict[int, LayerStats] = {}
        self._pending_counts: dict[RouterId, Tensor] = {}

    def keep_stats(self, stats: dict[int, LayerStats]) -> None:
        """Make the getters report this call, in its layers too; in training mode count it for `update_moe_bias`."""
        self._last_stats = stats
        for layer, own in stats.items():
            keep_stats(self.layers[str(layer)], own)
        if self.training:
            counts = by_router({layer: counts_of(own) for layer, own in stats.items()})
            self._pending_counts = added(self._pending_counts, counts)

    def get_moe_aux_loss(self) -> Float[Tensor, ""]:
        """Sum of the balancing losses of the last documented call, unweighted, with the graph; 0 if dense."""
        return self._summed("aux_loss")

    def get_moe_router_z_loss(self) -> Float[Tensor, ""]:
        """Sum of the router z-losses of the last documented call, unweighted, with the graph; 0 if dense."""
        return self._summed("z_loss")

    def get_expert_counts(self) -> dict[int, LayerCounts]:
        """Layer -> (E,) assignments of the last documented call, by modality where there are several; {} if dense."""
        return {layer: counts_of(stats) for layer, stats in self._last_stats.items()}

    def get_moma_expert_counts(self) -> dict[int, dict[str, Int[Tensor, "_E"]]]:
        """Layer -> modality -> (_E,) tokens of the last documented call; {} without modality-aware experts."""
        counts = self.get_expert_counts()
        return {layer: own for layer, own in counts.items() if isinstance(own, dict)}

    def _summed(self, field: str) -> Tensor:
        total = torch.zeros((), device=next(self.buffers()).device)
        for stats in self._last_stats.values():
            for router_stats in routers(stats):
                total = total + getattr(router_stats, field)
        return total

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles drop the last stats, which belong to a graph."""
        return {**self.__dict__, "_last_stats": {}}


def keep_stats(module: nn.Module, stats: RouterStats | LayerStats | None) -> None:
    """Make the getters of a module report a call: of a router, a mixture, mixtures by modality, or the ``mlp`` of a
    block. Other modules have none.
    """
    if stats is None or torch.compiler.is_compiling():
        return
    own: Any = unwrap(module)
    if isinstance(own, StatsGetters) and not isinstance(stats, dict):
        own.keep_stats(stats)
    elif isinstance(own, nn.ModuleDict) and isinstance(stats, dict):
        for modality, part in stats.items():
            keep_stats(own[modality], part)
    elif (inner := getattr(own, "mlp", getattr(own, "experts", None))) is not None:
        keep_stats(inner, stats)


def routers(stats: LayerStats) -> list[MoEStats]:
    """The stats of each router of a layer: one, or one per modality."""
    return list(stats.values()) if isinstance(stats, dict) else [stats]


def counts_of(stats: LayerStats) -> LayerCounts:
    """The assignments to each expert of a layer, by modality where there are several routers."""
    if isinstance(stats, dict):
        return {modality: router_stats.expert_counts for modality, router_stats in stats.items()}
    return stats.expert_counts


def added(
    total: Mapping[RouterId, Num[Tensor, "_E"]], counts: Mapping[RouterId, Num[Tensor, "_E"]]
) -> dict[RouterId, Num[Tensor, "_E"]]:
    """Counts by router, added up; a router that only one of them has keeps its own."""
    return {**total, **{router: total[router] + own if router in total else own for router, own in counts.items()}}
