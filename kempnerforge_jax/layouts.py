"""What `shared_config.parity.layouts` has this backend do, on several devices of this process."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kempnerforge_jax.model.stack import in_first_layer
from kempnerforge_jax.training.train import Trainer
from shared_config.errors import UserError
from shared_config.interchange.checkpoint import TrainingState
from shared_config.parity.layouts import Spread, bits_of
from shared_config.parity.work import Trained
from shared_config.schema.job import JobConfig
from shared_config.training.trainer import Batch

NAME = "jax"


def train(config: JobConfig, state: TrainingState, steps: Sequence[Sequence[Batch]]) -> Spread:
    """Steps from a state on, on as many devices as the layout has; see `LayoutBackend`."""
    with jax.enable_x64(True):
        trainer = Trainer(config, _devices(config.distributed.fewest_devices), dtype=jnp.float64)
        initial = trainer.state().weights
        trainer.load_state(state)
        ranks = 1 if trainer.mesh is None else trainer.mesh.layout.data_ranks
        metrics, states = [], []
        for number, micro_batches in enumerate(steps, 1):
            taken = trainer.step(_joined(micro_batches, ranks))
            metrics.append({name: float(value) for name, value in taken.items()})
            if number in (1, len(steps)):
                states.append(trainer.state())
        return Spread(
            Trained(metrics, states, np.zeros(0)),
            initial,
            trainer.device.platform,
            {} if trainer.mesh is None else dataclasses.asdict(trainer.mesh.layout),
            _held(trainer),
            {name: _parts(array) for name, array in _arrays(trainer)},
        )


def _devices(count: int) -> list[Any]:
    """The first devices of the host.

    Raises:
        UserError: it has fewer.
    """
    found = jax.devices("cpu")
    if len(found) < count:
        flag = f"XLA_FLAGS=--xla_force_host_platform_device_count={count}"
        raise UserError(f"the layout has {count} devices, JAX on this host {len(found)}: set {flag}")
    return found[:count]


def _joined(micro_batches: Sequence[Batch], ranks: int) -> list[dict[str, np.ndarray]]:
    """Those that the data ranks compute at a time, as one."""
    groups = [micro_batches[first : first + ranks] for first in range(0, len(micro_batches), ranks)]
    return [{name: np.concatenate([batch[name] for batch in group]) for name in group[0]} for group in groups]


def _held(trainer: Trainer) -> list[int]:
    """Elements that each device holds of the tensors of the table."""
    found: dict[Any, int] = {}
    for name, array in {**trainer.parameters, **trainer.buffers}.items():
        for shard in array.addressable_shards if in_first_layer(name) in trainer.table else ():
            found[shard.device] = found.get(shard.device, 0) + shard.data.size
    return [found[device] for device in sorted(found, key=lambda device: device.id)]


def _arrays(trainer: Trainer) -> Iterator[tuple[str, jax.Array]]:
    """All that is kept from step to step."""
    yield from {**trainer.parameters, **trainer.buffers}.items()
    for path, leaf in jax.tree_util.tree_leaves_with_path(trainer.optimizer_state):
        yield f"optimizer{jax.tree_util.keystr(path)}", leaf


def _parts(array: jax.Array) -> np.ndarray:
    """(devices, 2): which part each device holds, and its bits."""
    shards = sorted(array.addressable_shards, key=lambda shard: shard.device.id)
    numbers: dict[str, int] = {}
    parts = [numbers.setdefault(str(shard.index), len(numbers)) for shard in shards]
    return np.array([(part, bits_of(np.asarray(shard.data))) for part, shard in zip(parts, shards, strict=True)])
