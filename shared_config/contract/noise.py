"""Noise that follows from integers alone: the same bits in both backends, on every device and in every float dtype.

All arithmetic is on 32-bit unsigned integers, with multipliers below 2^31, so that a product fits a signed 64-bit one
where a framework has no unsigned arithmetic. This file is the definition in NumPy; `model/noise.py` of each backend has
the same functions.

Shapes: B images, P = 3 * h * w places of an image, N tokens, F features.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

MASK = 0xFFFFFFFF
MULTIPLIERS = (0x21F0AAAD, 0x735A2D97)
SALTS = (0x3C6EF372, 0x1F83D9AB)
"""Of the two digests of an image: fractional parts of square roots of primes (as in SHA-2), no secret in them."""

LEVELS = 127.5
MAX_LEVEL = 32767
FEATURE_SCALE = 128.0
UNIFORM_BITS = 23


def mix(x: ArrayLike) -> np.ndarray:
    """A bijection of the 32-bit integers in which each input bit flips each output bit with probability near 1/2.

    Xor-shift and multiply, constants found by search (C. Wellons, hash-prospector: 16 21f0aaad 15 735a2d97 15).
    """
    x = np.asarray(x, np.uint32)
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint32(16))) * np.uint32(MULTIPLIERS[0])
        x = (x ^ (x >> np.uint32(15))) * np.uint32(MULTIPLIERS[1])
    return x ^ (x >> np.uint32(15))


def pixel_levels(pixels: np.ndarray) -> np.ndarray:
    """The integers that stand for pixel values: floor(127.5 * float32(pixel)), cut off at +-32767, modulo 2^32.

    An 8-bit value v, normalised to v / 127.5 - 1, falls in the middle of its level, so that rounding it to bfloat16
    changes nothing. What is not finite has level 0.

    Returns:
        uint32, of the shape of ``pixels``.
    """
    values = pixels.astype(np.float32)
    values = np.where(np.isfinite(values), values, np.float32(0))
    levels = np.clip(np.floor(values * np.float32(LEVELS)), -MAX_LEVEL, MAX_LEVEL)
    return levels.astype(np.int32).view(np.uint32)


def image_digests(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two 32-bit digests of each image: sums over its places of a hash of (salt, place, level).

    Args:
        pixels: (B, ...), floating point; places count in reading order.

    Returns:
        uint32 (B,), twice.
    """
    levels_BP = pixel_levels(pixels).reshape(len(pixels), -1)
    places_P = np.arange(levels_BP.shape[1], dtype=np.uint32)
    first_B, second_B = (
        mix(np.sum(mix(mix(places_P ^ np.uint32(salt)) + levels_BP), axis=1, dtype=np.uint32)) for salt in SALTS
    )
    return first_B, second_B


def image_noise(pixels: np.ndarray, num_tokens: int, feature_dim: int, seed: int = 0) -> np.ndarray:
    """Features that are a function of the pixel values and their places, and look random.

    Odd multiples of 1/128 between -2 and 2, evenly distributed; exact in every float dtype. An image with a value that
    is not finite has NaN features.

    Args:
        pixels: (B, ...), floating point.
        seed: an image has different noise under different seeds.

    Returns:
        (B, N, F), in the dtype of ``pixels``.
    """
    first_B, second_B = image_digests(pixels)
    cells = np.arange(num_tokens * feature_dim, dtype=np.uint32)
    bits = mix(mix(cells + first_B[:, None]) ^ second_B[:, None] ^ mix(seed & MASK))
    odd = 2 * (bits >> np.uint32(24)).astype(np.int32) - 255
    finite_B1 = np.all(np.isfinite(pixels.astype(np.float32)).reshape(len(pixels), -1), axis=1, keepdims=True)
    noise = np.where(finite_B1, odd / np.float32(FEATURE_SCALE), np.float32(np.nan))
    return noise.reshape(len(pixels), num_tokens, feature_dim).astype(pixels.dtype)


def fold(state: ArrayLike, index: ArrayLike) -> np.ndarray:
    """A new hash from a hash and an integer, elementwise; chains of it name a number by several indices."""
    salted = np.asarray(index, np.uint32) + np.uint32(SALTS[0])
    return mix(np.asarray(state, np.uint32) ^ mix(salted))


def uniforms(bits: np.ndarray) -> np.ndarray:
    """Hashes to float32 numbers strictly between 0 and 1: odd multiples of 2^-24, exact."""
    return ((bits >> np.uint32(32 - UNIFORM_BITS)).astype(np.float32) + np.float32(0.5)) / np.float32(2**UNIFORM_BITS)


def routing_bits(seed: int, layer: int, group: int, tokens: int, experts: int) -> np.ndarray:
    """A hash for every pair of token and expert of one router: uint32 (tokens, experts).

    Args:
        seed: of the training step.
        group: which of the layer's routers.
    """
    router = fold(fold(mix(seed & MASK), layer), group)
    token_T1 = fold(router, np.arange(tokens, dtype=np.uint32))[:, None]
    return fold(token_T1, np.arange(experts, dtype=np.uint32))


def gumbel_noise(seed: int, layer: int, group: int, tokens: int, experts: int) -> np.ndarray:
    """-log(-log(u)) for the uniforms of `routing_bits`: float64 (tokens, experts)."""
    return -np.log(-np.log(uniforms(routing_bits(seed, layer, group, tokens, experts)).astype(np.float64)))
