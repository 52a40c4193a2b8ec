"""Random numbers and orders of data in integers of Python, which have no width that a library could change.

Philox 4x64-10 is that of Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", section 3.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator

WORD, WORD32 = 2**64, 2**32
PHILOX_MULTIPLIERS = (0xD2E7470EE14C6C93, 0xCA5A826395121157)
PHILOX_WEYL = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)
"""Of the golden ratio and the square root of 3 (Salmon et al., section 3.3)."""


def philox_key(seed: int, name: str) -> tuple[int, int]:
    """The key of a stream: the first 16 bytes of SHA-256 of ``seed:name``, as two little-endian words."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:16], "little")


def philox(key: tuple[int, int]) -> Iterator[int]:
    """64-bit words: four for each value of a counter that begins at 1, in ten rounds."""
    counter = 0
    while True:
        counter += 1
        state, (first, second) = (counter, 0, 0, 0), key
        for _ in range(10):
            low, high = state[0] * PHILOX_MULTIPLIERS[0], state[2] * PHILOX_MULTIPLIERS[1]
            state = (high // WORD ^ state[1] ^ first, high % WORD, low // WORD ^ state[3] ^ second, low % WORD)
            first, second = (first + PHILOX_WEYL[0]) % WORD, (second + PHILOX_WEYL[1]) % WORD
        yield from state


def uniforms(seed: int, name: str, count: int) -> list[float]:
    """Numbers in [0, 1): the upper 53 bits of each word."""
    words = philox(philox_key(seed, name))
    return [(next(words) >> 11) / 2**53 for _ in range(count)]


def permutation(size: int, key: str) -> list[int]:
    """Where a Feistel network of 8 rounds with cycle walking (Black & Rogaway 2002) puts 0, 1, ..., size - 1."""
    digest = hashlib.blake2b(key.encode(), digest_size=64).digest()
    keys = [int.from_bytes(digest[8 * number : 8 * number + 8], "little") for number in range(8)]
    half = max(1, math.ceil((size - 1).bit_length() / 2))
    placed = []
    for index in range(size):
        place = _enciphered(index, half, keys)
        while place >= size:
            place = _enciphered(place, half, keys)
        placed.append(place)
    return placed


def _enciphered(value: int, half: int, keys: list[int]) -> int:
    left, right = divmod(value, 2**half)
    for key in keys:
        left, right = right, left ^ (splitmix((right + key) % WORD) % 2**half)
    return left * 2**half + right


def splitmix(x: int) -> int:
    """The finaliser of SplitMix64 (Steele, Lea & Flood 2014)."""
    x = ((x ^ x >> 30) * 0xBF58476D1CE4E5B9) % WORD
    x = ((x ^ x >> 27) * 0x94D049BB133111EB) % WORD
    return x ^ x >> 31


def mixed(x: int) -> int:
    """hash-prospector's 16 21f0aaad 15 735a2d97 15 (C. Wellons)."""
    x = ((x ^ x >> 16) * 0x21F0AAAD) % WORD32
    x = ((x ^ x >> 15) * 0x735A2D97) % WORD32
    return x ^ x >> 15


def folded(state: int, index: int) -> int:
    """A hash from a hash and an integer; the salt is the fraction of the square root of 5, as in SHA-256."""
    return mixed(state ^ mixed((index + 0x3C6EF372) % WORD32))


def routing_uniform(seed: int, layer: int, router: int, token: int, expert: int) -> float:
    """The number behind the noise of one token and expert: an odd multiple of 2^-24."""
    state = mixed(seed % WORD32)
    for index in (layer, router, token, expert):
        state = folded(state, index)
    return ((state >> 9) + 0.5) / 2**23


def image_feature(levels: list[int], cell: int) -> float:
    """One feature of the noise of an image with these integer pixel levels; salts of the square roots of 5 and 17."""
    digests = []
    for salt in (0x3C6EF372, 0x1F83D9AB):
        total = sum(mixed((mixed(place ^ salt) + level) % WORD32) for place, level in enumerate(levels))
        digests.append(mixed(total % WORD32))
    bits = mixed(mixed((cell + digests[0]) % WORD32) ^ digests[1])
    return (2 * (bits >> 24) - 255) / 128
