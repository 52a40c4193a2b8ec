"""The layers that torch has built in: linear maps and lookup tables.

Shapes: ... any leading axes, I inputs, O outputs, V rows of a table, D model dim.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx

from kempnerforge_jax.model.module import Module


class Linear(Module):
    """x @ weight.T + bias, the weight (O, I) as in torch; drawn uniform(-1, 1) / sqrt(I)."""

    def __init__(self, in_features: int, out_features: int, bias: bool = False, *, rngs: nnx.Rngs):
        self.in_features = in_features
        self.out_features = out_features
        weight_OI = self._drawn((out_features, in_features), rngs)
        self.weight: nnx.Param[jax.Array] | None = nnx.Param(weight_OI)
        self.bias = nnx.Param(self._drawn((out_features,), rngs)) if bias else None

    def forward(self, x: jax.Array, weight: jax.Array | None = None) -> jax.Array:
        """(..., I) -> (..., O).

        Args:
            x: the input; its dtype must be that of the weight.
            weight: (O, I), used instead of the layer's own, which a tied layer has not.
        """
        if weight is None:
            assert self.weight is not None, "a tied layer needs the weight at its call"
            weight = self.weight.get_value()
        y = contract(x, weight)
        return y if self.bias is None else y + self.bias.get_value()

    def _drawn(self, shape: tuple[int, ...], rngs: nnx.Rngs) -> jax.Array:
        bound = 1 / math.sqrt(self.in_features)
        return jax.random.uniform(rngs.params(), shape, jnp.float32, -bound, bound)


class Embedding(Module):
    """A lookup table (V, D), drawn normal(0, 1)."""

    def __init__(self, num_embeddings: int, dim: int, *, rngs: nnx.Rngs):
        self.num_embeddings = num_embeddings
        self.weight = nnx.Param(jax.random.normal(rngs.params(), (num_embeddings, dim), jnp.float32))

    def forward(self, ids: jax.Array) -> jax.Array:
        """Integers (...) -> (..., D); the row of an id outside [0, V) is NaN."""
        inside = (ids >= 0) & (ids < self.num_embeddings)
        rows = jnp.take(self.weight.get_value(), jnp.where(inside, ids, 0), axis=0)
        return jnp.where(inside[..., None], rows, jnp.nan)


def contract(x: jax.Array, weight: jax.Array) -> jax.Array:
    """x (..., I) times weight (O, I) over I.

    XLA sums bfloat16 products in float32 and rounds the result once. Asking for a float32 result and casting it would
    be the same forward, but makes the products of the backward pass float32 ones.
    """
    if x.dtype != weight.dtype:
        raise ValueError(f"x.dtype = {x.dtype}: must be the dtype of the weight, {weight.dtype}")
    return jax.lax.dot_general(x, weight, (((x.ndim - 1,), (1,)), ((), ())))
