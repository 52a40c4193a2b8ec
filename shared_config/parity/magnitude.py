"""Which arithmetic, coarser than it is said to be, made the errors: named only where its traces are seen.

Rounding the inputs of products to a roundoff of u moves a result by about u / 2^-24 times its float32 delta, wherever
in the model it stands; without a delta, by about u relative to its size. A wrong constant may leave errors of that
size, too. What tells arithmetic from it: the values of one side have the few bits of the format; or errors begin at the
first product of the model, keep that size from there on, and look like those of rounding: spread over all rows and
columns, in no relation to the values, and not the same in all rows.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from shared_config.parity.numerics import UNIT_ROUNDOFF, as_float64
from shared_config.parity.result import DIFFERS, Row
from shared_config.parity.traces import FORWARD, Trace


@dataclass(frozen=True)
class Coarse:
    """An arithmetic, its roundoff, the bits that float32 has beyond it, and where to look for it."""

    roundoff: float
    exponent: int
    spare_bits: int
    advice: str


COARSE: Mapping[str, Coarse] = {
    "bfloat16": Coarse(2.0**-8, -8, 16, "something may be computed or stored in bfloat16 on one side"),
    "TF32": Coarse(2.0**-11, -11, 13, "train.matmul_precision, or NVIDIA_TF32_OVERRIDE, may differ between the two"),
}
"""The coarsest first: values that lack its bits lack those of the others, too."""

REACH = 2.0**1.5
"""An error is named if it is within this factor of the roundoff: half way from one to the other of the two."""
PRODUCT = re.compile(r"(proj\d?|gate|output_head|patch_embedding)$")
"""Names of modules whose output is a product with a weight."""
MOST = 0.8
"""Share of what follows the first product that has errors of this size, too."""
ALONG_VALUES, THE_SAME = 0.25, 0.5
"""Shares of the square of errors that follow from the values, or are the same in all rows, from which on it is not
rounding."""
EVEN = 8.0
"""Rounding errors of rows relative to the row, and of columns, differ by less than this from their median."""
FEW = 4
"""Rows and columns of a tensor on whose errors nothing can be told."""


def magnitude_note(rows: Sequence[Row], a: Trace, b: Trace, dtype: str) -> str:
    """Which arithmetic left errors like those of the forward pass in float32; "" if nothing shows that one did."""
    forward = [row for row in rows if row.group == FORWARD]
    first = next((place for place, row in enumerate(forward) if not row.ok), None)
    if first is None or dtype != "float32":
        return ""
    row = forward[first]
    value_a, value_b = (trace.tensors.get(row.name) for trace in (a, b))
    if row.status != DIFFERS or not (isinstance(value_a, np.ndarray) and isinstance(value_b, np.ndarray)):
        return ""
    if not (np.isfinite(as_float64(value_a)).all() and np.isfinite(as_float64(value_b)).all()):
        return ""
    for name, coarse in COARSE.items():
        if _stored(value_a, value_b, coarse) or _computed(forward, first, value_a, value_b, coarse):
            return (
                f"{row.name}: the relative error, {row.relative:.1e}, is of the size that {name} leaves "
                f"(2^{coarse.exponent}, where float32 leaves 2^-24): {coarse.advice}"
            )
    return ""


def has_spare_bits(values: np.ndarray, bits: int) -> bool:
    """Whether the last mantissa bits of all float32 values are 0, as a format that lacks them leaves them."""
    stored = np.asarray(values, np.float32).view(np.uint32)
    return bool(np.any(values)) and not bool(np.any(stored & np.uint32((1 << bits) - 1)))


def looks_rounded(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether the difference of two tensors is spread evenly, in no relation to the values or to the column."""
    values = as_float64(a).reshape(-1, a.shape[-1] if a.ndim else 1)
    errors = as_float64(b).reshape(values.shape) - values
    kept = np.any(values, axis=1)
    values, errors = values[kept], errors[kept]
    if min(values.shape) < FEW or not np.any(errors, axis=1).all():
        return False
    norms, sizes = np.linalg.norm(values, axis=1), np.linalg.norm(errors, axis=1)
    along_values = np.mean(np.square(np.sum(values * errors, axis=1) / (norms * sizes)))
    distinct = np.unique(errors, axis=0)
    the_same = np.mean(np.square(distinct.mean(axis=0))) / np.mean(np.square(distinct))
    even = _even(sizes / norms) and _even(np.linalg.norm(errors, axis=0))
    return bool(even and along_values < ALONG_VALUES and the_same < THE_SAME)


def _even(sizes: np.ndarray) -> bool:
    median = np.median(sizes)
    return bool(sizes.min() * EVEN > median and sizes.max() < EVEN * median)


def _stored(a: np.ndarray, b: np.ndarray, coarse: Coarse) -> bool:
    """Whether one side, and only one, lacks the bits that the format lacks, and does not differ by more than that."""
    error = np.abs(as_float64(a) - as_float64(b))
    rounded = np.all(error <= 2 * coarse.roundoff * np.abs(as_float64(a)))
    return bool(rounded) and has_spare_bits(a, coarse.spare_bits) != has_spare_bits(b, coarse.spare_bits)


def _computed(forward: Sequence[Row], first: int, a: np.ndarray, b: np.ndarray, coarse: Coarse) -> bool:
    """Whether errors begin at a product that has none before it, look rounded, and keep their size from there on."""
    if not PRODUCT.search(forward[first].name) or any(PRODUCT.search(row.name) for row in forward[:first]):
        return False
    sized = [coarse.roundoff / REACH <= _size(row) < coarse.roundoff * REACH for row in forward[first:]]
    return sized[0] and sum(sized) >= MOST * len(sized) and looks_rounded(a, b)


def _size(row: Row) -> float:
    """Roundoff of the operands that an error of this size comes from."""
    return row.multiple * UNIT_ROUNDOFF["float32"] if row.delta and row.multiple else row.relative
