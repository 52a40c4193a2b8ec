"""Matrix products over groups of rows, one matrix per group, with static shapes.

The rows of group e are those from ends[e - 1] (0 for the first) to ends[e]; rows from ends[-1] on belong to no group.

Shapes: R rows, D inputs, F outputs, E groups, N tiles, b rows of a tile.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from kempnerforge_jax.model.mosaic import has_matmul, has_outer, mosaic_matmul, mosaic_outer

_LOOP_ROWS = 128
TILE_ROWS = 256
_ROWS_BY_ROWS = (((0,), (0,)), ((), ()))


def grouped_matmul(
    x_RD: Float[Array, "R D"], w_EDF: Float[Array, "E D F"], ends_E: Int[Array, "E"]
) -> Float[Array, "R F"]:
    """(R, F): row r times the matrix of its group; 0 for rows of no group, whatever they hold.

    Args:
        x_RD, w_EDF: of one dtype.
        ends_E: int32, not decreasing, at most R.
    """
    return _grouped_matmul(False, x_RD, w_EDF, ends_E)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped_matmul(is_transposed: bool, x_RD: jax.Array, w_EDF: jax.Array, ends_E: jax.Array) -> jax.Array:
    """`grouped_matmul`, also by matrices that are held as w (E, F, D).

    The implementation is that of the platform for which the program is lowered. A kernel for a platform goes into
    these two maps, of `_grouped_matmul` and `grouped_outer`, and nowhere else.
    """
    terms, outputs = w_EDF.shape[1:][:: -1 if is_transposed else 1]
    has_kernel = has_matmul(x_RD.shape[0], terms, outputs, x_RD.dtype)

    def by(matmul: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
        return lambda x, w, ends_E: matmul(x, w.swapaxes(1, 2) if is_transposed else w, ends_E)

    def by_kernel(x: jax.Array, w: jax.Array, ends_E: jax.Array) -> jax.Array:
        return _owned(mosaic_matmul(x, w, _sizes(ends_E), is_transposed), ends_E)

    return lax.platform_dependent(
        x_RD,
        w_EDF,
        ends_E,
        cpu=by(looped_matmul),
        cuda=by_kernel if has_kernel else by(tiled_matmul),
        rocm=by(tiled_matmul),
        default=by(ragged_matmul),
    )


@jax.custom_vjp
def grouped_outer(
    x_RD: Float[Array, "R D"], y_RF: Float[Array, "R F"], ends_E: Int[Array, "E"]
) -> Float[Array, "E D F"]:
    """(E, D, F): for each group, the sum over its rows of x_r y_r^T; 0 for a group without rows."""
    has_kernel = has_outer(x_RD.shape[0], x_RD.shape[1], y_RF.shape[1], x_RD.dtype)

    def by_kernel(x_RD: jax.Array, y_RF: jax.Array, ends_E: jax.Array) -> jax.Array:
        return mosaic_outer(_owned(x_RD, ends_E), _owned(y_RF, ends_E), _sizes(ends_E))

    cuda = by_kernel if has_kernel else tiled_outer
    return lax.platform_dependent(
        x_RD, y_RF, ends_E, cpu=looped_outer, cuda=cuda, rocm=tiled_outer, default=ragged_outer
    )


def _matmul_forward(
    is_transposed: bool, x_RD: jax.Array, w_EDF: jax.Array, ends_E: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return _grouped_matmul(is_transposed, x_RD, w_EDF, ends_E), (x_RD, w_EDF, ends_E)


def _matmul_backward(is_transposed: bool, saved: tuple[jax.Array, ...], dy_RF: jax.Array) -> tuple[Any, Any, None]:
    x_RD, w_EDF, ends_E = saved
    dx_RD = _grouped_matmul(not is_transposed, dy_RF, w_EDF, ends_E)
    factors = (dy_RF, x_RD) if is_transposed else (x_RD, dy_RF)
    return dx_RD, grouped_outer(*factors, ends_E), None


def _outer_forward(x_RD: jax.Array, y_RF: jax.Array, ends_E: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return grouped_outer(x_RD, y_RF, ends_E), (x_RD, y_RF, ends_E)


def _outer_backward(saved: tuple[jax.Array, ...], dw_EDF: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    x_RD, y_RF, ends_E = saved
    return _grouped_matmul(True, y_RF, dw_EDF, ends_E), _grouped_matmul(False, x_RD, dw_EDF, ends_E), None


_grouped_matmul.defvjp(_matmul_forward, _matmul_backward)
grouped_outer.defvjp(_outer_forward, _outer_backward)


def looped_matmul(
    x_RD: Float[Array, "R D"], w_EDF: Float[Array, "E D F"], ends_E: Int[Array, "E"], loop_rows: int = _LOOP_ROWS
) -> Float[Array, "R F"]:
    """`grouped_matmul` as loops over groups and, as long as they have rows, over blocks of these."""
    rows = min(loop_rows, x_RD.shape[0])
    out_RF = jnp.zeros((x_RD.shape[0], w_EDF.shape[2]), x_RD.dtype)
    if rows == 0:
        return out_RF

    def block(w_DF: jax.Array, owned_b1: jax.Array, at: jax.Array, out_RF: jax.Array) -> jax.Array:
        new_bF = lax.dynamic_slice_in_dim(x_RD, at, rows) @ w_DF
        old_bF = lax.dynamic_slice_in_dim(out_RF, at, rows)
        return lax.dynamic_update_slice_in_dim(out_RF, jnp.where(owned_b1, new_bF, old_bF), at, axis=0)

    def group(e: jax.Array, out_RF: jax.Array) -> jax.Array:
        w_DF = lax.dynamic_index_in_dim(w_EDF, e, keepdims=False)
        return _over_blocks(ends_E, e, rows, x_RD.shape[0], out_RF, lambda *args: block(w_DF, *args))

    return lax.fori_loop(0, w_EDF.shape[0], group, out_RF)


def looped_outer(
    x_RD: Float[Array, "R D"], y_RF: Float[Array, "R F"], ends_E: Int[Array, "E"], loop_rows: int = _LOOP_ROWS
) -> Float[Array, "E D F"]:
    """`grouped_outer` as loops over groups and blocks of their rows; sums in at least float32."""
    rows = min(loop_rows, x_RD.shape[0])
    out_EDF = jnp.zeros((ends_E.shape[0], x_RD.shape[1], y_RF.shape[1]), x_RD.dtype)
    if rows == 0:
        return out_EDF
    dtype = jnp.promote_types(x_RD.dtype, jnp.float32)

    def block(owned_b1: jax.Array, at: jax.Array, sum_DF: jax.Array) -> jax.Array:
        x_bD, y_bF = (jnp.where(owned_b1, lax.dynamic_slice_in_dim(array, at, rows), 0) for array in (x_RD, y_RF))
        return sum_DF + lax.dot_general(x_bD, y_bF, _ROWS_BY_ROWS, preferred_element_type=dtype)

    def group(e: jax.Array, out_EDF: jax.Array) -> jax.Array:
        sum_DF = _over_blocks(ends_E, e, rows, x_RD.shape[0], jnp.zeros(out_EDF.shape[1:], dtype), block)
        return lax.dynamic_update_index_in_dim(out_EDF, sum_DF.astype(out_EDF.dtype), e, axis=0)

    return lax.fori_loop(0, ends_E.shape[0], group, out_EDF)


def _over_blocks(
    ends_E: jax.Array, e: jax.Array, rows: int, total: int, carry: jax.Array, block: Callable[..., jax.Array]
) -> jax.Array:
    """``carry = block(owned_b1, at, carry)`` for blocks of ``rows`` rows from ``at`` on, and of these
    ``owned_b1`` are of group e.

    The last blocks start early enough to end within the array.
    """
    starts_E = jnp.pad(ends_E, (1, 0))
    start, end = (lax.dynamic_index_in_dim(starts_E, e + i, keepdims=False) for i in (0, 1))

    def body(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        start, carry = state
        at = jnp.minimum(start, total - rows)
        rows_b = at + jnp.arange(rows, dtype=at.dtype)
        owned_b1 = ((rows_b >= start) & (rows_b < end))[:, None]
        return start + rows, block(owned_b1, at, carry)

    return lax.while_loop(lambda state: state[0] < end, body, (start, carry))[1]


def tiled_matmul(
    x_RD: Float[Array, "R D"], w_EDF: Float[Array, "E D F"], ends_E: Int[Array, "E"], tile_rows: int = TILE_ROWS
) -> Float[Array, "R F"]:
    """`grouped_matmul` as one batched product: every group cut into tiles of equal size, their number bounded by R and
    E alone.
    """
    if x_RD.shape[0] == 0:
        return jnp.zeros((0, w_EDF.shape[2]), x_RD.dtype)
    expert_N, rows_Nb, inside_Nb = _tiles(ends_E, x_RD.shape[0], tile_rows)
    out_NbF = jnp.einsum("nbd,ndf->nbf", _gather(x_RD, rows_Nb, inside_Nb), w_EDF[expert_N])
    trash = x_RD.shape[0]
    out_RF = jnp.zeros((trash + 1, w_EDF.shape[2]), x_RD.dtype)
    return out_RF.at[jnp.where(inside_Nb, rows_Nb, trash).ravel()].set(out_NbF.reshape(-1, w_EDF.shape[2]))[:-1]


def tiled_outer(
    x_RD: Float[Array, "R D"], y_RF: Float[Array, "R F"], ends_E: Int[Array, "E"], tile_rows: int = TILE_ROWS
) -> Float[Array, "E D F"]:
    """`grouped_outer` as one batched product; the tiles of a group are added up in an order that does not vary."""
    shape = (ends_E.shape[0], x_RD.shape[1], y_RF.shape[1])
    if x_RD.shape[0] == 0:
        return jnp.zeros(shape, x_RD.dtype)
    expert_N, rows_Nb, inside_Nb = _tiles(ends_E, x_RD.shape[0], tile_rows)
    dtype = jnp.promote_types(x_RD.dtype, jnp.float32)
    x_NbD, y_NbF = _gather(x_RD, rows_Nb, inside_Nb), _gather(y_RF, rows_Nb, inside_Nb)
    parts_NDF = jnp.einsum("nbd,nbf->ndf", x_NbD, y_NbF, preferred_element_type=dtype)
    member_EN = (expert_N == jnp.arange(shape[0])[:, None]).astype(dtype)
    return jnp.einsum("en,ndf->edf", member_EN, parts_NDF, precision=lax.Precision.HIGHEST).astype(x_RD.dtype)


def _tiles(ends_E: jax.Array, rows: int, tile_rows: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Group of each tile, its rows, and which of these belong to the group. Tiles beyond those needed are empty."""
    groups = ends_E.shape[0]
    starts_E = jnp.pad(ends_E, (1, 0))[:-1]
    tiles_E = (ends_E - starts_E + tile_rows - 1) // tile_rows
    tile_ends_E = jnp.cumsum(tiles_E)
    tile_N = jnp.arange(rows // tile_rows + groups, dtype=ends_E.dtype)
    expert_N = jnp.searchsorted(tile_ends_E, tile_N, side="right", method="compare_all")
    needed_N = expert_N < groups
    expert_N = jnp.minimum(expert_N, groups - 1)
    first_N = starts_E[expert_N] + (tile_N - (tile_ends_E - tiles_E)[expert_N]) * tile_rows
    rows_Nb = first_N[:, None] + jnp.arange(tile_rows, dtype=ends_E.dtype)
    inside_Nb = needed_N[:, None] & (rows_Nb < ends_E[expert_N][:, None])
    return expert_N, rows_Nb, inside_Nb


def _gather(x_RD: jax.Array, rows_Nb: jax.Array, inside_Nb: jax.Array) -> jax.Array:
    gathered_NbD = x_RD[jnp.minimum(rows_Nb, x_RD.shape[0] - 1)]
    return jnp.where(inside_Nb[:, :, None], gathered_NbD, 0)


def ragged_matmul(
    x_RD: Float[Array, "R D"], w_EDF: Float[Array, "E D F"], ends_E: Int[Array, "E"]
) -> Float[Array, "R F"]:
    """`grouped_matmul` by `jax.lax.ragged_dot`, which has a kernel on TPU."""
    return _owned(lax.ragged_dot(x_RD, w_EDF, _sizes(ends_E), precision=_ragged_precision(x_RD.dtype)), ends_E)


def ragged_outer(
    x_RD: Float[Array, "R D"], y_RF: Float[Array, "R F"], ends_E: Int[Array, "E"]
) -> Float[Array, "E D F"]:
    """`grouped_outer` by `jax.lax.ragged_dot_general`, contracting the ragged axis."""
    numbers = lax.RaggedDotDimensionNumbers(_ROWS_BY_ROWS, lhs_ragged_dimensions=[0], rhs_group_dimensions=[])
    x_RD, y_RF = _owned(x_RD, ends_E), _owned(y_RF, ends_E)
    precision = _ragged_precision(x_RD.dtype)
    return lax.ragged_dot_general(x_RD, y_RF, _sizes(ends_E), numbers, precision=precision).astype(x_RD.dtype)


def _ragged_precision(dtype: np.dtype) -> lax.Precision | None:
    """What TPU's kernel is told of factors: nothing but the default of narrow ones, which it refuses else, and whose
    products are exact in any case.
    """
    return lax.Precision.DEFAULT if dtype.itemsize < np.dtype(np.float32).itemsize else None


def _sizes(ends_E: jax.Array) -> jax.Array:
    return jnp.diff(ends_E, prepend=np.int32(0))


def _owned(rows_RX: jax.Array, ends_E: jax.Array) -> jax.Array:
    """0 in rows of no group."""
    return jnp.where((jnp.arange(rows_RX.shape[0]) < ends_E[-1])[:, None], rows_RX, 0)
