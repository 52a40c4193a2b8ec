"""What is kept of a tensor that is too large to keep: statistics, hashes, and a sketch that distances follow from."""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from shared_config.contract.mixing import WEYL, splitmix
from shared_config.interchange.weights import is_floating
from shared_config.parity.numerics import as_float64

SKETCH_SIZE = 1024
BLOCK = 1 << 20
PIECE = 1 << 15
"""Values that are looked at together."""


@dataclass(frozen=True, eq=False)
class Summary:
    """What is kept of a tensor in place of its values.

    Attributes:
        hash: SHA-256 of dtype, shape and bytes; of integers as int64, as backends choose other widths.
        nonfinite_hash: SHA-256 of where NaN and the infinities stand; "" if there are none.
        sketch: float64 (1024,), linear in the tensor: the norm of a difference of sketches estimates the norm of the
            difference of tensors to about 3 % (count sketch: Charikar, Chen & Farach-Colton 2002). Empty for integers.
        nonfinite: how many places are NaN or infinite.
    """

    shape: tuple[int, ...]
    dtype: str
    hash: str
    nonfinite_hash: str
    rms: float
    mean: float
    minimum: float
    maximum: float
    sketch: np.ndarray
    nonfinite: int = 0

    @property
    def size(self) -> int:
        """Number of elements of the tensor."""
        return int(np.prod(self.shape, dtype=np.int64))


def summarize(tensor: ArrayLike) -> Summary:
    """What can be kept of a tensor in a few kilobytes; it is read in pieces that stay in a processor's cache."""
    array = np.asarray(tensor, order="C")
    flat = array.reshape(-1)
    low, high, total, count = np.inf, -np.inf, 0.0, 0
    for values in _pieces(flat):
        kept = values if np.isfinite(values).all() else values[np.isfinite(values)]
        low, high = kept.min(initial=low), kept.max(initial=high)
        total, count = total + float(kept.sum()), count + kept.size
    scale = max(abs(float(low)), abs(float(high))) if count else 0.0
    squares = sum(_squares(values, scale) for values in _pieces(flat)) if scale else 0.0
    finite = count == flat.size
    return Summary(
        shape=array.shape,
        dtype=array.dtype.name,
        hash=_hash(array),
        nonfinite_hash="" if finite else _hash(_kinds_of_nonfinite(as_float64(array))),
        rms=scale * math.sqrt(squares / count) if scale else 0.0,
        mean=total / count if count else 0.0,
        minimum=float(low) if count else 0.0,
        maximum=float(high) if count else 0.0,
        sketch=sketch(flat) if is_floating(array.dtype) else np.empty(0),
        nonfinite=flat.size - count,
    )


def _pieces(flat: np.ndarray) -> Iterator[np.ndarray]:
    """Runs of `PIECE` values, as float64."""
    return (as_float64(flat[start : start + PIECE]) for start in range(0, flat.size, PIECE))


def _squares(values: np.ndarray, scale: float) -> float:
    """Sum of the squares of what is finite, relative to a scale."""
    scaled = values / scale
    if not np.isfinite(scaled).all():
        scaled = scaled[np.isfinite(scaled)]
    return float(scaled @ scaled)


def tensors_hash(tensors: Mapping[str, np.ndarray | Summary]) -> str:
    """SHA-256 of names, dtypes, shapes and bytes, whatever the order; the same of tensors and of their summaries."""
    hashes = {name: tensor.hash if isinstance(tensor, Summary) else _hash(tensor) for name, tensor in tensors.items()}
    return hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()


def sketch(values: np.ndarray) -> np.ndarray:
    """Signed sums of values over 1024 buckets chosen by a hash of the position; what is not finite counts as 0."""
    sums = np.zeros(SKETCH_SIZE)
    for number, piece in enumerate(_pieces(values.reshape(-1))):
        start = number * PIECE
        places = slice(start % BLOCK, start % BLOCK + piece.size)
        signs, buckets = (part[places] for part in _places(start - start % BLOCK))
        known = piece if np.isfinite(piece).all() else np.where(np.isfinite(piece), piece, 0.0)
        sums += np.bincount(buckets, weights=signs * known, minlength=SKETCH_SIZE)
    return sums


@functools.lru_cache(maxsize=8)
def _places(start: int) -> tuple[np.ndarray, np.ndarray]:
    """Signs and buckets of the `BLOCK` positions from ``start`` on."""
    mixed = splitmix(np.arange(start, start + BLOCK, dtype=np.uint64) + WEYL)
    signs = np.where(mixed >> np.uint64(63), -1.0, 1.0)
    buckets = (mixed % np.uint64(SKETCH_SIZE)).astype(np.int64)
    return signs, buckets


def _kinds_of_nonfinite(values: np.ndarray) -> np.ndarray:
    """0 for finite, 1 for NaN, 2 and 3 for the infinities."""
    return (np.isnan(values) + 2 * (values == np.inf) + 3 * (values == -np.inf)).astype(np.int8)


def _hash(array: np.ndarray) -> str:
    array = array if is_floating(array.dtype) else array.astype(np.int64)
    digest = hashlib.sha256(f"{array.dtype.name} {array.shape}".encode())
    digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
