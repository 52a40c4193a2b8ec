"""Cross entropy over a vocabulary that is split over ranks: no rank has all logits of a token.

Shapes: B batch, S sequence, V this rank's part of the vocabulary.
"""

from __future__ import annotations

import functools

import torch
import torch.distributed as dist
from jaxtyping import Float, Int, Integer
from torch import Tensor

from kempnerforge_torch.distributed.collectives import summed_over
from kempnerforge_torch.distributed.context_parallel import CrossEntropy, of_all_parts
from kempnerforge_torch.distributed.mesh import Mesh
from kempnerforge_torch.distributed.tensor_parallel import part_of
from kempnerforge_torch.model.checks import check_ids, check_shape, nan_outside
from kempnerforge_torch.model.embedding import FactoredLogits
from kempnerforge_torch.training.head import loss_in_chunks
from kempnerforge_torch.training.loss import cross_entropy
from shared_config.contract.labels import IGNORED


def cross_entropy_of(mesh: Mesh | None, vocab_size: int) -> CrossEntropy:
    """The cross entropy of the logits of a model in a layout, called as `cross_entropy` is."""
    found: CrossEntropy = cross_entropy
    if mesh is not None and mesh.layout.tp > 1:
        found = functools.partial(split_cross_entropy, vocab_size=vocab_size, group=mesh.group("tp"))
    return found if mesh is None or mesh.layout.cp == 1 else of_all_parts(found, mesh.group("cp"))


def split_cross_entropy(
    logits: Float[Tensor, "B S V"] | FactoredLogits,
    labels_BS: Integer[Tensor, "B S"],
    *,
    vocab_size: int,
    group: dist.ProcessGroup,
    smoothing: float = 0.0,
    z_weight: float = 0.0,
    fused: bool = False,
) -> tuple[Float[Tensor, ""], Int[Tensor, ""]]:
    """`cross_entropy` of logits of which each rank has those of its part of the vocabulary; the same on every rank.

    Args:
        labels_BS: of the whole vocabulary.
        smoothing, z_weight: as of `cross_entropy`.
        fused: has no effect.

    Raises:
        ValueError: as `cross_entropy` does; on an accelerator the sum is NaN for an invalid label.
    """
    if isinstance(logits, FactoredLogits):
        own = functools.partial(
            split_cross_entropy, vocab_size=vocab_size, group=group, smoothing=smoothing, z_weight=z_weight
        )
        return loss_in_chunks(own, logits, labels_BS, -(-vocab_size // group.size()))
    check_shape("labels", labels_BS, logits.shape[:-1])
    check_ids("labels", labels_BS, vocab_size, IGNORED)
    labels_BS, (start, stop) = labels_BS.long(), part_of(vocab_size, group)
    wide_BSV = logits.to(torch.promote_types(logits.dtype, torch.float32))
    highest_BS = wide_BSV.detach().amax(dim=-1)
    dist.all_reduce(highest_BS, dist.ReduceOp.MAX, group)
    sums_BS = summed_over((wide_BSV - highest_BS[..., None]).exp().sum(dim=-1), group)
    mine_BS = (labels_BS >= start) & (labels_BS < stop)
    found_BS = wide_BSV.gather(-1, torch.where(mine_BS, labels_BS - start, 0)[..., None])[..., 0]
    chosen_BS = summed_over(torch.where(mine_BS, found_BS, 0), group)
    counts_BS, normalizer_BS = labels_BS != IGNORED, sums_BS.log() + highest_BS
    losses_BS = normalizer_BS - chosen_BS
    if smoothing:
        mean_BS = summed_over(wide_BSV.sum(dim=-1), group) / vocab_size
        losses_BS = losses_BS + smoothing * (chosen_BS - mean_BS)
    if z_weight:
        losses_BS = losses_BS + z_weight * normalizer_BS.square()
    losses_BS = nan_outside(losses_BS, labels_BS, vocab_size)
    return torch.where(counts_BS, losses_BS, 0).sum(), counts_BS.sum()
