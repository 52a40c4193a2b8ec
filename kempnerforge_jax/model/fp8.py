"""Linear maps whose three matrix products are computed in FP8, by the recipe of `shared_config.contract.fp8`.

Shapes: R rows, I inputs, O outputs, K what a product sums over, N rows of its second factor.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from shared_config.contract.fp8 import BACKWARD, FLOOR, FORWARD, Format

_DTYPES = {format.name: getattr(jnp, format.name) for format in (FORWARD, BACKWARD)}
_ROWS_BY_ROWS = (((1,), (1,)), ((), ()))


class Quantised(NamedTuple):
    """codes * scales: rows of float8 codes (R, K), each with a float32 scale (R, 1)."""

    codes: Float[Array, "R K"]
    scales: Float[Array, "R 1"]


def fp8_linear(x: Float[Array, "... I"], weight: Float[Array, "O I"]) -> Float[Array, "... O"]:
    """bfloat16 x (..., I) times weight (O, I) over I, in FP8; the sizes must be such that `fits`."""
    return _linear(x.reshape(-1, x.shape[-1]), weight).reshape(*x.shape[:-1], weight.shape[0])


def quantise(x: Float[Array, "R K"], format: Format) -> Quantised:
    """Each row in a float8 format, with its own scale."""
    wide = x.astype(jnp.float32)
    largest = jnp.max(jnp.abs(wide), axis=-1, keepdims=True)
    scales = jnp.maximum(largest, np.float32(FLOOR)) * np.float32(1 / format.largest)
    scaled = jnp.clip(wide * (1 / scales), -format.largest, format.largest)
    return Quantised(scaled.astype(_DTYPES[format.name]), scales)


def product(a: Quantised, b: Quantised) -> Float[Array, "R N"]:
    """The rows of ``a`` (R, K) times those of ``b`` (N, K): bfloat16 (R, N), summed in float32.

    XLA gives a product of float8 codes to the FP8 units, and where there are none multiplies the codes in a wider type,
    where their products are exact. "highest" asks those units for sums of as many digits as they can.
    """
    sums = lax.dot_general(
        a.codes, b.codes, _ROWS_BY_ROWS, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32
    )
    return (sums * b.scales.T * a.scales).astype(jnp.bfloat16)


@jax.custom_vjp
def _linear(x_RI: jax.Array, weight_OI: jax.Array) -> jax.Array:
    """x (R, I), weight (O, I) -> (R, O)."""
    return product(quantise(x_RI, FORWARD), quantise(weight_OI, FORWARD))


def _forward(x_RI: jax.Array, weight_OI: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _linear(x_RI, weight_OI), (x_RI, weight_OI)


def _backward(saved: tuple[jax.Array, jax.Array], dy_RO: jax.Array) -> tuple[jax.Array, jax.Array]:
    x_RI, weight_OI = saved
    dx_RI = product(quantise(dy_RO, BACKWARD), quantise(weight_OI.T, FORWARD))
    return dx_RI, product(quantise(dy_RO.T, BACKWARD), quantise(x_RI.T, FORWARD))


_linear.defvjp(_forward, _backward)
