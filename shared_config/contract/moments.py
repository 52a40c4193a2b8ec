"""What an optimiser keeps for each parameter: moments of the parameter's shape, and the number of updates that it took.

In a state and in checkpoints they are ``<moment>.<parameter>`` and ``t.<parameter>``. All are 0 at the start.
"""

from __future__ import annotations

from collections.abc import Iterable

from shared_config.contract.specs import ParameterSpec, ParameterTable
from shared_config.registry import declaration
from shared_config.schema.optimizer import OptimizerConfig

MOMENTS = ("m", "v")
"""Those of AdamW: the averages of gradients and of their squares."""
UPDATES = "t"
AVERAGE = "ema"
"""The average of the weights, less the weights."""


def is_hidden_matrix(name: str, spec: ParameterSpec) -> bool:
    """Whether a parameter is a matrix of a block, or a stack of such: no embedding, head, adapter, norm or bias."""
    return len(spec.shape) > 1 and spec.decay and any(part.endswith("layers") for part in name.split("."))


def optimizer_of(config: OptimizerConfig, name: str, spec: ParameterSpec) -> str:
    """The registered optimiser that updates a parameter: the job's, or the one that is declared for what is no hidden
    matrix.
    """
    others = declaration("optimizer", config.name).others
    return others if others and not is_hidden_matrix(name, spec) else config.name


def optimizers_of(config: OptimizerConfig) -> tuple[str, ...]:
    """All that `optimizer_of` may give."""
    others = declaration("optimizer", config.name).others
    return (config.name, others) if others else (config.name,)


def moments_of(config: OptimizerConfig, name: str, spec: ParameterSpec) -> tuple[str, ...]:
    """The moments of a parameter."""
    return _kept(config, optimizer_of(config, name, spec))


def declared_moments(optimizer: str) -> tuple[str, ...]:
    """The moments of a registered optimiser; AdamW's where none were declared."""
    return declaration("optimizer", optimizer).moments or MOMENTS


def moment_names(config: OptimizerConfig, table: ParameterTable, parameters: Iterable[str]) -> list[str]:
    """``<moment>.<parameter>`` of all these parameters, kind by kind."""
    kept = {name: moments_of(config, name, table[name]) for name in parameters}
    kinds = dict.fromkeys(kind for optimizer in optimizers_of(config) for kind in _kept(config, optimizer))
    return [f"{kind}.{name}" for kind in kinds for name, own in kept.items() if kind in own]


def gradient_share(config: OptimizerConfig, name: str, spec: ParameterSpec) -> float:
    """What of a gradient the first update puts into the moment "m", where there is one."""
    decay_rates = {"lion": config.betas[1], "muon": config.momentum}
    return 1 - decay_rates.get(optimizer_of(config, name, spec), config.betas[0])


def _kept(config: OptimizerConfig, optimizer: str) -> tuple[str, ...]:
    return (*declared_moments(optimizer), *((AVERAGE,) if config.ema_decay else ()))
