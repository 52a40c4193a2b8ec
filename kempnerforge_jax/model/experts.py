"""Experts applied to rows that are sorted by expert.

The rows of expert e are those from ends[e - 1] (0 for the first) to ends[e]; rows from ends[-1] on belong to no expert.

Shapes: R rows, D model dim, F expert width, E experts, b rows of a block.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from kempnerforge_jax.model.grouped import grouped_matmul
from kempnerforge_jax.model.mlp import Activation
from kempnerforge_jax.model.module import Module


def grouped_expert_forward(
    x_sorted: Float[Array, "R D"], tokens_per_expert: Sequence[int], experts: Sequence[Module]
) -> Float[Array, "R D"]:
    """(R, D) -> (R, D), each row through its expert.

    Args:
        tokens_per_expert: E numbers of rows, R in all.

    Raises:
        ValueError: numbers that don't fit the rows or the experts.
    """
    _check_counts(len(x_sorted), tokens_per_expert, len(experts))
    outs = [
        expert(part)
        for expert, part in zip(experts, jnp.split(x_sorted, np.cumsum(tokens_per_expert)[:-1]), strict=True)
    ]
    return jnp.concatenate(outs)


def grouped_expert_forward_packed(
    x_sorted: Float[Array, "R D"],
    tokens_per_expert: Sequence[int],
    up_w: Float[Array, "E D F"],
    down_w: Float[Array, "E F D"],
    gate_w: Float[Array, "E D F"] | None,
    activation: Activation,
) -> Float[Array, "R D"]:
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
    ends_E = jnp.asarray(np.cumsum(tokens_per_expert), jnp.int32)
    return apply_packed(x_sorted, ends_E, up_w, down_w, gate_w, activation)


def apply_packed(
    x_RD: Float[Array, "R D"],
    ends_E: Int[Array, "E"],
    up_w: Float[Array, "E D F"],
    down_w: Float[Array, "E F D"],
    gate_w: Float[Array, "E D F"] | None,
    activation: Activation,
) -> Float[Array, "R D"]:
    """(R, D): as `grouped_expert_forward_packed`, by ends; 0 for rows of no expert."""
    hidden_RF = grouped_matmul(x_RD, up_w, ends_E)
    if gate_w is None:
        hidden_RF = activation(hidden_RF)
    else:
        hidden_RF = activation(grouped_matmul(x_RD, gate_w, ends_E)) * hidden_RF
    return grouped_matmul(hidden_RF, down_w, ends_E)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def apply_blockwise(
    activation: Activation,
    block: int,
    x_RD: Float[Array, "R D"],
    ends_E: Int[Array, "E"],
    weights: Mapping[str, Float[Array, "E _ _"]],
) -> Float[Array, "R D"]:
    """(R, D): as `apply_packed`, ``block`` rows at a time for as long as there are rows of experts: where there may be
    many more than there are, the others cost nothing but their place. Backward computes a block anew.

    Args:
        weights: ``up``, ``down`` and, if gated, ``gate``.
    """

    def one(at: jax.Array, out_RD: jax.Array) -> jax.Array:
        out_bD = _one_block(
            activation, weights, lax.dynamic_slice_in_dim(padded_RD, at, block), _within(ends_E, at, block)
        )
        return lax.dynamic_update_slice_in_dim(out_RD, out_bD, at, axis=0)

    padded_RD = _padded(x_RD, block)
    return _over_blocks(ends_E, block, one, jnp.zeros_like(padded_RD))[: len(x_RD)]


def _blockwise_forward(activation: Activation, block: int, *inputs: Any) -> tuple[jax.Array, tuple[Any, ...]]:
    return apply_blockwise(activation, block, *inputs), inputs


def _blockwise_backward(
    activation: Activation, block: int, saved: tuple[Any, ...], dy_RD: jax.Array
) -> tuple[jax.Array, None, Any]:
    """Gradients of weights are added up over blocks in at least float32."""
    x_RD, ends_E, weights = saved

    def one(at: jax.Array, sums: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
        x_bD, dy_bD = (lax.dynamic_slice_in_dim(array, at, block) for array in padded)
        block_ends_E = _within(ends_E, at, block)
        _, backward = jax.vjp(lambda weights, x_bD: _one_block(activation, weights, x_bD, block_ends_E), weights, x_bD)
        own, dx_bD = backward(dy_bD)
        return (
            lax.dynamic_update_slice_in_dim(sums[0], dx_bD, at, axis=0),
            jax.tree.map(lambda total, part: total + part.astype(total.dtype), sums[1], own),
        )

    padded = _padded(x_RD, block), _padded(dy_RD, block)
    wide = jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.promote_types(w.dtype, jnp.float32)), weights)
    dx_RD, totals = _over_blocks(ends_E, block, one, (jnp.zeros_like(padded[0]), wide))
    return dx_RD[: len(x_RD)], None, jax.tree.map(lambda total, w: total.astype(w.dtype), totals, weights)


apply_blockwise.defvjp(_blockwise_forward, _blockwise_backward)


def _one_block(
    activation: Activation, weights: Mapping[str, jax.Array], x_bD: jax.Array, ends_E: jax.Array
) -> jax.Array:
    return apply_packed(x_bD, ends_E, weights["up"], weights["down"], weights.get("gate"), activation)


def _over_blocks(ends_E: jax.Array, block: int, one: Callable[[jax.Array, Any], Any], carry: Any) -> Any:
    """``carry = one(at, carry)`` for each block of rows, which starts at ``at``, that has rows of experts."""
    return lax.fori_loop(0, -(-ends_E[-1] // block), lambda number, carry: one(number * block, carry), carry)


def _within(ends_E: jax.Array, at: jax.Array, block: int) -> jax.Array:
    """The ends of experts' rows within a block of rows."""
    return jnp.clip(ends_E - at, 0, block)


def _padded(rows_RD: jax.Array, block: int) -> jax.Array:
    """With rows of 0 at the end, up to whole blocks."""
    return jnp.pad(rows_RD, ((0, -len(rows_RD) % block), (0, 0)))


def apply_modules(x_RD: Float[Array, "R D"], ends_E: Int[Array, "E"], experts: Sequence[Module]) -> Float[Array, "R D"]:
    """(R, D): as `grouped_expert_forward`, by ends, on whose values no shape depends; 0 for rows of no expert."""
    rows_R1 = jnp.arange(x_RD.shape[0])[:, None]
    out_RD, start = jnp.zeros_like(x_RD), 0
    for index, expert in enumerate(experts):
        out_RD = jnp.where((rows_R1 >= start) & (rows_R1 < ends_E[index]), expert(x_RD), out_RD)
        start = ends_E[index]
    return out_RD


def _check_counts(rows: int, tokens_per_expert: Sequence[int], num_experts: int) -> None:
    if len(tokens_per_expert) != num_experts or min(tokens_per_expert) < 0 or sum(tokens_per_expert) != rows:
        raise ValueError(
            f"tokens_per_expert = {list(tokens_per_expert)}: must be {num_experts} numbers of rows, {rows} in all"
        )
