"""Which parallel layouts `validate` compares: the one asked for, or with ``--full`` a few that the model allows."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from shared_config.contract.sharding import has_axes, refusals, unsupported
from shared_config.errors import ConfigError
from shared_config.interchange.vision import tower_of
from shared_config.loader import parse_overrides
from shared_config.parity.layouts import described
from shared_config.parity.plan import BACKENDS
from shared_config.schema.distributed import DistributedConfig
from shared_config.schema.job import JobConfig

SECTION = "distributed."
USUAL = (
    DistributedConfig(dp_replicate=2, dp_shard=2),
    DistributedConfig(dp_shard=2, tp=2),
    DistributedConfig(dp_shard=2, ep=2),
    DistributedConfig(cp=2),
    DistributedConfig(pp=2),
)
"""What ``--full`` compares: every axis, on at most four devices."""


def layouts_to_compare(
    config: JobConfig, given: DistributedConfig, overrides: Sequence[str], *, full: bool, device: str
) -> tuple[DistributedConfig, ...]:
    """The layouts for a model.

    Args:
        config: of the model.
        given: the layout of the config that was loaded, before it was shrunk.
        overrides: of the command line. A model that was shrunk has no layout but what they say.
        full: whether to take the usual ones where none is asked for, and the device is the CPU, on which layouts run.

    Raises:
        ConfigError: one that is asked for has a single device, or is not for the model or a backend.
    """
    named = [name.removeprefix(SECTION) for name, _ in parse_overrides(overrides) if name.startswith(SECTION)]
    shrunk = config.distributed != given
    layout = DistributedConfig(**{name: getattr(given, name) for name in named}) if shrunk else given
    if layout.fewest_devices > 1:
        problems = reasons_against(config, layout)
        if device != "cpu":
            problems.append(f"--device {device}: must be cpu, where the processes of {described(layout)} can run")
        if problems:
            raise ConfigError(list(dict.fromkeys(problems)))
        return (layout,)
    if named:
        sizes = ", ".join(f"distributed.{name} = {getattr(layout, name)}" for name in named)
        raise ConfigError([f"{sizes}: is a layout of one device, which says nothing of layouts; must be of several"])
    usual = USUAL if full and device == "cpu" else ()
    return tuple(layout for layout in usual if not reasons_against(config, layout))


def reasons_against(config: JobConfig, layout: DistributedConfig) -> list[str]:
    """Why a model can't have a layout, or a backend that has its axes does not support it; a line for each reason.

    The steps that are compared have enough micro-batches for a pipeline, whatever the config says.
    """
    train = dataclasses.replace(config.train, grad_accum_steps=max(config.train.grad_accum_steps, layout.pp))
    config = config.replace(distributed=layout, train=train)
    backends = [backend for backend in BACKENDS if has_axes(backend, layout)]
    found = [f"distributed.{line}" for line in layout.problems_on(layout.fewest_devices)]
    tower = tower_of(config)
    return [*found, *refusals(config), *(line for backend in backends for line in unsupported(config, backend, tower))]


def layouts_left_out(config: JobConfig, device: str) -> dict[str, str]:
    """The layouts that ``--full`` does not compare, with the reason."""
    if device != "cpu":
        return {"layouts": f"--device {device}: must be cpu, where their processes can run"}
    against = {described(layout): reasons_against(config, layout) for layout in USUAL}
    return {name: "; ".join(reasons) for name, reasons in against.items() if reasons}


def without_layout(overrides: Sequence[str]) -> tuple[str, ...]:
    """The overrides that are not of the layout."""
    pairs = parse_overrides(overrides)
    return tuple(f"--{name}={value}" for name, value in pairs if not name.startswith(SECTION))


def on_one_device(config: JobConfig) -> JobConfig:
    """The config without its layout."""
    return dataclasses.replace(config, distributed=DistributedConfig())
