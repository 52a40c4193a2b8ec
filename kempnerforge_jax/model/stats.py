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

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Num

from kempnerforge_jax.model.embedding import FactoredLogits
from kempnerforge_jax.model.kv_cache import KVCache
from kempnerforge_jax.model.module import Module, named_variables
from kempnerforge_jax.model.wrappers import unwrap
from shared_config.contract.routing import RouterId, by_router


class RouterStats(NamedTuple):
    """What one call of a router counted, and its losses, over the valid tokens.

    Attributes:
        aux_loss: scalar, at least float32: the balancing loss, unweighted.
        z_loss: scalar, at least float32: mean(logsumexp(logits)^2) (Zoph et al. 2022, arXiv:2202.08906), unweighted.
        expert_counts: int32 (E,), assignments to each expert, before any capacity.
        entropy: scalar, at least float32: mean entropy of the tokens' distributions over experts, in nats,
            without a gradient.
    """

    aux_loss: Float[Array, ""]
    z_loss: Float[Array, ""]
    expert_counts: Int[Array, "E"]
    entropy: Float[Array, ""]


class MoEStats(NamedTuple):
    """What one call of a mixture of experts counted, and its losses, over the valid tokens.

    Attributes:
        aux_loss, z_loss, expert_counts, entropy: as in `RouterStats`.
        dropped: int32 scalar, assignments beyond the capacity.
    """

    aux_loss: Float[Array, ""]
    z_loss: Float[Array, ""]
    expert_counts: Int[Array, "E"]
    entropy: Float[Array, ""]
    dropped: Int[Array, ""]


LayerStats = MoEStats | dict[str, MoEStats]
"""The stats of a layer's mixture, or modality -> those of its mixture."""
LayerCounts = Int[Array, "E"] | dict[str, Int[Array, "_E"]]
"""int32 (E,) of a layer's experts, or modality -> (_E,) of its experts."""


class RouterOutput(NamedTuple):
    """What a router of tokens computes.

    Attributes:
        weights: (T, k), at least float32: how much each assignment counts.
        indices: int32 (T, k), the experts chosen, best first.
        stats: what it counted, and its losses.
    """

    weights: Float[Array, "T k"]
    indices: Int[Array, "T k"]
    stats: RouterStats


class ExpertChoiceOutput(NamedTuple):
    """What a router whose experts choose tokens computes.

    Attributes:
        weights: (C, E), at least float32: scores of the tokens taken; 0 where an expert takes fewer than C.
        tokens: int32 (C, E), the tokens that each expert takes, best first.
        scores: (T, E), at least float32, of all tokens.
    """

    weights: Float[Array, "C E"]
    tokens: Int[Array, "C E"]
    scores: Float[Array, "T E"]


class MoEOutput(NamedTuple):
    """What a mixture of experts computes.

    Attributes:
        x: (B, S, D), in the dtype of its input.
        stats: what it counted, and the losses of its router.
    """

    x: Float[Array, "... D"]
    stats: MoEStats


class MoMaOutput(NamedTuple):
    """What mixtures of modality-aware experts compute.

    Attributes:
        x: (B, S, D), in the dtype of the input.
        stats: modality -> what its mixture counted.
    """

    x: Float[Array, "B S D"]
    stats: dict[str, MoEStats]


class BlockOutput(NamedTuple):
    """What a block computes.

    Attributes:
        x: the residual stream (B, S, D), or that of each modality, in the dtype of the input.
        stats: what its mixture of experts counted, by modality where there are several; None if dense.
        kv_cache: the one given, with the new tokens; None if none was given.
    """

    x: Float[Array, "B S D"] | dict[str, Float[Array, "B _S D"]]
    stats: LayerStats | None
    kv_cache: KVCache | None = None


class TransformerOutput(NamedTuple):
    """What a transformer computes.

    Attributes:
        logits: (B, S_out, V), or the residual stream (B, S_out, D) of a model without head; in the dtype of the
            weights. Also the stream where there are ``factors``.
        stats: layer -> what its mixtures of experts counted, and their losses; {} if dense.
        kv_caches: those given, with the new tokens; None if none were given.
        factors: of the logits, where these were asked for instead; else None.
    """

    logits: Float[Array, "B S_out V"]
    stats: dict[int, LayerStats]
    kv_caches: list[KVCache] | None = None
    factors: FactoredLogits | None = None


class StatsGetters(Module):
    """Base of routers and mixtures: the getters of the stats that a documented call kept.

    They report the last plain call of this module, or of one that holds it: ``model(tokens)`` sets those of all its
    routers. `run`, and what runs inside jit, leaves them alone.
    """

    num_experts: int

    def keep_stats(self, stats: RouterStats | MoEStats) -> None:
        """Make the getters report this call. Inside jit nothing happens."""
        self.keep(stats=stats)

    @property
    def aux_loss(self) -> Float[Array, ""]:
        """Scalar: the balancing loss of the last documented call; 0 before any."""
        stats = self._last_stats()
        return self._zero() if stats is None else stats.aux_loss

    @property
    def z_loss(self) -> Float[Array, ""]:
        """Scalar: the router z-loss of the last documented call; 0 before any."""
        stats = self._last_stats()
        return self._zero() if stats is None else stats.z_loss

    @property
    def expert_counts(self) -> Int[Array, "E"]:
        """int32 (E,): the assignments to each expert in the last documented call; 0 before any."""
        stats = self._last_stats()
        return jnp.zeros(self.num_experts, jnp.int32) if stats is None else stats.expert_counts

    def _last_stats(self) -> RouterStats | MoEStats | None:
        return self.kept("stats")

    def _zero(self) -> jax.Array:
        """In at least float32."""
        dtypes = (variable.get_value().dtype for _, variable in named_variables(self))
        return jnp.zeros((), jnp.promote_types(next(dtypes, jnp.float32), jnp.float32))


class ModelGetters(Module):
    """Base of transformers: the getters of the stats that a documented call kept. `run` leaves them alone."""

    layers: nnx.Dict[Module]

    def keep_stats(self, stats: dict[int, LayerStats]) -> None:
        """Make the getters report this call, in its layers too; unless after `eval`, count it for `update_moe_bias`.
        Inside jit nothing happens.
        """
        self.keep(stats=stats)
        for layer, own in stats.items():
            if str(layer) in self.layers:
                keep_stats(self.layers[str(layer)], own)
        if not self.deterministic:
            counts = by_router({layer: counts_of(own) for layer, own in stats.items()})
            self.keep(pending=added(self.kept("pending", {}), counts))

    def get_moe_aux_loss(self) -> Float[Array, ""]:
        """Sum of the balancing losses of the last documented call outside jit, unweighted; 0 if dense."""
        return self._summed("aux_loss")

    def get_moe_router_z_loss(self) -> Float[Array, ""]:
        """Sum of the router z-losses of the last documented call outside jit, unweighted; 0 if dense."""
        return self._summed("z_loss")

    def get_expert_counts(self) -> dict[int, LayerCounts]:
        """Layer -> (E,) assignments of the last documented call outside jit, by modality where there are several; {} if
        dense.
        """
        return {layer: counts_of(stats) for layer, stats in self._last_stats().items()}

    def get_moma_expert_counts(self) -> dict[int, dict[str, Int[Array, "_E"]]]:
        """Layer -> modality -> (_E,) tokens of the last documented call outside jit; {} without modality-aware
        experts.
        """
        counts = self.get_expert_counts()
        return {layer: own for layer, own in counts.items() if isinstance(own, dict)}

    def _last_stats(self) -> dict[int, LayerStats]:
        return self.kept("stats", {})

    def _summed(self, field: str) -> jax.Array:
        total = jnp.zeros((), jnp.float32)
        for stats in self._last_stats().values():
            for router_stats in routers(stats):
                total = total + getattr(router_stats, field)
        return total


def keep_stats(module: nnx.Module, stats: RouterStats | LayerStats | None) -> None:
    """Make the getters of a module report a call: of a router, a mixture, mixtures by modality, or the ``mlp`` of a
    block. Other modules have none.
    """
    if stats is None:
        return
    own: Any = unwrap(module)
    if isinstance(own, StatsGetters) and not isinstance(stats, dict):
        own.keep_stats(stats)
    elif isinstance(own, nnx.Dict) and isinstance(stats, dict):
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
    total: Mapping[RouterId, Num[Array, "_E"]], counts: Mapping[RouterId, Num[Array, "_E"]]
) -> dict[RouterId, Num[Array, "_E"]]:
    """Counts by router, added up; a router that only one of them has keeps its own."""
    return {**total, **{router: total[router] + own if router in total else own for router, own in counts.items()}}
