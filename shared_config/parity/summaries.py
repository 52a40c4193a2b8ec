"""What is kept of a tensor that is too large to keep: statistics, hashes, and a sketch that distances follow from."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from shared_config.contract.mixing import WEYL, splitmix
from shared_config.interchange.weights import is_floating
from shared_config.parity.numerics import as_float64, rms

SKETCH_SIZE = 1024
BLOCK = 1 << 20


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
    """What can be kept of a tensor in a few kilobytes."""
    array = np.asarray(tensor, order="C")
    values = as_float64(array)
    finite = np.isfinite(values)
    kept = values[finite]
    return Summary(
        shape=array.shape,
        dtype=array.dtype.name,
        hash=_hash(array),
        nonfinite_hash="" if finite.all() else _hash(_kinds_of_nonfinite(values)),
        rms=rms(kept),
        mean=float(kept.mean()) if kept.size else 0.0,
        minimum=float(kept.min()) if kept.size else 0.0,
        maximum=float(kept.max()) if kept.size else 0.0,
        sketch=sketch(np.where(finite, values, 0.0)) if is_floating(array.dtype) else np.empty(0),
        nonfinite=int(np.count_nonzero(~finite)),
    )


def tensors_hash(tensors: Mapping[str, np.ndarray | Summary]) -> str:
    """SHA-256 of names, dtypes, shapes and bytes, whatever the order; the same of tensors and of their summaries."""
    hashes = {name: tensor.hash if isinstance(tensor, Summary) else _hash(tensor) for name, tensor in tensors.items()}
    return hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()


def sketch(values: np.ndarray) -> np.ndarray:
    """Signed sums of float64 values over 1024 buckets chosen by a hash of the position."""
    flat = values.reshape(-1)
    sums = np.zeros(SKETCH_SIZE)
    for start in range(0, flat.size, BLOCK):
        block = flat[start : start + BLOCK]
        signs, buckets = (part[: block.size] for part in _places(start))
        sums += np.bincount(buckets, weights=signs * block, minlength=SKETCH_SIZE)
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
