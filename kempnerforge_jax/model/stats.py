"""What blocks and transformers give, and what their routers counted.

Shapes: B batch, S positions of the residual stream, D model dim, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax

from kempnerforge_jax.model.kv_cache import KVCache


class BlockOutput(NamedTuple):
    """What a block computes.

    Attributes:
        x: the residual stream (B, S, D), or that of each modality.
        stats: what its router counted, and its losses, by modality where there are several; None if dense.
        kv_cache: the one given, with the new tokens; None if none was given.
    """

    x: jax.Array | dict[str, jax.Array]
    stats: Any
    kv_cache: KVCache | None = None


class TransformerOutput(NamedTuple):
    """What a forward computes.

    Attributes:
        logits: (B, S_out, V), or the residual stream (B, S_out, D) of a model without head.
        stats: layer -> what its routers counted, and their losses; {} if dense.
        kv_caches: those given, with the new tokens; None if none were given.
    """

    logits: jax.Array
    stats: dict[int, Any]
    kv_caches: list[KVCache] | None = None


def routers(stats: Any) -> list[Any]:
    """The stats of each router of a layer: one, or one per modality."""
    return list(stats.values()) if isinstance(stats, dict) else [stats]


def counts_of(stats: Any) -> Any:
    """The choices of each expert of a layer, by modality where there are several routers."""
    if isinstance(stats, dict):
        return {modality: router_stats.expert_counts for modality, router_stats in stats.items()}
    return stats.expert_counts


def added(total: dict[Any, Any], counts: dict[Any, Any]) -> dict[Any, Any]:
    """Two nested dicts of counts, added up; what only one of them has counts too."""
    total = dict(total)
    for key, value in counts.items():
        if isinstance(value, dict):
            total[key] = added(total.get(key, {}), value)
        else:
            total[key] = total[key] + value if key in total else value
    return total
