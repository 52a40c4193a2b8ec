"""Factors on activations, that are kept in float32 whatever the dtype of what they multiply.

A number that JAX multiplies an array by takes its dtype: in bfloat16 it would be rounded first, by up to 0.4 percent.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float


def scaled(x: Float[Array, "..."], factor: float) -> Float[Array, "..."]:
    """The product, found in at least float32 and given in the dtype of x; what is multiplied by 1 stays as it is."""
    return x if factor == 1 else (_wide(x) * factor).astype(x.dtype)


def divided(x: Float[Array, "..."], divisor: float) -> Float[Array, "..."]:
    """The quotient, found in at least float32 and given in the dtype of x; what is divided by 1 stays as it is."""
    return x if divisor == 1 else (_wide(x) / divisor).astype(x.dtype)


def _wide(x: Array) -> Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
