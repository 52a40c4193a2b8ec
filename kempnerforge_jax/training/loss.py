"""Cross entropy of next-token labels, and the losses of routers.

Shapes: B batch, S sequence, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Integer

from kempnerforge_jax.model.checks import check_ids, check_shape, wide
from kempnerforge_jax.model.embedding import FactoredLogits
from kempnerforge_jax.model.stats import LayerStats, MoEStats
from kempnerforge_jax.training.head import loss_in_chunks
from shared_config.contract.labels import IGNORED
from shared_config.contract.routing import by_router


def cross_entropy(
    logits: Float[Array, "B S V"] | FactoredLogits,
    labels_BS: Integer[Array, "B S"],
    *,
    smoothing: float = 0.0,
    z_weight: float = 0.0,
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """Sum of logsumexp(logits) - logits[label] over the labels that are not -100, and the number of these labels.

    The arithmetic is in at least float32. Only the logits are kept for the backward pass, which computes the
    probabilities again; the compiler fuses the widening into its reductions, so no second array of their size exists.

    Args:
        logits: where their factors are given and they would be many, those of all tokens never exist together.
        smoothing: e; of each label then (1 - e) logits[label] + e mean(logits) is subtracted.
        z_weight: w; of each label w logsumexp(logits)^2 is added.

    Returns:
        sum: scalar, at least float32; 0 with gradient 0 if no label counts; inside jit NaN if a label is neither -100
            nor in [0, V).
        count: int32 scalar.

    Raises:
        ValueError: labels of another shape than the logits, or that are not integers; outside jit one that is neither
            -100 nor in [0, V).
    """
    if isinstance(logits, FactoredLogits):
        own = functools.partial(cross_entropy, smoothing=smoothing, z_weight=z_weight)
        return loss_in_chunks(own, logits, labels_BS, len(logits.weight))
    check_shape("labels", labels_BS, logits.shape[:-1])
    check_ids("labels", labels_BS, logits.shape[-1], IGNORED)
    labels_BS = wide(labels_BS)
    return _summed(logits, labels_BS, smoothing, z_weight), jnp.sum(labels_BS != IGNORED, dtype=jnp.int32)


def mean_cross_entropy(
    logits: Float[Array, "B S V"] | FactoredLogits,
    labels_BS: Integer[Array, "B S"],
    *,
    smoothing: float = 0.0,
    z_weight: float = 0.0,
) -> Float[Array, ""]:
    """`cross_entropy` per label that counts; 0 with gradient 0 if none does."""
    total, count = cross_entropy(logits, labels_BS, smoothing=smoothing, z_weight=z_weight)
    return total / jnp.maximum(count, 1)


def router_losses(stats: Mapping[int, LayerStats]) -> tuple[Float[Array, ""] | float, Float[Array, ""] | float]:
    """Balancing losses and z-losses of all routers, each summed, unweighted; 0 without any.

    Args:
        stats: of a `TransformerOutput`.
    """
    each = router_stats(stats)
    return sum((router.aux_loss for router in each), 0.0), sum((router.z_loss for router in each), 0.0)


def router_stats(stats: Mapping[int, LayerStats]) -> list[MoEStats]:
    """The stats of each router, layer by layer: one per layer, or one per modality."""
    return list(by_router(stats).values())


@functools.partial(jax.checkpoint, static_argnums=(2, 3))
def _summed(logits_BSV: jax.Array, labels_BS: jax.Array, smoothing: float, z_weight: float) -> jax.Array:
    wide_BSV = logits_BSV.astype(jnp.promote_types(logits_BSV.dtype, jnp.float32))
    is_label_BSV = labels_BS[..., None] == jnp.arange(logits_BSV.shape[-1], dtype=labels_BS.dtype)
    chosen_BS = jnp.where(is_label_BSV, wide_BSV, 0).sum(axis=-1)
    normalizer_BS = jax.nn.logsumexp(wide_BSV, axis=-1)
    loss_BS = normalizer_BS - chosen_BS
    if smoothing:
        loss_BS += smoothing * (chosen_BS - wide_BSV.mean(axis=-1))
    if z_weight:
        loss_BS += z_weight * jnp.square(normalizer_BS)
    loss_BS = jnp.where(is_label_BSV.any(axis=-1), loss_BS, jnp.nan)
    return jnp.where(labels_BS != IGNORED, loss_BS, 0).sum()
