"""A Hugging Face folder in transformers: its own model beside both backends, with the weights of the folder.

What transformers computes in float32 whatever the dtype, as softmax and rotary tables, keeps it from being exact in
float64. So its error against the float64 of PyTorch may be that of such roundings, or a few times that of the backends.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from shared_config.parity.checks import trace_command
from shared_config.parity.numerics import as_float64, rms
from shared_config.parity.plan import BACKENDS, TRANSFORMERS, TRUTH, Check, Finding, Plan, register
from shared_config.parity.request import logits_name
from shared_config.parity.traces import FORWARD, GRADIENT, LOSS, Trace, group_of

ROUNDED = {FORWARD: 1e-5, LOSS: 1e-5, GRADIENT: 1e-4}
"""The relative error of a tensor that float32 inside explains. In float64, small models of seven families with 24
positions measure up to 2e-7, 1e-8 and 2e-6.
"""
TIMES = 8.0
"""Of the larger error of the backends, what that of transformers may be. It measures up to 4 times theirs, in small
LLaVAs up to 2.6 times.
"""
SMALL = 1e-3
"""Of the largest tensor of its group, what a tensor is taken to be at least: some gradients are truly 0."""


@dataclass(frozen=True)
class Row:
    """Of tensors of a group, the one whose error is nearest to its limit in transformers.

    Attributes:
        errors: of it in each backend and in transformers, against the float64 of PyTorch, relative to its RMS.
    """

    dtype: str
    group: str
    count: int
    worst: str
    errors: Mapping[str, float]
    limit: float

    @property
    def ok(self) -> bool:
        """Whether it is within the limit; NaN is not."""
        return self.errors[TRANSFORMERS] <= self.limit


def rows(plan: Plan) -> list[Row]:
    """One for each dtype and group."""
    truth = plan.trace(*TRUTH)
    return [row for dtype in foreign_dtypes(plan) for row in _rows(plan, dtype, truth)]


def foreign_dtypes(plan: Plan) -> tuple[str, ...]:
    """Those that transformers has, too; of experts those in which rounding seldom changes a choice."""
    left_out = ("fp8", "bfloat16") if plan.config.has_routers else ("fp8",)
    return tuple(dtype for dtype in plan.dtypes if dtype not in left_out)


def _rows(plan: Plan, dtype: str, truth: Trace) -> Iterator[Row]:
    traces = {backend: plan.trace(backend, dtype) for backend in BACKENDS}
    traces[TRANSFORMERS] = plan.foreign_trace(dtype)
    names = list(traces[TRANSFORMERS].tensors)
    for group in dict.fromkeys(map(group_of, names)):
        own = [name for name in names if group_of(name) == group]
        scale = SMALL * max(rms(truth.array(name)) for name in own)
        errors = {name: {side: _error(trace, truth, name, scale) for side, trace in traces.items()} for name in own}
        logits = {side: _error(trace, truth, logits_name(plan.config), 0.0) for side, trace in traces.items()}
        usual = {side: float(np.median([errors[name][side] for name in own])) for side in traces}
        limits = {name: _limit(group, *([logits] if group == LOSS else [errors[name], usual])) for name in own}
        worst = max(own, key=lambda name: (_share(errors[name][TRANSFORMERS], limits[name]), name))
        yield Row(dtype, group, len(own), worst, errors[worst], limits[worst])


def _limit(group: str, *errors: Mapping[str, float]) -> float:
    """By the errors of the same tensor, and as those of a small one may be small by chance, by the median of its group;
    of the loss by those of the logits.
    """
    return max(ROUNDED[group], TIMES * max(error[backend] for error in errors for backend in BACKENDS))


def _share(error: float, limit: float) -> float:
    return error / limit if np.isfinite(error) else np.inf


def _error(trace: Trace, truth: Trace, name: str, scale: float) -> float:
    """Infinite where a tensor is missing or of another shape."""
    if name not in trace.tensors or trace.array(name).shape != truth.array(name).shape:
        return np.inf
    exact = as_float64(truth.array(name))
    return rms(as_float64(trace.array(name)) - exact) / max(rms(exact), scale)


def _jobs(plan: Plan, backend: str) -> list[list[str]]:
    command = trace_command(plan, backend)
    return [
        [*command, "--dtype", dtype, "--output", str(plan.trace_file(backend, dtype))] for dtype in foreign_dtypes(plan)
    ]


def _compare(plan: Plan) -> Iterator[Finding]:
    for row in rows(plan):
        said = f"{row.worst}: relative error {row.errors[TRANSFORMERS]:.2g}, allowed {row.limit:.2g}"
        yield Finding(
            f"{TRANSFORMERS}, {row.dtype}",
            row.group,
            row.ok,
            row.count,
            row.worst,
            row.errors[TRANSFORMERS],
            row.limit,
            detail="" if row.ok else said,
            backend=TRANSFORMERS,
        )


register(Check(TRANSFORMERS, _jobs, _compare, foreign=True))
