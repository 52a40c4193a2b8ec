"""The layers that torch has built in: linear maps and lookup tables.

Shapes: ... any leading axes, I inputs, O outputs, R rank, V rows of a table, D model dim.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Integer

from kempnerforge_jax.model.checks import nan_outside, wide
from kempnerforge_jax.model.fp8 import fp8_linear
from kempnerforge_jax.model.module import Module
from shared_config.contract.fp8 import fits


class Linear(Module):
    """x @ weight.T + bias, the weight (O, I) as in torch; drawn uniform(-1, 1) / sqrt(I).

    Attributes:
        fp8: whether bfloat16 products are computed in FP8 where their sizes fit.
        lora_a, lora_b, lora_scale: an adapter, if there is one: see `shared_config.contract.lora`.
    """

    fp8 = False
    lora_scale = 1.0
    lora_a: nnx.Param | None = None
    lora_b: nnx.Param | None = None

    def __init__(self, in_features: int, out_features: int, bias: bool = False, *, rngs: nnx.Rngs | None):
        """``rngs``: None for zeros, where the values are set afterwards."""
        self.in_features = in_features
        self.out_features = out_features
        weight_OI = _uniform(rngs, (out_features, in_features), in_features)
        self.weight: nnx.Param[jax.Array] | None = nnx.Param(weight_OI)
        self.bias = nnx.Param(_uniform(rngs, (out_features,), in_features)) if bias else None

    def forward(self, x: Float[Array, "... I"]) -> Float[Array, "... O"]:
        """(..., I) -> (..., O); the dtype of ``x`` must be that of the weight."""
        assert self.weight is not None, "a tied layer has no weight"
        bias = None if self.bias is None else self.bias.get_value()
        y = linear(x, matrix(self, "weight", x.dtype), bias, self.fp8)
        if self.lora_a is None or self.lora_b is None:
            return y
        return y + low_rank(x, self.lora_a.get_value(), self.lora_b.get_value(), self.lora_scale)

    def factors(self, x: Float[Array, "... I"]) -> tuple[Float[Array, "... I"], Float[Array, "O I"]]:
        """What `forward` multiplies: inputs and the weight."""
        assert self.weight is not None, "a tied layer has no weight"
        return x, self.weight.get_value()


class Embedding(Module):
    """A lookup table (V, D), drawn normal(0, 1)."""

    def __init__(self, num_embeddings: int, dim: int, *, rngs: nnx.Rngs | None):
        """``rngs``: None for zeros, where the values are set afterwards."""
        self.num_embeddings = num_embeddings
        self.weight = nnx.Param(_normal(rngs, (num_embeddings, dim)))

    def forward(self, ids: Integer[Array, "..."]) -> Float[Array, "... D"]:
        """Integers (...) -> (..., D); the row of an id outside [0, V) is NaN."""
        ids = wide(ids)
        rows = _look_up(self.weight.get_value(), jnp.clip(ids, 0, self.num_embeddings - 1))
        return nan_outside(rows, ids, self.num_embeddings)


def matrix(module: Module, name: str, dtype: DTypeLike) -> Float[Array, "..."]:
    """A weight of a module as it is; one that `hold_int8` put codes in the place of, from these, in ``dtype``."""
    weight, scales = getattr(module, name).get_value(), getattr(module, f"{name}_scale", None)
    return weight if scales is None else (weight * scales.get_value()).astype(dtype)


def silence(layer: Linear) -> None:
    """Set the weight to zero."""
    assert layer.weight is not None, "a tied layer has no weight"
    layer.weight.set_value(jnp.zeros_like(layer.weight.get_value()))


def linear(
    x: Float[Array, "... I"],
    weight: Float[Array, "O I"],
    bias: Float[Array, "O"] | None = None,
    fp8: bool = False,
) -> Float[Array, "... O"]:
    """x (..., I) times weight (O, I) over I, plus bias (O,).

    XLA sums bfloat16 products in float32 and rounds the result once. Asking for a float32 result and casting it would
    be the same forward, but makes the products of the backward pass float32 ones.

    Args:
        fp8: compute the product in FP8, if it is of bfloat16 and its sizes fit.

    Raises:
        ValueError: dtypes that differ.
    """
    if x.dtype != weight.dtype:
        raise ValueError(f"x.dtype = {x.dtype}: must be the dtype of the weight, {weight.dtype}")
    if fp8 and x.dtype == jnp.bfloat16 and fits(x.size // weight.shape[1], *weight.shape):
        y = fp8_linear(x, weight)
    else:
        y = jax.lax.dot_general(x, weight, (((x.ndim - 1,), (1,)), ((), ())))
    return y if bias is None else y + broadcast(bias, y.shape)


def low_rank(
    x: Float[Array, "... I"], a_RI: Float[Array, "R I"], b_OR: Float[Array, "O R"], scale: float
) -> Float[Array, "... O"]:
    """scale * B (A x), as an adapter adds it to W x: (..., I) -> (..., O)."""
    return scale * linear(linear(x, a_RI), b_OR)


def broadcast(x: Float[Array, "..."], shape: Sequence[int]) -> Float[Array, "..."]:
    """``x`` in a larger shape; its gradient is summed in at least float32."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return jnp.broadcast_to(wide, shape).astype(x.dtype)


def _uniform(rngs: nnx.Rngs | None, shape: tuple[int, ...], fan_in: int) -> jax.Array:
    """float32 values, uniform(-1, 1) / sqrt(fan_in)."""
    if rngs is None:
        return jnp.zeros(shape, jnp.float32)
    bound = 1 / math.sqrt(fan_in)
    return jax.random.uniform(rngs.params(), shape, jnp.float32, -bound, bound)


def _normal(rngs: nnx.Rngs | None, shape: tuple[int, ...]) -> jax.Array:
    """float32 values, normal(0, 1)."""
    if rngs is None:
        return jnp.zeros(shape, jnp.float32)
    return jax.random.normal(rngs.params(), shape, jnp.float32)


@jax.custom_vjp
def _look_up(weight_VD: jax.Array, ids: jax.Array) -> jax.Array:
    """Rows of a table; backward adds up the gradients of a row in at least float32, as there may be thousands."""
    return jnp.take(weight_VD, ids, axis=0)


def _look_up_forward(weight_VD: jax.Array, ids: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _look_up(weight_VD, ids), (weight_VD, ids)


def _look_up_backward(saved: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array, None]:
    weight_VD, ids = saved
    total_VD = jnp.zeros(weight_VD.shape, jnp.promote_types(dy.dtype, jnp.float32))
    return total_VD.at[ids].add(dy.astype(total_VD.dtype)).astype(weight_VD.dtype), None


_look_up.defvjp(_look_up_forward, _look_up_backward)
