"""Experts applied to rows that are sorted by expert.

The rows of expert e are those from ends[e - 1] (0 for the first) to ends[e]; rows from ends[-1] on belong to no expert.

Shapes: R rows, D model dim, F expert width, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from kempnerforge_torch.model.grouped import grouped_matmul
from kempnerforge_torch.model.mlp import Activation


def grouped_expert_forward(
    x_sorted: Float[Tensor, "R D"], tokens_per_expert: Sequence[int], experts: Sequence[nn.Module] | nn.ModuleList
) -> Float[Tensor, "R D"]:
    """(R, D) -> (R, D), each row through its expert.

    Args:
        tokens_per_expert: E numbers of rows, R in all.

    Raises:
        ValueError: numbers that don't fit the rows or the experts.
    """
    _check_counts(len(x_sorted), tokens_per_expert, len(experts))
    parts = x_sorted.split(list(tokens_per_expert))
    return torch.cat([expert(part) for expert, part in zip(experts, parts, strict=True)])


def grouped_expert_forward_packed(
    x_sorted: Float[Tensor, "R D"],
    tokens_per_expert: Sequence[int],
    up_w: Float[Tensor, "E D F"],
    down_w: Float[Tensor, "E F D"],
    gate_w: Float[Tensor, "E D F"] | None,
    activation: Activation,
) -> Float[Tensor, "R D"]:
    """(R, D) -> (R, D), each row by the matrices of its expert: down(activation(gate(x)) * up(x)), without ``gate_w``
    down(activation(up(x))).

    Args:
        tokens_per_expert: E numbers of rows, R in all.
        up_w, gate_w: (E, D, F).
        down_w: (E, F, D).

    Raises:
        ValueError: numbers that don't fit the rows or the experts.
    """
    _check_counts(len(x_sorted), tokens_per_expert, len(up_w))
    ends_E = torch.tensor(tokens_per_expert, device=x_sorted.device).cumsum(0, dtype=torch.int32)
    return apply_packed(x_sorted, ends_E, up_w, down_w, gate_w, activation)


def apply_packed(
    x_RD: Float[Tensor, "R D"],
    ends_E: Int[Tensor, "E"],
    up_w: Float[Tensor, "E D F"] | Sequence[Float[Tensor, "D F"]],
    down_w: Float[Tensor, "E F D"] | Sequence[Float[Tensor, "F D"]],
    gate_w: Float[Tensor, "E D F"] | Sequence[Float[Tensor, "D F"]] | None,
    activation: Activation,
) -> Float[Tensor, "R D"]:
    """(R, D): as `grouped_expert_forward_packed`, by ends. The weights may be given as one matrix per expert.

    Rows of no expert come out as what happened to be in memory, and so do their gradients: they must not be read.
    """
    hidden_RF = grouped_matmul(x_RD, up_w, ends_E, True)
    if gate_w is None:
        hidden_RF = activation(hidden_RF)
    else:
        hidden_RF = activation(grouped_matmul(x_RD, gate_w, ends_E, True)) * hidden_RF
    return grouped_matmul(hidden_RF, down_w, ends_E, True)


def apply_modules(
    x_RD: Float[Tensor, "R D"], ends_E: Int[Tensor, "E"], experts: Sequence[nn.Module]
) -> Float[Tensor, "R D"]:
    """(R, D): as `grouped_expert_forward`, by ends, on whose values no shape depends; 0 for rows of no expert."""
    rows_R1 = torch.arange(x_RD.shape[0], device=x_RD.device)[:, None]
    out_RD, start = torch.zeros_like(x_RD), 0
    for index, expert in enumerate(experts):
        out_RD = torch.where((rows_R1 >= start) & (rows_R1 < ends_E[index]), expert(x_RD), out_RD)
        start = ends_E[index]
    return out_RD


def _check_counts(rows: int, tokens_per_expert: Sequence[int], num_experts: int) -> None:
    if len(tokens_per_expert) != num_experts or min(tokens_per_expert) < 0 or sum(tokens_per_expert) != rows:
        raise ValueError(
            f"tokens_per_expert = {list(tokens_per_expert)}: must be {num_experts} numbers of rows, {rows} in all"
        )
