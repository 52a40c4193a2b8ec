"""Expert parallelism (Lepikhin et al. 2021, arXiv:2006.16668): each rank along "ep" holds some of the experts. Rows of
tokens, sorted by expert, go to the ranks of their experts, and the results come back.

    rank 0    rows of expert  0 0 1 2 3 3    sends 0 0 1 | 2 3 3     has 0 0 1 (own)  0 1 1 (of rank 1)
    rank 1    rows of expert  0 1 1 2 2 3    sends 0 1 1 | 2 2 3     has 2 3 3 (of rank 0)  2 2 3 (own)

Shapes: R rows, D model dim, E experts of all ranks, e experts of one, N ranks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kempnerforge_torch.distributed.collectives import exchanged
from kempnerforge_torch.model.moe import MoEMLP


def send_rows(layer: MoEMLP, group: dist.ProcessGroup) -> None:
    """Let a layer that holds some of the experts send rows to the ranks of the others."""
    apply = layer._apply_experts

    def applied(x_RD: Tensor, ends_E: Tensor, complete: bool) -> Tensor:
        counts_Ne = torch.diff(ends_E, prepend=ends_E.new_zeros(1)).reshape(group.size(), -1)
        own_Ne = torch.empty_like(counts_Ne)
        dist.all_to_all_single(own_Ne, counts_Ne, group=group)
        sent, received = counts_Ne.sum(dim=1).tolist(), own_Ne.sum(dim=1).tolist()
        mine_RD = exchanged(x_RD[: sum(sent)], sent, received, group)
        order_R = _by_expert(own_Ne)
        ends_e = own_Ne.sum(dim=0).cumsum(dim=0, dtype=torch.int32)
        out_RD = apply(mine_RD[order_R], ends_e, True)[order_R.argsort()]
        back_RD = exchanged(out_RD, received, sent, group)
        return torch.cat([back_RD, back_RD.new_zeros(x_RD.shape[0] - sum(sent), x_RD.shape[1])])

    forward: Any = applied
    layer._apply_experts = forward


def _by_expert(counts_Ne: Tensor) -> Tensor:
    """The order that sorts rows by expert, and those of one expert by rank, where they lie by rank and then expert."""
    experts_Ne = torch.arange(counts_Ne.shape[1], device=counts_Ne.device).expand_as(counts_Ne)
    return experts_Ne.flatten().repeat_interleave(counts_Ne.flatten()).argsort(stable=True)
