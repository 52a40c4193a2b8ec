"""What `validate` checks beyond one step: a long sequence, and with ``--full`` all scenarios."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator

import numpy as np

from shared_config.parity.checks import findings_of, trace_command, unrecorded
from shared_config.parity.compare import TOLERANCES, compare_traces
from shared_config.parity.configs import learning_rate
from shared_config.parity.dtypes import narrow_dtypes
from shared_config.parity.images import image_token
from shared_config.parity.numerics import as_float64, relative_error, rms
from shared_config.parity.plan import BACKENDS, LONG, TRUTH, Check, Finding, Plan, register
from shared_config.parity.provenance import check_trace, expected_meta
from shared_config.parity.request import logits_name
from shared_config.parity.scenarios import PARTS, STATE, applicable, cached_and_whole, scenario_config
from shared_config.parity.traces import DECODE, FORWARD, LOSS, LOSSES, Trace, TraceMeta, group_of, read_trace
from shared_config.parity.validation import validation_tokens
from shared_config.schema.job import JobConfig

LONG_SEQUENCE = 601
"""Beyond blocks and buckets of 512, and not a multiple of a power of two."""

STEPS_APART = 1e-6
"""How far float64 weights may be apart after training, in steps of the learning rate; presets measure up to 7e-11. What
is left of a gradient that vanishes may move a weight by as much of a step as it is of Adam's eps.
"""

ACCUMULATION, CAPTURES, RESUME = "accumulation", "captures", "resume"
MIXED = "mixed precision"
"""The scenario "accumulation" in bfloat16, and in FP8 where the config has it; its limits are of what rounding the
weights to these does.
"""


def _long_config(config: JobConfig) -> tuple[JobConfig, list[str]]:
    """The config with place for the long sequence, and the overrides that make it."""
    model, vlm = config.model, config.vlm
    if vlm is None:
        length = max(model.max_seq_len, LONG_SEQUENCE)
        return config.replace(model=model.replace(max_seq_len=length)), [f"--model.max_seq_len={length}"]
    text = max(vlm.max_text_len, LONG_SEQUENCE)
    length = model.max_seq_len + text - vlm.max_text_len
    changed = config.replace(model=model.replace(max_seq_len=length), vlm=vlm.replace(max_text_len=text))
    return changed, [f"--model.max_seq_len={length}", f"--vlm.max_text_len={text}"]


def _long_tokens(plan: Plan) -> np.ndarray:
    """Of a batch of one."""
    config = plan.config
    return validation_tokens(config.model.vocab_size, 1, LONG_SEQUENCE, plan.seed, image_token(config))


def _long_jobs(plan: Plan, backend: str) -> list[list[str]]:
    _, overrides = _long_config(plan.config)
    tokens = ",".join(map(str, _long_tokens(plan)[0]))
    kept = ["--only", ",".join(_long_names(plan)), "--no-deltas"]
    output = ["--output", str(plan.scenario_file(backend, LONG))]
    return [[*trace_command(plan, backend, overrides), "--dtype", "float64", "--tokens", tokens, *kept, *output]]


def _long_names(plan: Plan) -> list[str]:
    return [logits_name(plan.config), LOSS]


def _compare_long(plan: Plan) -> Iterator[Finding]:
    """Logits and loss of a forward of more positions than blocks and buckets have, in float64."""
    config = _long_config(plan.expected_config)[0]
    expected = expected_meta(config, plan.seed, plan.weights_hash, tokens=_long_tokens(plan), only=_long_names(plan))
    torch, jax = (_checked(plan, backend, LONG, expected) for backend in BACKENDS)
    comparison = compare_traces(torch, jax)
    name = f"{LONG_SEQUENCE} positions"
    plan.comparisons[name] = comparison
    yield from findings_of(name, comparison)
    yield from unrecorded(name, (torch, jax), _long_names(plan))


def _checked(plan: Plan, backend: str, scenario: str, expected: TraceMeta, dtype: str = "float64") -> Trace:
    path = plan.scenario_file(backend, scenario, dtype)
    asked = dataclasses.replace(expected, backend=backend, device=plan.device, dtype=dtype)
    return check_trace(read_trace(path), asked, path)


def _jobs(*names: str) -> Callable[[Plan, str], list[list[str]]]:
    """Jobs of scenarios, those that the config has; "accumulation" also in mixed precision."""

    def jobs(plan: Plan, backend: str) -> list[list[str]]:
        return [
            [
                *trace_command(plan, backend),
                *("--scenario", name, "--dtype", dtype, "--runs", str(plan.folder)),
                *("--output", str(plan.scenario_file(backend, name, dtype))),
                "--deltas" if (backend, dtype, name) == (*TRUTH, ACCUMULATION) else "--no-deltas",
            ]
            for name in names
            if name in applicable(plan.config)
            for dtype in ("float64", *(narrow_dtypes(plan.config) if name == ACCUMULATION else ()))
        ]

    return jobs


def _pair(plan: Plan, name: str, dtype: str = "float64") -> tuple[Trace, Trace]:
    config = scenario_config(plan.config, name)
    expected = dataclasses.replace(expected_meta(config, plan.seed, plan.weights_hash), extra={"scenario": name})
    torch, jax = (_checked(plan, backend, name, expected, dtype) for backend in BACKENDS)
    return torch, jax


def _compared(plan: Plan, title: str, torch: Trace, jax: Trace, truth: Trace | None = None) -> Iterator[Finding]:
    """All that is not the state after training, as of one step."""
    torch, jax = _without_state(torch), _without_state(jax)
    comparison = compare_traces(torch, jax, None if truth is None else _without_state(truth))
    plan.comparisons[title] = comparison
    yield from findings_of(title, comparison)


def _without_state(trace: Trace) -> Trace:
    kept = {name: tensor for name, tensor in trace.tensors.items() if group_of(name) != STATE}
    return dataclasses.replace(trace, tensors=kept)


def _compare_training(name: str) -> Callable[[Plan], Iterator[Finding]]:
    def judge(plan: Plan) -> Iterator[Finding]:
        if name not in applicable(plan.config):
            return
        torch, jax = _pair(plan, name)
        yield from _compared(plan, name, torch, jax)
        yield _same_state(name, "weights", torch, jax)
        if name == ACCUMULATION:
            for dtype in narrow_dtypes(plan.config):
                title = MIXED if dtype == "bfloat16" else f"{MIXED}, {dtype}"
                yield from _compared(plan, title, *_pair(plan, name, dtype), truth=torch)

    return judge


def _same_state(check: str, subject: str, a: Trace, b: Trace, backend: str = "") -> Finding:
    """Weights after training, whose distance is measured in steps of the learning rate."""
    names = [name for name in dict.fromkeys([*a.tensors, *b.tensors]) if group_of(name) == STATE]
    apart = {name: _steps_apart(a, b, name) for name in names} or {"": math.inf}
    worst = max(apart, key=apart.__getitem__)
    said = f"{worst.partition('/')[2]}: {apart[worst]:.2g} steps of the learning rate apart"
    ok = apart[worst] <= STEPS_APART
    return Finding(
        check,
        subject,
        ok,
        len(names),
        worst.partition("/")[2],
        apart[worst],
        STEPS_APART,
        "" if ok else said,
        backend,
    )


def _steps_apart(a: Trace, b: Trace, name: str) -> float:
    if name not in a.tensors or name not in b.tensors or a.tensors[name].shape != b.tensors[name].shape:
        return math.inf
    apart = rms(as_float64(a.array(name)) - as_float64(b.array(name))) / learning_rate(a)
    return apart if math.isfinite(apart) else math.inf


def _compare_decoding(name: str) -> Callable[[Plan], Iterator[Finding]]:
    """Between the backends, and logits of static caches with those of a forward without caches in each."""

    def judge(plan: Plan) -> Iterator[Finding]:
        if name not in applicable(plan.config):
            return
        traces = _pair(plan, name)
        yield from _compared(plan, name, *traces)
        for backend, trace in zip(BACKENDS, traces, strict=True):
            yield _consistent(name, f"{backend}: static caches = forward", *cached_and_whole(trace), backend)
            streamed, generated = (as_float64(trace.array(f"{DECODE}/{way}")) for way in ("streamed", "generated"))
            same = np.array_equal(streamed, generated)
            said = "" if same else f"{backend}: stream and generate draw different tokens"
            yield Finding(name, f"{backend}: stream = generate", same, detail=said, backend=backend)

    return judge


def _consistent(check: str, subject: str, value: np.ndarray, truth: np.ndarray, backend: str) -> Finding:
    limit = TOLERANCES["float64"][FORWARD].relative
    error = relative_error(value, truth) if value.shape == truth.shape else math.inf
    ok = error <= limit and bool(np.isfinite(truth).all())
    said = "" if ok else f"{subject}: relative error {error:.3g}"
    return Finding(check, subject, ok, worst=check, error=error, limit=limit, detail=said, backend=backend)


def _compare_captures(plan: Plan) -> Iterator[Finding]:
    """Between the backends, and in each with what the trace of one step has under the same names."""
    traces = _pair(plan, CAPTURES)
    yield from _compared(plan, CAPTURES, *traces)
    for backend, trace in zip(BACKENDS, traces, strict=True):
        step = plan.trace(backend, "float64")
        names = [name for name in dict.fromkeys([*trace.tensors, *step.tensors]) if group_of(name) == FORWARD]
        lacking = [name for name in names if name not in trace.tensors or name not in step.tensors]
        found = [
            _consistent(CAPTURES, name, np.asarray(trace.tensors[name]), np.asarray(step.tensors[name]), backend)
            for name in names
            if name not in lacking
        ]
        worst = max(found, key=lambda finding: (not finding.ok, finding.error))
        said = f"{backend}: {', '.join(lacking[:3])}: captured by one way alone" if lacking else worst.detail
        subject = f"{backend}: store = trace"
        yield dataclasses.replace(
            worst, subject=subject, count=len(names), worst=worst.subject, ok=worst.ok and not lacking, detail=said
        )


def _compare_resumed(plan: Plan) -> Iterator[Finding]:
    """Runs that changed backends twice with those of each backend that never did."""
    whole, last = _pair(plan, "resume-0"), _pair(plan, f"resume-{PARTS - 1}")
    yield from _compared(plan, RESUME, *whole)
    for backend, other, a, b in zip(BACKENDS, reversed(BACKENDS), whole, last, strict=True):
        way = f"{backend}, {other}, {backend}"
        yield _same_state(RESUME, f"{way}: weights", a, b, backend)
        resumed, unbroken = (as_float64(trace.array(f"{LOSS}/loss")) for trace in (b, a))
        finding = _consistent(RESUME, f"{way}: losses", resumed, unbroken, backend)
        limit = TOLERANCES["float64"][LOSSES].relative
        same = finding.error <= limit and a.meta.extra["step"] == b.meta.extra["step"]
        yield dataclasses.replace(finding, limit=limit, ok=same, detail="" if same else finding.detail)


def _nothing(plan: Plan) -> Iterator[Finding]:
    yield from ()


register(Check("long", _long_jobs, _compare_long))
for _name in ("documents", "padding", ACCUMULATION):
    register(Check(_name, _jobs(_name), _compare_training(_name), full=True))
for _name in ("generate", "ring"):
    register(Check(_name, _jobs(_name), _compare_decoding(_name), full=True))
register(Check(CAPTURES, _jobs(CAPTURES), _compare_captures, full=True))
for _part in range(PARTS):
    _judge = _compare_resumed if _part == PARTS - 1 else _nothing
    register(Check(f"{RESUME} {_part}", _jobs(f"resume-{_part}"), _judge, stage=_part, full=True))
