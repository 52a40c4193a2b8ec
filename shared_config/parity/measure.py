"""Distances between two recorded tensors, whole or summarised."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import numpy as np

from shared_config.errors import UserError
from shared_config.interchange.weights import is_floating
from shared_config.parity.numerics import as_float64, difference, nonfinite_mismatch
from shared_config.parity.result import NOT_FINITE, HeatMap, Row
from shared_config.parity.tolerance import Tensor
from shared_config.parity.traces import Summary, summarize

HEATMAP_ROWS, HEATMAP_COLUMNS = 48, 96


@dataclass(frozen=True)
class Measured:
    """How far a tensor is from its reference."""

    error: float
    scale: float
    mismatched: int
    position: tuple[int, ...] | None
    estimated: bool = False


def all_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite."""
    return not tensor.nonfinite_hash if isinstance(tensor, Summary) else bool(np.isfinite(as_float64(tensor)).all())


def with_nonfinite(row: Row, a: Tensor, b: Tensor) -> Row:
    """The row with the places that are not finite in both: a separate finding where there is no other."""
    if isinstance(a, Summary) or isinstance(b, Summary):
        summary_a, summary_b = summary_of(a), summary_of(b)
        count = min(max(side.nonfinite, int(bool(side.nonfinite_hash))) for side in (summary_a, summary_b))
        alike, position = summary_a.nonfinite_hash == summary_b.nonfinite_hash, None
    else:
        both = ~np.isfinite(as_float64(a)) & ~np.isfinite(as_float64(b))
        count, alike = int(both.sum()), not nonfinite_mismatch(a, b).any()
        position = first_true(both) if count else None
    if not count:
        return row
    if row.ok or (alike and row.mismatched):  # a truth that is finite there is no news
        row = dataclasses.replace(row, status=NOT_FINITE, position=position, mismatched=0)
    return dataclasses.replace(row, nonfinite=count)


def heatmap(value: np.ndarray, reference: np.ndarray) -> HeatMap:
    """Largest absolute difference in each of at most 48 x 96 blocks."""
    value, reference = as_float64(value), as_float64(reference)
    with np.errstate(invalid="ignore"):
        gap = np.abs(value - reference)
    gap = np.where((value == reference) | (np.isnan(value) & np.isnan(reference)), 0.0, gap)
    gap = np.where(np.isnan(gap), np.inf, gap)
    table = gap.reshape(-1, gap.shape[-1]) if gap.ndim else gap.reshape(1, 1)
    blocks = _block_maxima(_block_maxima(table, HEATMAP_ROWS).T, HEATMAP_COLUMNS).T
    rows, columns = table.shape
    return HeatMap((rows, columns), tuple(tuple(float(x) for x in row) for row in blocks))


def _block_maxima(table: np.ndarray, blocks: int) -> np.ndarray:
    """Maxima over at most ``blocks`` runs of rows, as equal in length as can be."""
    starts = np.unique(np.linspace(0, len(table), min(blocks, len(table)), endpoint=False).astype(int))
    return np.maximum.reduceat(table, starts, axis=0)


def measure(value: Tensor, reference: Tensor) -> Measured:
    """The distance of a tensor from its reference: exact, or estimated where either is summarised."""
    if isinstance(value, Summary) or isinstance(reference, Summary):
        return estimate(summary_of(value), summary_of(reference))
    found = difference(value, reference)
    return Measured(found.rms_error, found.truth_rms, found.mismatched, found.index)


def estimate(value: Summary, reference: Summary) -> Measured:
    """The distance of two summaries, from their sketches.

    Raises:
        UserError: one is of a trace of a former format, whose sketches were others.
    """
    if value.sketch.shape != reference.sketch.shape:
        sizes = f"{value.sketch.size} and {reference.sketch.size}"
        raise UserError(f"statistics with sketches of {sizes} numbers: one trace is of a former format: record it anew")
    if value.nonfinite_hash != reference.nonfinite_hash:
        return Measured(math.inf, reference.rms, 1, None, estimated=True)
    apart = value.sketch - reference.sketch
    error = math.sqrt(float(apart @ apart) / reference.size) if reference.size else 0.0
    told_apart = bool(value.hash and reference.hash) and value.hash != reference.hash
    if told_apart and value.dtype == reference.dtype:
        error = max(error, np.finfo(np.float64).tiny)  # not the same bits, even where the sketch can't tell
    return Measured(error, reference.rms, 0, None, estimated=True)


def summary_of(tensor: Tensor) -> Summary:
    """A tensor, summarised."""
    return tensor if isinstance(tensor, Summary) else summarize(tensor)


def dtype_of(tensor: Tensor) -> str:
    """Name of the dtype."""
    return tensor.dtype if isinstance(tensor, Summary) else tensor.dtype.name


def floats(tensor: Tensor) -> bool:
    """Whether the values are floating-point numbers."""
    return bool(tensor.sketch.size) if isinstance(tensor, Summary) else is_floating(tensor.dtype)


def first_true(flags: np.ndarray) -> tuple[int, ...]:
    """Indices of the first True."""
    return tuple(int(i) for i in np.unravel_index(int(np.argmax(flags)), flags.shape))


def value_at(tensor: Tensor | None, position: tuple[int, ...] | None) -> float | None:
    """A value of a tensor that is there whole; None otherwise."""
    if position is None or not isinstance(tensor, np.ndarray) or not tensor.size:
        return None
    return float(tensor[position])
