"""Products over groups of rows by the kernels that JAX has for Hopper GPUs. Their modules are experimental: all that
touches them is here. Within a jit of their own they are lowered once for all layers of a shape.

Shapes: R rows, D inputs, F outputs, E groups.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

ROWS, COLUMNS, STEP = 128, 128, 64
"""Of a tile of the result, and how many terms of its sums are read at once."""
SWIZZLED = 8
"""Rows that lie together in shared memory."""
IN_FLIGHT, IN_FLIGHT_OUTER = 6, 4
"""How many reads are on their way: as many as shared memory has room for, and for outer products the fastest number."""


def has_matmul(rows: int, terms: int, outputs: int, dtype: DTypeLike) -> bool:
    """Whether this process has a GPU with the kernel for rows times matrices, and the shapes suit it."""
    return _fits(rows) and terms % STEP == 0 and outputs % COLUMNS == 0 and _has_kernels(dtype)


def has_outer(rows: int, inputs: int, outputs: int, dtype: DTypeLike) -> bool:
    """Whether this process has a GPU with the kernel for outer products, and the shapes suit it."""
    return _fits(rows) and inputs % ROWS == 0 and outputs % COLUMNS == 0 and _has_kernels(dtype)


def _fits(rows: int) -> bool:
    return rows >= ROWS and rows % SWIZZLED == 0


def _has_kernels(dtype: DTypeLike) -> bool:
    """Sizes of groups are int32 in both kernels, which they would not stay with 64 bits enabled."""
    if dtype not in (jnp.bfloat16, jnp.float16) or jax.config.read("jax_enable_x64"):
        return False
    if jax.default_backend() != "gpu":
        return False
    device = jax.local_devices()[0]
    return "cuda" in device.client.platform_version and int(float(device.compute_capability)) == 9


@functools.partial(jax.jit, static_argnums=3)
def mosaic_matmul(
    x_RD: Float[Array, "R D"], w_EDF: Float[Array, "E D F"], sizes_E: Int[Array, "E"], is_transposed: bool
) -> Float[Array, "R F"]:
    """(R, F): rows times the matrix of their group, of shapes that suit `has_matmul`; anything in rows of no group.

    Args:
        sizes_E: rows of each group, int32.
        is_transposed: whether the matrices are (E, F, D).
    """
    from jax.experimental.pallas.ops.gpu.ragged_dot_mgpu import ragged_dot

    outputs = w_EDF.shape[1 if is_transposed else 2]
    return ragged_dot(
        x_RD,
        w_EDF,
        group_sizes=sizes_E,
        block_m=ROWS,
        block_n=COLUMNS,
        block_k=STEP,
        max_concurrent_steps=IN_FLIGHT,
        grid_block_n=math.gcd(4, outputs // COLUMNS),
        transpose_rhs=is_transposed,
    )


@jax.jit
def mosaic_outer(
    x_RD: Float[Array, "R D"], y_RF: Float[Array, "R F"], sizes_E: Int[Array, "E"]
) -> Float[Array, "E D F"]:
    """(E, D, F): sums of outer products over the rows of each group, of shapes that suit `has_outer`.

    Args:
        x_RD, y_RF: finite in rows of no group.
        sizes_E: rows of each group, int32.
    """
    from jax.experimental.pallas.ops.gpu.transposed_ragged_dot_mgpu import transposed_ragged_dot

    outer_EDF: Any = transposed_ragged_dot(
        x_RD,
        y_RF,
        group_sizes=sizes_E,
        block_m=ROWS,
        block_n=COLUMNS,
        block_k=STEP,
        max_concurrent_steps=IN_FLIGHT_OUTER,
        grid_block_n=1,
    )
    return outer_EDF
