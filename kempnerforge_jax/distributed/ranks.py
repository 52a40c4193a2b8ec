"""The data ranks of a mesh, which see different micro-batches, and which of them a process has devices of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np

from kempnerforge_jax.device import process_count
from kempnerforge_jax.distributed.mesh import Mesh
from kempnerforge_jax.distributed.processes import of_all
from shared_config.training.trainer import Batch


@dataclass(frozen=True)
class Ranks:
    """The ranks that see different micro-batches; without a mesh there is one."""

    mesh: Mesh | None

    @property
    def count(self) -> int:
        """How many there are."""
        return 1 if self.mesh is None else self.mesh.layout.data_ranks

    @property
    def own(self) -> range:
        """Those of which this process has devices."""
        if self.mesh is None:
            return range(1)
        devices, process = self.mesh.axes.devices.ravel(), jax.process_index()
        of_a_rank = len(devices) // self.count
        places = [place for place, device in enumerate(devices) if device.process_index == process]
        return range(places[0] // of_a_rank, places[-1] // of_a_rank + 1)

    def number(self, number: int) -> int:
        """The sum over all ranks of a number that the host has of its own; each process that has devices of a rank has
        the rank's.
        """
        if self.mesh is None:
            return number
        holders = process_count() * len(self.own) // self.count
        total = sum(given for (given,) in of_all([number]))
        return total // holders

    def divided(self, batches: Sequence[Batch]) -> list[list[Batch]]:
        """The batches of each rank of this process, from batches with the rows of all of them, rank by rank."""
        ranks = len(self.own)
        parts = [{name: np.split(array, ranks) for name, array in batch.items()} for batch in batches]
        return [[{name: part[name][rank] for name in part} for part in parts] for rank in range(ranks)]
