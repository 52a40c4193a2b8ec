"""The moments of a tensor on the host in one compiled loop, which reads each value once; NumPy reads it five times.

Numba compiles it at the first call, and keeps what it has compiled beside this file or in the user's cache.
"""

from __future__ import annotations

from collections.abc import Callable

import numba
import numpy as np

from shared_config.parity.summaries import MOMENTS, PIECE, SCALARS, SKETCH_SIZE, SUMMED

if numba.config.DISABLE_JIT:  # pyright: ignore[reportAttributeAccessIssue, reportPrivateImportUsage]
    raise ImportError("Numba is asked for Python's own loops, which are thousands of times as slow")


def add_up(values: np.ndarray, signs: np.ndarray, begins: np.ndarray, times: np.ndarray) -> np.ndarray:
    """`summaries.moments` of a block, float64 (MOMENTS,), all of whose values count.

    Where a value is not finite, or its square is not, neither is the norm, and the rest is of no use.

    Args:
        values: float32 or float64 (n,), n > 0, contiguous. A column of a piece is added up in their dtype, 8 rows and
            then the sums of these; the rest in float64.
        signs: `summaries.signs` in the dtype of the values.
        begins, times: of each piece of the block, as of `summaries.starts`.
    """
    found, of_block = np.zeros(MOMENTS), np.zeros((2, SKETCH_SIZE))
    of_piece, ends = np.empty((3, SKETCH_SIZE), values.dtype), np.empty((2, SKETCH_SIZE), values.dtype)
    _add_pieces(values, signs, begins, times, found, of_block, of_piece, ends)
    return found


def compiled(function: Callable[..., None]) -> Callable[..., None]:
    """The function as Numba compiles it, which is kept for later processes where there is a folder for that."""
    try:
        return numba.njit(function, cache=True, nogil=True)
    except RuntimeError:
        return numba.njit(function, nogil=True)


@compiled
def _add_pieces(
    values: np.ndarray,
    signs: np.ndarray,
    begins: np.ndarray,
    times: np.ndarray,
    found: np.ndarray,
    of_block: np.ndarray,
    of_piece: np.ndarray,
    ends: np.ndarray,
) -> None:
    """Fill what is to be found.

    Args:
        of_block: for the sums and squares of each column.
        of_piece: for its signed sums, sums and squares.
        ends: for its lowest and highest value.
    """
    columns = found[SCALARS : SCALARS + SKETCH_SIZE]
    ends[0], ends[1] = np.inf, -np.inf
    for piece in range(begins.size):
        part, signed = values[piece * PIECE : (piece + 1) * PIECE], signs[begins[piece] :]
        of_piece[:] = 0
        start = 0
        while start < part.size:
            if part.size - start >= SUMMED * SKETCH_SIZE:
                end = start + SUMMED * SKETCH_SIZE
                _add_rows(part[start:end], signed[start:end], SUMMED, SKETCH_SIZE, of_piece, ends)
            else:
                end = min(start + SKETCH_SIZE, part.size)
                _add_rows(part[start:end], signed[start:end], 1, end - start, of_piece, ends)
            start = end
        for column in range(SKETCH_SIZE):
            columns[column] += times[piece] * of_piece[0, column]
            of_block[0, column] += of_piece[1, column]
            of_block[1, column] += of_piece[2, column]
    found[0], found[1], found[2] = ends[0].min(), ends[1].max(), of_block[0].sum()
    found[3], found[4] = np.sqrt(of_block[1].sum()), values.size


@numba.njit(inline="always")
def _add_rows(
    values: np.ndarray, signs: np.ndarray, rows: int, width: int, of_piece: np.ndarray, ends: np.ndarray
) -> None:
    """Add rows next to each other, of such a width, to what is known of each column."""
    signed_sums, sums, squares, lows, highs = of_piece[0], of_piece[1], of_piece[2], ends[0], ends[1]
    for column in range(width):
        signed_sum = total = square = values.dtype.type(0)
        low, high = lows[column], highs[column]
        for row in range(rows):
            place = row * SKETCH_SIZE + column
            value = values[place]
            signed_sum += value * signs[place]
            total += value
            square += value * value
            low = value if value < low else low
            high = value if value > high else high
        signed_sums[column] += signed_sum
        sums[column] += total
        squares[column] += square
        lows[column], highs[column] = low, high
