"""How tokens get to their experts and back: capacity, the order of rows, and what is added up.

Shapes: T tokens, D model dim, E experts, k assignments of each token, R = k * T rows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Num
from torch import Tensor

from shared_config.contract.capacity import capacity, token_capacities


class Dispatch(NamedTuple):
    """Which row holds which assignment. Number j * T + t is the j-th of token t: all first ones come before all second
    ones.

    Attributes:
        assignment_R: the assignment that each row holds; rows of no expert (padding, over capacity) come last.
        row_R: the row of each assignment.
        ends_E: int32, row after the last one of each expert.
    """

    assignment_R: Int[Tensor, "R"]
    row_R: Int[Tensor, "R"]
    ends_E: Int[Tensor, "E"]


def layer_capacity(
    tokens: int, members_T: Bool[Tensor, "T"] | None, top_k: int, num_experts: int, factor: float
) -> int | Int[Tensor, "..."] | None:
    """`capacity` for all tokens, or for those that are True in ``members_T``: then an array, as their number is."""
    if members_T is None or factor == 0:
        return capacity(tokens, top_k, num_experts, factor)
    table = torch.tensor(_capacities(tokens, top_k, num_experts, factor), device=members_T.device)
    return table.index_select(0, members_T.sum().reshape(1))


def plan_dispatch(
    indices_Tk: Int[Tensor, "T k"],
    valid_T: Bool[Tensor, "T"] | None,
    num_experts: int,
    capacity: int | Int[Tensor, "..."] | None = None,
) -> Dispatch:
    """Sort the assignments by expert, those of equal expert slot by slot and then by token.

    Args:
        valid_T: tokens whose assignments count; None means all.
        capacity: assignments that an expert takes, a number or a scalar array; None means any number.
    """
    tokens, top_k = indices_Tk.shape
    expert_R = indices_Tk.t().flatten()
    if valid_T is not None:
        expert_R = torch.where(valid_T.repeat(top_k), expert_R, num_experts)
    expert_R, assignment_R = torch.sort(expert_R, stable=True)
    ends_E = _ends(expert_R, num_experts)
    rows_R = torch.arange(tokens * top_k, device=indices_Tk.device)
    if capacity is not None and not (isinstance(capacity, int) and capacity >= tokens * top_k):
        starts = F.pad(ends_E, (1, 0))
        expert_R = torch.where(rows_R - starts[expert_R] < capacity, expert_R, num_experts)
        expert_R, order_R = torch.sort(expert_R, stable=True)
        assignment_R, ends_E = assignment_R[order_R], _ends(expert_R, num_experts)
    row_R = torch.empty_like(assignment_R).scatter(0, assignment_R, rows_R)
    return Dispatch(assignment_R, row_R, ends_E)


def combine(
    out_RD: Float[Tensor, "R D"],
    weights_Tk: Float[Tensor, "T k"],
    plan: Dispatch,
    gradient_factors_Tk: Float[Tensor, "T k"] | None = None,
) -> Float[Tensor, "T D"]:
    """(T, D): for each token the weighted sum of its rows, in the dtype of the weights."""
    tokens, top_k = weights_Tk.shape
    out_kTD = _Permute.apply(out_RD, plan.row_R, plan.assignment_R).reshape(top_k, tokens, out_RD.shape[1])
    out_kTD = out_kTD.to(weights_Tk.dtype)
    if gradient_factors_Tk is not None:
        out_kTD = _ScaleGradient.apply(out_kTD, gradient_factors_Tk.t()[:, :, None])
    return (out_kTD * weights_Tk.t()[:, :, None]).sum(dim=0)


def gradient_factors(counts_E: Num[Tensor, "E"], dtype: torch.dtype) -> Float[Tensor, "E"]:
    """mean count / count of each expert; 1 for an expert without tokens, to which no gradient flows."""
    wide_E = counts_E.to(dtype)
    return torch.where(counts_E > 0, wide_E.sum() / (wide_E.clamp(min=1) * counts_E.shape[0]), 1.0)


def dispatch(
    x_TD: Float[Tensor, "T D"], assignment_R: Int[Tensor, "R"], row_R: Int[Tensor, "R"], top_k: int
) -> Float[Tensor, "R D"]:
    """Row r is the token of assignment r; backward adds up the rows of a token, in the order of its assignments."""
    return _DispatchTokens.apply(x_TD, assignment_R, row_R, top_k)


class _DispatchTokens(torch.autograd.Function):
    """Row r is the token of assignment r; backward adds up the rows of a token, in the order of its assignments."""

    @staticmethod
    def forward(x_TD: Tensor, assignment_R: Tensor, row_R: Tensor, top_k: int) -> Tensor:
        return x_TD.index_select(0, assignment_R % max(x_TD.shape[0], 1))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, int], output: Tensor) -> None:
        _, assignment_R, row_R, ctx.top_k = inputs
        ctx.save_for_backward(assignment_R, row_R)

    @staticmethod
    def backward(ctx: Any, dy_RD: Tensor) -> tuple[Tensor, None, None, None]:
        assignment_R, row_R = ctx.saved_tensors
        dx_kTD = _Permute.apply(dy_RD, row_R, assignment_R).reshape(ctx.top_k, -1, dy_RD.shape[1])
        return dx_kTD.sum(dim=0), None, None, None


class _Permute(torch.autograd.Function):
    """x[order]; backward takes by the inverse order, where autograd, not knowing that rows occur once, would add."""

    @staticmethod
    def forward(x_RD: Tensor, order_R: Tensor, inverse_R: Tensor) -> Tensor:
        return x_RD.index_select(0, order_R)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, dy_RD: Tensor) -> tuple[Tensor, None, None]:
        order_R, inverse_R = ctx.saved_tensors
        return _Permute.apply(dy_RD, inverse_R, order_R), None, None


class _ScaleGradient(torch.autograd.Function):
    """The identity; backward multiplies by the factors."""

    @staticmethod
    def forward(x: Tensor, factors: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        (factors,) = ctx.saved_tensors
        return dy * factors, None


@torch.compiler.assume_constant_result
def _capacities(tokens: int, top_k: int, num_experts: int, factor: float) -> list[int]:
    return token_capacities(tokens, top_k, num_experts, factor).tolist()


def _ends(expert_R: Tensor, num_experts: int) -> Tensor:
    experts_E = torch.arange(num_experts, device=expert_R.device)
    return torch.searchsorted(expert_R, experts_E, right=True, out_int32=True)
