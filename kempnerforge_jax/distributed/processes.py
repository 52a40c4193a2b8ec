"""The processes of a run: joined as a launcher says, each with all devices that it has."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from jax._src.distributed import global_state  # has no public name; Orbax takes it from here, too

from kempnerforge_jax.device import process_count
from kempnerforge_jax.distributed.devices import Device
from kempnerforge_jax.distributed.mesh import devices_of
from shared_config.interchange.together import ALONE, Processes
from shared_config.training.launch import Launch, launch_of

TIMEOUT = 300
"""Seconds for which a process waits for the others to join, or to leave."""
DEAD_AFTER = 60
"""Seconds without a sign of life after which a process counts as dead, which ends all others."""
LONGEST_WAIT = 3600
"""Seconds for which processes that are alive wait for another one, as for the first that writes files."""
PARTING = 5.0
"""Seconds for which a process that has failed waits for the others to fail with it, before it says so and ends."""

_TURNS = itertools.count()


@contextlib.contextmanager
def joined(device: Device | str | None) -> Iterator[list[Device]]:
    """Join the other processes that a launcher started, while the context is open, and yield the devices of all.

    The processes of a machine take its GPUs in turn; one that is alone there takes all. Where there is one process, or
    a library has joined them already, nothing is joined.

    Raises:
        UserError: this machine has no such device; a launcher's variables are incomplete.
    """
    launch = None if jax.distributed.is_initialized() else launch_of(backend="jax")
    if launch is not None or jax.distributed.is_initialized():
        jax.config.update("jax_cpu_enable_async_dispatch", False)  # gloo mixes up the messages of two programs at once
    if launch is None:
        yield devices_of(device)
        return
    _join(launch)
    try:
        yield devices_of(device)
    except BaseException:
        leaving = threading.Thread(target=jax.distributed.shutdown, daemon=True)
        leaving.start()
        leaving.join(PARTING)
        raise
    jax.distributed.shutdown()


def largest_of(numbers: Sequence[int]) -> list[int]:
    """Of several numbers that all processes give, the largest of each."""
    return [max(given) for given in zip(*of_all(numbers), strict=True)]


def of_all(numbers: Sequence[int]) -> list[list[int]]:
    """The numbers that all processes give, in the order of the processes.

    They go through the service that joins the processes, not through devices: these are busy with steps, and of two
    programs at once on the same processors gloo mixes up the messages.

    Raises:
        JaxRuntimeError: a process is gone, or has not given numbers for an hour.
    """
    count = process_count()
    if count == 1:
        return [list(numbers)]
    service: Any = global_state.client
    place = f"kempnerforge/{next(_TURNS) % 2}/"  # of two turns, as one may begin while others end the one before
    service.key_value_set(f"{place}{jax.process_index()}", " ".join(map(str, numbers)), allow_overwrite=True)
    service.wait_at_barrier("kempnerforge", LONGEST_WAIT * 1000)
    given = {name.rpartition("/")[2]: value for name, value in service.key_value_dir_get(place)}
    return [[int(number) for number in given[str(process)].split()] for process in range(count)]


def processes() -> Processes:
    """All that have joined."""
    count = process_count()
    return Processes(jax.process_index(), count, largest_of) if count > 1 else ALONE


def is_main() -> bool:
    """Whether this is the process that writes the files and the console."""
    return jax.process_index() == 0


def _join(launch: Launch) -> None:
    jax.config.update("jax_enable_preemption_service", False)  # its handler would take SIGTERM
    join = functools.partial(
        jax.distributed.initialize,
        local_device_ids=_own_gpus(launch),
        initialization_timeout=TIMEOUT,
        heartbeat_timeout_seconds=DEAD_AFTER,
        shutdown_timeout_seconds=TIMEOUT,
    )
    if launch.address:
        meeting = f"{launch.address}:{launch.port}"
        join(meeting, launch.world_size, launch.rank, cluster_detection_method="deactivate")
    else:
        join(cluster_detection_method="ompi")


def _own_gpus(launch: Launch) -> list[int] | None:
    """The GPU of this process, unless it is to have all that it sees, or a variable of JAX names its own."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "many,of,them").split(",")
    is_told = "JAX_LOCAL_DEVICE_IDS" in os.environ
    return [launch.local_rank] if launch.shares_machine and len(visible) > 1 and not is_told else None
