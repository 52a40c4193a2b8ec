"""What is kept of a tensor that is too large to keep: statistics, hashes, and a sketch from which distances follow.

All of it comes of the *moments* of a tensor, which any device can compute in one pass, in any order of summation: a
float64 vector of `MOMENTS` numbers,

    lowest, highest, sum, norm, count      of the values that are finite
    columns  (1021,)                       signed sums of the values at places p with the same p mod 1021
    gaps     (1021,)                       sums, mod 2^32, of a number for each place that is not finite, of its row
                                           ``p // 1021`` and its kind

The sign of place p in piece ``k = p // PIECE`` is ``times[k] * signs()[first[k] + p % PIECE]`` with
``first, times = starts(k + 1)``.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import ml_dtypes
import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from shared_config.contract.mixing import WEYL, splitmix
from shared_config.interchange.weights import is_floating

SKETCH_SIZE = 1021
"""A prime, so that whatever the width of a matrix, a column of it spreads over all buckets."""
ROWS = 64
PIECE = ROWS * SKETCH_SIZE
"""Values whose signs are next to each other."""
BLOCK = 16 * PIECE
"""Values that are looked at together: they stay in a processor's cache, and calls are few."""
SCALARS = 5
MOMENTS = SCALARS + 2 * SKETCH_SIZE
NAN, POSITIVE, NEGATIVE = 0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D
"""What a place counts in ``gaps`` that is NaN, or an infinity."""
LOW = np.uint64(0xFFFFFFFF)
SUMMED = 8
"""Rows of a group: these are added up, and then the groups of a piece, in the arithmetic of the values."""
MODERATE = 1e15
"""Beyond this, or its inverse, values of float32 are widened: so are their squares."""
EXTREME = 1e100
"""Beyond this, or its inverse, squares are taken of scaled values."""


@dataclass(frozen=True, eq=False)
class Summary:
    """What is kept of a tensor in place of its values.

    Attributes:
        hash: SHA-256 of dtype, shape and bytes; of integers as int64, as backends choose other widths. "" where it was
            not asked for.
        nonfinite_hash: SHA-256 of where NaN and the infinities stand; "" if there are none.
        sketch: float64 (1021,), linear in the tensor: the norm of a difference of sketches estimates the norm of the
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


def summarize(tensor: ArrayLike, hashed: bool = True) -> Summary:
    """What can be kept of a tensor in a few kilobytes.

    Args:
        hashed: whether to hash its bytes, which takes several times as long as all else; those of integers always are.
    """
    array = np.asarray(tensor, order="C")
    floating = is_floating(array.dtype)
    digest = _hash(array) if hashed or not floating else ""
    return summary_of_moments(moments(array), array.shape, array.dtype.name, digest, floating)


def summary_of_moments(
    found: np.ndarray, shape: tuple[int, ...], dtype: str, digest: str = "", floating: bool = True
) -> Summary:
    """The summary of a tensor of which the moments are known.

    Args:
        found: float64 (`MOMENTS`,).
        digest: `Summary.hash`.
    """
    low, high, total, norm, count = found[:SCALARS].tolist()
    columns, gaps = found[SCALARS : SCALARS + SKETCH_SIZE], found[SCALARS + SKETCH_SIZE :]
    nonfinite = math.prod(shape) - int(count)
    return Summary(
        shape=tuple(shape),
        dtype=dtype,
        hash=digest,
        nonfinite_hash=_digest(shape, gaps) if nonfinite else "",
        rms=norm / math.sqrt(count) if count else 0.0,
        mean=total / count if count else 0.0,
        minimum=low if count else 0.0,
        maximum=high if count else 0.0,
        sketch=np.array(columns) if floating else np.empty(0),
        nonfinite=nonfinite,
    )


@np.errstate(over="ignore", invalid="ignore")
def moments(array: np.ndarray) -> np.ndarray:
    """float64 (`MOMENTS`,) of an array on the host, which is read in blocks; a sum may be infinite.

    Values of float32 and narrower dtypes are added up in float32: 8, and then 8 of these sums, to a column of a piece,
    at most 1021 to another sum. All other arithmetic is in float64. So moments are off by about a rounding of float32,
    or float64, of their norm.

    Where Numba is installed a compiled loop reads the values of an array that is at least a piece, once. Smaller ones,
    and blocks in which a value is not finite or all are tiny, are read by NumPy, in five passes.
    """
    flat = np.ascontiguousarray(array).reshape(-1)
    begins, times = starts(-(-flat.size // PIECE))
    found = _vector(np.inf, -np.inf, 0.0, 0.0, 0)
    for number, (start, end) in enumerate(_blocks(flat.size)):
        pieces = slice(start // PIECE, -(-end // PIECE))
        of_block = _of_block(_plain(flat[start:end]), begins[pieces], times[pieces], start)
        found = _of_both(found, of_block) if number else of_block
    if found[4] < flat.size:
        found[SCALARS + SKETCH_SIZE :] %= 2.0**32
    return found


@functools.cache
def signs(dtype: DTypeLike = np.float64) -> np.ndarray:
    """(2 * `PIECE`,) of -1 and 1: the highest bits of SplitMix64's numbers."""
    mixed = splitmix(np.arange(2 * PIECE, dtype=np.uint64) + WEYL)
    return np.where(mixed >> np.uint64(63), -1.0, 1.0).astype(dtype)


@functools.lru_cache(maxsize=64)
def starts(pieces: int) -> tuple[np.ndarray, np.ndarray]:
    """int64 (pieces,), where in `signs` those of each piece begin, and float64 (pieces,), what multiplies these."""
    mixed = splitmix(np.arange(pieces, dtype=np.uint64) + WEYL)
    return (mixed % np.uint64(PIECE)).astype(np.int64), np.where(mixed >> np.uint64(63), -1.0, 1.0)


def sketch(values: np.ndarray) -> np.ndarray:
    """float64 (1021,): signed sums; what is not finite counts as 0."""
    return moments(values)[SCALARS : SCALARS + SKETCH_SIZE]


def tensors_hash(tensors: Mapping[str, np.ndarray | Summary]) -> str:
    """SHA-256 of names, dtypes, shapes and bytes, whatever the order; the same of tensors and of hashed summaries."""
    hashes = {name: tensor.hash if isinstance(tensor, Summary) else _hash(tensor) for name, tensor in tensors.items()}
    return hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()


def _vector(low: float, high: float, total: float, norm: float, count: int) -> np.ndarray:
    """Moments with so much in the first places, and nothing in the columns and gaps."""
    found = np.zeros(MOMENTS)
    found[:SCALARS] = low, high, total, norm, count
    return found


def _of_both(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """The moments of two blocks together; gaps are not reduced."""
    found = first + second
    found[0], found[1], found[3] = min(first[0], second[0]), max(first[1], second[1]), math.hypot(first[3], second[3])
    return found


@functools.cache
def _loop() -> Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray], np.ndarray] | None:
    """That of `moments_loop`, where Numba is installed, works with the NumPy that is, and compiles."""
    try:
        from shared_config.parity.moments_loop import add_up
    except ImportError:
        return None
    return add_up


def _of_block(values: np.ndarray, begins: np.ndarray, times: np.ndarray, start: int) -> np.ndarray:
    """Moments of a block that starts at a place; gaps are not reduced."""
    if values.size >= PIECE and (loop := _loop()) is not None:
        found = loop(values, signs(values.dtype), begins, times)
        low, high, norm = found[0], found[1], found[3]
        if math.isfinite(norm) and max(-low, high) > 1 / MODERATE:
            return found
    return _read(values, begins, times, start)


def _read(values: np.ndarray, begins: np.ndarray, times: np.ndarray, start: int) -> np.ndarray:
    """Moments of a block by NumPy; gaps are not reduced."""
    low, high, count, gaps = float(np.minimum.reduce(values)), float(np.maximum.reduce(values)), values.size, None
    if not (math.isfinite(low) and math.isfinite(high)):
        finite = np.isfinite(values)
        gaps = _gaps(values, finite, start) & LOW
        low, high = (float(f(initial=i, where=finite)) for f, i in ((values.min, np.inf), (values.max, -np.inf)))
        count = int(finite.sum())
        values = np.where(finite, values, values.dtype.type(0))
    largest = max(-low, high, 0.0)
    values = values if 1 / MODERATE < largest < MODERATE else values.astype(np.float64, copy=False)
    total, norm = 0.0, 0.0
    for rows in _rows(values):
        total += float(np.add.reduce(np.vecdot(rows, _ones(rows.dtype)[: rows.shape[1]]), dtype=np.float64))
        norm = math.hypot(norm, _norm(rows, largest))
    found = _vector(low, high, total, norm, count)
    found[SCALARS : SCALARS + SKETCH_SIZE] = _columns(values, begins, times)
    if gaps is not None:
        found[SCALARS + SKETCH_SIZE :] = gaps
    return found


def _plain(piece: np.ndarray) -> np.ndarray:
    """As float32 or float64, whichever holds the values; a bfloat16 is the upper half of a float32."""
    if piece.dtype == ml_dtypes.bfloat16:
        return (piece.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)
    wide = np.float32 if piece.dtype in (np.float16, np.float32) else np.float64
    return piece.astype(wide, copy=False)


def _blocks(size: int) -> list[tuple[int, int]]:
    """Where each block of so many values begins and ends; the last has what is left as well."""
    bounds = [*range(0, max(size - BLOCK, 0) + 1, BLOCK), size]
    return list(itertools.pairwise(bounds)) if size else []


def _rows(values: np.ndarray) -> list[np.ndarray]:
    """The same as rows (n, 1021) and, where some are left, a shorter one (1, m)."""
    rest = values.size % SKETCH_SIZE
    whole, left = values[: values.size - rest].reshape(-1, SKETCH_SIZE), values[values.size - rest :].reshape(1, -1)
    return [part for part in (whole, left) if part.size]


@functools.cache
def _ones(dtype: np.dtype) -> np.ndarray:
    return np.ones(SKETCH_SIZE, dtype)


def _norm(rows: np.ndarray, largest: float) -> float:
    if not largest:
        return 0.0
    scale = 1.0 if 1 / EXTREME < largest < EXTREME else largest
    scaled = rows if scale == 1.0 else rows / scale
    return scale * math.sqrt(float(np.add.reduce(np.vecdot(scaled, scaled), dtype=np.float64)))


def _columns(values: np.ndarray, begins: np.ndarray, times: np.ndarray) -> np.ndarray:
    """float64 (1021,): signed sums of a block, by where the signs of each piece begin and what multiplies these."""
    whole = values.size // PIECE
    sums = np.empty((whole, ROWS // SUMMED, SKETCH_SIZE), values.dtype)
    table, shape = signs(values.dtype), (ROWS // SUMMED, SUMMED, SKETCH_SIZE)
    for number, begin in enumerate(begins[:whole].tolist()):
        piece, signed = values[number * PIECE : (number + 1) * PIECE], table[begin : begin + PIECE]
        np.einsum("grc,grc->gc", piece.reshape(shape), signed.reshape(shape), out=sums[number])
    columns = np.einsum("p,pc->c", times[:whole], np.add.reduce(sums, 1))
    if whole < begins.size:
        left = values[whole * PIECE :]
        _add_part(columns, left, table[begins[whole] : begins[whole] + left.size], times[whole])
    return columns


def _add_part(columns: np.ndarray, part: np.ndarray, signed: np.ndarray, times: float) -> None:
    """Add the sums of a part of a piece: of groups of eight rows, of the rows left, of what is left of a row."""
    groups, whole = (part.size - part.size % of for of in (SUMMED * SKETCH_SIZE, SKETCH_SIZE))
    for start, end, rows in (
        (0, groups, SUMMED),
        (groups, whole, (whole - groups) // SKETCH_SIZE),
        (whole, part.size, 1),
    ):
        if start < end:
            shape = (-1, rows, min(SKETCH_SIZE, end - start))
            sums = np.einsum("grc,grc->gc", part[start:end].reshape(shape), signed[start:end].reshape(shape))
            columns[: shape[2]] += times * np.add.reduce(sums, 0)


def _gaps(values: np.ndarray, finite: np.ndarray, start: int) -> np.ndarray:
    """Sums (1021,) of numbers that tell which places are not finite, and how."""
    places = np.flatnonzero(~finite)
    kinds = np.where(np.isnan(values[places]), NAN, np.where(values[places] > 0, POSITIVE, NEGATIVE)).astype(np.uint64)
    mixed = (places + start).astype(np.uint64) // np.uint64(SKETCH_SIZE) * np.uint64(NAN) & LOW
    sums = np.zeros(SKETCH_SIZE, np.uint64)
    np.add.at(sums, (places + start) % SKETCH_SIZE, (mixed ^ (mixed >> np.uint64(15)) | np.uint64(1)) * kinds)
    return sums


def _digest(shape: tuple[int, ...], numbers: np.ndarray) -> str:
    return hashlib.sha256(f"{tuple(shape)}".encode() + numbers.astype("<u8").tobytes()).hexdigest()


def _hash(array: np.ndarray) -> str:
    array = array if is_floating(array.dtype) else array.astype(np.int64)
    digest = hashlib.sha256(f"{array.dtype.name} {array.shape}".encode())
    digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
