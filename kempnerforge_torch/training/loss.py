"""Cross entropy of next-token labels, and the losses of routers.

Shapes: B batch, S sequence, V vocabulary, N = B*S positions.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Integer
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kempnerforge_torch.model.checks import check_ids, check_shape
from kempnerforge_torch.model.embedding import FactoredLogits
from kempnerforge_torch.model.stats import LayerStats, MoEStats
from kempnerforge_torch.training.head import loss_in_chunks
from shared_config.contract.labels import IGNORED
from shared_config.contract.routing import by_router

CHUNK_ELEMENTS = 2**24
"""Logits that are widened at a time: 64 MiB in float32."""


def cross_entropy(
    logits: Float[Tensor, "B S V"] | FactoredLogits,
    labels_BS: Integer[Tensor, "B S"],
    *,
    smoothing: float = 0.0,
    z_weight: float = 0.0,
    fused: bool = False,
) -> tuple[Float[Tensor, ""], Int[Tensor, ""]]:
    """Sum of logsumexp(logits) - logits[label] over the labels that are not -100, and the number of these labels.

    The arithmetic is in at least float32. Where the logits are many, the backward pass recomputes the probabilities,
    some rows at a time, so that no second array of their size is kept.

    Args:
        logits: where their factors are given and they would be many, those of all tokens never exist together.
        smoothing: e; of each label then (1 - e) logits[label] + e mean(logits) is subtracted.
        z_weight: w; of each label w logsumexp(logits)^2 is added.
        fused: compile the sum, which then makes no second array of the size of the logits.

    Returns:
        sum: scalar, at least float32; 0 with gradient 0 if no label counts.
        count: int64 scalar.

    Raises:
        ValueError: labels of another shape than the logits, or that are not integers; on the CPU one outside [0, V)
            that is not -100 (on an accelerator: an assertion of the device).
    """
    if isinstance(logits, FactoredLogits):
        return loss_in_chunks(
            functools.partial(cross_entropy, smoothing=smoothing, z_weight=z_weight, fused=fused),
            logits,
            labels_BS,
            len(logits.weight),
        )
    check_shape("labels", labels_BS, logits.shape[:-1])
    check_ids("labels", labels_BS, logits.shape[-1], IGNORED)
    logits_NV, labels_N = logits.flatten(0, -2), labels_BS.flatten().long()
    count = (labels_N != IGNORED).sum()
    if fused:
        return _compiled_sum()(logits_NV, labels_N, smoothing, z_weight), count
    rows = max(1, CHUNK_ELEMENTS // logits_NV.shape[-1])
    if len(labels_N) <= rows:
        return _summed(logits_NV, labels_N, smoothing, z_weight), count
    chunks = zip(logits_NV.split(rows), labels_N.split(rows), strict=True)
    sums = [checkpoint(_summed, *chunk, smoothing, z_weight, use_reentrant=False) for chunk in chunks]
    return torch.stack(sums).sum(), count


def mean_cross_entropy(
    logits: Float[Tensor, "B S V"] | FactoredLogits,
    labels_BS: Integer[Tensor, "B S"],
    *,
    smoothing: float = 0.0,
    z_weight: float = 0.0,
) -> Float[Tensor, ""]:
    """`cross_entropy` per label that counts; 0 with gradient 0 if none does."""
    total, count = cross_entropy(logits, labels_BS, smoothing=smoothing, z_weight=z_weight)
    return total / count.clamp(min=1)


def router_losses(stats: Mapping[int, LayerStats]) -> tuple[Float[Tensor, ""] | float, Float[Tensor, ""] | float]:
    """Balancing losses and z-losses of all routers, each summed, unweighted; 0 without any.

    Args:
        stats: of a `TransformerOutput`.
    """
    each = router_stats(stats)
    return sum((router.aux_loss for router in each), 0.0), sum((router.z_loss for router in each), 0.0)


def router_stats(stats: Mapping[int, LayerStats]) -> list[MoEStats]:
    """The stats of each router, layer by layer: one per layer, or one per modality."""
    return list(by_router(stats).values())


def _summed(logits_NV: Tensor, labels_N: Tensor, smoothing: float, z_weight: float) -> Tensor:
    wide_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    total = F.cross_entropy(wide_NV, labels_N, ignore_index=IGNORED, reduction="sum", label_smoothing=smoothing)
    if z_weight:
        total = total + z_weight * torch.where(labels_N != IGNORED, wide_NV.logsumexp(dim=-1).square(), 0).sum()
    return total


@functools.cache
def _compiled_sum() -> Callable[[Tensor, Tensor, float, float], Tensor]:
    """`_summed` compiled; eager for further shapes once a process has compiled too many."""
    return torch.compile(_summed)
