"""The processes of a run: joined as a launcher says, one device each."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from kempnerforge_torch.device import find_device
from kempnerforge_torch.distributed.failures import Failures
from shared_config.interchange.together import ALONE, Processes
from shared_config.training.launch import Launch, launch_of

TIMEOUT = timedelta(minutes=10)
"""How long a rank waits for the others in a collective before it gives up with an error."""
PARTING = 1.5
"""Seconds for which a process that has failed waits to leave the others, before it says why and ends; more than
`kempnerforge_torch.distributed.failures.LOOKING`."""
SHOWING = 2 * PARTING + 1
"""The same of one whose error another shows: a launcher ends the others with the first process that ends."""
BACKENDS = {"cuda": "cpu:gloo,cuda:nccl", "xpu": "cpu:gloo,xpu:xccl"}
"""Type of device -> what carries its tensors, and those of the host; gloo alone for others."""


@contextlib.contextmanager
def joined(device: torch.device | str | None, timeout: timedelta = TIMEOUT) -> Iterator[torch.device]:
    """Join the other processes that a launcher started, while the context is open, and yield this one's device.

    The processes of a machine take its accelerators in turn. Where there is one process, or a library has joined them
    already, nothing is joined. Where one fails, within the context or as they join, the others end within seconds (see
    `Failures`), and only the error of the first that failed is shown.

    Raises:
        UserError: this machine has no such device; a launcher's variables are incomplete.
    """
    launch = None if dist.is_initialized() else launch_of()
    if launch is None:
        yield _own_device(find_device(device), None)
        return
    url = "env://" if launch.launcher == "torchrun" else f"tcp://{launch.address}:{launch.port}"
    store, *_ = next(rendezvous(url, launch.rank, launch.world_size, timeout=timeout))
    store.set_timeout(timeout)
    failures = Failures(store, launch.rank)
    try:
        place = _own_device(find_device(device), launch)
        _init_group(place, store, launch, timeout)
        yield place
        failures.leave()
        largest_of([0])  # until all have left, as the store may end with the first of them
    except BaseException as error:
        is_shown = getattr(error, "shown_elsewhere", False)
        first = failures.leave() if is_shown else failures.tell()
        _part(is_host=launch.rank == 0, is_silent=is_shown or first not in (None, launch.rank))
        if first is None or not isinstance(error, Exception):
            raise
        raise Processes(launch.rank, launch.world_size).error_of(first, error)  # noqa: B904 (it has its cause)
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


def _init_group(place: torch.device, store: Store, launch: Launch, timeout: timedelta) -> None:
    backend, own = BACKENDS.get(place.type, "gloo"), PrefixStore("default_pg", store)
    dist.init_process_group(backend, None, timeout, rank=launch.rank, world_size=launch.world_size, store=own)


def _part(is_host: bool, is_silent: bool) -> None:
    """Leave the others after a failure. NCCL waits for what has been asked of it, which may never come.

    Args:
        is_host: whether the store may end with this process, so that the others need time to read there.
        is_silent: whether another says what went wrong, which it needs time for.
    """
    time.sleep(SHOWING if is_silent else PARTING if is_host else 0)
    if dist.is_initialized():
        leaving = threading.Thread(target=dist.destroy_process_group, daemon=True)
        leaving.start()
        leaving.join(PARTING)


def _own_device(device: torch.device, launch: Launch | None) -> torch.device:
    if launch is None or device.type == "cpu":
        return device
    if device.index is None:
        device = torch.device(device.type, launch.local_rank)
    torch.accelerator.set_device_index(device)
    return find_device(device)
