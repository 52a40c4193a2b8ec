"""Which traces can be compared, and how their tensors line up."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from shared_config.errors import UserError
from shared_config.parity.selection import RefedFields
from shared_config.parity.tolerance import TOLERANCES
from shared_config.parity.traces import (
    COTANGENT,
    DECODE,
    FORWARD,
    GRADIENT,
    LOSS,
    LOSSES,
    ROUTING,
    UPDATED,
    Trace,
    TraceMeta,
    group_of,
    tensors_hash,
)
from shared_config.schema.base import execution_names
from shared_config.schema.job import JobConfig

TRUTH_DTYPE = "float64"
INITIAL = "initial weights"
FORWARD_GROUPS = (INITIAL, FORWARD, ROUTING, LOSS, DECODE)
BACKWARD_GROUPS = (COTANGENT, GRADIENT, UPDATED)
GROUP_ORDER = (*FORWARD_GROUPS, *BACKWARD_GROUPS, LOSSES)


def check_comparable(a: Trace, b: Trace, truth: Trace | None) -> None:
    """Refuse traces of different configs, seeds or inputs, without tensors, or of a dtype that no tolerance is for.

    Raises:
        UserError: naming every difference.
    """
    for side, trace in (("a", a), ("b", b), ("truth", truth)):
        if trace is None:
            continue
        if trace.meta.dtype not in TOLERANCES:
            raise UserError(f"trace {side}: dtype = {trace.meta.dtype!r}: must be one of {', '.join(TOLERANCES)}")
        if not trace.tensors:
            raise UserError(f"trace {side}: has no tensors")
        problems = list(differences_of_origin(a.meta, trace.meta))
        if problems:
            raise UserError("\n  ".join([f"trace a and trace {side} are not of the same run:", *problems]))
    _check_refed(a, b)
    if truth is not None and truth.meta.dtype != TRUTH_DTYPE:
        raise UserError(f"the truth: dtype = {truth.meta.dtype!r}: must be {TRUTH_DTYPE!r}")


def _check_refed(a: Trace, b: Trace) -> None:
    """Layers that were given recorded inputs can be held to the run that recorded them, or to one given the same.

    Raises:
        UserError: naming what was fed.
    """
    for side, trace, other in (("a", a, b), ("b", b, a)):
        fed = trace.meta.refed
        if not fed:
            continue
        if other.meta.refed.get("hash", fed_hash(other, fed.get("modules", []))) != fed.get("hash"):
            source = _source(fed)
            raise UserError(
                f"trace {side}: its layers were given what another trace ({source}) recorded: it can be compared with "
                "that trace, or with one that was given the same"
            )


def _source(fed: RefedFields) -> str:
    return f"{fed.get('backend')} {fed.get('device')} {fed.get('dtype')}"


def fed_hash(trace: Trace, modules: Iterable[str]) -> str:
    """Hash of the outputs of some modules; "" if a trace lacks one."""
    names = [f"{FORWARD}/{module}" for module in modules]
    return tensors_hash({name: trace.tensors[name] for name in names}) if set(names) <= set(trace.tensors) else ""


def differences_of_origin(a: TraceMeta, b: TraceMeta) -> Iterator[str]:
    """Where two runs differ that must agree: seed, inputs, and what in the config decides which function it is."""
    if a.seed != b.seed:
        yield f"seed: {a.seed} and {b.seed}"
    for field in ("weights_hash", "tokens_hash"):
        hash_a, hash_b = getattr(a, field), getattr(b, field)
        if hash_a and hash_b and hash_a != hash_b:
            yield f"{field.removesuffix('_hash')}: other values ({hash_a[:12]}... and {hash_b[:12]}...)"
    if a.config != b.config:
        yield from _differences_of_config(a.config_fields, b.config_fields)


def _differences_of_config(a: Mapping[str, Any], b: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key in dict.fromkeys([*a, *b]):
        path, value_a, value_b = prefix + key, a.get(key), b.get(key)
        if path in execution_names(JobConfig) or value_a == value_b:
            continue
        if isinstance(value_a, Mapping) and isinstance(value_b, Mapping):
            yield from _differences_of_config(value_a, value_b, f"{path}.")
        else:
            yield f"{path}: {value_a!r} and {value_b!r}"


def execution_order(a: Trace, b: Trace) -> list[str]:
    """Every name of either trace, in the order of execution, whatever order they were written in.

    Forward tensors stand as they were recorded. A route stands before the module that it is a part of, a gradient where
    the backward pass reaches its module, after that of the module's output.
    """
    names = list(dict.fromkeys([*a.tensors, *b.tensors]))
    modules = {name.removeprefix(f"{FORWARD}/"): i for i, name in enumerate(names) if group_of(name) == FORWARD}

    def key(index: int) -> tuple[int, int, int]:
        name = names[index]
        group, _, path = name.partition("/")
        if group == FORWARD:
            return GROUP_ORDER.index(FORWARD), modules[path], 1
        place = _place_of_module(path, modules)
        if group == ROUTING:
            return GROUP_ORDER.index(FORWARD), place, 0
        group = GRADIENT if group == COTANGENT else group
        rank = GROUP_ORDER.index(group) if group in GROUP_ORDER else len(GROUP_ORDER)
        return rank, -place if group in BACKWARD_GROUPS else 0, index

    return [names[index] for index in sorted(range(len(names)), key=key)]


def common_names(a: Trace, b: Trace) -> list[str]:
    """In the order of execution, every name of either trace that both were to record, whether they did or not."""
    return [name for name in execution_order(a, b) if all(name in t.tensors or t.meta.wants(name) for t in (a, b))]


def _place_of_module(path: str, modules: Mapping[str, int]) -> int:
    """Place of the innermost recorded module that a path lies in; past the end if there is none."""
    while path and path not in modules:
        path = path.rpartition(".")[0]
    return modules[path] if path else len(modules) + 10**6


def extent_notes(a: Trace, b: Trace, label_a: str, label_b: str) -> Iterator[str]:
    """What was not compared as a trace was not to record it, and what went into its layers, in words."""
    for label, trace, other in ((label_a, a, b), (label_b, b, a)):
        left_out = [name for name in other.tensors if name not in trace.tensors and not trace.meta.wants(name)]
        layers, only = trace.meta.selection.get("layers"), trace.meta.selection.get("only", [])
        asked = [f"layers {', '.join(map(str, layers))}"] if layers is not None else []
        asked += [f"only {', '.join(only)}"] if only else []
        fed = trace.meta.refed
        if fed:
            more = "forward, routes, loss and gradients" if fed.get("backward") else "forward, routes and loss"
            asked.append(f"{more}, as its layers were given recorded inputs")
            gradients = ", and the gradients of their outputs" if fed.get("backward") else ""
            yield f"{label}: its layers were given what {_source(fed)} recorded{gradients}"
            own = fed.get("own", [])
            if own:
                yield f"{label}: {', '.join(own)}: not recorded there, passed on what they put out themselves"
        if left_out:
            yield f"{label}: holds {'; '.join(asked)}: {len(left_out)} tensors of the other are not compared"


def order_notes(a: Trace, b: Trace, label_a: str, label_b: str) -> Iterator[str]:
    """Where the two first executed their modules in different order, in words."""
    common_a = [name for name in a.tensors if group_of(name) == FORWARD and name in b.tensors]
    common_b = [name for name in b.tensors if group_of(name) == FORWARD and name in a.tensors]
    for name_a, name_b in zip(common_a, common_b, strict=True):
        if name_a != name_b:
            yield f"executed in different order: {label_a} has {name_a} where {label_b} has {name_b}"
            return
