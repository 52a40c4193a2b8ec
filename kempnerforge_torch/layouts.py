"""What `shared_config.parity.layouts` has this backend do, in several processes that it starts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from kempnerforge_torch.device import process_count
from kempnerforge_torch.distributed.ranks import local
from kempnerforge_torch.distributed.spawn import together
from kempnerforge_torch.distributed.states import of_all_stages
from kempnerforge_torch.model.state import get_state, own_tensors, to_numpy
from kempnerforge_torch.training.optimizer import get_optimizer_state
from kempnerforge_torch.training.train import Trainer
from shared_config.interchange.checkpoint import TrainingState
from shared_config.parity.layouts import Spread, bits_of
from shared_config.parity.work import Trained
from shared_config.schema.job import JobConfig
from shared_config.training.trainer import Batch

NAME = "torch"


def train(config: JobConfig, state: TrainingState, steps: Sequence[Sequence[Batch]]) -> Spread:
    """Steps from a state on, in as many processes as the layout has devices; see `LayoutBackend`."""
    return together(_train_one, config.distributed.fewest_devices, config, state, steps)


def _train_one(config: JobConfig, state: TrainingState, steps: Sequence[Sequence[Batch]]) -> Spread:
    """What one of the processes does; each finds all that they did together."""
    trainer = Trainer(config, "cpu", dtype=torch.float64)
    initial = _whole_state(trainer).weights
    trainer.load_state(state)
    metrics, states = [], []
    for number, micro_batches in enumerate(steps, 1):
        taken = trainer.step(micro_batches[trainer.ranks.rank :: trainer.ranks.count])
        metrics.append({name: float(value) for name, value in taken.items()})
        if number in (1, len(steps)):
            states.append(_whole_state(trainer))
    return Spread(
        Trained(metrics, states, np.zeros(0)),
        initial,
        trainer.device.type,
        {} if trainer.mesh is None else dataclasses.asdict(trainer.mesh.layout),
        _of_all(_held(trainer)),
        _replicas(states[-1], metrics),
    )


def _whole_state(trainer: Trainer) -> TrainingState:
    """The state, put together by each process from the parts that it sees."""
    tensors = (get_state(trainer.model), get_optimizer_state(trainer.optimizer, trainer.parameters))
    own = ({name: to_numpy(one).copy() for name, one in found.items()} for found in tensors)
    weights, moments = (of_all_stages(found, trainer.mesh) for found in own)
    return TrainingState(trainer.updates, {name: weights[name] for name in trainer.table if name in weights}, moments)


def _held(trainer: Trainer) -> int:
    """Elements that this process holds of the tensors of the table."""
    own = own_tensors(trainer.model)
    return sum(local(own[name]).numel() for name in trainer.table if name in own)


def _replicas(state: TrainingState, metrics: Sequence[Mapping[str, float]]) -> dict[str, np.ndarray]:
    """(processes, 2): the bits of what each has put together, which is the same part on all of them."""
    numbers = {f"metrics/{name}": np.array([taken[name] for taken in metrics]) for name in metrics[0]}
    optimizer = {f"optimizer/{name}": array for name, array in state.optimizer.items()}
    own = {name: bits_of(array) for name, array in {**state.weights, **optimizer, **numbers}.items()}
    return {name: np.array([(0, found[name]) for found in every]) for every in [_of_all(own)] for name in own}


def _of_all(own: Any) -> list[Any]:
    """What each process has, in their order."""
    every: list[Any] = [own] * process_count()
    if process_count() > 1:
        dist.all_gather_object(every, own)
    return every
