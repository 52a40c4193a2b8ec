"""Freezing parts of a model: a frozen parameter gets no gradient and no update."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from flax import nnx

from kempnerforge_jax.model.module import named_variables
from kempnerforge_jax.model.wrappers import unwrapped
from shared_config.contract.freeze import canonical_freeze_meta, effective_freeze, matches, pattern_of
from shared_config.contract.lora import beside_adapters
from shared_config.schema.freeze import FreezeSpec

__all__ = ["apply_freeze_specs", "canonical_freeze_meta", "effective_freeze", "freeze_params", "frozen_parameters"]

FROZEN = "frozen"
"""Name of the mark in a variable's metadata."""


def freeze_params(model: nnx.Module, patterns: str | Sequence[str], *, frozen: bool = True) -> int:
    """Freeze, or thaw, the parameters whose names fit a pattern (* and ? as in file names).

    The mark is on the model; a train step asks for it by `frozen_parameters`, to differentiate the other arrays only.

    Returns:
        number of elements whose state changed.
    """
    flipped = 0
    for name, parameter in _parameters(model):
        if matches(name, patterns) and _is_frozen(parameter) != frozen:
            parameter.set_metadata(FROZEN, frozen)
            flipped += parameter.get_value().size
    return flipped


def apply_freeze_specs(
    model: nnx.Module, specs: Sequence[FreezeSpec], pattern_map: Mapping[str, str | Sequence[str]]
) -> int:
    """Make ``specs`` the only ones in force: what none of them freezes is thawed, of a model with low-rank
    adapters only these; later specs override earlier ones.

    Args:
        pattern_map: module -> pattern or patterns of parameter names, ``vlm.module_patterns``. A spec's module may be a
            pattern itself.

    Returns:
        number of elements whose state changed.

    Raises:
        ValueError: a module without a pattern.
    """
    chosen = [(pattern_of(spec, pattern_map), spec.frozen) for spec in specs]
    before = frozen_parameters(model)
    freeze_params(model, "*", frozen=False)
    for pattern, frozen in chosen:
        freeze_params(model, pattern, frozen=frozen)
    besides = beside_adapters(name for name, _ in _parameters(model))
    for name, parameter in _parameters(model):
        parameter.set_metadata(FROZEN, _is_frozen(parameter) or name in besides)
    changed = before ^ frozen_parameters(model)
    return sum(parameter.get_value().size for name, parameter in _parameters(model) if name in changed)


def frozen_parameters(model: nnx.Module) -> set[str]:
    """Names of the parameters that are frozen."""
    return {name for name, parameter in _parameters(model) if _is_frozen(parameter)}


def _parameters(model: nnx.Module) -> Iterator[tuple[str, nnx.Param[Any]]]:
    return ((name, variable) for name, variable in named_variables(unwrapped(model)) if isinstance(variable, nnx.Param))


def _is_frozen(parameter: nnx.Param[Any]) -> bool:
    return bool(parameter.get_metadata(FROZEN, default=False))
