"""What a comparison of two traces found: a row for each tensor, and where to look first."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from shared_config.parity.align import BACKWARD_GROUPS, FORWARD_GROUPS
from shared_config.parity.parts import Part
from shared_config.parity.tolerance import coarser
from shared_config.parity.traces import TraceMeta

EQUAL, WITHIN, DIFFERS, NO_DELTA = "equal", "within", "differs", "no delta"
NOT_FINITE = "not finite in both"
OTHER_SHAPE, OTHER_KIND, ONLY_A, ONLY_B = "shape", "dtype", "missing in b", "missing in a"


@dataclass(frozen=True)
class Row:
    """The verdict on one tensor.

    Attributes:
        status: "equal" (no difference at all), "within" the limit, "differs", "shape", "dtype", "missing in a",
            "missing in b", "not finite in both" (which shows nothing; what is finite is the same), or "no delta":
            unequal, and nothing says how much rounding may do.
        worse: side whose error is shown, "a" or "b"; the other's is a smaller share of its limit.
        against: what it was measured against: "truth", or "a".
        error, limit, delta: RMS error, RMS error allowed, RMS error that rounding the weights makes.
        scale: RMS of what it was measured against.
        mismatched: places where NaN or infinity stand on one side only, or where integers differ.
        nonfinite: places where neither of the two is finite.
        position: of the largest difference, or of the first mismatch; None if unknown (summaries, missing tensors).
        estimated: whether the error is estimated from summaries.
        part: the row, column, element or the scale that is a larger share of its own limit than the whole tensor is;
            if it is beyond, ``position`` is that of the largest difference within it.
    """

    name: str
    group: str
    status: str
    shape: tuple[int, ...] = ()
    dtype_a: str = ""
    dtype_b: str = ""
    worse: str = "b"
    against: str = "a"
    error: float = 0.0
    limit: float = 0.0
    delta: float | None = None
    scale: float = 0.0
    mismatched: int = 0
    nonfinite: int = 0
    position: tuple[int, ...] | None = None
    value_a: float | None = None
    value_b: float | None = None
    value_truth: float | None = None
    estimated: bool = False
    part: Part | None = None

    @property
    def ok(self) -> bool:
        """Whether the tensors count as the same."""
        return self.status in (EQUAL, WITHIN)

    @property
    def share(self) -> float:
        """Error as a share of the limit, of the tensor or its worst part: above 1 is a difference."""
        if self.status == EQUAL:
            return 0.0
        whole = self.error / self.limit if self.limit else math.inf
        return whole if self.part is None else max(whole, self.part.share)

    @property
    def multiple(self) -> float | None:
        """Error in multiples of delta; None where there is no delta."""
        if self.delta is None:
            return None
        return self.error / self.delta if self.delta else (0.0 if self.error == 0 else math.inf)

    @property
    def relative(self) -> float:
        """Error relative to the tensor's RMS."""
        return self.error / self.scale if self.scale else (0.0 if self.error == 0 else math.inf)

    @property
    def nearest(self) -> tuple[float, float, float]:
        """Error, limit and size of what is nearest to its limit, the whole tensor or a part of it."""
        part = self.part
        return (self.error, self.limit, self.scale) if part is None else (part.error, part.limit, part.size)

    @property
    def full_label(self) -> str:
        """The name, with the part that is nearest to its limit, if that is not the whole tensor."""
        return self.name if self.part is None else f"{self.part.label} of {self.name}"


@dataclass(frozen=True)
class HeatMap:
    """Largest absolute difference by place: rows are all axes but the last, flattened, columns are the last axis.

    Attributes:
        shape: of the whole (rows, columns), which ``values`` covers in equal blocks.
        values: infinite where NaN or infinity stand on one side only.
    """

    shape: tuple[int, int]
    values: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Comparison:
    """What comparing two traces found; `rows` are in execution order, gradients in that of the backward pass."""

    rows: tuple[Row, ...]
    meta_a: TraceMeta
    meta_b: TraceMeta
    meta_truth: TraceMeta | None
    label_a: str
    label_b: str
    heatmaps: Mapping[str, HeatMap]
    notes: tuple[str, ...] = ()

    @property
    def equal(self) -> bool:
        """Whether every tensor of either trace has its equal in the other."""
        return all(row.ok for row in self.rows)

    @property
    def failures(self) -> tuple[Row, ...]:
        """All rows that are not ok."""
        return tuple(row for row in self.rows if not row.ok)

    @property
    def first_forward(self) -> Row | None:
        """The first tensor of the forward pass, in execution order, that differs."""
        return first_failure(self.rows, FORWARD_GROUPS)

    @property
    def first_backward(self) -> Row | None:
        """The first tensor of the backward pass, which starts at the end of the model, that differs."""
        return first_failure(self.rows, BACKWARD_GROUPS)

    @property
    def groups(self) -> dict[str, tuple[Row, ...]]:
        """Rows by group, in execution order."""
        names = dict.fromkeys(row.group for row in self.rows)
        return {name: tuple(row for row in self.rows if row.group == name) for name in names}

    @property
    def dtype(self) -> str:
        """The coarser of the two arithmetics."""
        return coarser(self.meta_a.dtype, self.meta_b.dtype)

    def to_json(self) -> dict[str, object]:
        """All of it as JSON values; what is not finite is written as text ("inf", "nan")."""
        first = {"first_forward": self.first_forward, "first_backward": self.first_backward}
        content = {
            "equal": self.equal,
            "a": _origin(self.label_a, self.meta_a),
            "b": _origin(self.label_b, self.meta_b),
            "truth": None if self.meta_truth is None else _origin("truth", self.meta_truth),
            "tensors": len(self.rows),
            "failures": len(self.failures),
            **{key: None if row is None else row.name for key, row in first.items()},
            "notes": list(self.notes),
            "rows": [_row_values(row) for row in self.rows],
        }
        return _json_values(content)


def first_failure(rows: Iterable[Row], groups: tuple[str, ...]) -> Row | None:
    """The first row of these groups that is not ok."""
    return next((row for row in rows if not row.ok and row.group in groups), None)


def _origin(label: str, meta: TraceMeta) -> dict[str, Any]:
    fields = dataclasses.asdict(meta)
    return {"label": label, **{name: value for name, value in fields.items() if name not in ("deltas", "parts")}}


def _row_values(row: Row) -> dict[str, Any]:
    """The fields of a row, and what follows from them."""
    values = {**dataclasses.asdict(row), "multiple": row.multiple, "share": row.share}
    if row.part is not None:
        values["part"] |= {"label": row.part.label, "share": row.part.share}
    return values


def _json_values(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _json_values(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_json_values(part) for part in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
