"""Are two traces the same function? Tensor by tensor, with errors in multiples of what rounding alone does.

NaN and infinity are compared by place before anything else, everything else by the one table in `tolerance`; integers
(routes, counts) must be equal where rounding the weights changes none.
"""

from __future__ import annotations

from collections.abc import Iterator

from shared_config.errors import UserError
from shared_config.parity.align import (
    BACKWARD_GROUPS,
    FORWARD_GROUPS,
    INITIAL,
    check_comparable,
    common_names,
    extent_notes,
    order_notes,
)
from shared_config.parity.judge import Judge
from shared_config.parity.magnitude import magnitude_note
from shared_config.parity.result import DIFFERS, EQUAL, NO_DELTA, Comparison, HeatMap, Row, first_failure
from shared_config.parity.tolerance import TOLERANCES, Tolerance
from shared_config.parity.traces import Trace, TraceMeta

__all__ = ["TOLERANCES", "Comparison", "HeatMap", "Row", "Tolerance", "compare_traces"]


def compare_traces(a: Trace, b: Trace, truth: Trace | None = None, labels: tuple[str, str] | None = None) -> Comparison:
    """Compare two traces, each against a float64 trace of the same config if one is given, else with one another.

    Args:
        labels: names of the two for messages; by default their backends.

    Raises:
        UserError: if they are traces of different configs, seeds or inputs; if the truth is not float64; or if tensors
            of float32 or bfloat16 differ and no trace carries deltas for that dtype.
    """
    check_comparable(a, b, truth)
    label_a, label_b = labels or _labels(a.meta, b.meta)
    judge = Judge(a, b, truth)
    rows = [*_initial_weights(a.meta, b.meta), *(judge.row(name) for name in common_names(a, b))]
    if not judge.has_deltas and any(row.status == NO_DELTA for row in rows):
        raise UserError(
            f"{label_a}, {label_b}: differ, and neither carries deltas for {judge.dtype}, without which nothing says "
            "how far rounding may move a result: give a float64 trace of the same config and seed as the truth"
        )
    size = magnitude_note(rows, a, b, judge.dtype)
    first = [first_failure(rows, FORWARD_GROUPS), first_failure(rows, BACKWARD_GROUPS)]
    heatmaps = {row.name: found for row in first if row is not None and (found := judge.heatmap(row)) is not None}
    return Comparison(
        rows=tuple(rows),
        meta_a=a.meta,
        meta_b=b.meta,
        meta_truth=None if judge.truth is None else judge.truth.meta,
        label_a=label_a,
        label_b=label_b,
        heatmaps=heatmaps,
        notes=(*filter(None, [size]), *order_notes(a, b, label_a, label_b), *extent_notes(a, b, label_a, label_b)),
    )


def _initial_weights(a: TraceMeta, b: TraceMeta) -> Iterator[Row]:
    """Both backends must draw the same bits from a seed."""
    if a.initial_hash and b.initial_hash:
        yield Row(INITIAL, INITIAL, EQUAL if a.initial_hash == b.initial_hash else DIFFERS)


def _labels(a: TraceMeta, b: TraceMeta) -> tuple[str, str]:
    for label_a, label_b in (
        (a.backend, b.backend),
        (f"{a.backend} {a.device}", f"{b.backend} {b.device}"),
        (f"{a.backend} {a.dtype}", f"{b.backend} {b.dtype}"),
    ):
        if label_a != label_b:
            return label_a, label_b
    return f"{a.backend} (first)", f"{b.backend} (second)"
