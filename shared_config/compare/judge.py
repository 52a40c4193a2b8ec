"""The verdict on one tensor of two traces, measured against one another or each against the float64 truth."""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from shared_config.compare.result import (
    DIFFERS,
    EQUAL,
    NO_DELTA,
    NOT_FINITE,
    ONLY_A,
    ONLY_B,
    OTHER_KIND,
    OTHER_SHAPE,
    WITHIN,
    HeatMap,
    Row,
)
from shared_config.compare.tolerance import (
    ROUTES,
    TOLERANCES,
    Scales,
    Tensor,
    coarser,
    experts_choose_tokens,
    has_experts,
    scale_of,
    tolerance_of,
)
from shared_config.errors import UserError
from shared_config.interchange.traces import DECODE, FORWARD, Summary, Trace, group_of, summarize
from shared_config.interchange.weights import is_floating
from shared_config.numerics import as_float64, difference, nonfinite_mismatch, rms

DECODED_OUTPUTS = ("output_head", "transformer.output_head")
"""The activation that cached decoding computes again, of a text or a vision-language model: its delta is decode's."""

_DECODED = tuple(f"{FORWARD}/{output}" for output in DECODED_OUTPUTS)

HEATMAP_ROWS, HEATMAP_COLUMNS = 48, 96


@dataclass(frozen=True)
class Measured:
    """How far a tensor is from its reference."""

    error: float
    scale: float
    mismatched: int
    position: tuple[int, ...] | None
    estimated: bool = False


class Judge:
    """Judges one tensor at a time of traces that can be compared.

    If layers were given recorded inputs, they are held to the other trace: the truth of a plain run has other inputs,
    and gives deltas only.
    """

    def __init__(self, a: Trace, b: Trace, truth: Trace | None):
        self.a, self.b = a, b
        refed = [trace for trace in (a, b) if trace.meta.refed]
        self.truth = None if refed else truth
        self.dtype = coarser(a.meta.dtype, b.meta.dtype)
        reference = {**b.tensors, **a.tensors, **({} if truth is None else truth.tensors)}
        self._scales = Scales(reference, a.meta.config_fields)
        self._deltas: dict[str, dict[str, float]] = {dtype: {} for dtype in TOLERANCES}
        for trace in (b, a, truth, *refed):  # with recorded inputs, rounding moves a layer by what it does there alone
            for dtype, deltas in ({} if trace is None else trace.meta.deltas).items():
                self._deltas.setdefault(dtype, {}).update(deltas)
        self._check_deltas(reference)

    @property
    def has_deltas(self) -> bool:
        """Whether any trace says how far rounding to the coarser dtype moves results."""
        return bool(self._deltas[self.dtype])

    def _check_deltas(self, reference: Mapping[str, Tensor]) -> None:
        """Refuse deltas that no rounding makes: they would let anything pass.

        Where a tensor is not finite itself, its delta says nothing, and is of no use to any verdict.

        Raises:
            UserError: naming the tensor.
        """
        for dtype, deltas in self._deltas.items():
            for name, delta in deltas.items():
                tensor = reference.get(name)
                if delta == math.inf and tensor is not None and not _all_finite(tensor):
                    continue
                bound = math.inf if tensor is None else self._scales.largest_delta(name, dtype, tensor)
                if not (0 <= delta <= min(bound, sys.float_info.max)):
                    limit = f" of at most {bound:.2g}" if math.isfinite(bound) else ""
                    raise UserError(
                        f"delta of {name} in {dtype} = {str(delta)[:40]}: must be what rounding the weights can do, a "
                        f"number{limit}; the trace is damaged, or its model amplifies rounding beyond all use"
                    )

    def row(self, name: str) -> Row:
        """The verdict on the tensor of this name, which either trace may lack."""
        a, b = self.a.tensors.get(name), self.b.tensors.get(name)
        if a is None or b is None:
            present = b if a is None else a
            assert present is not None
            status = ONLY_B if a is None else ONLY_A
            return Row(name, group_of(name), status, shape=present.shape, error=math.inf)
        row = Row(name, group_of(name), EQUAL, a.shape, _dtype(a), _dtype(b))
        truth = None if self.truth is None else self.truth.tensors.get(name)
        if a.shape != b.shape or (truth is not None and truth.shape != a.shape):
            return dataclasses.replace(row, status=OTHER_SHAPE, error=math.inf)
        if _is_floating(a) != _is_floating(b):
            return dataclasses.replace(row, status=OTHER_KIND, error=math.inf)
        if not _is_floating(a):
            return self._exact(row, a, b)
        sides = [("b", b, a, self.dtype)] if truth is None else self._sides_against(truth, a, b)
        judged = [self._judged(row, side, value, reference, dtype) for side, value, reference, dtype in sides]
        if truth is not None:
            judged = [dataclasses.replace(found, against="truth") for found in judged]
        worst = max(judged, key=lambda found: (not found.ok, found.share))
        return self._with_values(_with_nonfinite(worst, a, b), truth)

    def heatmap(self, row: Row) -> HeatMap | None:
        """Where the tensor of a row differs; None if it is not known place by place."""
        value = {"a": self.a, "b": self.b}[row.worse].tensors.get(row.name)
        reference = self.truth if row.against == "truth" else self.a
        against = None if reference is None else reference.tensors.get(row.name)
        if row.position is None or not isinstance(value, np.ndarray) or not isinstance(against, np.ndarray):
            return None
        return heatmap(value, against)

    def _sides_against(self, truth: Tensor, a: Tensor, b: Tensor) -> list[tuple[str, Tensor, Tensor, str]]:
        return [("a", a, truth, self.a.meta.dtype), ("b", b, truth, self.b.meta.dtype)]

    @functools.cached_property
    def _rerouted(self) -> dict[str, bool]:
        """By side, whether routes differ from those that it is measured against; if none were recorded, they may."""
        against = self.a if self.truth is None else self.truth
        return {side: _routes_differ(trace, against) for side, trace in (("a", self.a), ("b", self.b))}

    def _exact(self, row: Row, a: Tensor, b: Tensor) -> Row:
        """Integers must be equal, but for as many as rounding the weights changes too (routes at near ties)."""
        if isinstance(a, Summary) or isinstance(b, Summary):
            same = _summary(a).hash == _summary(b).hash
            return (
                row if same else dataclasses.replace(row, status=DIFFERS, error=math.inf, mismatched=1, estimated=True)
            )
        unequal = a != b
        if not unequal.any():
            return row
        delta = self._delta(row.name, self.dtype)
        found = difference(b, a)
        if row.name.endswith(ROUTES):
            ceiling = routes_ceiling(b, a, experts_choose_tokens(self.a.meta.config_fields))
        else:
            ceiling = integers_ceiling(b, a, _routes_differ(self.b, self.a))
        limit = min(tolerance_of(row.group, self.dtype).K * (delta or 0.0), ceiling)
        row = dataclasses.replace(
            row,
            status=WITHIN if found.rms_error <= limit else DIFFERS,
            error=found.rms_error if limit else math.inf,
            limit=limit,
            delta=delta,
            scale=found.truth_rms,
            mismatched=int(unequal.sum()),
            position=_first_true(unequal),
        )
        return self._with_values(row, None)

    def _judged(self, row: Row, side: str, value: Tensor, reference: Tensor, dtype: str) -> Row:
        found = _measure(value, reference)
        delta = self._delta(row.name, dtype)
        ceiling = self._scales.ceiling(row.name, dtype, (scale_of(value), found.scale), self._rerouted[side])
        limit = self._scales.limit(row.name, dtype, found.scale, delta, ceiling)
        if found.error == 0:
            status, found = EQUAL, dataclasses.replace(found, position=None)
        elif found.error <= limit:
            status = WITHIN
        else:
            unscaled = delta is None and not tolerance_of(row.group, dtype).relative and not found.mismatched
            status = NO_DELTA if unscaled else DIFFERS
        measured = {field.name: getattr(found, field.name) for field in dataclasses.fields(found)}
        return dataclasses.replace(row, status=status, worse=side, limit=limit, delta=delta, **measured)

    def _delta(self, name: str, dtype: str) -> float | None:
        deltas = self._deltas[dtype]
        if name not in deltas and group_of(name) == DECODE:
            return next((deltas[output] for output in _DECODED if output in deltas), None)
        delta = deltas.get(name)
        return None if delta == math.inf else delta

    def _with_values(self, row: Row, truth: Tensor | None) -> Row:
        values = {
            field: _value_at(tensor, row.position)
            for field, tensor in (
                ("value_a", self.a.tensors[row.name]),
                ("value_b", self.b.tensors[row.name]),
                ("value_truth", truth),
            )
        }
        return dataclasses.replace(row, **values)


def integers_ceiling(value: np.ndarray, reference: np.ndarray, rerouted: bool) -> float:
    """Largest RMS difference that a delta may allow of integers that are no routes: counts, which follow from routes,
    differ where these do, and by less than their size.
    """
    return max(rms(value), rms(reference)) if rerouted else 0.0


def routes_ceiling(value: np.ndarray, reference: np.ndarray, experts_choose: bool) -> float:
    """Largest RMS difference that a delta may allow of routes: rounding decides near ties only, half of them at most.

    Args:
        experts_choose: whether a column holds the tokens that an expert takes, the best first, so that one that comes
            or goes moves all after it; else a row holds the experts of a token.
    """
    if experts_choose:
        stay = np.concatenate([np.isin(*columns) for columns in zip(value.T, reference.T, strict=True)])
    else:
        stay = value == reference
    return math.inf if 2 * np.count_nonzero(stay) >= value.size else 0.0


def _routes_differ(trace: Trace, against: Trace) -> bool:
    """Whether routes differ where both recorded them; true if there are experts but no routes to see."""
    names = [name for name in trace.tensors if name.endswith(ROUTES) and name in against.tensors]
    if not names:
        return has_experts(trace.meta.config_fields)
    return any(_summary(trace.tensors[name]).hash != _summary(against.tensors[name]).hash for name in names)


def _all_finite(tensor: Tensor) -> bool:
    return not tensor.nonfinite_hash if isinstance(tensor, Summary) else bool(np.isfinite(as_float64(tensor)).all())


def _with_nonfinite(row: Row, a: Tensor, b: Tensor) -> Row:
    """The row with the places that are not finite in both: a finding of its own where nothing else is one."""
    if isinstance(a, Summary) or isinstance(b, Summary):
        summary_a, summary_b = _summary(a), _summary(b)
        count = min(max(side.nonfinite, int(bool(side.nonfinite_hash))) for side in (summary_a, summary_b))
        alike, position = summary_a.nonfinite_hash == summary_b.nonfinite_hash, None
    else:
        both = ~np.isfinite(as_float64(a)) & ~np.isfinite(as_float64(b))
        count, alike = int(both.sum()), not nonfinite_mismatch(a, b).any()
        position = _first_true(both) if count else None
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


def _measure(value: Tensor, reference: Tensor) -> Measured:
    if isinstance(value, Summary) or isinstance(reference, Summary):
        return _estimate(_summary(value), _summary(reference))
    found = difference(value, reference)
    return Measured(found.rms_error, found.truth_rms, found.mismatched, found.index)


def _estimate(value: Summary, reference: Summary) -> Measured:
    if value.nonfinite_hash != reference.nonfinite_hash:
        return Measured(math.inf, reference.rms, 1, None, estimated=True)
    apart = value.sketch - reference.sketch
    error = math.sqrt(float(apart @ apart) / reference.size) if reference.size else 0.0
    if value.hash != reference.hash and value.dtype == reference.dtype:
        error = max(error, np.finfo(np.float64).tiny)  # not the same bits, even where the sketch can't tell
    return Measured(error, reference.rms, 0, None, estimated=True)


def _summary(tensor: Tensor) -> Summary:
    return tensor if isinstance(tensor, Summary) else summarize(tensor)


def _dtype(tensor: Tensor) -> str:
    return tensor.dtype if isinstance(tensor, Summary) else tensor.dtype.name


def _is_floating(tensor: Tensor) -> bool:
    return bool(tensor.sketch.size) if isinstance(tensor, Summary) else is_floating(tensor.dtype)


def _first_true(flags: np.ndarray) -> tuple[int, ...]:
    return tuple(int(i) for i in np.unravel_index(int(np.argmax(flags)), flags.shape))


def _value_at(tensor: Tensor | None, position: tuple[int, ...] | None) -> float | None:
    if position is None or not isinstance(tensor, np.ndarray) or not tensor.size:
        return None
    return float(tensor[position])
