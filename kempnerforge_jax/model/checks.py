"""Checks of masks, and of integers that name something: tokens, labels, modalities, documents, rows."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import AxisType
from jaxtyping import Array, Float, Int, Integer, Shaped

MAX_ID = 2**31
"""Upper bound (exclusive) of integers that count."""


def check_shape(name: str, array: Shaped[Array, "..."], shape: Sequence[int]) -> None:
    """
    Raises:
        ValueError: ``array`` has another shape.
    """
    if tuple(array.shape) != tuple(shape):
        raise ValueError(f"{name}.shape = {tuple(array.shape)}: must be {tuple(shape)}")


def check_axes(name: str, array: Shaped[Array, "..."], axes: Sequence[str]) -> None:
    """
    Raises:
        TypeError: ``array`` is a list.
        ValueError: ``array`` has another number of axes, or lies on a mesh whose axes are explicit.
    """
    if isinstance(array, list | tuple):
        raise TypeError(f"{name} is a {type(array).__name__}: must be an array, as jnp.asarray({name})")
    mesh = jax.typeof(array).sharding.mesh
    if AxisType.Explicit in mesh.axis_types:
        raise ValueError(
            f"{name} lies on a mesh with explicit axes {mesh.axis_names}: they must be auto, as in "
            "jax.make_mesh(sizes, names, axis_types=(jax.sharding.AxisType.Auto,) * len(names))"
        )
    if array.ndim != len(axes):
        raise ValueError(f"{name}.shape = {tuple(array.shape)}: must be ({', '.join(axes)})")


def check_mask(name: str, mask: Shaped[Array, "..."], shape: Sequence[int]) -> None:
    """
    Raises:
        ValueError: ``mask`` is not bool, or has another shape.
    """
    if mask.dtype != jnp.bool_:
        raise ValueError(f"{name}.dtype = {mask.dtype}: must be bool, True = real")
    check_shape(name, mask, shape)


def check_ids(name: str, ids: Shaped[Array, "..."], size: int | None = None, ignored: int | None = None) -> None:
    """
    Args:
        size: ids are in [0, size); None: any integer is valid.
        ignored: one further id that is allowed.

    Raises:
        ValueError: not of an integer type; outside jit also an id outside. Inside jit, where values can't be seen, what
            is computed of such an id must be NaN (`nan_outside`).
    """
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(f"{name}.dtype = {ids.dtype}: must be an integer type")
    if size is None or isinstance(ids, Tracer):
        return
    values = np.asarray(ids)
    is_outside = (values < 0) | (values >= size)
    invalid = values[is_outside if ignored is None else is_outside & (values != ignored)]
    if invalid.size:
        allowed = f"[0, {size})" + ("" if ignored is None else f" or {ignored}")
        raise ValueError(f"{name} = {invalid[0]}: ids must be in {allowed}; {invalid.size} of {values.size} are not")


def check_limits(name: str, values: Int[Array, "N"], limits: Int[Array, "N"]) -> None:
    """
    Raises:
        ValueError: a value is above its limit; where values can't be seen, as by `check_ids`.
    """
    if isinstance(values, Tracer) or isinstance(limits, Tracer):
        return
    for place, (value, limit) in enumerate(zip(values.tolist(), limits.tolist(), strict=True)):
        if value > limit:
            raise ValueError(f"{name}[{place}] = {value}: must be at most {limit}")


def check_positions(
    shape: Sequence[int], doc_ids: Shaped[Array, "..."] | None, key_padding_mask: Shaped[Array, "..."] | None
) -> None:
    """
    Raises:
        ValueError: ids or mask of the new tokens (B, S) have another dtype or shape.
    """
    if key_padding_mask is not None:
        check_mask("key_padding_mask", key_padding_mask, shape)
    if doc_ids is not None:
        check_ids("doc_ids", doc_ids)
        check_shape("doc_ids", doc_ids, shape)


def wide(ids: Integer[Array, "..."]) -> Int[Array, "..."]:
    """The same integers in at least int32: comparing narrow ones would wrap the other side to their type."""
    return ids.astype(jnp.promote_types(ids.dtype, jnp.int32))


def nan_outside(x: Float[Array, "..."], ids: Integer[Array, "..."], size: int) -> Float[Array, "..."]:
    """``x`` (..., D), NaN where the id (...) is outside [0, size)."""
    ids = wide(ids)
    is_outside = ((ids < 0) | (ids >= size)).reshape(*ids.shape, *[1] * (x.ndim - ids.ndim))
    return jnp.where(is_outside, jnp.nan, x)
