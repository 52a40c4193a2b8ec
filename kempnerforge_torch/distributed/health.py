"""The check of devices before a run, of the one device of each process."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from kempnerforge_torch.device import process_count
from shared_config.schema.job import JobConfig
from shared_config.training import health

MESSAGE = 2**14
"""Bytes of what one process tells another."""


def check_health(config: JobConfig, device: torch.device) -> None:
    """The check that ``train.health_check_seconds`` asks for; 0 for none.

    Raises:
        UserError: as `shared_config.training.health.check_health`.
    """
    if seconds := config.train.health_check_seconds:
        bench = Bench(device, seconds)
        health.check_health(bench, seconds)
        bench.close()


class Bench:
    """The device of this process; see `shared_config.training.health.Bench`. Processes talk on gloo."""

    def __init__(self, device: torch.device, seconds: float):
        self.device, self.processes = device, process_count()
        self.devices = self.processes
        self.rank = dist.get_rank() if self.processes > 1 else 0
        self.own: Mapping[int, str] = {self.rank: str(device)}
        # What is stuck has to end on gloo before its processes can, and on others later than the reports are in.
        limit = timedelta(seconds=seconds if device.type == "cpu" else 4 * seconds)
        backend = dist.get_default_backend_for_device(device)
        self._group: Any = dist.new_group(timeout=limit, backend=backend) if self.processes > 1 else None

    def products(self, number: int, a: np.ndarray, b: np.ndarray) -> Iterator[np.ndarray]:
        """The product of two float32 matrices, computed in float32 and in bfloat16."""
        for dtype in (torch.float32, torch.bfloat16):
            x, y = (torch.from_numpy(each).to(self.device, dtype) for each in (a, b))
            yield (x @ y).float().cpu().numpy()

    def sums(self, parts: Mapping[int, np.ndarray]) -> dict[int, np.ndarray]:
        """What the device gets as the sum of the vectors of all."""
        total = torch.from_numpy(parts[self.rank]).to(self.device)
        if self._group is not None:
            dist.all_reduce(total, group=self._group)
        return {self.rank: total.cpu().numpy()}

    def send(self, text: str, rank: int, seconds: float) -> None:
        """Tell a process something."""
        message = torch.frombuffer(bytearray(text.encode()[:MESSAGE].ljust(MESSAGE)), dtype=torch.uint8)
        self._is_done(dist.isend(message, rank), seconds)

    def receive(self, rank: int, seconds: float) -> str | None:
        """What a process has told this one; None if it has not within so many seconds."""
        message = torch.empty(MESSAGE, dtype=torch.uint8)
        done = self._is_done(dist.irecv(message, rank), seconds)
        return message.numpy().tobytes().decode().strip() if done else None

    def close(self) -> None:
        """Leave the group that summed; one that is stuck ends with its process."""
        if self._group is not None:
            dist.destroy_process_group(self._group)

    def _is_done(self, work: dist.Work | None, seconds: float) -> bool:
        assert work is not None
        try:
            return work.wait(timedelta(seconds=seconds))
        except RuntimeError:
            return False
