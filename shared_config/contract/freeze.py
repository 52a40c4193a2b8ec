"""Which parameters are frozen at a step: by name alone, for both backends."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TypeVar

import numpy as np

from shared_config.contract.lora import beside_adapters
from shared_config.contract.moments import AVERAGE, UPDATES, moments_of
from shared_config.contract.specs import ParameterTable
from shared_config.errors import UserError
from shared_config.schema.freeze import FreezeSpec, FreezeStage, is_pattern
from shared_config.schema.optimizer import OptimizerConfig
from shared_config.schema.vlm import VLMConfig

Patterns = str | Sequence[str]
"""One name pattern, or several."""
Kept = TypeVar("Kept")
ADAMW = OptimizerConfig()


def effective_freeze(
    step: int,
    base: Sequence[FreezeSpec],
    schedule: Sequence[FreezeStage],
    valid_modules: Iterable[str] | None = None,
) -> tuple[FreezeSpec, ...]:
    """The specs in force at an optimiser step (from 0): those of the last stage that has started, else ``base``.

    Raises:
        ValueError: a spec, in force or not, of a module that is not a pattern, and not among ``valid_modules``.
    """
    if valid_modules is not None:
        allowed = sorted(valid_modules)
        for spec in (*base, *(spec for stage in schedule for spec in stage.specs)):
            if spec.module not in allowed and not is_pattern(spec.module):
                raise ValueError(f"freeze = {spec.module!r}: must be one of {', '.join(allowed)}")
    started = [stage for stage in schedule if stage.start_step <= step]
    return tuple(max(started, key=lambda stage: stage.start_step).specs if started else base)


def canonical_freeze_meta(specs: Sequence[FreezeSpec]) -> list[dict[str, str | bool]]:
    """What a checkpoint remembers of specs: equal for specs that freeze the same, whatever their order, and JSON.

    Of several specs of a module the last counts; one that thaws is the same as none.
    """
    last = {spec.module: spec.frozen for spec in specs}
    return [{"module": module, "frozen": True} for module in sorted(last) if last[module]]


def frozen_names(names: Iterable[str], specs: Sequence[FreezeSpec], pattern_map: Mapping[str, Patterns]) -> set[str]:
    """The names that are frozen under ``specs``; where several match a name, the last counts.

    Args:
        pattern_map: module -> pattern or patterns of parameter names (* and ? as in file names),
            ``vlm.module_patterns``.
    """
    patterns = [(pattern_of(spec, pattern_map), spec.frozen) for spec in specs]
    frozen = set()
    for name in names:
        found = [is_frozen for pattern, is_frozen in patterns if matches(name, pattern)]
        if found and found[-1]:
            frozen.add(name)
    return frozen


def never_trained(
    names: Iterable[str],
    base: Sequence[FreezeSpec],
    schedule: Sequence[FreezeStage],
    pattern_map: Mapping[str, Patterns],
) -> set[str]:
    """The names that are frozen from the first step to the last: an optimiser needs no moments of them."""
    names = list(names)
    first = () if schedule and schedule[0].start_step == 0 else (base,)
    return set(names).intersection(
        *(frozen_names(names, specs, pattern_map) for specs in (*first, *(stage.specs for stage in schedule)))
    )


def trained_parameters(masters: Mapping[str, Kept], vlm: VLMConfig | None) -> dict[str, Kept]:
    """The parameters, of any kind, by name, that are trained at some step.

    Raises:
        UserError: there are none.
    """
    if vlm is None:
        return dict(masters)
    never = never_trained(masters, vlm.freeze, vlm.freeze_schedule, vlm.module_patterns)
    trained = {name: master for name, master in masters.items() if name not in never}
    if not trained:
        raise UserError(f"vlm.freeze = {[spec.module for spec in vlm.freeze]}: freezes all there is, always")
    return trained


def moments_under(
    vlm: VLMConfig | None,
    table: ParameterTable,
    moments: Mapping[str, Kept],
    optimizer: OptimizerConfig = ADAMW,
) -> Mapping[str, Kept | np.ndarray]:
    """Moments and update counts of a run that may have frozen other parts, for a run that continues it under ``vlm``:
    without what is never trained now, and with zeros for what was never trained before, and for an average of the
    weights that is kept from now on.

    Args:
        moments: by name, arrays of any kind, and ``t.<parameter>`` if the run has counted.
        optimizer: what keeps them.
    """
    if not moments:
        return {}
    given = _with_average(table, moments, optimizer)
    if vlm is None:
        return given
    parameters = [name for name, spec in table.items() if not spec.is_buffer]
    never = never_trained(parameters, vlm.freeze, vlm.freeze_schedule, vlm.module_patterns)
    never |= beside_adapters(parameters)
    kept = {name: value for name, value in given.items() if name.partition(".")[2] not in never}
    kinds = {name: moments_of(optimizer, name, table[name]) for name in parameters if name not in never}
    fresh = [name for name, own in kinds.items() if not any(f"{moment}.{name}" in moments for moment in own)]
    zeros = {f"{moment}.{name}": np.zeros(table[name].shape, np.float32) for name in fresh for moment in kinds[name]}
    return kept | zeros | {f"{UPDATES}.{name}": np.zeros((), np.int32) for name in fresh}


def _with_average(
    table: ParameterTable, moments: Mapping[str, Kept], optimizer: OptimizerConfig
) -> dict[str, Kept | np.ndarray]:
    """With an average of the weights, which starts at these, if one is kept, else without."""
    if not optimizer.ema_decay:
        return {name: value for name, value in moments.items() if not name.startswith(f"{AVERAGE}.")}
    counted = [name.removeprefix(f"{UPDATES}.") for name in moments if name.startswith(f"{UPDATES}.")]
    zeros = {f"{AVERAGE}.{name}": np.zeros(table[name].shape, np.float32) for name in counted if name in table}
    return {**zeros, **moments}


def pattern_of(spec: FreezeSpec, pattern_map: Mapping[str, Patterns]) -> Patterns:
    """The pattern or patterns of a spec's module, which may be a pattern itself.

    Raises:
        ValueError: a module without a pattern.
    """
    if spec.module not in pattern_map:
        if is_pattern(spec.module):
            return spec.module
        raise ValueError(f"freeze = {spec.module!r}: must be one of {', '.join(sorted(pattern_map))}")
    return pattern_map[spec.module]


def matches(name: str, patterns: Patterns) -> bool:
    """Whether a parameter's name fits one of the patterns."""
    return any(fnmatchcase(name, pattern) for pattern in ([patterns] if isinstance(patterns, str) else patterns))
