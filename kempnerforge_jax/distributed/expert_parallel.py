"""Expert parallelism (Lepikhin et al. 2021, arXiv:2006.16668): each device along "ep" holds some of the experts. Every
one gets all tokens, and adds up, for each, what its own experts make of it; these sums are scattered.

    2 devices, 2 experts each, a token has 2               device 0 has experts 0 and 1    device 1 has experts 2 and 3
    device 0 has tokens a -> 0 2, b -> 1 0                 a:0  b:0  b:1  c:1              a:2  c:3  d:2  d:3
    device 1 has tokens c -> 3 1, d -> 2 3                 sums of a b c d                 sums of a b c d

A device has room for the rows of all experts; of these it computes its own, a block at a time.

Shapes: T tokens of this device, G of all devices, D model dim, k assignments of a token, R rows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from kempnerforge_jax.model.dispatch import Routes, experts_of, plan_dispatch

AXIS = "ep"
BLOCKS = 4
"""Of rows, of a device whose experts have their even share; the last is in part empty, as a rule."""
ALIGNED = 128
"""Rows of a block are a multiple of it, as of the tiles of kernels."""


def gather_tokens(
    routed: Callable[[Float[Array, "G D"], Routes], Float[Array, "G D"]],
    x_TD: Float[Array, "T D"],
    routes: Routes,
    held: int,
) -> Float[Array, "T D"]:
    """(T, D): for each token the weighted sum of what its experts make of it, wherever they are, in the dtype of the
    weights.

    Args:
        routed: tokens of all devices, and how they go to the ``held`` experts of this one, to the sums of what these
            make of them.
    """
    x_GD, weights_Gk = _gathered(x_TD), _gathered(routes.weights_Tk)
    factors_Gk = None if routes.factors_Tk is None else _gathered(routes.factors_Tk)
    number_Gk = lax.all_gather(experts_of(routes), AXIS, axis=0, tiled=True) - held * lax.axis_index(AXIS)
    plan = plan_dispatch(jnp.where((number_Gk >= 0) & (number_Gk < held), number_Gk, held), None, held)
    experts, even = len(routes.plan.ends_E), routes.weights_Tk.size
    most = number_Gk.size if routes.limit is None else experts * routes.limit
    plan = plan._replace(assignment_R=plan.assignment_R[:most])
    y_GD = routed(x_GD, Routes(weights_Gk, plan, factors_Gk, block=-(-even // (BLOCKS * ALIGNED)) * ALIGNED))
    return _scattered(x_TD.dtype, y_GD)


@jax.custom_vjp
def _gathered(x: jax.Array) -> jax.Array:
    """What the devices have, one after another; the gradient of a part is the sum of theirs, in at least float32."""
    return lax.all_gather(x, AXIS, axis=0, tiled=True)


def _gathered_backward(_: None, dy: jax.Array) -> tuple[jax.Array]:
    wide = dy.astype(jnp.promote_types(dy.dtype, jnp.float32))
    return (lax.psum_scatter(wide, AXIS, scatter_dimension=0, tiled=True).astype(dy.dtype),)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scattered(gradients: DTypeLike, y: jax.Array) -> jax.Array:
    """This device's part of the sum; the gradient of a summand is those of all parts, which fit the dtype of
    ``gradients``, as the result is cast to it.
    """
    return lax.psum_scatter(y, AXIS, scatter_dimension=0, tiled=True)


def _scattered_backward(gradients: DTypeLike, _: None, dy: jax.Array) -> tuple[jax.Array]:
    return (lax.all_gather(dy.astype(gradients), AXIS, axis=0, tiled=True).astype(dy.dtype),)


_gathered.defvjp(lambda x: (_gathered(x), None), _gathered_backward)
_scattered.defvjp(lambda gradients, y: (_scattered(gradients, y), None), _scattered_backward)
