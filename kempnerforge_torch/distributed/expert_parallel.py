"""Expert parallelism (Lepikhin et al. 2021, arXiv:2006.16668): each rank along "ep" holds some of the experts. Tokens
get to the ranks of their experts, and the results come back, in one of two ways:

    gathered     every rank gets all tokens, and adds up, for each, what its own experts make of it; these sums are
                 scattered. No number leaves the device: the host never waits.
    exchanged    each rank gets the rows of its own experts: fewer bytes where ranks are many and experts of a token
                 few. The host waits for the numbers of rows.

    2 ranks, 2 experts each, a token has 2                 rank 0 has experts 0 and 1      rank 1 has experts 2 and 3
    gathered     rank 0 has tokens a -> 0 2, b -> 1 0      a:0  b:0  b:1  c:1              a:2  c:3  d:2  d:3
                 rank 1 has tokens c -> 3 1, d -> 2 3      sums of a b c d                 sums of a b c d
    exchanged    rank 0 has rows a:0 b:0 b:1 | a:2         sends a:2, gets c:1             sends c:1, gets a:2

`shared_config.contract.activations.gathers_tokens` says which, if products skip rows of no expert: a rank that gathers
tokens has room for the rows of all experts.

Shapes: T tokens of this rank, G of all ranks, D model dim, k assignments of a token, R rows, E experts of all ranks, e
experts of one, N ranks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kempnerforge_torch.distributed.collectives import exchanged, gathered, scattered
from kempnerforge_torch.model.dispatch import Routes, experts_of, plan_dispatch
from kempnerforge_torch.model.moe import MoEMLP


def gather_tokens(layer: MoEMLP, group: dist.ProcessGroup) -> None:
    """Let a layer that holds some of the experts compute the rows of its own for the tokens of all ranks."""
    own, routed = layer.num_experts // group.size(), layer._routed

    def of_all(x_TD: Tensor, routes: Routes) -> Tensor:
        wide = torch.promote_types(x_TD.dtype, torch.float32)
        x_GD, weights_Gk = gathered(x_TD, 0, group, sums=wide), gathered(routes.weights_Tk, 0, group)
        factors_Gk = None if routes.factors_Tk is None else gathered(routes.factors_Tk, 0, group)
        number_Gk = gathered(experts_of(routes), 0, group) - own * group.rank()
        plan = plan_dispatch(torch.where((number_Gk >= 0) & (number_Gk < own), number_Gk, own), None, own)
        most = number_Gk.numel() if routes.limit is None else layer.num_experts * routes.limit
        plan = plan._replace(assignment_R=plan.assignment_R[:most])
        y_GD = routed(x_GD, Routes(weights_Gk, plan, factors_Gk, False, None))
        return scattered(y_GD, 0, group, gradients=x_TD.dtype)

    forward: Any = of_all
    layer._routed = forward


def send_rows(layer: MoEMLP, group: dist.ProcessGroup) -> None:
    """Let a layer that holds some of the experts send rows to the ranks of the others."""
    apply = layer._apply_experts

    def applied(x_RD: Tensor, ends_E: Tensor) -> Tensor:
        counts_Ne = torch.diff(ends_E, prepend=ends_E.new_zeros(1)).reshape(group.size(), -1)
        own_Ne = torch.empty_like(counts_Ne)
        dist.all_to_all_single(own_Ne, counts_Ne, group=group)
        sent, received = counts_Ne.sum(dim=1).tolist(), own_Ne.sum(dim=1).tolist()
        mine_RD = exchanged(x_RD[: sum(sent)], sent, received, group)
        order_R = _by_expert(own_Ne)
        ends_e = own_Ne.sum(dim=0).cumsum(dim=0, dtype=torch.int32)
        out_RD = apply(mine_RD[order_R], ends_e)[order_R.argsort()]
        back_RD = exchanged(out_RD, received, sent, group)
        return torch.cat([back_RD, back_RD.new_zeros(x_RD.shape[0] - sum(sent), x_RD.shape[1])])

    forward: Any = applied
    layer._apply_experts = forward


def _by_expert(counts_Ne: Tensor) -> Tensor:
    """The order that sorts rows by expert, and those of one expert by rank, where they lie by rank and then expert."""
    experts_Ne = torch.arange(counts_Ne.shape[1], device=counts_Ne.device).expand_as(counts_Ne)
    return experts_Ne.flatten().repeat_interleave(counts_Ne.flatten()).argsort(stable=True)
