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
from kempnerforge_torch.model.stats import LayerStats, MoEStats
from shared_config.contract.labels import IGNORED
from shared_config.contract.routing import by_router

CHUNK_ELEMENTS = 2**26
"""Logits that are widened at a time: 256 MiB in float32."""


def cross_entropy(
    logits_BSV: Float[Tensor, "B S V"], labels_BS: Integer[Tensor, "B S"], *, fused: bool = False
) -> tuple[Float[Tensor, ""], Int[Tensor, ""]]:
    """Sum of logsumexp(logits) - logits[label] over the labels that are not -100, and the number of these labels.

    The arithmetic is in at least float32. Where the logits are many, the backward pass recomputes the probabilities,
    some rows at a time, so that no second array of their size is kept.

    Args:
        fused: compile the sum, which then makes no second array of the size of the logits.

    Returns:
        sum: scalar, at least float32; 0 with gradient 0 if no label counts.
        count: int64 scalar.

    Raises:
        ValueError: labels of another shape than the logits, or that are not integers; on the CPU one outside [0, V)
            that is not -100 (on an accelerator: an assertion of the device).
    """
    check_shape("labels", labels_BS, logits_BSV.shape[:-1])
    check_ids("labels", labels_BS, logits_BSV.shape[-1], IGNORED)
    logits_NV, labels_N = logits_BSV.flatten(0, -2), labels_BS.flatten().long()
    count = (labels_N != IGNORED).sum()
    if fused:
        return _compiled_sum()(logits_NV, labels_N), count
    rows = max(1, CHUNK_ELEMENTS // logits_NV.shape[-1])
    if len(labels_N) <= rows:
        return _summed(logits_NV, labels_N), count
    chunks = zip(logits_NV.split(rows), labels_N.split(rows), strict=True)
    sums = [checkpoint(_summed, logits, labels, use_reentrant=False) for logits, labels in chunks]
    return torch.stack(sums).sum(), count


def mean_cross_entropy(logits_BSV: Float[Tensor, "B S V"], labels_BS: Integer[Tensor, "B S"]) -> Float[Tensor, ""]:
    """`cross_entropy` per label that counts; 0 with gradient 0 if none does."""
    total, count = cross_entropy(logits_BSV, labels_BS)
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


def _summed(logits_NV: Tensor, labels_N: Tensor) -> Tensor:
    wide_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    return F.cross_entropy(wide_NV, labels_N, ignore_index=IGNORED, reduction="sum")


@functools.cache
def _compiled_sum() -> Callable[[Tensor, Tensor], Tensor]:
    """`_summed` compiled; eager for further shapes once a process has compiled too many."""
    return torch.compile(_summed)
