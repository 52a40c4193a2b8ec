"""The check of devices before a run, of all devices of each process."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax._src.distributed import global_state  # has no public name; Orbax takes it from here, too
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kempnerforge_jax.device import process_count
from kempnerforge_jax.distributed.devices import Device
from shared_config.schema.job import JobConfig
from shared_config.training import health

AXIS = "devices"


def check_health(config: JobConfig, devices: Sequence[Device]) -> None:
    """The check that ``train.health_check_seconds`` asks for; 0 for none.

    Raises:
        UserError: as `shared_config.training.health.check_health`.
    """
    if seconds := config.train.health_check_seconds:
        health.check_health(Bench(devices), seconds)


class Bench:
    """The devices of this process; see `shared_config.training.health.Bench`. Processes talk through the service that
    joins them.
    """

    def __init__(self, devices: Sequence[Device]):
        self.rank, self.processes, self.devices = jax.process_index(), process_count(), len(devices)
        self.own: Mapping[int, str] = {
            number: f"{device.platform}:{device.local_hardware_id}"
            for number, device in enumerate(devices)
            if device.process_index == self.rank
        }
        self._devices = devices
        self._service: Any = global_state.client

    def products(self, number: int, a: np.ndarray, b: np.ndarray) -> Iterator[np.ndarray]:
        """The product of two float32 matrices, computed by a device in float32 and in bfloat16."""
        for dtype in (jnp.float32, jnp.bfloat16):
            x, y = (jax.device_put(each.astype(dtype), self._devices[number]) for each in (a, b))
            yield np.asarray(x @ y).astype(np.float32)

    def sums(self, parts: Mapping[int, np.ndarray]) -> dict[int, np.ndarray]:
        """What each own device gets as the sum of the vectors of all."""

        def row(place: Any) -> np.ndarray:
            return parts[place[0].start or 0][None]

        mesh, rows = Mesh(np.asarray(self._devices), (AXIS,)), PartitionSpec(AXIS)
        given = jax.make_array_from_callback((self.devices, self.devices), NamedSharding(mesh, rows), row)
        added = jax.shard_map(lambda part: lax.psum(part, AXIS), mesh=mesh, in_specs=rows, out_specs=rows)
        shards = jax.jit(added)(given).addressable_shards
        return {self._devices.index(shard.device): np.asarray(shard.data)[0] for shard in shards}

    def send(self, text: str, rank: int, seconds: float) -> None:
        """Tell a process something."""
        self._service.key_value_set(f"kempnerforge/health/{self.rank}/{rank}", text)

    def receive(self, rank: int, seconds: float) -> str | None:
        """What a process has told this one; None if it has not within so many seconds."""
        place = f"kempnerforge/health/{rank}/{self.rank}"
        try:
            text = self._service.blocking_key_value_get(place, round(seconds * 1000))
        except jax.errors.JaxRuntimeError:
            return None
        self._service.key_value_delete(place)
        return text
