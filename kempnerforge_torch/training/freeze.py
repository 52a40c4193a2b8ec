"""Freezing parts of a model: a frozen parameter gets no gradient and no update."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from shared_config.contract.freeze import canonical_freeze_meta, effective_freeze, matches, pattern_of
from shared_config.contract.lora import beside_adapters
from shared_config.interchange.states import plain_name
from shared_config.schema.freeze import FreezeSpec

__all__ = ["apply_freeze_specs", "canonical_freeze_meta", "effective_freeze", "freeze_params", "frozen_parameters"]


def freeze_params(model: nn.Module, patterns: str | Sequence[str], *, frozen: bool = True) -> int:
    """Freeze, or thaw, the parameters whose names fit a pattern (* and ? as in file names).

    Returns:
        number of elements whose state changed.
    """
    flipped = 0
    for name, parameter in model.named_parameters():
        if matches(plain_name(name), patterns) and parameter.requires_grad == frozen:
            parameter.requires_grad_(not frozen)
            flipped += parameter.numel()
    return flipped


def apply_freeze_specs(
    model: nn.Module, specs: Sequence[FreezeSpec], pattern_map: Mapping[str, str | Sequence[str]]
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
    besides = beside_adapters(plain_name(name) for name, _ in model.named_parameters())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and plain_name(name) not in besides)
    changed = before ^ frozen_parameters(model)
    return sum(parameter.numel() for name, parameter in model.named_parameters() if plain_name(name) in changed)


def frozen_parameters(model: nn.Module) -> set[str]:
    """Names of the parameters that are frozen."""
    return {plain_name(name) for name, parameter in model.named_parameters() if not parameter.requires_grad}
