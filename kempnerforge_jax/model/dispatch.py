"""How tokens get to their experts and back: capacity, the order of rows, and what is added up.

Shapes: T tokens, D model dim, E experts, k assignments of each token, R = k * T rows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Num

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

    assignment_R: Int[Array, "R"]
    row_R: Int[Array, "R"]
    ends_E: Int[Array, "E"]


class Routes(NamedTuple):
    """What is decided of the tokens of a layer.

    Attributes:
        weights_Tk: of assignments, at least float32.
        plan: which row holds which assignment.
        factors_Tk: of the gradients that flow through experts; None: 1.
        limit: rows that an expert has at most; None: any number.
        block: rows that are computed at a time, as long as there are any; None: all, at once.
    """

    weights_Tk: Float[Array, "T k"]
    plan: Dispatch
    factors_Tk: Float[Array, "T k"] | None
    limit: int | None = None
    block: int | None = None


def layer_capacity(
    tokens: int, members_T: Bool[Array, "T"] | None, top_k: int, num_experts: int, factor: Share | None
) -> int | Int[Array, "..."] | None:
    """`capacity` for all tokens, or for those that are True in ``members_T``: then an array, as their number is."""
    if members_T is None or factor is None:
        return capacity(tokens, top_k, num_experts, factor)
    return jnp.asarray(token_capacities(tokens, top_k, num_experts, factor))[members_T.sum(dtype=jnp.int32)]


def plan_dispatch(
    indices_Tk: Int[Array, "T k"],
    valid_T: Bool[Array, "T"] | None,
    num_experts: int,
    capacity: int | Int[Array, "..."] | None = None,
) -> Dispatch:
    """Sort the assignments by expert, those of equal expert slot by slot and then by token.

    Args:
        valid_T: tokens whose assignments count; None means all.
        capacity: assignments that an expert takes, a number or a scalar array; None means any number.
    """
    tokens, top_k = indices_Tk.shape
    expert_R = indices_Tk.T.ravel()
    if valid_T is not None:
        expert_R = jnp.where(jnp.tile(valid_T, top_k), expert_R, num_experts)
    rows_R = jnp.arange(tokens * top_k, dtype=jnp.int32)
    expert_R, assignment_R = lax.sort((expert_R, rows_R), num_keys=1, is_stable=True)
    ends_E = _ends(expert_R, num_experts)
    if capacity is not None and not (isinstance(capacity, int) and capacity >= tokens * top_k):
        starts = jnp.pad(ends_E, (1, 0))
        expert_R = jnp.where(rows_R - starts[expert_R] < capacity, expert_R, num_experts)
        expert_R, assignment_R = lax.sort((expert_R, assignment_R), num_keys=1, is_stable=True)
        ends_E = _ends(expert_R, num_experts)
    row_R = jnp.zeros_like(assignment_R).at[assignment_R].set(rows_R, unique_indices=True)
    return Dispatch(assignment_R, row_R, ends_E)


def combine(out_RD: Float[Array, "R D"], routes: Routes) -> Float[Array, "T D"]:
    """(T, D): for each token the weighted sum of its rows, which are 0 if they are of no expert, in the dtype of the
    weights.
    """
    weights_Tk, plan, factors_Tk, *_ = routes
    tokens, top_k = weights_Tk.shape
    out_kTD = _by_assignment(out_RD, *plan).reshape(top_k, tokens, out_RD.shape[1])
    out_kTD = out_kTD.astype(weights_Tk.dtype)
    if factors_Tk is not None:
        out_kTD = _scale_gradient(out_kTD, factors_Tk.T[:, :, None])
    return (out_kTD * weights_Tk.T[:, :, None]).sum(axis=0)


def gradient_factors(counts_E: Num[Array, "E"], dtype: DTypeLike) -> Float[Array, "E"]:
    """mean count / count of each expert; 1 for an expert without tokens, to which no gradient flows."""
    wide_E = counts_E.astype(dtype)
    return jnp.where(counts_E > 0, wide_E.sum() / (jnp.maximum(wide_E, 1) * counts_E.shape[0]), 1)


def dispatch(x_TD: Float[Array, "T D"], routes: Routes) -> Float[Array, "R D"]:
    """Row r is the token of assignment r; backward adds up the rows of a token, in the order of its assignments.
    (Gradients of rows of no expert are 0.)
    """
    return _dispatch_tokens(x_TD, *routes.plan)


@jax.custom_vjp
def _dispatch_tokens(x_TD: jax.Array, assignment_R: jax.Array, row_R: jax.Array, ends_E: jax.Array) -> jax.Array:
    return x_TD[assignment_R % max(x_TD.shape[0], 1)]


def _dispatch_forward(x_TD: jax.Array, *plan: jax.Array) -> tuple[jax.Array, Any]:
    return _dispatch_tokens(x_TD, *plan), (plan, jnp.zeros((x_TD.shape[0], 0), x_TD.dtype))


def _dispatch_backward(saved: Any, dy_RD: jax.Array) -> tuple[jax.Array, None, None, None]:
    plan, like_T = saved
    tokens, assignments = len(like_T), len(plan[1])
    dx_kTD = _by_assignment(dy_RD, *plan).reshape(assignments // max(tokens, 1), tokens, dy_RD.shape[1])
    return dx_kTD.sum(axis=0), None, None, None


def _by_assignment(rows_RD: jax.Array, assignment_R: jax.Array, row_R: jax.Array, ends_E: jax.Array) -> jax.Array:
    """The row of each assignment; 0 of those without an expert, whose rows are 0 or left out."""
    if len(assignment_R) == len(row_R):
        return _permute(rows_RD, row_R, assignment_R)
    found_RD = _permute(rows_RD, jnp.minimum(row_R, len(assignment_R) - 1), assignment_R)
    return jnp.where((row_R < ends_E[-1])[:, None], found_RD, 0)


@jax.custom_vjp
def _permute(x_RD: jax.Array, order_R: jax.Array, inverse_R: jax.Array) -> jax.Array:
    """x[order]; backward takes by the inverse order, where JAX, not knowing that rows occur once, would add. (Those of
    no expert, which may occur more often, have no gradient.)
    """
    return x_RD[order_R]


def _permute_forward(x_RD: jax.Array, order_R: jax.Array, inverse_R: jax.Array) -> tuple[jax.Array, Any]:
    return x_RD[order_R], (order_R, inverse_R)


def _permute_backward(saved: Any, dy_RD: jax.Array) -> tuple[jax.Array, None, None]:
    order_R, inverse_R = saved
    return _permute(dy_RD, inverse_R, order_R), None, None


@jax.custom_vjp
def _scale_gradient(x: jax.Array, factors: jax.Array) -> jax.Array:
    """The identity; backward multiplies by the factors."""
    return x


def _scale_gradient_forward(x: jax.Array, factors: jax.Array) -> tuple[jax.Array, jax.Array]:
    return x, factors


def _scale_gradient_backward(factors: jax.Array, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    return dy * factors, jnp.zeros_like(factors)


def experts_of(routes: Routes) -> Int[Array, "T k"]:
    """The expert of each assignment; E for those that have none."""
    expert_R = jnp.searchsorted(routes.plan.ends_E, routes.plan.row_R, side="right", method="compare_all")
    return expert_R.astype(jnp.int32).reshape(routes.weights_Tk.shape[::-1]).T


def _ends(expert_R: jax.Array, num_experts: int) -> jax.Array:
    experts_E = jnp.arange(num_experts, dtype=expert_R.dtype)
    return jnp.searchsorted(expert_R, experts_E, side="right", method="compare_all").astype(jnp.int32)


_dispatch_tokens.defvjp(_dispatch_forward, _dispatch_backward)
_permute.defvjp(_permute_forward, _permute_backward)
_scale_gradient.defvjp(_scale_gradient_forward, _scale_gradient_backward)
