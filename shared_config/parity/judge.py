"""The verdict on one tensor of two traces, measured against one another or each against the float64 truth."""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
from collections.abc import Mapping

import numpy as np

from shared_config.errors import UserError
from shared_config.parity.align import execution_order
from shared_config.parity.configs import experts_choose_tokens
from shared_config.parity.measure import (
    all_finite,
    dtype_of,
    first_true,
    floats,
    heatmap,
    measure,
    summary_of,
    value_at,
    with_nonfinite,
)
from shared_config.parity.numerics import as_float64, difference, finite_gap, rms
from shared_config.parity.parts import Part, PartErrors, unpacked, worst_part
from shared_config.parity.rerouted import Rerouted, rerouted, routes_differ
from shared_config.parity.result import (
    DIFFERS,
    EQUAL,
    NO_DELTA,
    ONLY_A,
    ONLY_B,
    OTHER_KIND,
    OTHER_SHAPE,
    WITHIN,
    HeatMap,
    Row,
)
from shared_config.parity.routes import COUNTS, is_routes, unequal_choices
from shared_config.parity.tolerance import (
    ROUTE_SLACK,
    TOLERANCES,
    Scales,
    Tensor,
    coarser,
    scale_of,
    tolerance_of,
)
from shared_config.parity.traces import DECODE, FOREIGN, FORWARD, ZEROS, Summary, Trace, group_of

DECODED_OUTPUTS = ("output_head", "transformer.output_head")
"""The activation that cached decoding computes again, of a text or a vision-language model: its delta is decode's."""

_DECODED = tuple(f"{FORWARD}/{output}" for output in DECODED_OUTPUTS)

SLACK = 1 + 1e-6
"""For sums in another order."""


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
        self._scales = Scales(reference, a.meta.config_fields, bool(a.meta.extra.get(FOREIGN)), _zeros(a, b))
        self._deltas: dict[str, dict[str, float]] = {dtype: {} for dtype in TOLERANCES}
        self._parts: dict[str, dict[str, np.ndarray]] = {dtype: {} for dtype in TOLERANCES}
        for trace in (b, a, truth, *refed):  # with recorded inputs, rounding moves a layer by what it does there alone
            for dtype, deltas in ({} if trace is None else trace.meta.deltas).items():
                parts = {} if trace is None else trace.meta.parts.get(dtype, {})
                known = {name: part for name, part in self._parts.get(dtype, {}).items() if name not in deltas}
                self._deltas.setdefault(dtype, {}).update(deltas)
                self._parts[dtype] = known | {name: part for name, part in parts.items() if name in deltas}
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
                if delta == math.inf and tensor is not None and not all_finite(tensor):
                    continue
                bound = math.inf if tensor is None else self._scales.largest_delta(name, dtype, tensor)
                if not (0 <= delta <= min(bound, sys.float_info.max)):
                    limit = f" of at most {bound:.2g}" if math.isfinite(bound) else ""
                    raise UserError(
                        f"delta of {name} in {dtype} = {str(delta)[:40]}: must be what rounding the weights can do, a "
                        f"number{limit}; the trace is damaged, or its model amplifies rounding beyond all use"
                    )

    def _part_deltas(self, name: str, dtype: str, shape: tuple[int, ...]) -> PartErrors | None:
        """What rounding does to the parts of a tensor; None if nothing says it.

        Raises:
            UserError: naming the tensor, if it is nothing that rounding can do, by the delta of the whole tensor.
        """
        source = self._source_of_delta(name, dtype)
        numbers, delta = self._parts[dtype].get(source), self._delta(name, dtype)
        if numbers is None or delta is None:
            return None
        try:
            parts = unpacked(np.asarray(numbers, np.float64), shape)
        except ValueError as error:
            raise UserError(f"parts of {name} in {dtype}: {error}; the trace is damaged") from None
        for moved, places in ((parts.rows, parts.rows.size), (parts.columns, parts.columns.size)):
            largest = SLACK * delta * math.sqrt(places)
            if not ((moved >= 0) & (moved <= largest)).all():
                raise UserError(
                    f"parts of {name} in {dtype}: must be at most {largest:.2g}, as the delta of all is {delta:.2g}; "
                    "the trace is damaged"
                )
        if not 0 <= parts.scale < math.inf:
            raise UserError(f"parts of {name} in {dtype}: scale = {parts.scale}: must be finite; the trace is damaged")
        return parts

    def row(self, name: str) -> Row:
        """The verdict on the tensor of this name, which either trace may lack."""
        a, b = self.a.tensors.get(name), self.b.tensors.get(name)
        if a is None or b is None:
            present = b if a is None else a
            assert present is not None
            status = ONLY_B if a is None else ONLY_A
            return Row(name, group_of(name), status, shape=present.shape, error=math.inf)
        row = Row(name, group_of(name), EQUAL, a.shape, dtype_of(a), dtype_of(b))
        truth = None if self.truth is None else self.truth.tensors.get(name)
        if a.shape != b.shape or (truth is not None and truth.shape != a.shape):
            return dataclasses.replace(row, status=OTHER_SHAPE, error=math.inf)
        if floats(a) != floats(b):
            return dataclasses.replace(row, status=OTHER_KIND, error=math.inf)
        if not floats(a):
            return self._exact(row, a, b)
        sides = [("b", b, a, self.dtype)] if truth is None else self._sides_against(truth, a, b)
        judged = [self._judged(row, side, value, reference, dtype) for side, value, reference, dtype in sides]
        if truth is not None:
            judged = [dataclasses.replace(found, against="truth") for found in judged]
        worst = max(judged, key=lambda found: (not found.ok, found.share))
        return self._with_values(with_nonfinite(worst, a, b), truth)

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
    def _rerouted(self) -> dict[str, Rerouted]:
        """By side, what follows from choices that are not those that it is measured against; routes are held to those
        of the other trace.
        """
        against, order = self.a if self.truth is None else self.truth, execution_order(self.a, self.b)
        pairs = {"a": (self.a, against), "b": (self.b, against), "routes": (self.b, self.a)}
        return {side: rerouted(*pair, order, self._explained, ROUTE_SLACK[self.dtype]) for side, pair in pairs.items()}

    def _explained(self, name: str) -> float:
        """K deltas, of what is held to the other trace."""
        return tolerance_of(group_of(name), self.dtype).K * (self._delta(name, self.dtype) or 0.0)

    @functools.cached_property
    def _routes_differ(self) -> dict[str, bool]:
        """By side, whether routes differ from those that it is measured against; if none were recorded, they may."""
        against = self.a if self.truth is None else self.truth
        return {side: routes_differ(trace, against) for side, trace in (("a", self.a), ("b", self.b))}

    def _exact(self, row: Row, a: Tensor, b: Tensor) -> Row:
        """Integers must be equal, but for as many as rounding the weights changes too (routes at near ties)."""
        if isinstance(a, Summary) or isinstance(b, Summary):
            same = summary_of(a).hash == summary_of(b).hash
            return (
                row if same else dataclasses.replace(row, status=DIFFERS, error=math.inf, mismatched=1, estimated=True)
            )
        unequal = a != b
        if not unequal.any():
            return row
        delta, found, allowed = self._delta(row.name, self.dtype), difference(b, a), self._explained(row.name)
        if is_routes(row.name):
            unequal = unequal_choices(b, a, experts_choose_tokens(self.a.meta.config_fields))
            error = float(self._rerouted["routes"].own(row.name, unequal).sum())
            limit = self._routes_limit(unequal, allowed)
        else:
            error, limit = found.rms_error, self._counts_limit(row.name, a, b, allowed)
        row = dataclasses.replace(
            row,
            status=WITHIN if error <= limit else DIFFERS,
            error=error if limit else math.inf,
            limit=limit,
            delta=delta,
            scale=float(unequal.size) if is_routes(row.name) else found.truth_rms,
            mismatched=int(unequal.sum()),
            position=first_true(unequal),
        )
        return self._with_values(row, None)

    def _routes_limit(self, unequal: np.ndarray, allowed: float) -> float:
        """How many choices may be unequal: rounding decides near ties only, half of all at most."""
        return min(max(allowed, ROUTE_SLACK[self.dtype]), unequal.size / 2)

    def _counts_limit(self, name: str, a: np.ndarray, b: np.ndarray, allowed: float) -> float:
        """Largest RMS difference of integers that are no routes: those that count routes differ where these do, by less
        than their size, and by as much as follows from the choices that are unequal.
        """
        if not routes_differ(self.b, self.a):
            return 0.0
        follows = 2 * self._unequal / math.sqrt(max(1, a.size)) if name.endswith(COUNTS) else 0.0
        return min(max(allowed, follows), max(rms(a), rms(b)))

    @functools.cached_property
    def _unequal(self) -> int:
        """How many choices of routers are unequal, where the values of both are known."""
        choose = experts_choose_tokens(self.a.meta.config_fields)
        count = 0
        for name, a in self.a.tensors.items():
            b = self.b.tensors.get(name)
            if is_routes(name) and isinstance(a, np.ndarray) and isinstance(b, np.ndarray) and a.shape == b.shape:
                count += int(unequal_choices(b, a, choose).sum())
        return count

    def _judged(self, row: Row, side: str, value: Tensor, reference: Tensor, dtype: str) -> Row:
        other = self._rerouted[side]
        kept = other.kept(row.name, value, reference)
        found = measure(kept if row.name in other.excused else value, reference)
        delta = self._delta(row.name, dtype)
        ceiling = self._scales.ceiling(row.name, dtype, (scale_of(value), found.scale), self._routes_differ[side])
        limit = self._scales.limit(row.name, dtype, found.scale, delta, ceiling)
        limit = max(limit, other.allowed(row.name, value, ceiling))
        if found.error == 0 and (kept is value or row.name not in other.excused):
            status, found = EQUAL, dataclasses.replace(found, position=None)
        elif found.error <= limit:
            status = WITHIN
        else:
            unscaled = delta is None and not tolerance_of(row.group, dtype).relative and not found.mismatched
            status = NO_DELTA if unscaled else DIFFERS
        measured = {field.name: getattr(found, field.name) for field in dataclasses.fields(found)}
        row = dataclasses.replace(row, status=status, worse=side, limit=limit, delta=delta, **measured)
        part = self._worst_part(row, side, kept, reference, dtype) if status in (WITHIN, DIFFERS) else None
        if part is None or part.share <= row.share:
            return row
        status, position = (DIFFERS, part.position) if part.share > 1 else (status, row.position)
        return dataclasses.replace(row, status=status, part=part, position=position)

    def _worst_part(self, row: Row, side: str, value: Tensor, reference: Tensor, dtype: str) -> Part | None:
        """The part of a tensor that is nearest to its limit; None where parts say nothing, or nothing is known of them.

        Where routes differ these are parts of what they don't reach. In cached decoding they may differ unseen.
        """
        if isinstance(value, Summary) or isinstance(reference, Summary) or not math.isfinite(row.error):
            return None
        limits = self._scales.part_limits(row.name, dtype, row.scale)
        deltas = self._part_deltas(row.name, dtype, reference.shape)
        if limits is None or deltas is None or row.delta is None or not np.isfinite(reference).all():
            return None
        if not self._rerouted[side].has_parts(row.name, reference):
            return None
        return worst_part(finite_gap(value, reference), as_float64(reference), deltas, row.delta, limits)

    def _source_of_delta(self, name: str, dtype: str) -> str:
        """The tensor whose delta it has: that of cached decoding is the delta of the logits."""
        deltas = self._deltas[dtype]
        if name not in deltas and group_of(name) == DECODE:
            return next((output for output in _DECODED if output in deltas), name)
        return name

    def _delta(self, name: str, dtype: str) -> float | None:
        delta = self._deltas[dtype].get(self._source_of_delta(name, dtype))
        return None if delta == math.inf else delta

    def _with_values(self, row: Row, truth: Tensor | None) -> Row:
        values = {
            field: value_at(tensor, row.position)
            for field, tensor in (
                ("value_a", self.a.tensors[row.name]),
                ("value_b", self.b.tensors[row.name]),
                ("value_truth", truth),
            )
        }
        return dataclasses.replace(row, **values)


def _zeros(a: Trace, b: Trace) -> set[str]:
    """Gradients that are 0 in float64, as one of the traces says."""
    known = (trace.meta.extra.get(ZEROS) for trace in (a, b))
    return {str(name) for names in known if isinstance(names, list) for name in names}
