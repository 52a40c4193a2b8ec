"""Expert parallelism: each device along "ep" holds some of the experts, and rows travel to theirs and back.

Shapes: R rows of this rank, D model dim, E experts of the layer, H experts that a device holds, P devices along "ep",
N = P * R rows that a device computes.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

AXIS = "ep"


def exchanged(
    apply: Callable[[Float[Array, "N D"], Int[Array, "H"]], Float[Array, "N D"]],
    x_RD: Float[Array, "R D"],
    ends_E: Int[Array, "E"],
) -> Float[Array, "R D"]:
    """(R, D): rows that are sorted by expert, each through its own, wherever that is; 0 for rows of no expert.

    Every device sends each other one as many rows as it has, of which those that have no expert there are 0: no row is
    ever left behind, whatever the routes.

    Args:
        apply: rows, sorted by the experts that this device holds, and the ends (H,) of each expert's -> rows.
        ends_E: row after the last one of each expert.
    """
    devices = lax.axis_size(AXIS)
    counts_PH = jnp.diff(ends_E, prepend=0).reshape(devices, -1)
    ends_P = ends_E.reshape(devices, -1)[:, -1]
    starts_P = jnp.concatenate([jnp.zeros(1, ends_P.dtype), ends_P[:-1]])
    rows_R = jnp.arange(x_RD.shape[0], dtype=ends_E.dtype)
    place_PR = starts_P[:, None] + rows_R
    sent_PRD = _rows(x_RD, place_PR, place_PR < ends_P[:, None])
    came_PRD, came_PH = (lax.all_to_all(array, AXIS, 0, 0) for array in (sent_PRD, counts_PH))
    expert_PR = jax.vmap(lambda ends_H: jnp.searchsorted(ends_H, rows_R, side="right"))(jnp.cumsum(came_PH, axis=1))
    order = jnp.argsort(expert_PR.ravel(), stable=True)
    flat = came_PRD.reshape(-1, x_RD.shape[1])
    computed = apply(flat[order], jnp.cumsum(came_PH.sum(axis=0), dtype=ends_E.dtype))
    back_PRD = computed[jnp.argsort(order)].reshape(came_PRD.shape)
    result_PRD = lax.all_to_all(back_PRD, AXIS, 0, 0)
    home_R = jnp.minimum(jnp.searchsorted(ends_P, rows_R, side="right"), devices - 1)
    place_R = home_R * x_RD.shape[0] + rows_R - starts_P[home_R]
    return _rows(result_PRD.reshape(-1, x_RD.shape[1]), place_R, rows_R < ends_E[-1])


def _rows(x: jax.Array, places: jax.Array, there: jax.Array) -> jax.Array:
    """x[places], 0 where nothing is there."""
    return jnp.where(there[..., None], x[jnp.where(there, places, 0)], 0)
