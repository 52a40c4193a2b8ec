"""What `validate` checks: each check says what the backends' processes must do, and judges what they left behind.

Other parts of the package add their own: ``register(Check(name, jobs, judge))``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from shared_config.interchange import checkpoint, run_layout
from shared_config.interchange.toml import config_to_toml
from shared_config.loader import load_config
from shared_config.parity.align import INITIAL
from shared_config.parity.compare import TOLERANCES, Comparison, Row, compare_traces
from shared_config.parity.dtypes import stored_dtype
from shared_config.parity.numerics import as_float64, relative_error
from shared_config.parity.plan import BACKENDS, TRANSFORMERS, TRUTH, Check, Finding, Plan, register
from shared_config.parity.provenance import check_run, expected_names, initial_hash, missing_names
from shared_config.parity.request import can_decode, decode_reference, logits_name
from shared_config.parity.traces import DECODE, FORWARD, LOSSES, Trace, TraceMeta, group_of
from shared_config.training.metrics import read_metrics

CALM_WARMUP = 100
"""Steps of warm-up in the training check: at a peak learning rate reached too early, training amplifies rounding."""
TRAINED_BATCH, TRAINED_LENGTH = 16, 128
NUMBERS = {"grad_norm": 1e-4, "lr": 0.0, "tokens": 0.0}
"""What records of a training run hold beside the loss, and the relative error allowed. Gradient norms of the presets
measure up to 8e-6. The loss of a few steps does not show their size, by which Adam divides."""


def findings_of(check: str, comparison: Comparison) -> Iterator[Finding]:
    """One finding for each group of tensors of a comparison."""
    for group, rows in comparison.groups.items():
        worst = max(rows, key=lambda row: (not row.ok, row.share))
        error, limit, size = worst.nearest
        yield Finding(
            check=check,
            subject=group,
            ok=all(row.ok for row in rows),
            count=len(rows),
            worst="" if worst.group == INITIAL else worst.full_label.replace(f"{group}/", "", 1),
            error=error / size if size else worst.relative,
            limit=limit / size if size else limit,
            detail="" if worst.ok else describe(worst, comparison),
        )


def outcome(findings: Sequence[Finding]) -> str:
    """The verdict in a line: whether the backends agree with each other, and each with itself."""
    failed = [finding for finding in findings if not finding.ok]
    between = [finding for finding in failed if not finding.backend]
    said = ["the backends agree"]
    if between:
        said = [f"the backends DIFFER in {len(between)} of {len(findings)} comparisons"]
    for backend in BACKENDS:
        within = sum(finding.backend == backend for finding in failed)
        if within:
            said.append(f"{backend} DISAGREES WITH ITSELF in {within} of {len(findings)} comparisons")
    foreign = sum(finding.backend == TRANSFORMERS for finding in failed)
    if any(finding.backend == TRANSFORMERS for finding in findings) and not foreign:
        said.append(f"{TRANSFORMERS} agrees with them")
    if foreign:
        said.append(f"{TRANSFORMERS} DIFFERS FROM BOTH in {foreign} of {len(findings)} comparisons")
    return "; ".join(said)


def describe(row: Row, comparison: Comparison) -> str:
    """A difference in words: which tensor, where, both values, and how far beyond rounding."""
    parts = [f"{row.name}: {row.status}"]
    if row.position is not None:
        parts.append(f"at {row.position} {comparison.label_a} {row.value_a!r}, {comparison.label_b} {row.value_b!r}")
    if row.mismatched:
        parts.append(f"{row.mismatched} places are unequal or not finite on one side")
    if row.nonfinite:
        parts.append(f"{row.nonfinite} places are not finite in both")
    if row.part is not None and row.part.share > 1:
        part = row.part
        parts.append(f"{row.full_label}: {part.share:.3g} times its limit")
        if part.count > 1:
            parts.append(f"{part.beyond} of {part.count} {part.kind}s are beyond theirs")
    if math.isfinite(row.error) and row.limit:
        parts.append(f"relative error {row.relative:.2g}, {row.error / row.limit:.3g} times the limit")
    if row.multiple is not None:
        parts.append(f"{row.multiple:.3g} times what rounding does")
    return "; ".join(parts)


def trace_command(plan: Plan, backend: str, overrides: Sequence[str] = ()) -> list[str]:
    """The start of the command that leaves a trace, of the plan's weights and seed."""
    command = ["trace", str(plan.config_file), "--backend", backend, "--seed", str(plan.seed), "--device", plan.device]
    given = [] if plan.weights is None else ["--weights", str(plan.weights), *plan.overrides]
    return [*command, *given, *overrides]


def _trace_jobs(plan: Plan, backend: str) -> list[list[str]]:
    """One trace per dtype, the float64 one first. In bfloat16 experts that choose tokens take those of float64: with as
    many choices as they have, some are always so close that rounding decides.
    """
    shared = trace_command(plan, backend)
    jobs = []
    for dtype in sorted(plan.dtypes, key=lambda dtype: dtype != "float64"):
        own = ["--deltas" if (backend, dtype) == TRUTH else "--no-deltas"]
        if stored_dtype(dtype) == "bfloat16" and plan.config.experts_choose:
            own += ["--routes", str(plan.trace_file(backend, "float64"))]
        jobs.append([*shared, "--dtype", dtype, "--output", str(plan.trace_file(backend, dtype)), *own])
    return jobs


def _compare_steps(plan: Plan) -> Iterator[Finding]:
    """float64 against float64; float32 and bfloat16, each side against the float64 truth."""
    truth = plan.trace(*TRUTH)
    for dtype in plan.dtypes:
        a, b = (plan.trace(backend, dtype) for backend in BACKENDS)
        comparison = compare_traces(a, b, None if dtype == "float64" else truth)
        plan.comparisons[dtype] = comparison
        yield from findings_of(dtype, comparison)
        yield from _not_shown(plan, dtype, (a, b))


def _not_shown(plan: Plan, dtype: str, traces: Sequence[Trace]) -> Iterator[Finding]:
    """What two traces that agree may hide: initial weights that both draw wrong, tensors that neither recorded, and
    logits of another dtype than was asked for.
    """
    drawn = initial_hash(plan.config, plan.seed)
    for trace in traces:
        backend, logits = trace.meta.backend, trace.tensors.get(logits_name(plan.config))
        if drawn is not None and trace.meta.initial_hash != drawn:
            said = f"{backend}: they are not those that seed {plan.seed} draws"
            yield Finding(dtype, INITIAL, ok=False, worst=INITIAL, error=math.inf, detail=said)
        if logits is not None and str(logits.dtype) != stored_dtype(dtype):
            said = f"{backend}: {logits_name(plan.config)} is {logits.dtype}; it was to be {stored_dtype(dtype)}"
            yield Finding(dtype, FORWARD, ok=False, worst=logits_name(plan.config), error=math.inf, detail=said)
    yield from unrecorded(dtype, traces, expected_names(plan.config))


def unrecorded(check: str, traces: Sequence[Trace], expected: Sequence[str]) -> Iterator[Finding]:
    """A finding for each group of which no trace has a tensor that was expected."""
    lacking: dict[str, list[str]] = {}
    for name in missing_names(traces, expected):
        lacking.setdefault(group_of(name), []).append(name)
    for group, names in lacking.items():
        said = f"neither backend recorded {names[0]}, so that nothing is known of it"
        yield Finding(check, group, ok=False, count=len(names), worst=names[0], error=math.inf, detail=said)


def no_jobs(plan: Plan, backend: str) -> list[list[str]]:
    """The jobs of a check that reads what others recorded."""
    return []


def _compare_decoding(plan: Plan) -> Iterator[Finding]:
    """Within each backend, in float64: logits of cached decoding, which has no capacity limits, against those of a full
    forward that has none either.
    """
    limit, whole = TOLERANCES["float64"][FORWARD].relative, decode_reference(plan.config)
    for backend in BACKENDS if can_decode(plan.config) else ():
        trace = plan.trace(backend, "float64")
        names = [name for name in trace.tensors if name.startswith(f"{DECODE}/") and name != whole]
        errors = {name: relative_error(trace.array(name), trace.array(whole)) for name in names}
        broken = {name: np.inf for name in (whole, *names) if not np.isfinite(as_float64(trace.array(name))).all()}
        errors |= broken
        worst = max(errors, key=errors.__getitem__)
        ok = errors[worst] <= limit
        said = f"{backend} disagrees with itself: {worst} is not its full forward, relative error {errors[worst]:.3g}"
        if broken:
            said = f"{backend}: {', '.join(broken)}: not finite, which agrees with nothing"
        yield Finding(
            "cached decoding",
            f"{backend}: decode = forward",
            ok,
            len(names),
            worst,
            errors[worst],
            limit,
            detail="" if ok else said,
            backend=backend,
        )


def _train_jobs(plan: Plan, backend: str) -> list[list[str]]:
    if plan.steps == 0:
        return []
    command = ["train", str(plan.config_file), "--backend", backend, "--quiet", "--device", plan.device]
    return [[*command, "--output", str(plan.run_folder(backend)), *_train_overrides(plan)]]


def _train_overrides(plan: Plan) -> list[str]:
    """What the training run changes of the config."""
    config = plan.config
    overrides = {
        "train.max_steps": plan.steps,
        "train.batch_size": min(config.train.batch_size, TRAINED_BATCH),
        "train.seq_len": min(config.train.seq_len, TRAINED_LENGTH),
        "train.mixed_precision": "fp32",
        "train.compile_model": "false",
        "scheduler.warmup_steps": max(config.scheduler.warmup_steps, CALM_WARMUP),
        "scheduler.decay_steps": "none",
        "eval.interval": 0,
        "eval.steps": 0,
        "metrics.log_interval": 1,
    }
    return [f"--{name}={value}" for name, value in overrides.items()]


def _compare_training(plan: Plan) -> Iterator[Finding]:
    """Losses of a short float32 training run on the data of the config, and the other numbers of its steps."""
    if plan.steps == 0:
        return
    name, records = f"training, {plan.steps} steps", {backend: _records(plan, backend) for backend in BACKENDS}
    torch, jax = (_losses(plan, records[backend], backend) for backend in BACKENDS)
    comparison = compare_traces(torch, jax)
    plan.comparisons["training"] = comparison
    yield from findings_of(name, comparison)
    for number, limit in NUMBERS.items():
        a, b = (
            np.array([record.get(number, np.nan) for record in records[backend]], np.float64) for backend in BACKENDS
        )
        error = relative_error(b, a) if a.shape == b.shape and np.isfinite(a).all() else math.inf
        said = f"{number}: relative error {error:.2g}"
        ok = error <= limit
        yield Finding(name, number, ok, worst=number, error=error, limit=limit, detail="" if ok else said)


def _losses(plan: Plan, records: Sequence[Mapping[str, Any]], backend: str) -> Trace:
    losses = np.array([record["loss"] for record in records], np.float64)
    meta = TraceMeta(backend, plan.device, "float32", plan.config.train.seed, config_to_toml(plan.config))
    return Trace({LOSSES: losses}, meta)


def _records(plan: Plan, backend: str) -> list[dict[str, Any]]:
    """The numbers of each step of the run that a backend's process left behind.

    Raises:
        UserError: it is another than the one that was asked for.
    """
    folder = plan.run_folder(backend)
    config = load_config(str(plan.config_file), [*_train_overrides(plan), f"--checkpoint.dir={folder}"])
    run = check_run(checkpoint.load(folder, with_optimizer=False), backend, config)
    records = {record["step"]: record for record in read_metrics(folder / run_layout.METRICS)}
    return [records[step] for step in range(1, run.state.step + 1) if step in records]


register(Check("one step", _trace_jobs, _compare_steps))
register(Check("cached decoding", no_jobs, _compare_decoding))
register(Check("training", _train_jobs, _compare_training))
