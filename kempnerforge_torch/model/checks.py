"""Checks of masks, and of integers that name something: tokens, labels, modalities, documents, rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int, Integer, Shaped
from torch import Tensor

MAX_ID = 2**31
"""Upper bound (exclusive) of integers that count."""


def check_shape(name: str, array: Shaped[Tensor, "..."], shape: Sequence[int]) -> None:
    """
    Raises:
        ValueError: ``array`` has another shape.
    """
    if tuple(array.shape) != tuple(shape):
        raise ValueError(f"{name}.shape = {tuple(array.shape)}: must be {tuple(shape)}")


def check_axes(name: str, array: Shaped[Tensor, "..."], axes: Sequence[str]) -> None:
    """
    Raises:
        TypeError: ``array`` is a list.
        ValueError: ``array`` has another number of axes.
    """
    if isinstance(array, list | tuple):
        raise TypeError(f"{name} is a {type(array).__name__}: must be a tensor, as torch.tensor({name})")
    if array.ndim != len(axes):
        raise ValueError(f"{name}.shape = {tuple(array.shape)}: must be ({', '.join(axes)})")


def check_mask(name: str, mask: Shaped[Tensor, "..."], shape: Sequence[int]) -> None:
    """
    Raises:
        ValueError: ``mask`` is not bool, or has another shape.
    """
    if mask.dtype != torch.bool:
        raise ValueError(f"{name}.dtype = {mask.dtype}: must be bool, True = real")
    check_shape(name, mask, shape)


def check_ids(name: str, ids: Shaped[Tensor, "..."], size: int | None = None, ignored: int | None = None) -> None:
    """
    Args:
        size: ids are in [0, size); None: any integer is valid.
        ignored: one further id that is allowed.

    Raises:
        ValueError: not of an integer type; on the CPU also an id outside. Where values can't be seen without waiting
            for the device, or are being traced, what is computed of such an id must be NaN (`nan_outside`).
    """
    if ids.dtype == torch.bool or ids.is_floating_point() or ids.is_complex():
        raise ValueError(f"{name}.dtype = {ids.dtype}: must be an integer type")
    if size is None or ids.device.type != "cpu" or torch.compiler.is_compiling():
        return
    values = wide(ids)
    is_outside = (values < 0) | (values >= size)
    invalid = values[is_outside if ignored is None else is_outside & (values != ignored)]
    if invalid.numel():
        allowed = f"[0, {size})" + ("" if ignored is None else f" or {ignored}")
        raise ValueError(
            f"{name} = {int(invalid[0])}: ids must be in {allowed}; {invalid.numel()} of {ids.numel()} are not"
        )


def check_limits(name: str, values: Int[Tensor, "N"], limits: Int[Tensor, "N"]) -> None:
    """
    Raises:
        ValueError: a value is above its limit; where values can't be seen, as by `check_ids`.
    """
    if values.device.type != "cpu" or torch.compiler.is_compiling():
        return
    for place, (value, limit) in enumerate(zip(values.tolist(), limits.tolist(), strict=True)):
        if value > limit:
            raise ValueError(f"{name}[{place}] = {value}: must be at most {limit}")


def check_positions(
    shape: Sequence[int], doc_ids: Shaped[Tensor, "..."] | None, key_padding_mask: Shaped[Tensor, "..."] | None
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


def wide(ids: Integer[Tensor, "..."]) -> Int[Tensor, "..."]:
    """The same integers as int64: comparing narrow ones would wrap the other side to their type."""
    return ids.long()


def nan_outside(x: Float[Tensor, "..."], ids: Integer[Tensor, "..."], size: int) -> Float[Tensor, "..."]:
    """``x`` (..., D), NaN where the id (...) is outside [0, size)."""
    ids = wide(ids)
    is_outside = ((ids < 0) | (ids >= size)).reshape(*ids.shape, *[1] * (x.ndim - ids.ndim))
    return x.masked_fill(is_outside, torch.nan)
