"""The moments of `shared_config.parity.summaries` in one pass over an array on an NVIDIA GPU, by Pallas and Triton.

Each program adds up some columns of some rows of 1021 values; XLA adds up what the programs found. Versions of JAX that
will drop Triton have no kernel, and those that say so are silenced: there are other ways to the same.

Shapes: G pieces, P groups of rows, K blocks of columns, C columns of all blocks, M moments.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jaxtyping import Float, Shaped

from shared_config.parity import summaries
from shared_config.parity.summaries import MODERATE, NAN, NEGATIVE, PIECE, POSITIVE, ROWS, SCALARS, SKETCH_SIZE

try:
    from jax.experimental.pallas import triton
except ImportError:
    HAS_TRITON = False
else:
    HAS_TRITON = True

DTYPES = ("float32", "bfloat16", "float16")
"""Whose squares are numbers of float64."""
MOST_GROUPS = 264
"""Two for each multiprocessor of an H100, and each in four blocks of columns."""
AT_A_TIME = 8
"""Rows of a piece whose values are on their way at once."""
BLOCK, BLOCKS = 256, 4
"""Columns of a program, and how many programs have all of a row."""
SPARE = 8
"""Places for scalars."""


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Context for compiling programs with the kernel: nothing is said of the future of Triton in JAX."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The Pallas Triton backend", DeprecationWarning)
        yield


@functools.partial(jax.jit, static_argnames="interpret")  # lowered once for all arrays of a shape
def run_moments(flat: Shaped[Array, "_"], *, interpret: bool = False) -> Float[Array, "M"]:
    """float64 (M,), of an array of one of `DTYPES` that is not empty; where 64 bits are enabled.

    Args:
        interpret: whether to run the kernel in operations of XLA, on any device.
    """
    size = flat.size
    rows = -(-size // SKETCH_SIZE)
    rows_each = -(-rows // (MOST_GROUPS * AT_A_TIME)) * AT_A_TIME
    groups = -(-rows // rows_each)
    first, times = (jnp.asarray(part, jnp.int32) for part in summaries.starts(-(-size // PIECE)))
    add_up: Any = pl.pallas_call(
        functools.partial(_add_up, size, rows, rows_each),
        grid=(groups, BLOCKS),
        in_specs=[pl.BlockSpec(memory_space=pl.ANY)] * 4,
        out_specs=[
            pl.BlockSpec((None, None, SPARE), lambda group, block: (group, block, 0)),
            *[pl.BlockSpec((None, BLOCK), lambda group, block: (group, block))] * 2,
        ],
        out_shape=[
            jax.ShapeDtypeStruct((groups, BLOCKS, SPARE), jnp.float64),
            jax.ShapeDtypeStruct((groups, BLOCKS * BLOCK), jnp.float64),
            jax.ShapeDtypeStruct((groups, BLOCKS * BLOCK), jnp.uint32),
        ],
        compiler_params=triton.CompilerParams(num_warps=4),
        interpret=interpret,
    )
    scalars_PKM, columns_PC, gaps_PC = add_up(flat, jnp.asarray(summaries.signs(np.int8)), first, times)
    low, high, total, squares, missing = jnp.moveaxis(scalars_PKM[..., :SCALARS], -1, 0)
    scalars = jnp.stack([low.min(), high.max(), total.sum(), jnp.sqrt(squares.sum()), size - missing.sum()])
    gaps_C = gaps_PC.sum(0, dtype=jnp.uint32).astype(jnp.float64)
    return jnp.concatenate([scalars, columns_PC.sum(0)[:SKETCH_SIZE], gaps_C[:SKETCH_SIZE]])


def _add_up(
    size: int, rows: int, rows_each: int,
    flat: Any, signs: Any, first: Any, times: Any, scalars_of: Any, columns_of: Any, gaps_of: Any,
) -> None:  # fmt: skip
    """Of some columns of some rows: lowest and highest value, sum, sum of squares and how many are not finite; of each
    column its signed sum, and its gaps. A few rows are added up in 32 bits, and all of those in 64; where the largest
    value is not moderate all are, as its square may not be a number of 32.
    """
    begin = pl.program_id(1) * BLOCK
    column = begin + jnp.arange(BLOCK, dtype=jnp.int32)
    start = pl.program_id(0) * rows_each
    steps = (jnp.minimum(rows - start, rows_each) + AT_A_TIME - 1) // AT_A_TIME

    def of_row(row: Array) -> tuple[Array, Array]:
        place = row.astype(jnp.int64) * SKETCH_SIZE
        there = column < jnp.minimum(size - place, SKETCH_SIZE).astype(jnp.int32)
        return triton.load(flat.at[pl.ds(place + begin, BLOCK)], mask=there, other=0).astype(jnp.float32), there

    def signs_of(row: Array, each: int, there: Array) -> Array:
        sign_at = first[row // ROWS] + (row % ROWS + each) * SKETCH_SIZE + begin
        return triton.load(signs.at[pl.ds(sign_at, BLOCK)], mask=there, other=0)

    def add(step: Array, sums: tuple[Array, ...]) -> tuple[Array, ...]:
        low, high, total, squares, signed, missing = sums
        row = start + step * AT_A_TIME
        some = some_squares = some_signed = jnp.zeros((BLOCK,), jnp.float32)
        for each in range(AT_A_TIME):
            value, there = of_row(row + each)
            counted = there & (jnp.abs(value) < jnp.inf)
            known = jnp.where(counted, value, 0)
            low = jnp.minimum(low, jnp.where(counted, value, jnp.inf))
            high = jnp.maximum(high, jnp.where(counted, value, -jnp.inf))
            some, some_squares = some + known, some_squares + known * known
            negative = signs_of(row, each, there).astype(jnp.int32) < 0
            some_signed = some_signed + jnp.where(negative, -known, known)
            missing = missing + (there & ~counted).astype(jnp.int32)
        total, squares = total + some.astype(jnp.float64), squares + some_squares.astype(jnp.float64)
        return low, high, total, squares, signed + some_signed.astype(jnp.float64) * times[row // ROWS], missing

    def add_in_64_bits(step: Array, sums: tuple[Array, ...]) -> tuple[Array, ...]:
        total, squares, signed = sums
        row = start + step
        value, there = of_row(row)
        known = jnp.where(jnp.abs(value) < jnp.inf, value, 0).astype(jnp.float64)
        sign = signs_of(row, 0, there).astype(jnp.float64) * times[row // ROWS]
        return total + known, squares + known * known, signed + known * sign

    def add_gaps(step: Array, gaps: Array) -> Array:
        row = start + step
        value, there = of_row(row)
        key = row.astype(jnp.uint32) * jnp.uint32(NAN)
        key = (key ^ (key >> 15)) | 1
        kind = jnp.where(value > 0, jnp.uint32(POSITIVE), jnp.uint32(NEGATIVE))
        kind = jnp.where(value == value, kind, jnp.uint32(NAN))
        return gaps + jnp.where(there & ~(jnp.abs(value) < jnp.inf), kind * key, jnp.uint32(0))

    low, high = (jnp.full((BLOCK,), bound, jnp.float32) for bound in (jnp.inf, -jnp.inf))
    wide, narrow = jnp.zeros((BLOCK,), jnp.float64), jnp.zeros((BLOCK,), jnp.int32)
    sums = lax.fori_loop(0, steps, add, (low, high, wide, wide, wide, narrow))
    low, high, total, squares, signed, missing = sums
    lowest, highest = low.min(), high.max()
    largest = jnp.maximum(highest, -lowest)
    is_extreme = (largest >= MODERATE) | ((largest > 0) & (largest <= 1 / MODERATE))
    sums = jax.tree.map(lambda known: jnp.where(is_extreme, 0, known), (total, squares, signed))
    again = jnp.where(is_extreme, steps * AT_A_TIME, 0)
    total, squares, signed = lax.fori_loop(0, again, add_in_64_bits, sums)
    scalars = lowest, highest, total.sum(), squares.sum(), missing.sum()
    for place, scalar in enumerate(scalars):
        scalars_of[place] = scalar.astype(jnp.float64)
    triton.store(columns_of.at[pl.ds(0, BLOCK)], signed)
    again = jnp.where(missing.sum() > 0, steps * AT_A_TIME, 0)
    triton.store(gaps_of.at[pl.ds(0, BLOCK)], lax.fori_loop(0, again, add_gaps, jnp.zeros((BLOCK,), jnp.uint32)))
