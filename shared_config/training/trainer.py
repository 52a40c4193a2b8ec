"""What a training run works with, and what it ends with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, SupportsFloat

import numpy as np

from shared_config.errors import UserError
from shared_config.interchange.checkpoint import TrainingState
from shared_config.interchange.parts import StateParts
from shared_config.training.speed import Devices

Batch = Mapping[str, np.ndarray]
Numbers = Mapping[str, SupportsFloat]
Record = dict[str, float | None]


class Trainer(Protocol):
    """A model and its optimiser.

    Attributes:
        backend: "torch" or "jax"; written into checkpoints.
        devices: what all ranks compute on.
    """

    backend: str
    devices: Devices

    def step(self, micro_batches: Sequence[Batch]) -> Numbers:
        """One update from the micro-batches of one optimiser step (this rank's share of them).

        Returns:
            "loss" (nats per token) and other numbers; "taken" is 0 where an update was left out, which goes into no
            record. They may be scalars still being computed on a device: the loop
            reads them only after it has asked for the next step, so that the device never waits for the host.
        """
        ...

    def evaluate(self, batches: Sequence[Batch]) -> Numbers:
        """Numbers over held-out batches, "loss" among them, the same on every rank. Changes nothing."""
        ...

    def parts(self) -> StateParts:
        """Copies, on the host, of what this rank is to write of all that the next step depends on. Together the ranks
        give every part of every tensor once.
        """
        ...

    def profile(self, folder: Path) -> AbstractContextManager[None]:
        """Trace the steps taken within it, to new files of a folder."""
        ...

    def peak_memory(self) -> int | None:
        """The most bytes that a device of this rank has held at once since the start; of a CPU, what its process has.
        None where that is not known.
        """
        ...

    def load_state(self, state: TrainingState | StateParts) -> None:
        """Take over a state, of which each rank reads what it holds. An empty ``optimizer`` with step 0 means weights
        alone: the moments stay as built.

        Raises:
            UserError: names or shapes that do not fit the model.
        """
        ...


class TrainingData(Protocol):
    """What `shared_config.data.TextData` is.

    Attributes:
        rows_per_batch, tokens_per_batch: of one micro-batch, over all ranks.
        notes: what a user should know about the data before the run, one line each.
    """

    rows_per_batch: int
    tokens_per_batch: int

    @property
    def notes(self) -> Sequence[str]:
        """What a user should know about the data, one line each."""
        ...

    @property
    def fingerprint(self) -> str:
        """Changes whenever the batches do."""
        ...

    def in_steps_of(self, rows: int) -> TrainingData:
        """The data of a run whose steps have so many rows, over all micro-batches and ranks."""
        ...

    def batch(self, index: int) -> Batch:
        """The batch of an index: the same arrays whoever asks."""
        ...

    def heldout(self) -> Sequence[Batch]:
        """The held-out batches."""
        ...


class TrainingDivergedError(UserError):
    """The loss or the norm of the gradient is not finite."""


@dataclass(frozen=True)
class TrainingSummary:
    """How a run ended.

    Attributes:
        step: updates done in all; ``steps_run`` of them now, from ``resumed_from`` on.
        loss: of the last step taken now; None if there was none.
        metrics: the last record, held-out numbers as ``heldout_*``.
        tokens_per_second: over all ranks, averaged over the last steps.
        checkpoint: the latest one.
        stopped_by: the signal that ended the run early, as "SIGINT".
        exit_status: 0, or 129 (SIGHUP), 130 (SIGINT), 143 (SIGTERM).
    """

    step: int
    steps_run: int
    resumed_from: int
    loss: float | None
    metrics: Record
    tokens_per_second: float
    seconds: float
    checkpoint: Path | None
    stopped_by: str | None
    exit_status: int

    @property
    def heldout_loss(self) -> float | None:
        """Nats per token, None if the last step had no evaluation."""
        return self.metrics.get("heldout_loss")
