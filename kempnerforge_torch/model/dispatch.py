"""How tokens get to their experts and back: capacity, the order of rows, and what is added up.

Shapes: T tokens, D model dim, E experts, k assignments of each token, R = k * T rows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Num
from torch import Tensor

from shared_config.contract.capacity import Share, capacity, token_capacities


class Dispatch(NamedTuple):
    """Which row holds which assignment. Number j * T + t is the j-th of token t: all first ones come before all second
    ones.

    Attributes:
        assignment_R: the assignment that each row holds; rows of no expert (padding, over capacity) come last, and may
            be left out.
        row_R: the row of each assignment.
        ends_E: int32, row after the last one of each expert.
    """

    assignment_R: Int[Tensor, "R"]
    row_R: Int[Tensor, "R"]
    ends_E: Int[Tensor, "E"]


class Routes(NamedTuple):
    """What is decided of the tokens of a layer.

    Attributes:
        weights_Tk: of assignments, at least float32.
        plan: which row holds which assignment.
        factors_Tk: of the gradients that flow through experts; None: 1.
        complete: whether every assignment has an expert.
        limit: rows that an expert has at most; None: any number.
    """

    weights_Tk: Float[Tensor, "T k"]
    plan: Dispatch
    factors_Tk: Float[Tensor, "T k"] | None
    complete: bool
    limit: int | None


def layer_capacity(
    tokens: int, members_T: Bool[Tensor, "T"] | None, top_k: int, num_experts: int, factor: Share | None
) -> int | Int[Tensor, "..."] | None:
    """`capacity` for all tokens, or for those that are True in ``members_T``: then an array, as their number is."""
    if members_T is None or factor is None:
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
    expert_R, assignment_R = _sorted(expert_R, num_experts)
    ends_E = _ends(expert_R, num_experts)
    rows_R = torch.arange(tokens * top_k, device=indices_Tk.device)
    if capacity is not None and not (isinstance(capacity, int) and capacity >= tokens * top_k):
        starts = F.pad(ends_E, (1, 0))
        expert_R = torch.where(rows_R - starts[expert_R] < capacity, expert_R, num_experts)
        expert_R, order_R = _sorted(expert_R, num_experts)
        assignment_R, ends_E = assignment_R[order_R], _ends(expert_R, num_experts)
    row_R = torch.empty_like(assignment_R).scatter(0, assignment_R, rows_R)
    return Dispatch(assignment_R, row_R, ends_E)


def _sorted(expert_R: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Experts in order, and where each was; a GPU takes a pass for every 8 bits of what it sorts."""
    narrow_R = expert_R.to(torch.int16) if num_experts <= torch.iinfo(torch.int16).max else expert_R
    sorted_R, order_R = torch.sort(narrow_R, stable=True)
    return sorted_R.to(expert_R.dtype), order_R


def combine(out_RD: Float[Tensor, "R D"], routes: Routes) -> Float[Tensor, "T D"]:
    """(T, D): for each token the weighted sum of its rows, in the dtype of the weights. Rows of no expert count as 0,
    whatever they hold.
    """
    weights_Tk, plan, factors_Tk, complete, _ = routes
    tokens, top_k = weights_Tk.shape
    out_kTD = _by_assignment(out_RD, *plan, complete).reshape(top_k, tokens, out_RD.shape[1])
    out_kTD = out_kTD.to(weights_Tk.dtype)
    if factors_Tk is not None:
        out_kTD = _ScaleGradient.apply(out_kTD, factors_Tk.t()[:, :, None])
    return (out_kTD * weights_Tk.t()[:, :, None]).sum(dim=0)


def gradient_factors(counts_E: Num[Tensor, "E"], dtype: torch.dtype) -> Float[Tensor, "E"]:
    """mean count / count of each expert; 1 for an expert without tokens, to which no gradient flows."""
    wide_E = counts_E.to(dtype)
    return torch.where(counts_E > 0, wide_E.sum() / (wide_E.clamp(min=1) * counts_E.shape[0]), 1.0)


def dispatch(x_TD: Float[Tensor, "T D"], routes: Routes) -> Float[Tensor, "R D"]:
    """Row r is the token of assignment r; backward adds up the rows of a token, in the order of its assignments.
    Gradients of rows of no expert count as 0, whatever they hold.
    """
    return _DispatchTokens.apply(x_TD, *routes.plan, routes.complete)


class _DispatchTokens(torch.autograd.Function):
    """Row r is the token of assignment r; backward adds up the rows of a token, in the order of its assignments."""

    @staticmethod
    def forward(x_TD: Tensor, assignment_R: Tensor, row_R: Tensor, ends_E: Tensor, complete: bool) -> Tensor:
        return x_TD.index_select(0, assignment_R % max(x_TD.shape[0], 1))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Tensor, bool], output: Tensor) -> None:
        x_TD, *plan, ctx.complete = inputs
        ctx.tokens = x_TD.shape[0]
        ctx.save_for_backward(*plan)

    @staticmethod
    def backward(ctx: Any, dy_RD: Tensor) -> tuple[Tensor, None, None, None, None]:
        assignment_R, row_R, ends_E = ctx.saved_tensors
        dx_kTD = _by_assignment(dy_RD, assignment_R, row_R, ends_E, ctx.complete)
        top_k = len(row_R) // max(ctx.tokens, 1)
        return dx_kTD.reshape(top_k, ctx.tokens, dy_RD.shape[1]).sum(dim=0), None, None, None, None


def _by_assignment(rows_RD: Tensor, assignment_R: Tensor, row_R: Tensor, ends_E: Tensor, complete: bool) -> Tensor:
    """The row of each assignment; 0 of those without an expert, of which there are none if ``complete``."""
    last = max(len(assignment_R) - 1, 0)
    found_RD = _Permute.apply(rows_RD, row_R if last + 1 == len(row_R) else row_R.clamp(max=last), assignment_R)
    return found_RD if complete else torch.where((row_R < ends_E[-1])[:, None], found_RD, 0)


class _Permute(torch.autograd.Function):
    """x[order]; backward takes by the inverse order, where autograd, not knowing that rows occur once, would add.
    (Those of no expert, which may occur more often, have no gradient.)
    """

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
def _capacities(tokens: int, top_k: int, num_experts: int, factor: Share) -> list[int]:
    return token_capacities(tokens, top_k, num_experts, factor).tolist()


def experts_of(routes: Routes) -> Int[Tensor, "T k"]:
    """The expert of each assignment; E for those that have none."""
    expert_R = torch.searchsorted(routes.plan.ends_E.long(), routes.plan.row_R, right=True)
    return expert_R.reshape(routes.weights_Tk.shape[::-1]).t()


def _ends(expert_R: Tensor, num_experts: int) -> Tensor:
    experts_E = torch.arange(num_experts, device=expert_R.device)
    return torch.searchsorted(expert_R, experts_E, right=True, out_int32=True)
