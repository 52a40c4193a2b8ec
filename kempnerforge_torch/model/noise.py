"""Noise by hashing, bit for bit that of `shared_config.contract.noise`, which defines it.

32-bit unsigned arithmetic in int64: every product is below 2^63, and is truncated to 32 bits.

Shapes: B images, P = 3 * h * w places of an image, N tokens, F features, T tokens of a router, E experts.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from shared_config.contract.noise import FEATURE_SCALE, LEVELS, MASK, MAX_LEVEL, MULTIPLIERS, SALTS, UNIFORM_BITS

_Integers = TypeVar("_Integers", int, Tensor)


def mix(x: _Integers) -> _Integers:
    """A bijection of the 32-bit integers, held in int64 or in an int of Python."""
    x = ((x ^ (x >> 16)) * MULTIPLIERS[0]) & MASK
    x = ((x ^ (x >> 15)) * MULTIPLIERS[1]) & MASK
    return x ^ (x >> 15)


def pixel_levels(pixels: Float[Tensor, "..."]) -> Integer[Tensor, "..."]:
    """floor(127.5 * float32(pixel)), cut off at +-32767, modulo 2^32; 0 for what is not finite."""
    values = pixels.to(torch.float32)
    values = values.masked_fill(~values.isfinite(), 0)
    return (values * LEVELS).floor().clamp(-MAX_LEVEL, MAX_LEVEL).to(torch.int64) & MASK


def image_digests(pixels: Float[Tensor, "B ..."]) -> tuple[Integer[Tensor, "B"], Integer[Tensor, "B"]]:
    """(B, ...) -> two digests (B,)."""
    levels_BP = pixel_levels(pixels).flatten(1)
    indices_P = torch.arange(levels_BP.shape[1], device=pixels.device)
    first_B, second_B = (mix(mix((mix(indices_P ^ salt) + levels_BP) & MASK).sum(dim=1) & MASK) for salt in SALTS)
    return first_B, second_B


def image_noise(
    pixels: Float[Tensor, "B ..."], num_tokens: int, feature_dim: int, seed: int = 0
) -> Float[Tensor, "B N F"]:
    """(B, ...) -> (B, N, F), in the dtype of ``pixels``; no gradient."""
    first_B, second_B = image_digests(pixels)
    indices = torch.arange(num_tokens * feature_dim, device=pixels.device)
    bits = mix(mix((indices + first_B[:, None]) & MASK) ^ second_B[:, None] ^ mix(seed & MASK))
    odd = 2 * (bits >> 24) - 255
    finite_B = pixels.to(torch.float32).isfinite().flatten(1).all(dim=1)
    noise = (odd.to(torch.float32) / FEATURE_SCALE).masked_fill(~finite_B[:, None], torch.nan)
    return torch.unflatten(noise, 1, (num_tokens, feature_dim)).to(pixels.dtype)


def fold(state: Integer[Tensor, "..."], index: Integer[Tensor, "..."] | int) -> Integer[Tensor, "..."]:
    """A new hash from a hash and an integer, elementwise."""
    index = torch.as_tensor(index, dtype=torch.int64, device=state.device)
    return mix(state ^ mix((index + SALTS[0]) & MASK))


def uniforms(bits: Integer[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Hashes to float32 numbers strictly between 0 and 1."""
    return ((bits >> (32 - UNIFORM_BITS)).to(torch.float32) + 0.5) / 2**UNIFORM_BITS


def routing_bits(
    seed: Integer[Tensor, ""], layer: Integer[Tensor, ""] | int, group: int, tokens: int, experts: int
) -> Integer[Tensor, "T E"]:
    """A hash for every pair of token and expert of one router: (T, E).

    Args:
        seed: integer of shape ().
    """
    router = fold(fold(mix(seed.to(torch.int64) & MASK), layer), group)
    token_T1 = fold(router, torch.arange(tokens, device=seed.device))[:, None]
    return fold(token_T1, torch.arange(experts, device=seed.device))


def gumbel_noise(
    seed: Integer[Tensor, ""],
    layer: Integer[Tensor, ""] | int,
    group: int,
    tokens: int,
    experts: int,
    dtype: torch.dtype,
) -> Float[Tensor, "T E"]:
    """-log(-log(u)): (T, E) in ``dtype``."""
    return -(-uniforms(routing_bits(seed, layer, group, tokens, experts)).to(dtype).log()).log()
