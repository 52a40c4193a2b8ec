"""Noise by hashing, bit for bit that of `shared_config.contract.noise`, which defines it.

Shapes: B images, P = 3 * h * w places of an image, N tokens, F features, T tokens of a router, E experts.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float, Integer

from shared_config.contract.noise import FEATURE_SCALE, LEVELS, MASK, MAX_LEVEL, MULTIPLIERS, SALTS, UNIFORM_BITS


def mix(x: Integer[Array, "..."]) -> Integer[Array, "..."]:
    """A bijection of the 32-bit integers, in uint32."""
    x = (x ^ (x >> 16)) * jnp.uint32(MULTIPLIERS[0])
    x = (x ^ (x >> 15)) * jnp.uint32(MULTIPLIERS[1])
    return x ^ (x >> 15)


def pixel_levels(pixels: Float[Array, "..."]) -> Integer[Array, "..."]:
    """floor(127.5 * float32(pixel)), cut off at +-32767, modulo 2^32; 0 for what is not finite."""
    values = pixels.astype(jnp.float32)
    values = jnp.where(jnp.isfinite(values), values, 0)
    levels = jnp.clip(jnp.floor(values * LEVELS), -MAX_LEVEL, MAX_LEVEL)
    return levels.astype(jnp.int32).astype(jnp.uint32)


def image_digests(pixels: Float[Array, "B ..."]) -> tuple[Integer[Array, "B"], Integer[Array, "B"]]:
    """(B, ...) -> two digests (B,)."""
    levels_BP = pixel_levels(pixels).reshape(len(pixels), -1)
    indices_P = jnp.arange(levels_BP.shape[1], dtype=jnp.uint32)
    first_B, second_B = (
        mix(mix(mix(indices_P ^ jnp.uint32(salt)) + levels_BP).sum(axis=1, dtype=jnp.uint32)) for salt in SALTS
    )
    return first_B, second_B


def image_noise(
    pixels: Float[Array, "B ..."], num_tokens: int, feature_dim: int, seed: int = 0
) -> Float[Array, "B N F"]:
    """(B, ...) -> (B, N, F), in the dtype of ``pixels``; no gradient."""
    first_B, second_B = image_digests(pixels)
    indices = jnp.arange(num_tokens * feature_dim, dtype=jnp.uint32)
    bits = mix(mix(indices + first_B[:, None]) ^ second_B[:, None] ^ mix(jnp.uint32(seed & MASK)))
    odd = 2 * (bits >> 24).astype(jnp.int32) - 255
    finite_B = jnp.isfinite(pixels.astype(jnp.float32)).reshape(len(pixels), -1).all(axis=1)
    noise = jnp.where(finite_B[:, None], odd.astype(jnp.float32) / FEATURE_SCALE, jnp.nan)
    return noise.reshape(len(pixels), num_tokens, feature_dim).astype(pixels.dtype)


def fold(state: Integer[Array, "..."], index: ArrayLike) -> Integer[Array, "..."]:
    """A new hash from a hash and an integer, elementwise."""
    return mix(state ^ mix(jnp.asarray(index, jnp.uint32) + jnp.uint32(SALTS[0])))


def uniforms(bits: Integer[Array, "..."]) -> Float[Array, "..."]:
    """Hashes to float32 numbers strictly between 0 and 1."""
    return ((bits >> (32 - UNIFORM_BITS)).astype(jnp.float32) + 0.5) / 2**UNIFORM_BITS


def routing_bits(
    seed: Integer[Array, ""], layer: ArrayLike, group: int, tokens: int, experts: int
) -> Integer[Array, "T E"]:
    """A hash for every pair of token and expert of one router: (T, E).

    Args:
        seed: integer of shape ().
    """
    router = fold(fold(mix(seed.astype(jnp.uint32)), layer), group)
    token_T1 = fold(router, jnp.arange(tokens, dtype=jnp.uint32))[:, None]
    return fold(token_T1, jnp.arange(experts, dtype=jnp.uint32))


def gumbel_noise(
    seed: Integer[Array, ""], layer: ArrayLike, group: int, tokens: int, experts: int, dtype: DTypeLike
) -> Float[Array, "T E"]:
    """-log(-log(u)): (T, E) in ``dtype``."""
    return -jnp.log(-jnp.log(uniforms(routing_bits(seed, layer, group, tokens, experts)).astype(dtype)))
