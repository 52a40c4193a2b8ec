"""What `validate` says of parallel layouts: each backend in a layout against itself on one device, and the two backends
in it against each other. (A backend that has no such layout takes part with what it does on one device.)

What is compared, of `STEPS` clipped training steps in float64, and how much two tensors may differ in any place:

    initial weights   not at all: they are those of the seed, whatever the layout
    losses            1e-10 of the largest of a number's values, or of 1: loss, norm of the gradient, losses of routers
    counts            not at all: labels that counted, experts without a token; what follows from counts is in weights
    gradients         1e-10 of the tensor's largest value. They are those of the first step: what the first moments hold
                      after it, divided by 1 - beta_1 and by the factor of clipping
    weights           1e-10 of the tensor's largest value, after the last step
    replicas          not at all: what several devices hold the same part of has the same bits on all of them
    parts             no device holds more than the sharding table gives it

A gradient that is 0 by mathematics, as that of a key's bias, is noise, of which `tolerance.Cancellation` says how large
it may be. AdamW divides it by itself, or by eps where that is larger: weights of such a tensor may differ by the noise
divided by eps, in steps of the learning rate.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping

import numpy as np

from shared_config.contract.lora import adapter_table
from shared_config.contract.moments import MOMENTS, declared_moments
from shared_config.contract.sharding import layout_of, placement, stage_of
from shared_config.contract.vision import job_table
from shared_config.contract.warm_start import without_warm_start
from shared_config.errors import UserError
from shared_config.interchange.toml import number_of
from shared_config.interchange.vision import tower_of
from shared_config.loader import load_config
from shared_config.parity.checks import trace_command
from shared_config.parity.configs import learning_rate
from shared_config.parity.layouts import (
    CLIP,
    LAYOUT,
    REPLICAS,
    STEPS,
    described,
    layout_overrides,
    micro_batches_for,
)
from shared_config.parity.numerics import UNIT_ROUNDOFF, as_float64
from shared_config.parity.plan import BACKENDS, LAYOUTS_STAGE, Check, Finding, Plan, register
from shared_config.parity.provenance import check_trace, expected_meta, initial_hash
from shared_config.parity.scenarios import STATE
from shared_config.parity.tolerance import Cancellation
from shared_config.parity.traces import GRADIENT, LOSS, ROUTING, Trace, group_of, read_trace
from shared_config.schema.distributed import DistributedConfig
from shared_config.schema.job import JobConfig
from shared_config.schema.optimizer import OptimizerConfig

ALONE = DistributedConfig()
AGREED = 1e-10
NORM, (FIRST, _) = "grad_norm", MOMENTS
GROUPS = {"losses": LOSS, "counts": ROUTING, "gradients": GRADIENT, "weights": STATE}
"""Subject of a finding -> group of a trace."""


def _jobs(plan: Plan, backend: str) -> list[list[str]]:
    """One device first, then each layout."""
    jobs = []
    for place, layout in enumerate((ALONE, *plan.layouts)):
        if backend not in plan.backends_of(layout):
            continue
        command = trace_command(plan, backend, layout_overrides(layout, micro_batches_for(plan.layouts)))
        output = ["--output", str(plan.layout_file(backend, place))]
        jobs.append([*command, "--scenario", LAYOUT, "--dtype", "float64", "--no-deltas", *output])
    return jobs


def _judge(plan: Plan) -> Iterator[Finding]:
    alone = {backend: _trace(plan, backend, ALONE, 0) for backend in BACKENDS}
    for place, layout in enumerate(plan.layouts, 1):
        title = described(layout)
        found = {backend: _trace(plan, backend, layout, place) for backend in plan.backends_of(layout)}
        for backend, trace in found.items():
            yield from _same(title, trace, alone[backend], backend)
            yield from _by_themselves(title, trace, config_of(plan, layout))
        found = alone | found
        yield from _same(title, found["jax"], found["torch"])


def config_of(plan: Plan, layout: DistributedConfig) -> JobConfig:
    """That of the steps in a layout."""
    overrides = layout_overrides(layout, micro_batches_for(plan.layouts))
    return without_warm_start(load_config(str(plan.config_file), overrides))


def _trace(plan: Plan, backend: str, layout: DistributedConfig, place: int) -> Trace:
    """What a backend left of the steps in a layout.

    Raises:
        UserError: it is another trace than the one that was asked for, or of another mesh.
    """
    path = plan.layout_file(backend, place)
    expected = expected_meta(config_of(plan, layout), plan.seed, plan.weights_hash)
    expected = dataclasses.replace(expected, backend=backend, device="cpu", dtype="float64", extra={"scenario": LAYOUT})
    trace = check_trace(read_trace(path), expected, path)
    problems = [*_problems(trace, config_of(plan, layout))]
    if problems:
        raise UserError("\n  ".join([f"{path}: is not what was asked for:", *problems]))
    return trace


def _held(trace: Trace) -> list[int]:
    """Elements that each device holds."""
    held = trace.meta.extra.get("held")
    return held if isinstance(held, list) else []


def _problems(trace: Trace, config: JobConfig) -> Iterator[str]:
    """How a trace is not of the layout that its config names."""
    devices, extra = config.distributed.fewest_devices, trace.meta.extra
    sizes = {} if devices == 1 else dataclasses.asdict(layout_of(config.distributed, devices))
    if extra.get("sizes") != sizes:
        yield f"mesh = {extra.get('sizes')}: was to be {sizes}"
    if len(_held(trace)) != devices:
        yield f"devices = {len(_held(trace))}: was to be {devices}"
    for group, shape in ((LOSS, (STEPS,)), (REPLICAS, (devices, 2))):
        wrong = {name: array.shape for name, array in _of(trace, group).items() if array.shape != shape}
        yield from (f"{group}/{name} is of shape {found}: was to be {shape}" for name, found in wrong.items())
    wanted = [LOSS, REPLICAS, STATE, *([GRADIENT] if FIRST in declared_moments(config.optimizer.name) else [])]
    yield from (f"{group}: nothing is recorded" for group in wanted if not _of(trace, group))


def _of(trace: Trace, group: str) -> dict[str, np.ndarray]:
    """The tensors of a group by the rest of their names."""
    return {
        name.partition("/")[2]: np.asarray(tensor) for name, tensor in trace.tensors.items() if group_of(name) == group
    }


def _factor(trace: Trace) -> float:
    """What the gradients of the first step were multiplied by, to clip them."""
    norm = float(_of(trace, LOSS)[NORM][0])
    return CLIP / max(norm, CLIP)


def _tensors(trace: Trace, group: str) -> dict[str, np.ndarray]:
    """What is compared of a group; gradients as they were before they were clipped."""
    tensors = _of(trace, group)
    return {name: array / _factor(trace) for name, array in tensors.items()} if group == GRADIENT else tensors


def _same(check: str, found: Trace, truth: Trace, backend: str = "") -> Iterator[Finding]:
    """A trace and the one that it has to equal, of one device or of the other backend."""
    prefix = f"{backend} = 1 device" if backend else "jax = torch"
    same = found.meta.initial_hash == truth.meta.initial_hash
    said = "" if same else f"{prefix}: initial weights: other values"
    yield Finding(check, f"{prefix}: initial weights", same, detail=said, backend=backend)
    limits = _limits(truth)
    for subject, group in GROUPS.items():
        own, true = _tensors(found, group), _tensors(truth, group)
        if own or true:
            yield _compared(check, f"{prefix}: {subject}", own, true, limits[group], backend)


def _compared(
    check: str,
    subject: str,
    found: Mapping[str, np.ndarray],
    truth: Mapping[str, np.ndarray],
    limits: Mapping[str, float],
    backend: str,
) -> Finding:
    """The tensor that is nearest to its limit, or farthest beyond."""
    names = list(dict.fromkeys([*truth, *found]))
    errors = {name: _error(found.get(name), truth.get(name)) for name in names}
    shares = {name: _share(errors[name], limits.get(name, 0.0)) for name in names}
    worst = max(names, key=shares.__getitem__)
    ok = shares[worst] <= 1
    beyond = sum(share > 1 for share in shares.values())
    said = f"{subject}: {worst} differs by {errors[worst]:.3g}, allowed {limits.get(worst, 0.0):.3g}"
    said += f"; {beyond} of {len(names)} are beyond their limits"
    size = max(_largest(truth[worst]) if worst in truth else 0.0, np.finfo(np.float64).tiny)
    return Finding(
        check,
        subject,
        ok,
        len(names),
        worst,
        errors[worst] / size,
        limits.get(worst, 0.0) / size,
        "" if ok else said,
        backend,
    )


def _error(value: np.ndarray | None, truth: np.ndarray | None) -> float:
    """Largest difference of any place; infinite where there is nothing to compare, or no number."""
    if value is None or truth is None or value.shape != truth.shape or value.dtype != truth.dtype:
        return math.inf
    gap = np.abs(as_float64(value) - as_float64(truth)).max(initial=0.0)
    return float(gap) if math.isfinite(gap) else math.inf


def _share(error: float, limit: float) -> float:
    return error / limit if limit else (math.inf if error else 0.0)


def _largest(array: np.ndarray) -> float:
    return float(np.abs(as_float64(array)).max(initial=0.0))


def _limits(truth: Trace) -> dict[str, dict[str, float]]:
    """Group -> tensor -> what it may differ by in any place."""
    sizes = {group: {name: _largest(a) for name, a in _tensors(truth, group).items()} for group in GROUPS.values()}
    gradients = sizes[GRADIENT]
    rule = Cancellation(max(gradients.values(), default=0.0))
    noise = {name: rule.noise(size, UNIT_ROUNDOFF["float64"]) for name, size in gradients.items()}
    eps = number_of(truth.meta.config_fields, "optimizer", "eps", OptimizerConfig().eps)
    step = learning_rate(truth) * _factor(truth) / eps
    moved = {name: noise[name] * step for name, size in gradients.items() if rule.vanishes(size)}
    return {
        LOSS: {name: AGREED * max(size, 1.0) for name, size in sizes[LOSS].items()},
        ROUTING: {},
        GRADIENT: {name: max(AGREED * size, noise[name]) for name, size in gradients.items()},
        STATE: {name: max(AGREED * size, moved.get(name, 0.0)) for name, size in sizes[STATE].items()},
    }


def _by_themselves(check: str, trace: Trace, config: JobConfig) -> Iterator[Finding]:
    """What the devices of a layout have to be by themselves: initial weights, bits, parts, steps that were clipped."""
    backend, replicas, held = trace.meta.backend, _of(trace, REPLICAS), _held(trace)
    drawn, said = initial_hash(config, config.train.seed, trained=True), {}
    if drawn is not None and trace.meta.initial_hash != drawn:
        said["initial weights"] = f"they are not those that seed {config.train.seed} draws"
    unequal = [name for name, parts in replicas.items() if len({*map(tuple, parts)}) != len({*parts[:, 0]})]
    said["replicas"] = f"other bits on devices that hold the same of {', '.join(unequal[:3])}" if unequal else ""
    most = most_held(config)
    over = f"a device holds {max(held):,} elements, more than the {most:,} of the sharding table"
    said["parts"] = over if max(held) > most else ""
    norms = _of(trace, LOSS)[NORM]
    if not (norms > CLIP).all():
        said["clipping"] = f"norms of gradients are {norms}: must be above {CLIP}, so that every step is clipped"
    counts = {"replicas": len(replicas), "parts": len(held)}
    for subject, problem in said.items():
        detail = f"{backend}: {subject}: {problem}" if problem else ""
        yield Finding(
            check, f"{backend}: {subject}", not problem, counts.get(subject, 1), detail=detail, backend=backend
        )


def most_held(config: JobConfig) -> int:
    """Elements of the model that no device holds more of; an axis that is not divided evenly may stay whole."""
    mesh = layout_of(config.distributed, config.distributed.fewest_devices)
    held = [0] * mesh.pp
    for name, spec in (job_table(config, tower_of(config)) | adapter_table(config)).items():
        parts, stage = placement(spec, mesh).shards(mesh), stage_of(name, config.model.n_layers, mesh.pp)
        held[stage] += math.prod(size if size % n else size // n for size, n in zip(spec.shape, parts, strict=True))
    return max(held)


register(Check("layouts", _jobs, _judge, stage=LAYOUTS_STAGE, layouts=True))
