"""The processes of a run: joined as a launcher says, one device each."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

from kempnerforge_torch.device import find_device
from shared_config.interchange.together import ALONE, Processes
from shared_config.training.launch import Launch, launch_of

TIMEOUT = timedelta(minutes=10)
"""How long a rank waits for the others in a collective before it gives up with an error."""
BACKENDS = {"cuda": "cpu:gloo,cuda:nccl", "xpu": "cpu:gloo,xpu:xccl"}
"""Type of device -> what carries its tensors, and those of the host; gloo alone for others."""


@contextlib.contextmanager
def joined(device: torch.device | str | None, timeout: timedelta = TIMEOUT) -> Iterator[torch.device]:
    """Join the other processes that a launcher started, while the context is open, and yield this one's device.

    The processes of a machine take its accelerators in turn. Where there is one process, or a library has joined them
    already, nothing is joined.

    Raises:
        UserError: this machine has no such device; a launcher's variables are incomplete.
    """
    launch = None if dist.is_initialized() else launch_of()
    place = _own_device(find_device(device), launch)
    if launch is None:
        yield place
        return
    url = "env://" if launch.launcher == "torchrun" else f"tcp://{launch.address}:{launch.port}"
    dist.init_process_group(
        BACKENDS.get(place.type, "gloo"), url, timeout, rank=launch.rank, world_size=launch.world_size
    )
    try:
        yield place
    finally:
        dist.destroy_process_group()


def largest_of(numbers: Sequence[int]) -> list[int]:
    """Of several numbers that all processes give, the largest of each."""
    given = torch.tensor(numbers)
    if dist.is_initialized():
        dist.all_reduce(given, dist.ReduceOp.MAX)
    return given.tolist()


def processes() -> Processes:
    """All that have joined."""
    return Processes(dist.get_rank(), dist.get_world_size(), largest_of) if dist.is_initialized() else ALONE


def is_main() -> bool:
    """Whether this is the process that writes the files and the console."""
    return not dist.is_initialized() or dist.get_rank() == 0


def _own_device(device: torch.device, launch: Launch | None) -> torch.device:
    if launch is None or device.type == "cpu":
        return device
    if device.index is None:
        device = torch.device(device.type, launch.local_rank)
    torch.accelerator.set_device_index(device)
    return find_device(device)
